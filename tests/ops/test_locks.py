"""One process at a time writes into a folder: shown with real processes, which are killed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mimicbrush.errors import InputError, LockedError
from mimicbrush.io import locks
from mimicbrush.io.locks import LOCK_NAME, hold_folder, hold_name

HOLDER = Path(__file__).parents[1] / "helpers" / "holding_process.py"


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "GRACE_S", 0.1)


@contextmanager
def running_holder(folder: Path, *child: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds a folder, and the number of its child, if it has one; both are killed in the end."""
    numbers: list[int] = []
    with subprocess.Popen([sys.executable, HOLDER, folder, *child], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline().split()
        assert said[0] == "held"
        numbers += [process.pid, *map(int, said[1:])]
        try:
            yield process, numbers[-1]
        finally:
            for number in numbers:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


@pytest.mark.parametrize("child", ["fork", "spawn"])
def test_the_second_is_refused_with_the_holders_name_and_starts_after_a_kill(tmp_path: Path, child: str) -> None:
    folder = tmp_path / "run"
    with running_holder(folder, child) as (process, number):
        with pytest.raises(LockedError) as refused, hold_folder(folder):
            pass
        for part in (str(folder), f"process {process.pid} on {socket.gethostname()}", "holding_process.py", "since 20"):
            assert part in str(refused.value)
        process.kill()
        process.wait()
        os.kill(number, 0)  # its child lives on
        assert (folder / LOCK_NAME).is_file()
        with hold_folder(folder):
            assert json.loads((folder / LOCK_NAME).read_text())["pid"] == os.getpid()
        assert not list(folder.iterdir())


def test_a_fork_neither_keeps_nor_frees_what_its_parent_holds(tmp_path: Path) -> None:
    with hold_folder(tmp_path / "run"):
        child = os.fork()
        if child == 0:  # leaves the block as an exception would
            try:
                raise SystemExit(0)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(LockedError), hold_folder(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / LOCK_NAME).is_file()


def test_nothing_is_left_of_a_lock_and_what_was_written_stays(tmp_path: Path) -> None:
    with hold_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["result"]
    with pytest.raises(ZeroDivisionError), hold_folder(tmp_path / "c" / "d"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_parts_share_a_folder_and_exclude_the_one_that_wants_it_alone(tmp_path: Path) -> None:
    with hold_folder(tmp_path, "0-of-2"), hold_folder(tmp_path, "1-of-2"):
        for part in ("", "1-of-2"):
            with pytest.raises(LockedError, match="is in use by process"), hold_folder(tmp_path, part):
                pass
    (tmp_path / f"{LOCK_NAME}-7-of-9").write_text("left by a kill")
    with hold_folder(tmp_path), pytest.raises(LockedError), hold_folder(tmp_path, "0-of-2"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_name_is_held_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / ("ä" * 127)
    with hold_name(path):
        path.mkdir()
        with pytest.raises(LockedError, match="ää"), hold_name(path):
            pass
        with hold_name(path.with_name("other")):
            pass
    assert list(path.parent.iterdir()) == [path]


def test_a_job_that_is_queued_again_waits_for_its_earlier_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with running_holder(tmp_path) as (process, _):
        later = threading.Timer(0.4, process.kill)
        later.start()
        start = time.monotonic()
        with hold_folder(tmp_path):
            assert time.monotonic() - start > 0.2
        later.join()
    with running_holder(tmp_path):
        monkeypatch.setenv("SLURM_JOB_ID", "18")  # another job does not wait
        with pytest.raises(LockedError), hold_folder(tmp_path):
            pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold_folder(tmp_path / "run"):
        (tmp_path / "run" / "result").touch()
    assert "a file system without locks" in caplog.text


def test_a_folder_that_cannot_be_held_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / ("x" * 256), Path("/proc/x")):
        with pytest.raises(InputError, match=re.escape(f"cannot write to {folder}: ")), hold_folder(folder):
            pass
