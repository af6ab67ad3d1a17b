"""Photographs with segments in the layout of SA-1B: NAME.jpg beside NAME.json, loose or inside a tar.

The JSON is `{"image": {...}, "annotations": [{"segmentation": {"size": [h, w], "counts": ...}, ...}]}` with
COCO run lengths. They are checked here, since the library that decodes them trusts what it is given.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

from mimicbrush.data.manifest import decode_jpeg
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.reasons import UntrustedFileError

JPEG_SUFFIXES = (".jpg", ".jpeg")
_NORMAL_ORIENTATION = 1


@dataclass(frozen=True)
class SegmentedImage:
    """A photograph that decodes, with the segments worth keeping.

    Attributes:
        width_px, height_px: of the photograph.
        segments: COCO RLEs {"size": [h, w], "counts": str}, largest first; may be empty.
        detail: what was left out, for a person to read.
    """

    width_px: int
    height_px: int
    segments: list[dict[str, Any]]
    detail: str


def read_segmented_image(jpeg: bytes, annotation: bytes, options: MiningOptions) -> SegmentedImage:
    """Check a photograph and its segments.

    Args:
        jpeg: the whole .jpg file.
        annotation: the whole .json file.
        options: limits of size and area.

    Raises:
        UntrustedFileError: what does not decode, is turned by EXIF, or does not fit together.
    """
    width, height = _check_jpeg(jpeg, options.max_pixels)
    kept: list[tuple[int, dict[str, Any]]] = []
    segmentations = _segmentations(annotation)
    for number, segmentation in enumerate(segmentations):
        counts = _run_lengths(segmentation, height, width, number)
        area = sum(counts[1::2])
        if options.min_segment_ratio <= area / (height * width) <= options.max_segment_ratio:
            kept.append((area, _as_rle(counts, height, width)))
    kept.sort(key=lambda entry: -entry[0])
    detail = f"{len(segmentations)} segments, {len(kept)} of an area in the range"
    return SegmentedImage(width, height, [rle for _, rle in kept[: options.max_segments]], detail)


def _check_jpeg(jpeg: bytes, max_pixels: int) -> tuple[int, int]:
    """Decode once, to know that it can be done; (width, height) in px."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
                width, height = image.size
                orientation = image.getexif().get(ExifTags.Base.Orientation, _NORMAL_ORIENTATION)
        if width * height > max_pixels:
            raise UntrustedFileError("too_large", f"{width} x {height} px, more than {max_pixels} pixels")
        decode_jpeg(jpeg)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UntrustedFileError("too_large", str(error)) from error
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise UntrustedFileError("damaged", f"no whole JPEG: {error}") from error
    if orientation != _NORMAL_ORIENTATION:
        raise UntrustedFileError("rotated", f"EXIF orientation {orientation}")
    return width, height


def _segmentations(annotation: bytes) -> list[dict[str, Any]]:
    try:
        content = json.loads(annotation)
    except (ValueError, RecursionError) as error:
        raise UntrustedFileError("bad_json", str(error)) from error
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise UntrustedFileError("bad_json", "no list 'annotations'")
    segmentations: list[dict[str, Any]] = []
    for number, entry in enumerate(annotations):
        segmentation = entry.get("segmentation") if isinstance(entry, dict) else None
        if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
            raise UntrustedFileError("bad_json", f"annotation {number} has no segmentation with 'size' and 'counts'")
        segmentations.append(segmentation)
    return segmentations


def _run_lengths(segmentation: dict[str, Any], height: int, width: int, number: int) -> list[int]:
    """The run lengths (background first), checked to tile a picture of this size exactly."""
    if segmentation["size"] != [height, width]:
        raise UntrustedFileError("bad_segment", f"segment {number} is of {segmentation['size']}, not {[height, width]}")
    counts = segmentation["counts"]
    try:
        runs = _unpack(counts, height * width) if isinstance(counts, str) else counts
        if not isinstance(runs, list) or not all(type(run) is int for run in runs):
            raise ValueError("the counts are neither a string nor a list of whole numbers")
        if any(run < 0 for run in runs) or sum(runs) != height * width:
            raise ValueError(f"the runs sum to {sum(runs)}, not {height * width}, or one is negative")
    except ValueError as error:
        raise UntrustedFileError("bad_segment", f"segment {number}: {error}") from error
    return runs


def _unpack(counts: str, num_pixels: int) -> list[int]:
    """Undo COCO's packing: 5 bits a character, the sixth says that more follow; differences from run 3 on."""
    runs: list[int] = []
    value, shift = 0, 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            raise ValueError(f"the counts hold {character!r}, or a number without end")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        if not 0 <= value <= num_pixels:
            raise ValueError(f"run {len(runs)} is {value}, outside 0..{num_pixels}")
        runs.append(value)
        value, shift = 0, 0
    if shift:
        raise ValueError("the counts end within a number")
    return runs


def _as_rle(counts: Sequence[int], height: int, width: int) -> dict[str, Any]:
    packed = coco_mask.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)
    return {"size": [height, width], "counts": packed["counts"].decode("ascii")}


@dataclass(frozen=True)
class ArchiveMember:
    """A photograph of a tar with its segments; the two are read only when asked for.

    Attributes:
        name: of the photograph inside the tar.
        image, annotation: where the tar has them.
    """

    name: str
    image: tarfile.TarInfo
    annotation: tarfile.TarInfo


def open_archive(path: Path) -> tarfile.TarFile:
    """Open an uncompressed tar for reading by member; nothing is ever extracted to disk.

    Raises:
        UntrustedFileError: "bad_archive".
    """
    try:
        return tarfile.open(path, mode="r:")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UntrustedFileError("bad_archive", str(error)) from error


def list_archive(archive: tarfile.TarFile) -> tuple[list[ArchiveMember], list[str]]:
    """Read all headers in order, and pair pictures with their segments.

    Returns:
        The photographs with segments, as they lie in the tar, and the names of all other files.

    Raises:
        UntrustedFileError: "bad_archive": a broken header, an end without end mark, or a name that occurs twice.
    """
    files: dict[str, tarfile.TarInfo] = {}
    try:
        for info in archive:
            if info.isdir():
                continue
            if info.name in files:
                raise UntrustedFileError("bad_archive", f"the name {info.name!r} occurs twice")
            files[info.name] = info
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UntrustedFileError("bad_archive", str(error)) from error
    _check_end(archive)
    members = list(_paired(files))
    used = {info.name for member in members for info in (member.image, member.annotation)}
    return members, [name for name in files if name not in used]


def _paired(files: dict[str, tarfile.TarInfo]) -> Iterator[ArchiveMember]:
    for name, info in files.items():
        path = PurePosixPath(name)
        annotation = files.get(str(path.with_suffix(".json"))) if path.suffix.lower() in JPEG_SUFFIXES else None
        if annotation is not None:
            yield ArchiveMember(name, info, annotation)


def _check_end(archive: tarfile.TarFile) -> None:
    """tarfile takes a broken header for the end of the archive; the true end is a block of zeros."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) != tarfile.BLOCKSIZE or any(block):
        raise UntrustedFileError("bad_archive", f"no end mark at byte {archive.offset}: damaged or cut short")


def read_member(archive: tarfile.TarFile, info: tarfile.TarInfo, max_bytes: int) -> bytes:
    """All bytes of one regular file of a tar.

    Raises:
        UntrustedFileError: a link or device, too large, or cut short.
    """
    if not info.isreg() or info.issparse():
        raise UntrustedFileError("not_a_file", f"{info.name!r} in the tar is a link, a device or sparse")
    if info.size > max_bytes:
        raise UntrustedFileError("too_large", f"{info.size} bytes, more than {max_bytes}")
    try:
        file = archive.extractfile(info)
        data = file.read() if file is not None else b""
    except (tarfile.TarError, OSError) as error:
        raise UntrustedFileError("bad_archive", str(error)) from error
    if len(data) != info.size:
        raise UntrustedFileError("bad_archive", f"{len(data)} of {info.size} bytes are there")
    return data
