"""Files that visitors of the editing page upload and get; nobody else can see them."""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mimicbrush.errors import InputError

_TOKEN_BYTES = 18


@dataclass(frozen=True)
class VisitorLimits:
    """Limits of what a visitor may ask for.

    Attributes:
        upload_bytes: of one file.
        pixels: of one image; checked before it is decoded.
        files: of one visitor; those that were used longest ago go first.
        age_s: how long a file is kept.
        total_bytes: of all files of all visitors.
        images, steps: of one edit.
        waiting: edits in the queue.
    """

    upload_bytes: int = 32 * 2**20
    pixels: int = 50_000_000
    files: int = 40
    age_s: float = 3600.0
    total_bytes: int = 2 * 2**30
    images: int = 4
    steps: int = 100
    waiting: int = 8


@dataclass(frozen=True)
class _StoredFile:
    visitor: str
    path: Path
    born_s: float
    size_bytes: int


class SessionFiles:
    """Store of visitors' files, in a folder that holds nothing else.

    Args:
        folder: is made, and emptied by `close`.
        limits: of age, number and size.
        clock: seconds that only grow; other ones in tests.
    """

    def __init__(self, folder: Path, limits: VisitorLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.limits, self._clock = folder, limits, clock
        self._stored: dict[str, _StoredFile] = {}
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, visitor: str, suffix: str, write: Callable[[Path], None]) -> str:
        """Have a file written, and return the token that names it.

        Args:
            visitor: who may see it.
            suffix: such as ".png".
            write: writes the file at the path that it is given.

        Raises:
            InputError: there is no room; the file is removed.
        """
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        path = self.folder / f"{token}{suffix}"
        try:
            write(path)
            size = path.stat().st_size
            with self._lock:
                self._forget_old(visitor)
                if size + sum(file.size_bytes for file in self._stored.values()) > self.limits.total_bytes:
                    raise InputError("there is no room for more images now; try again later")
                self._stored[token] = _StoredFile(visitor, path, self._clock(), size)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return token

    def find(self, visitor: str, token: str) -> Path:
        """Find the file of a token.

        Raises:
            InputError: there is none, or it is another visitor's: the error is the same.
        """
        with self._lock:
            file = self._stored.get(token)
            if file is None or file.visitor != visitor or self._clock() - file.born_s > self.limits.age_s:
                raise self.missing_error()
            self._stored[token] = self._stored.pop(token)  # the last now: a source goes on through many edits
            return file.path

    def missing_error(self) -> InputError:
        """Build the error about a file that is not here, or is another visitor's."""
        return InputError(
            f"this image is not here (any more: {self.limits.files} of a visitor are kept, for "
            f"{self.limits.age_s / 60:.0f} minutes); choose it again"
        )

    def _forget_old(self, visitor: str) -> None:
        now = self._clock()
        mine = [token for token, file in self._stored.items() if file.visitor == visitor]  # longest unused first
        surplus = set(mine[: max(0, len(mine) + 1 - self.limits.files)])
        for token, file in list(self._stored.items()):
            if token in surplus or now - file.born_s > self.limits.age_s:
                file.path.unlink(missing_ok=True)
                del self._stored[token]

    def close(self) -> None:
        """Remove all files."""
        with self._lock:
            self._stored.clear()
            shutil.rmtree(self.folder, ignore_errors=True)
