"""Files that visitors of the editing page upload and get; nobody else can see them."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mimicbrush.errors import InputError

_TOKEN_BYTES = 18
#: How the folder of a server begins; its process holds the lock inside it for as long as it lives.
_FOLDER, _LOCK = "mimicbrush-page-", "server.lock"


class MissingFileError(InputError):
    """A file that does not exist, or that belongs to another visitor."""


@dataclass(frozen=True)
class VisitorLimits:
    """Limits for a visitor.

    Attributes:
        upload_bytes, upload_s: of one file, and of the time in which it must arrive.
        images_at_once: of one visitor, that arrive or are read.
        arriving_bytes: of all files that are arriving; they are in memory meanwhile.
        pixels: of one image; checked before it is decoded.
        decode_s, decode_gib: time and memory for reading one image.
        decoding: images that are being read, or wait for it.
        files: of one visitor; those that were used longest ago go first.
        age_s: how long a file is kept.
        total_bytes: of all files of all visitors.
        images, steps: of one edit.
        waiting, waiting_of_one: edits in the queue, of all visitors and of one.
    """

    upload_bytes: int = 32 * 2**20
    upload_s: float = 300.0
    images_at_once: int = 4
    arriving_bytes: int = 256 * 2**20
    pixels: int = 50_000_000
    decode_s: float = 10.0
    decode_gib: float = 1.5
    decoding: int = 256
    files: int = 40
    age_s: float = 3600.0
    total_bytes: int = 2 * 2**30
    images: int = 4
    steps: int = 100
    waiting: int = 8
    waiting_of_one: int = 2


@contextmanager
def make_server_folder() -> Iterator[Path]:
    """Make a temporary folder for this process; it is removed at the end, or by the next server after a kill.

    The folder gets its name when its lock is held, so another server that starts meanwhile never takes it for left
    behind. The lock goes when the process does, however it ends.
    """
    room = Path(tempfile.gettempdir())
    for left in room.glob(f"{_FOLDER}*"):
        _remove_left_behind(left)
    unnamed = Path(tempfile.mkdtemp(prefix=f".{_FOLDER}", dir=room))
    with FileLock(unnamed / _LOCK, blocking=False):
        folder = unnamed.rename(room / unnamed.name.removeprefix("."))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_left_behind(folder: Path) -> None:
    with suppress(OSError, Timeout):  # Timeout: its server lives
        status = folder.lstat()  # not what a link leads to; and not another user's
        if folder.is_symlink() or not folder.is_dir() or status.st_uid != os.geteuid():
            return
        with FileLock(folder / _LOCK, blocking=False):
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _StoredFile:
    visitor: str
    path: Path
    born_s: float
    size_bytes: int


class SessionFiles:
    """Store of visitors' files, in a folder of its own.

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
        """Write a file with the given function, and return its token.

        Args:
            visitor: who may see it.
            suffix: such as ".png".
            write: writes the file at the path that it is given.

        Raises:
            InputError: there is no room, or the disk is full; the file is removed.
        """
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        path = self.folder / f"{token}{suffix}"
        try:
            write(path)
            size = path.stat().st_size
            with self._lock:
                self._forget_old(visitor)
                self._make_room(visitor, size)
                self._stored[token] = _StoredFile(visitor, path, self._clock(), size)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise InputError(f"the server could not save this image ({error.strerror}); try again later") from error
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return token

    def forget(self, token: str) -> None:
        """Remove a file if it exists."""
        with self._lock:
            file = self._stored.pop(token, None)
        if file is not None:
            file.path.unlink(missing_ok=True)

    def find(self, visitor: str, token: str) -> Path:
        """Find the file of a token.

        Raises:
            MissingFileError: there is none, or it is another visitor's: the error is the same.
        """
        with self._lock:
            file = self._stored.get(token)
            if file is None or file.visitor != visitor or self._clock() - file.born_s > self.limits.age_s:
                raise self.missing_error()
            self._stored[token] = self._stored.pop(token)  # the last now: a source goes on through many edits
            return file.path

    def missing_error(self) -> MissingFileError:
        """Build the error about a file that does not exist, or belongs to another visitor."""
        return MissingFileError(
            f"this image is not on the server (it keeps {self.limits.files} files per visitor, for "
            f"{self.limits.age_s / 60:.0f} minutes); choose the image again"
        )

    def _forget_old(self, visitor: str) -> None:
        now = self._clock()
        mine = [token for token, file in self._stored.items() if file.visitor == visitor]  # longest unused first
        surplus = set(mine[: max(0, len(mine) + 1 - self.limits.files)])
        for token, file in list(self._stored.items()):
            if token in surplus or now - file.born_s > self.limits.age_s:
                file.path.unlink(missing_ok=True)
                del self._stored[token]

    def _make_room(self, visitor: str, size: int) -> None:
        """Remove the least recently used files of whoever has the most data until `size` bytes fit."""
        if size > self.limits.total_bytes:
            raise InputError("the server has no space for an image of this size; choose a smaller image")
        held = Counter({visitor: size})
        for file in self._stored.values():
            held[file.visitor] += file.size_bytes
        while held.total() > self.limits.total_bytes:
            largest = max({file.visitor for file in self._stored.values()}, key=lambda each: held[each])
            token, file = next(each for each in self._stored.items() if each[1].visitor == largest)
            del self._stored[token]
            file.path.unlink(missing_ok=True)
            held[largest] -= file.size_bytes

    def close(self) -> None:
        """Remove all files."""
        with self._lock:
            self._stored.clear()
            shutil.rmtree(self.folder, ignore_errors=True)
