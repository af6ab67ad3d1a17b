"""Checks the structure of Matroska and WebM files: nesting and names of elements, tracks of blocks, and checksums.

When FFmpeg finds an unknown element, it continues at the next cluster and does not report the lost frames. It also does
not verify the checksums that it and other muxers write for each cluster (RFC 9559, RFC 8794 Sec. 11.3.1).

This module refuses no file itself: `containers.check_container` refuses a file as "damaged" if `find_matroska_fault`
finds a fault.
"""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path
from typing import NamedTuple

_EBML, _SEGMENT, _CLUSTER, _TRACKS = 0x1A45DFA3, 0x18538067, 0x1F43B675, 0x1654AE6B
_TRACK_ENTRY, _TRACK_NUMBER, _SIMPLE_BLOCK, _BLOCK_GROUP, _BLOCK = 0xAE, 0xD7, 0xA3, 0xA0, 0xA1
_CRC, _VOID = 0xBF, 0xEC
#: Children of a Segment: SeekHead, Info, Cues, Tags, Chapters, Attachments and those above.
_LEVEL_1 = {_CLUSTER, _TRACKS, 0x114D9B74, 0x1549A966, 0x1C53BB6B, 0x1254C367, 0x1043A770, 0x1941A469, _CRC, _VOID}
#: Children of a Cluster: Timestamp, SilentTracks, Position, PrevSize, EncryptedBlock and those above.
_IN_CLUSTER = {_SIMPLE_BLOCK, _BLOCK_GROUP, 0xE7, 0x5854, 0xA7, 0xAB, 0xAF, _CRC, _VOID}
_MAX_SIZE_BYTES, _MAX_ID_BYTES = 8, 4


class _Element(NamedTuple):
    """One element: offsets of its content; `end` is None if its size is unknown (a live recording)."""

    id: int
    start: int
    end: int | None


class _FaultError(Exception):
    """A fault in the structure of the file."""


def find_matroska_fault(path: Path) -> str:
    """Find a fault in the structure of a Matroska file; "" if there is none.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _check_file(data)
        except _FaultError as fault:
            return str(fault)
    return ""


def _check_file(data: mmap.mmap) -> None:
    head = _read_element(data, 0, len(data))
    if head.id != _EBML or head.end is None:
        raise _FaultError("no EBML header")
    segment = _read_element(data, head.end, len(data))
    if segment.id != _SEGMENT:
        raise _FaultError("no Segment after the EBML header")
    end = len(data) if segment.end is None else segment.end
    position = segment.start
    tracks: set[int] = set()
    while position < end:
        element = _read_element(data, position, end)
        if element.id not in _LEVEL_1:
            raise _FaultError(f"unknown element {element.id:x} at byte {position}")
        _check_crc(data, element)
        if element.id == _TRACKS:
            tracks |= _read_track_numbers(data, element)
        if element.id == _CLUSTER:
            position = _check_cluster(data, element, end, tracks)
        elif element.end is None:
            raise _FaultError(f"the element at byte {position} has no size")
        else:
            position = element.end


def _check_cluster(data: mmap.mmap, cluster: _Element, limit: int, tracks: set[int]) -> int:
    """Check a cluster, and return its end."""
    end = limit if cluster.end is None else cluster.end
    position = cluster.start
    while position < end:
        element = _read_element(data, position, end)
        if cluster.end is None and element.id in _LEVEL_1 - _IN_CLUSTER:
            break
        if element.id not in _IN_CLUSTER or element.end is None:
            raise _FaultError(f"unknown element {element.id:x} in the cluster, at byte {position}")
        if element.id == _SIMPLE_BLOCK:
            _check_block(data, element, tracks)
        elif element.id == _BLOCK_GROUP:
            _check_group(data, element, tracks)
        position = element.end
    return position


def _check_group(data: mmap.mmap, group: _Element, tracks: set[int]) -> None:
    assert group.end is not None
    position, num_blocks = group.start, 0
    while position < group.end:
        element = _read_element(data, position, group.end)
        if element.end is None:
            raise _FaultError(f"the element at byte {position} has no size")
        if element.id == _BLOCK:
            _check_block(data, element, tracks)
            num_blocks += 1
        position = element.end
    if num_blocks != 1:
        raise _FaultError(f"a group of {num_blocks} blocks at byte {group.start}")


def _check_block(data: mmap.mmap, block: _Element, tracks: set[int]) -> None:
    number, _ = _read_vint(data, block.start, len(data), _MAX_SIZE_BYTES)
    if number not in tracks:
        raise _FaultError(f"the block at byte {block.start} belongs to no track")


def _read_track_numbers(data: mmap.mmap, tracks: _Element) -> set[int]:
    numbers = set()
    for entry in _read_children(data, tracks):
        if entry.id == _TRACK_ENTRY:
            for child in _read_children(data, entry):
                if child.id == _TRACK_NUMBER:
                    numbers.add(int.from_bytes(data[child.start : child.end], "big"))
    return numbers


def _read_children(data: mmap.mmap, parent: _Element) -> list[_Element]:
    children = []
    position = parent.start
    if parent.end is None:
        raise _FaultError(f"the element at byte {parent.start} has no size")
    while position < parent.end:
        child = _read_element(data, position, parent.end)
        if child.end is None:
            raise _FaultError(f"the element at byte {position} has no size")
        children.append(child)
        position = child.end
    return children


def _check_crc(data: mmap.mmap, element: _Element) -> None:
    """Verify the checksum of an element, if it has one: its first child, which covers all other children."""
    if element.end is None or element.id in (_CRC, _VOID) or element.start >= element.end:
        return
    first = _read_element(data, element.start, element.end)
    if first.id != _CRC or first.end is None:
        return
    stored = int.from_bytes(data[first.start : first.end], "little")
    with memoryview(data) as view, view[first.end : element.end] as covered:
        computed = zlib.crc32(covered)
    if computed != stored:
        raise _FaultError(f"the checksum of the element at byte {element.start} is wrong")


def _read_element(data: mmap.mmap, position: int, limit: int) -> _Element:
    identity, size_at = _read_vint(data, position, limit, _MAX_ID_BYTES, keep_marker=True)
    size, start = _read_vint(data, size_at, limit, _MAX_SIZE_BYTES)
    if size == (1 << 7 * (start - size_at)) - 1:
        return _Element(identity, start, None)
    if start + size > limit:
        raise _FaultError(f"the element {identity:x} at byte {position} is longer than its parent")
    return _Element(identity, start, start + size)


def _read_vint(
    data: mmap.mmap, position: int, limit: int, max_bytes: int, *, keep_marker: bool = False
) -> tuple[int, int]:
    """Read a number of variable length (RFC 8794 Sec. 4), and return it with the position after it."""
    first = data[position] if position < limit else 0
    num_bytes = 9 - first.bit_length()
    if num_bytes > max_bytes or position + num_bytes > limit:
        raise _FaultError(f"no element at byte {position}")
    value = int.from_bytes(data[position : position + num_bytes], "big")
    return (value if keep_marker else value & ((1 << 7 * num_bytes) - 1)), position + num_bytes
