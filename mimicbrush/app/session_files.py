"""What visitors of the editing page upload and get: files that nobody else can see."""

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
    """What a visitor may ask for.

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
class _Kept:
    visitor: str
    path: Path
    born_s: float
    size_bytes: int


class SessionFiles:
    """Files of visitors, in a folder that holds nothing else.

    Args:
        folder: is made, and emptied by `close`.
        limits: of age, number and size.
        clock: seconds that only grow; other ones in tests.
    """

    def __init__(self, folder: Path, limits: VisitorLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.limits, self._clock = folder, limits, clock
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, visitor: str, suffix: str, write: Callable[[Path], None]) -> str:
        """Have a file written, and say its name.

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
                if size + sum(kept.size_bytes for kept in self._kept.values()) > self.limits.total_bytes:
                    raise InputError("there is no room for more images now; try again later")
                self._kept[token] = _Kept(visitor, path, self._clock(), size)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return token

    def find(self, visitor: str, token: str) -> Path:
        """The file of a name.

        Raises:
            InputError: there is none, or it is another visitor's: both are told alike.
        """
        with self._lock:
            kept = self._kept.get(token)
            if kept is None or kept.visitor != visitor or self._clock() - kept.born_s > self.limits.age_s:
                raise self.absent()
            self._kept[token] = self._kept.pop(token)  # the last now: a source goes on through many edits
            return kept.path

    def absent(self) -> InputError:
        """What is told of a file that is not here, or not for who asks."""
        return InputError(
            f"this image is not here (any more: {self.limits.files} of a visitor are kept, for "
            f"{self.limits.age_s / 60:.0f} minutes); choose it again"
        )

    def _forget_old(self, visitor: str) -> None:
        now = self._clock()
        mine = [token for token, kept in self._kept.items() if kept.visitor == visitor]  # longest unused first
        surplus = set(mine[: max(0, len(mine) + 1 - self.limits.files)])
        for token, kept in list(self._kept.items()):
            if token in surplus or now - kept.born_s > self.limits.age_s:
                kept.path.unlink(missing_ok=True)
                del self._kept[token]

    def close(self) -> None:
        """Remove everything."""
        with self._lock:
            self._kept.clear()
            shutil.rmtree(self.folder, ignore_errors=True)
