"""The page's server ends soon, whatever is open, and leaves nothing; clients that dawdle are let go."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from test_gate import png

HELPER = Path(__file__).parents[1] / "helpers/served_page.py"


class Client:
    """Connections to a server, each of which stays open."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port
        self.connections: list[socket.socket] = []

    def connect(self, beginning: bytes = b"") -> socket.socket:
        connection = socket.socket()
        self.connections.append(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(beginning)
        return connection

    def ask(self, head: str, expected: bytes, body: bytes = b"") -> socket.socket:
        """Ask, and read until what is expected comes."""
        cookie = f"mimicbrush_visitor={'a' * 24}"
        connection = self.connect(f"{head}\r\nHost: 127.0.0.1\r\nCookie: {cookie}\r\n\r\n".encode() + body)
        answer = b""
        while expected not in answer:
            chunk = connection.recv(4096)
            assert chunk, answer
            answer += chunk
        assert answer.startswith(b"HTTP/1.1 200 ")
        return connection

    def upload(self) -> None:
        image = png()
        self.ask(f"POST /upload HTTP/1.1\r\nContent-Length: {len(image)}", b'"token"', image)


@contextmanager
def served(folder: Path) -> Iterator[Client]:
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(
        [sys.executable, HELPER], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        client = Client(process, int(process.stdout.readline()))
        try:
            yield client
        finally:
            for connection in client.connections:
                connection.close()
            process.kill()


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGHUP, signal.SIGINT))],
)
def test_a_signal_ends_it_soon_while_streams_are_open_and_nothing_stays(number: signal.Signals, tmp_path: Path) -> None:
    with served(tmp_path) as client:
        stream = client.ask("GET /edit/endless HTTP/1.1", b"data: {}")
        client.upload()
        client.connect(b"POST /upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nhalf")
        assert list(tmp_path.glob("mimicbrush-page-*/visits/*"))
        client.process.send_signal(number)
        begin = time.monotonic()
        assert client.process.wait(60) == 128 + number
        print(f"ended {time.monotonic() - begin:.1f} s after {number.name}")
        assert not list(tmp_path.iterdir())
        answer = b""
        while chunk := stream.recv(4096):
            answer += chunk
        assert answer.endswith(b"0\r\n\r\n")  # it was ended whole
        assert client.process.stderr is not None and "Exception in ASGI" not in client.process.stderr.read()


def test_what_a_killed_server_leaves_goes_with_the_next(tmp_path: Path) -> None:
    with served(tmp_path) as client:
        client.upload()
        client.process.send_signal(signal.SIGKILL)
        client.process.wait(60)
    (left,) = tmp_path.iterdir()
    assert list(left.glob("visits/*"))
    with served(tmp_path):
        assert not left.exists()


def is_closed(connection: socket.socket, within_s: float) -> bool:
    """Whether the server closes; what it sends before is thrown away."""
    end = time.monotonic() + within_s
    connection.settimeout(1)
    while time.monotonic() < end:
        try:
            if not connection.recv(2**20):
                return True
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


@pytest.mark.slow
def test_clients_that_dawdle_are_let_go_and_others_are_not(tmp_path: Path) -> None:
    with served(tmp_path) as client:
        stream = client.ask("GET /edit/endless HTTP/1.1", b"data: {}")
        silent = client.connect()
        reading = client.connect(
            f"GET /files/large HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: mimicbrush_visitor={'a' * 24}\r\n\r\n".encode()
        )  # and takes nothing of it
        again = client.ask("GET / HTTP/1.1", b"page")
        for byte in b"GET / HTTP/1.1\r\nX: ":
            for slow in (silent, again):
                with suppress(ConnectionError):
                    slow.sendall(bytes([byte]))
            time.sleep(0.3)
        assert is_closed(silent, 30) and is_closed(again, 30)
        received = 0
        with suppress(ConnectionError):  # what the kernel holds is read, and then nothing comes
            while chunk := reading.recv(2**20):
                received += len(chunk)
        assert received < 64 * 2**20
        assert not is_closed(stream, 3)
        client.ask("GET / HTTP/1.1", b"page")
