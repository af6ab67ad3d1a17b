"""Hashes of files: full hashes, quick fingerprints, and checksums stored inside a file."""

from __future__ import annotations

import errno
import hashlib
import mmap
import stat
from collections.abc import Sequence
from pathlib import Path

_CHECKSUM_MARK = b"sha256:"
#: Placeholder in a file for its own checksum, until it is known and while it is computed.
NO_CHECKSUM = _CHECKSUM_MARK + b"0" * 64
#: Number of blocks of each file that are read.
_BLOCKS, _BLOCK_BYTES = 64, 4096


def require_plain_file(path: Path) -> None:
    """Check that a file is a regular file: opening a pipe could wait without end.

    Raises:
        OSError: it is absent, or a folder, a pipe, a socket or a device.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "this is a folder, a pipe, a socket or a device, not a regular file", str(path))


def hash_file(path: Path) -> str:
    """Compute the SHA-256 of a file, hex: the identity of mined files, and the check of checkpoints.

    Raises:
        OSError: see `require_plain_file`, or it cannot be read.
    """
    require_plain_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(files: Sequence[Path]) -> str:
    """Hash the lengths and some blocks of files: reading all of them would take half a minute."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "big"))
        with file.open("rb") as opened:
            for block in range(_BLOCKS):
                opened.seek(max(0, size - _BLOCK_BYTES) * block // (_BLOCKS - 1))  # from the first to the last
                digest.update(opened.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def store_checksum(path: Path) -> None:
    """Write the SHA-256 of a file into the file itself, over the first and the last `NO_CHECKSUM` in it.

    Args:
        path: a file that holds it there, and no `sha256:` before the first or after the last.
    """
    with path.open("rb+") as file, mmap.mmap(file.fileno(), 0) as data:
        places = data.find(_CHECKSUM_MARK), data.rfind(_CHECKSUM_MARK)
        checksum = _compute_checksum(data, places)
        for place in places:
            data[place : place + len(checksum)] = checksum


def is_checksum_right(path: Path) -> bool | None:
    """Check a file against the checksum that `store_checksum` wrote into it; None if it has none.

    Raises:
        OSError, ValueError: the file cannot be read, or is empty.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        places = data.find(_CHECKSUM_MARK), data.rfind(_CHECKSUM_MARK)
        if places[0] < 0:
            return None
        checksum = _compute_checksum(data, places)
        return all(data[place : place + len(checksum)] == checksum for place in places)


def _compute_checksum(data: mmap.mmap, places: tuple[int, int]) -> bytes:
    """The SHA-256 of a file as it was before its checksums were known."""
    digest = hashlib.sha256()
    start = 0
    with memoryview(data) as view:
        for place in places:
            with view[start:place] as before:
                digest.update(before)
            digest.update(NO_CHECKSUM)
            start = place + len(NO_CHECKSUM)
        with view[start:] as rest:
            digest.update(rest)
    return _CHECKSUM_MARK + digest.hexdigest().encode()
