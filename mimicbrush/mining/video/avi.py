"""Counts the dropped frames of AVI files: chunks without content, which the index counts and no demuxer returns.

A recorder writes such a chunk if there is no new image in time, and players show the image before again. So it is not
damage.

This module refuses no file itself: `stream_checks` refuses a file as "missing_packets" if other frames are missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

_CHUNK_HEADER_BYTES = 8
#: Chunks that contain chunks: the first is for files above 1 GB, the last for interleaved recordings.
_LISTS = (b"AVIX", b"AVI ", b"movi", b"rec ")


def count_dropped_frames(path: Path, stream: int) -> int:
    """Count the empty chunks of a video stream of an AVI file; 0 if its chunks do not nest.

    Args:
        path: the file.
        stream: number of the stream.

    Raises:
        OSError: the file cannot be read.
    """
    names = {f"{stream:02d}{kind}".encode() for kind in ("dc", "db")}
    dropped = 0
    with path.open("rb") as file:
        while header := _read_header(file):
            name, size = header
            if not name.isascii() or not name.decode().isprintable():
                return 0  # a wrong size of a chunk led into the middle of a frame
            if name in (b"RIFF", b"LIST"):
                if file.read(4) in _LISTS:
                    continue  # its chunks come next
                size -= 4
            elif name in names and size == 0:
                dropped += 1
            file.seek(size + size % 2, 1)
        end = file.tell()
        return dropped if end <= file.seek(0, 2) + 1 else 0


def _read_header(file: BinaryIO) -> tuple[bytes, int] | None:
    """Read name and size in bytes of the next chunk; None at the end."""
    header = file.read(_CHUNK_HEADER_BYTES)
    if len(header) < _CHUNK_HEADER_BYTES:
        return None
    return header[:4], int.from_bytes(header[4:], "little")
