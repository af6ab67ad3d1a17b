"""Locks: only one process at a time writes to a folder; a second one learns which process it is."""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mimicbrush.errors import InputError, LockedError, describe_os_error
from mimicbrush.io.atomic import hidden_stem, make_folder, remove_empty_folders
from mimicbrush.io.text import make_storable

#: The lock file in a folder, with the process that has the lock. It is removed when the process ends.
LOCK_NAME = ".lock"
#: Seconds to wait for another process that was just stopped, or that only checks whether the lock is free.
GRACE_S = 1.0
#: The same for the earlier start of one SLURM job: after the loss of a machine, NFS keeps its locks for 90 seconds.
SAME_JOB_GRACE_S = 150.0
#: Error numbers of file systems without locks.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
_ATTEMPTS = 5
_log = logging.getLogger(__name__)


@contextmanager
def hold_folder(folder: Path, part: str = "") -> Iterator[None]:
    """Lock a folder while it is written to. It is made if it is missing, and removed if it stays empty.

    The kernel frees the lock when its process ends, however that ends. Forked processes do not keep it. On a file
    system without locks there is none, which is logged as a warning.

    Args:
        folder: of the outputs.
        part: which one this is of several processes that share the folder; "" for one that has it to itself. Parts of
            different names do not exclude each other, but they and a process without a part do.

    Raises:
        LockedError: another process holds it; names that.
        InputError: the folder cannot be made, or written to.
    """
    own = folder / (f"{LOCK_NAME}-{part}" if part else LOCK_NAME)
    made: list[Path] = []
    with ExitStack() as held:
        held.callback(lambda: remove_empty_folders(made))
        try:
            made += _make_and_hold(folder, own, held)
            # First the own lock, then a look at the others: so of two that start at once, at least one sees the other.
            for other in [folder / LOCK_NAME] if part else sorted(folder.glob(f"{LOCK_NAME}-*")):
                if other.exists():
                    with _hold(other, folder):
                        pass
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {describe_os_error(error)}") from error
        yield


@contextmanager
def hold_name(path: Path) -> Iterator[None]:
    """Lock the name of a folder that is replaced as a whole; see `hold_folder`."""
    path = path.absolute()
    made: list[Path] = []
    with ExitStack() as held:
        held.callback(lambda: remove_empty_folders(made))
        try:
            made += _make_and_hold(path.parent, path.with_name(f"{hidden_stem(path.name)}.lock"), held, path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {describe_os_error(error)}") from error
        yield


def _make_and_hold(folder: Path, lock: Path, held: ExitStack, meant: Path | None = None) -> list[Path]:
    """Make a folder, and hold a lock in it; return the folders that were made."""
    for attempt in range(_ATTEMPTS):
        made = make_folder(folder)
        try:
            held.enter_context(_hold(lock, meant or folder))
        except FileNotFoundError:  # another process had made the folder, and has removed it again
            if attempt == _ATTEMPTS - 1:
                raise
        except BaseException:
            remove_empty_folders(made)
            raise
        else:
            break
    return made


@contextmanager
def _hold(path: Path, meant: Path) -> Iterator[None]:
    lock = FileLock(path, fallback_to_soft=False, thread_local=False, on_acquired=_write_holder)
    try:
        _acquire(lock, path)
    except Timeout:
        raise LockedError(
            f"{meant} is in use by {_describe_holder(read_holder(path))}. Wait until that process ends, stop it, or "
            "choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _log.warning(
            "%s is on a file system without locks: two processes that write to the same folder are not detected. Make "
            "sure that only one does",
            meant,
        )
        yield
        return
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # the whole folder may be gone
                path.unlink()
            lock.release()


def _acquire(lock: FileLock, path: Path) -> None:
    try:
        lock.acquire(timeout=GRACE_S)
    except Timeout:
        if not _slurm_job() or read_holder(path).get("job") != _slurm_job():
            raise
        lock.acquire(timeout=SAME_JOB_GRACE_S)


def _slurm_job() -> str:
    return os.environ.get("SLURM_JOB_ID", "")


def _write_holder(descriptor: int) -> None:
    """Write into the lock's own file who holds it."""
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": make_storable(shlex.join(sys.argv), 200),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "job": _slurm_job(),
    }
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(holder).encode())


def read_holder(path: Path) -> dict[str, Any]:
    """Read which process has a lock, or had it last; nothing if that cannot be read."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe_holder(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    host, pid, command, since = (make_storable(str(holder.get(key))) for key in ("host", "pid", "command", "since"))
    return f"process {pid} on {host}, since {since} ({command})"
