"""A server of files on this machine that may break, resume, redirect, or send what nobody asked for."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    """Serves `files`, by path; what else it does is set by the test.

    Attributes:
        files: path -> content.
        headers: path -> headers to add.
        redirects: path -> where it leads.
        breaks: path -> how many bytes each of the next answers sends before the connection ends.
        ranges: the Range header of each request, "" for none; with the path.
        stalls: whether a connection that breaks is held open until `resumed` is set.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.redirects: dict[str, str] = {}
        self.breaks: dict[str, list[int]] = {}
        self.ranges: list[tuple[str, str]] = []
        self.stalls = False
        self.resumed = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


@contextmanager
def file_server() -> Iterator[FileServer]:
    """A server that answers until the end of the block."""
    server = FileServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.resumed.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, format: str, *values: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        server, name = self.server, self.path.strip("/")
        wanted = self.headers.get("Range", "")
        server.ranges.append((name, wanted))
        if name in server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects[name])
            self.end_headers()
            return
        if name not in server.files:
            self.send_error(404)
            return
        data = server.files[name]
        tag = f'"{hashlib.sha256(data).hexdigest()[:8]}"'
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if wanted and self.headers.get("If-Range") != tag:
            start, wanted = 0, ""
        if wanted and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.end_headers()
            return
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        headers = {"Content-Type": "video/mp4", "Content-Length": str(len(data) - start), "ETag": tag}
        for key, value in (headers | server.headers.get(name, {})).items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        sent = data[start:]
        if server.breaks.get(name):
            self.wfile.write(sent[: server.breaks[name].pop(0)])
            self.wfile.flush()
            if server.stalls:
                server.resumed.wait(30)
            return
        self.wfile.write(sent)
