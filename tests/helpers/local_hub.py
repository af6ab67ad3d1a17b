"""A Hugging Face hub of local folders: as much of it as fetching files needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40


class LocalHub(ThreadingHTTPServer):
    """Serves folders as repositories, `root`/OWNER/NAME, and notes which files were asked for.

    As on the hub, the ETag of weights is their SHA-256, and that of small files the hash that git has for them.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.served: list[str] = []

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def local_hub(root: Path) -> Iterator[LocalHub]:
    """A hub that answers until the end of the block."""
    hub = LocalHub(root)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *values: object) -> None:
        """Say nothing."""

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        if path[:2] == ["api", "models"] and (self.server.root / path[2] / path[3]).is_dir():
            self._tell("/".join(path[2:4]), what=path[4] if len(path) > 4 else "revision")
        elif len(path) > 4 and path[2] == "resolve" and (file := self._file(path)).is_file():
            data = file.read_bytes()
            if with_body:
                self.server.served.append("/".join([*path[:2], *path[4:]]))
            self._send(data if with_body else b"", "application/octet-stream", len(data), _etag(file))
        else:
            self.send_response(404)
            if len(path) < 2 or not (self.server.root / path[0] / path[1]).is_dir():
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _file(self, path: list[str]) -> Path:
        return self.server.root.joinpath(*path[:2], *path[4:])

    def _tell(self, repository: str, what: str) -> None:
        folder = self.server.root / repository
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        told: object = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        if what == "tree":
            told = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _etag(file)}
                for name, file in zip(names, files, strict=True)
            ]
        body = json.dumps(told).encode()
        self._send(body, "application/json", len(body))

    def _send(self, body: bytes, kind: str, length: int, etag: str | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.send_header("X-Repo-Commit", COMMIT)
        if etag is not None:
            self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        self.wfile.write(body)


def _etag(file: Path) -> str:
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
