"""Files and folders that get their final name only when they are complete, and paths that stay inside a folder."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mimicbrush.errors import FULL_DISK, InputError, MimicBrushError

#: Temporary files that `write_aside` leaves if the process is killed.
ASIDE_PATTERN = ".*.tmp"
#: Bytes of the name of a file that its hidden name repeats: the suffix must fit, too.
_LONGEST_REPEATED = 100
#: A disk with less free space than this is full, whatever error a library reports.
_FULL_BELOW_BYTES = 1 << 16

# It can be read only by setting it, for the whole process: so once, before there are threads that write files.
_UMASK = os.umask(0)
os.umask(_UMASK)


def path_inside(root: Path, name: str) -> Path:
    """Resolve a path that is relative to the folder of a list, and refuse one that leads outside.

    Args:
        root: an existing folder.
        name: relative to it.

    Raises:
        InputError: it leaves the folder, by "..", as an absolute path or through a link.
    """
    path = root / name
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # circular links, characters that are not allowed in a path
        raise InputError(f"{name!r} is not a valid path ({error})") from error
    if not inside:
        raise InputError(f"{name!r} leads outside of {root}")
    return path


def hidden_stem(name: str) -> str:
    """Make the start of the hidden names for a file or folder: its own name, or a hash of a long name."""
    data = os.fsencode(name)
    return f".{name}" if len(data) <= _LONGEST_REPEATED else f".{hashlib.sha256(data).hexdigest()[:16]}"


def leftover_pattern(name: str) -> str:
    """Make the glob pattern of the temporary files that a killed process left for this file; see `write_aside`."""
    return f"{glob.escape(hidden_stem(name))}.*.tmp"


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, and rename it when it is complete and on the disk.

    Args:
        path: the file; an older one stays as it is until the new one replaces it.
        write: called with a hidden name in the same folder (`ASIDE_PATTERN`), to write the content there; what
            it returns is not looked at. Where it raises, nothing is left behind.

    Raises:
        OSError: the disk refuses; where it is full, the error names the folder.
    """
    # Without the suffix of the file: a search for *.parquet, for example, must not find an incomplete file.
    # Random, not the process's number: in containers on a shared disk these are alike.
    aside = path.with_name(f"{hidden_stem(path.name)}.{secrets.token_hex(4)}.tmp")
    try:
        with _full_disk_named(path.parent):
            write(aside)
            with aside.open("rb+") as file:
                os.fsync(file.fileno())
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    if os.name == "posix":  # the new name must be on the disk, too; Windows opens no folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _full_disk_named(folder: Path) -> Iterator[None]:
    """Raise what a library makes of a full disk as the OSError that it is, with the name of the folder.

    torch, safetensors and pyarrow raise errors of their own, and Python's own names no file.
    """
    try:
        yield
    except MimicBrushError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # safetensors removes its file, so there is space again, and has the reason only in its message.
        is_full = _is_full(folder) or os.strerror(errno.ENOSPC) in str(error)
        if number not in FULL_DISK and (number is not None or not is_full):
            raise
        raise OSError(number or errno.ENOSPC, "no space left on the disk", str(folder)) from error


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _FULL_BELOW_BYTES
    except OSError:
        return False


def make_folder(folder: Path) -> list[Path]:
    """Make a folder if it does not exist.

    Returns:
        The folders that were made, the outermost first, for `remove_empty_folders`.

    Raises:
        OSError: one cannot be made; then those before it are removed again.
    """
    missing = []
    for each in (folder, *folder.parents):
        if each.exists():
            break
        missing.append(each)
    made: list[Path] = []
    try:
        for each in reversed(missing):
            try:
                each.mkdir()
                made.append(each)
            except FileExistsError:  # another process was faster
                if not each.is_dir():
                    raise
    except BaseException:
        remove_empty_folders(made)
        raise
    return made


def remove_empty_folders(made: Sequence[Path]) -> None:
    """Remove the folders that `make_folder` made, if they are empty."""
    with suppress(OSError):
        for folder in reversed(made):
            folder.rmdir()


def write_json(path: Path, value: Any, *, ensure_ascii: bool = True) -> None:
    """Write a value as a JSON file, as `write_aside` does: one space of indentation, a newline at the end, UTF-8.

    Args:
        path: the file.
        value: what `json` can write.
        ensure_ascii: whether characters beyond ASCII are written as escapes, so that any program reads them.

    Raises:
        ValueError: a number in it is NaN or infinite, which JSON has no word for; nothing is written then.
    """
    text = json.dumps(value, indent=1, ensure_ascii=ensure_ascii, allow_nan=False) + "\n"
    write_aside(path, lambda aside: aside.write_bytes(text.encode()))


def apply_umask(folder: Path) -> None:
    """Give the files of a folder the permissions of the umask; safetensors writes them for their owner alone."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~_UMASK)


def replace_folder(final: Path, write: Callable[[Path], object]) -> None:
    """Write a folder under a temporary name, and rename it when it is complete; an older one stays until then.

    Args:
        final: the folder.
        write: called with a name beside it, to make the folder there. Where it raises, nothing is left behind.
    """
    final = final.absolute()
    aside, old = (final.with_name(f"{hidden_stem(final.name)}.{kind}.tmp") for kind in ("new", "old"))
    if old.exists() and not final.exists():
        old.rename(final)  # killed between the two renames below
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with _full_disk_named(final.parent):
            write(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if final.exists():
        final.rename(old)
    aside.rename(final)
    shutil.rmtree(old, ignore_errors=True)
