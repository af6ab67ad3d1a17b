"""Finds damage in video files that FFmpeg conceals, by the rules of the file formats.

The most common damage is a truncated file, or blocks of zeros where a disk or a transfer lost data. FFmpeg reads what
is left of a truncated file, and conceals lost blocks. Both violate the sizes and byte rules of the formats.

Refuses as:

* "missing_packets": the file is shorter than its container declares.
* "other_format": the first bytes are those of a format that is not read, such as an MPEG transport stream.
* "damaged": the structure of a Matroska file is inconsistent (`matroska`), or a packet has a long run of zeros or
  violates the byte rules of H.264 or HEVC (`build_packet_check`, called by `stream_checks`).
* "empty", "unreadable", "not_a_file": there is no content to read.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from mimicbrush.mining.refusals import UntrustedFileError
from mimicbrush.mining.video.matroska import find_matroska_fault

#: First bytes -> name of an unsupported format. FFmpeg reads only the formats of `strict_reader.VIDEO_FORMATS`.
_OTHER_FORMATS = {
    b"FLV\x01": "Flash Video (FLV)",
    bytes.fromhex("3026b2758e66cf11"): "Windows Media (ASF)",
    b"\x00\x00\x01\xba": "an MPEG program stream",
    b"OggS": "Ogg",
    b"GIF8": "a GIF",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip file",
    b"#EXTM3U": "a playlist, which refers to other files",
    b"<!DOCTYPE": "a web page, perhaps from a failed download",
    b"<html": "a web page, perhaps from a failed download",
}
_ISO_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
_TS_SYNC, _TS_PACKET_BYTES = b"\x47\x47", 188
_EBML_MAGIC = b"\x1a\x45\xdf\xa3"
_SEGMENT_ID = b"\x18\x53\x80\x67"
#: Byte triples that may not occur inside a NAL unit (ITU-T H.264 Sec. 7.4.1, H.265 Sec. 7.4.2).
_FORBIDDEN = (b"\x00\x00\x00", b"\x00\x00\x01", b"\x00\x00\x02")
#: Codecs with arithmetic-coded packets, in which a run of as many zeros as `_ZEROS` means damage.
_DENSE_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1"})
_ZEROS = bytes(24)
#: Some encoders write an end-of-stream unit with a start code at the end of the last NAL unit.
_END_OF_STREAM_BYTES = 6


def check_container(path: Path) -> None:
    """Refuse a file that is shorter than its container declares, or whose container is inconsistent.

    Raises:
        UntrustedFileError: "missing_packets"; "other_format"; "damaged" (Matroska); "empty" for zero bytes;
            "unreadable"; "not_a_file" for example for a pipe, which would block.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise UntrustedFileError("not_a_file", "a folder, pipe, socket or device")
        size = state.st_size
        with path.open("rb") as file:
            head = file.read(2 * _TS_PACKET_BYTES + 1)
            if not head:
                raise UntrustedFileError("empty", "zero bytes")
            other = _find_other_format(head)
            declared = _find_declared_size(file, head, size)
        fault = find_matroska_fault(path) if head[:4] == _EBML_MAGIC and declared <= size else ""
    except OSError as error:
        raise UntrustedFileError("unreadable", str(error)) from error
    if other:
        raise UntrustedFileError(
            "other_format", f"it is {other}; expected MP4, QuickTime, Matroska, WebM or AVI. FFmpeg can convert videos"
        )
    if declared > size:
        raise UntrustedFileError("missing_packets", f"the file should have {declared} bytes, but has {size}")
    if fault:
        raise UntrustedFileError("damaged", f"Matroska: {fault}")


def is_container(path: Path) -> bool:
    """Return whether a file starts like MP4, QuickTime, Matroska, WebM or AVI."""
    with path.open("rb") as file:
        head = file.read(8)
    return head[4:] in _ISO_BOXES or head[:4] in (b"RIFF", _EBML_MAGIC)


def _find_other_format(head: bytes) -> str:
    """Return the unsupported format that the first bytes of a file identify; "" if there is none."""
    # On Blu-ray discs and in cameras, each packet follows a timestamp of 4 bytes.
    if head[::_TS_PACKET_BYTES][:2] == _TS_SYNC or (
        head[4 :: _TS_PACKET_BYTES + 4][:2] == _TS_SYNC and head[:4] not in (b"RIFF", _EBML_MAGIC)
    ):
        return "an MPEG transport stream"
    return next((words for magic, words in _OTHER_FORMATS.items() if head.startswith(magic)), "")


def _find_declared_size(file: BinaryIO, head: bytes, size: int) -> int:
    if head[4:8] in _ISO_BOXES:
        return _find_iso_end(file, size)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] == _EBML_MAGIC:
        return _find_matroska_end(file)
    return 0


def _find_iso_end(file: BinaryIO, size: int) -> int:
    """Find the end of the last top-level box of an MP4 or QuickTime file."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length < 8:  # 0: this box ends with the file; else: these bytes after the last box are not used
            return position
        position += length
    return position


def _find_matroska_end(file: BinaryIO) -> int:
    """Find the end of the first Segment; 0 if its size is unknown (a live recording)."""
    file.seek(4)
    header_length = _read_ebml_size(file)
    if header_length is None:
        return 0
    file.seek(header_length, 1)
    if file.read(4) != _SEGMENT_ID:
        return 0
    length = _read_ebml_size(file)
    return 0 if length is None else file.tell() + length


def _read_ebml_size(file: BinaryIO) -> int | None:
    """Read a variable-length size (RFC 8794 Sec. 4); None if it is unknown."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    num_bytes = 9 - first[0].bit_length()
    value = first[0] & ((1 << (8 - num_bytes)) - 1)
    value = int.from_bytes(bytes([value]) + file.read(num_bytes - 1), "big")
    return None if value == (1 << 7 * num_bytes) - 1 else value


def build_packet_check(codec: str, extradata: bytes | None) -> Callable[[bytes], str]:
    """Build the check of a codec's packets: runs of zeros, and the byte rules of H.264 and HEVC.

    Returns:
        A function: bytes of a packet -> what is wrong with them, or "". For other codecs, it always returns "".
    """
    position = {"h264": 4, "hevc": 21}.get(codec)
    if position is not None and extradata and len(extradata) > position and extradata[0] == 1:
        length_bytes = (extradata[position] & 3) + 1
        return lambda data: _find_nal_fault(data, length_bytes)
    if codec in _DENSE_CODECS:
        return _find_zeros_fault
    return lambda _: ""


def _find_zeros_fault(data: bytes) -> str:
    # Zeros at the end may be padding.
    return "a run of zeros" if _ZEROS in data.rstrip(b"\0") else ""


def _find_nal_fault(data: bytes, length_bytes: int) -> str:
    position = 0
    while position < len(data):
        start = position + length_bytes
        position = start + int.from_bytes(data[position:start], "big")
        if start >= len(data) or position > len(data) or position == start:
            return "the lengths of its NAL units do not add up"
        for triple in _FORBIDDEN:
            if data.find(triple, start, position - _END_OF_STREAM_BYTES) >= 0:
                return f"a NAL unit contains the forbidden bytes {triple.hex(' ')}"
    return ""
