"""Hashes of files: whole ones, and quick fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

#: So many blocks of each file are looked at.
_BLOCKS, _BLOCK_BYTES = 64, 4096


def hash_file(path: Path) -> str:
    """Compute the SHA-256 of a file, hex: the identity of mined files, and the check of checkpoints."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(files: Sequence[Path]) -> str:
    """Tell files apart by their lengths and some blocks of each: whole ones would take half a minute to read."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "big"))
        with file.open("rb") as opened:
            for block in range(_BLOCKS):
                opened.seek(max(0, size - _BLOCK_BYTES) * block // (_BLOCKS - 1))  # from the first to the last
                digest.update(opened.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]
