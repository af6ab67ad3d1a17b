"""`run` and `Popen` of subprocess for our scripts, without importing PyTorch anew for each.

A server imports it once and forks (see `warm_server`); every script is a process of its own all the same, with its own
arguments, environment and folder, which can be killed. A server serves one setting of the variables that are read when
a process starts.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_SERVERS: dict[str, tuple[socket.socket, subprocess.Popen[bytes]]] = {}
_SERVER = Path(__file__).with_name("warm_server.py")
#: Where a request is longer, something is wrong with it.
_MOST_BYTES = 1 << 18


def _server(environment: Mapping[str, str]) -> socket.socket:
    # What is read when Python or a library is imported.
    read_early = {k: v for k, v in environment.items() if k.startswith(("PYTHON", "HF_", "OMP_", "ATEN_", "MKL_"))}
    path = json.dumps(read_early, sort_keys=True)
    if path not in _SERVERS:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST_BYTES)
        command = [sys.executable, str(_SERVER), str(theirs.fileno())]
        process = subprocess.Popen(command, env=dict(environment), pass_fds=[theirs.fileno()])
        theirs.close()
        _SERVERS[path] = ours, process
    return _SERVERS[path][0]


@atexit.register
def _stop_servers() -> None:
    for connection, process in _SERVERS.values():
        connection.close()
        process.wait()


class Popen:
    """A script as a process; what is not here is as in `subprocess.Popen`.

    Args:
        command: ``[sys.executable, script, *arguments]``.
        cwd: where it runs.
        env: its environment.
        stdout, stderr: None (ours), `subprocess.PIPE`, `subprocess.DEVNULL`, `subprocess.STDOUT` or a file.
        text: whether what is read from a pipe is text.
        start_new_session: as there.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        text: bool = False,
        start_new_session: bool = False,
    ) -> None:
        executable, *self.args = map(str, command)
        assert executable == sys.executable, executable
        environment = dict(os.environ if env is None else env)
        self.stdout, out = self._stream(stdout, 1, text)
        self.stderr, err = (None, os.dup(out)) if stderr == subprocess.STDOUT else self._stream(stderr, 2, text)
        nothing = os.open(os.devnull, os.O_RDONLY)
        self._answers, theirs = socket.socketpair()
        request = {"command": self.args, "cwd": str(Path(cwd or ".").absolute()), "env": environment}
        message = json.dumps({**request, "new_session": start_new_session}).encode()
        assert len(message) < _MOST_BYTES
        socket.send_fds(_server(environment), [message], [nothing, out, err, theirs.fileno()])
        for each in (nothing, out, err):
            os.close(each)
        theirs.close()
        self._unread = b""
        self.pid = int(self._answer("pid", None))
        self.returncode: int | None = None

    @staticmethod
    def _stream(wanted: int | IO[Any] | None, ours: int, text: bool) -> tuple[IO[Any] | None, int]:
        """What we read from, and the file descriptor that it writes to."""
        if wanted == subprocess.PIPE:
            reading, writing = os.pipe()
            return os.fdopen(reading, "r" if text else "rb"), writing
        if wanted == subprocess.DEVNULL:
            return None, os.open(os.devnull, os.O_WRONLY)
        return None, os.dup(ours if wanted is None else wanted if isinstance(wanted, int) else wanted.fileno())

    def poll(self) -> int | None:
        """How it ended; None: it runs."""
        try:
            return self.wait(0.001)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """How it ended, after at most so many seconds."""
        if self.returncode is None:
            self.returncode = self._answer("status", timeout)
            self._answers.close()
        return self.returncode

    def _answer(self, name: str, timeout: float | None) -> int:
        """The next thing that the server tells; there are two, a line each."""
        self._answers.settimeout(timeout)
        while b"\n" not in self._unread:
            try:
                data = self._answers.recv(1 << 10)
            except TimeoutError as error:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from error
            assert data, "the server of warm scripts is gone"
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return int(json.loads(line)[name])

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Read both pipes to their ends (one after the other: little is expected), and wait."""
        read: list[Any] = []
        for stream in (self.stdout, self.stderr):
            read.append(None if stream is None else stream.read())
            if stream is not None:
                stream.close()
        self.wait(timeout)
        return read[0], read[1]

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> Popen:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


def run(
    command: Sequence[str | Path],
    *,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = False,
    capture_output: bool = False,
    text: bool = False,
    stdout: int | IO[Any] | None = None,
    timeout: float = 280,
) -> subprocess.CompletedProcess[Any]:
    """Run a script to its end, as `subprocess.run` does."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        captures = capture_output or stdout == subprocess.PIPE
        process = Popen(
            command,
            cwd=cwd,
            env=env,
            stdout=out if captures else stdout,
            stderr=err if capture_output else None,
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        texts = []
        for file in (out, err):
            file.seek(0)
            data = file.read()
            texts.append(data.decode(errors="replace") if text else data)
    done = subprocess.CompletedProcess(command, status, texts[0], texts[1])
    if check:
        done.check_returncode()
    return done
