"""Photographs with segments in the layout of SA-1B: NAME.jpg beside NAME.json, loose or inside a tar.

They stay where they are: only the place of an image and of its segments is stored: file and offset.
"""

from __future__ import annotations

import io
import struct
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import ExifTags, Image, UnidentifiedImageError

from mimicbrush.data.pair import decode_jpeg
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.refusals import UntrustedFileError
from mimicbrush.ops.rle import AnnotationError, SegmentError, read_annotation, run_lengths

JPEG_SUFFIXES = (".jpg", ".jpeg")
_NORMAL_ORIENTATION = 1


@dataclass(frozen=True)
class SegmentedImage:
    """A photograph that decodes, with the segments that can be masks.

    Attributes:
        width_px, height_px: of the photograph.
        segments: numbers of the annotations, largest first; may be empty.
        ratios: their areas over that of the photograph.
        detail: what was left out, for a person to read.
    """

    width_px: int
    height_px: int
    segments: list[int]
    ratios: list[float]
    detail: str


def read_segmented_image(jpeg: bytes, annotation: bytes, options: MiningOptions) -> SegmentedImage:
    """Check a photograph and all of its segments, and choose by area.

    Args:
        jpeg: the whole .jpg file.
        annotation: the whole .json file.
        options: limits of size and area.

    Raises:
        UntrustedFileError: what does not decode, is turned by EXIF, or does not fit together.
    """
    width, height = _check_jpeg(jpeg, options.max_pixels)
    segments: list[tuple[float, int]] = []
    try:
        segmentations = read_annotation(annotation)
    except AnnotationError as error:
        raise UntrustedFileError("bad_json", str(error)) from error
    for number, segmentation in enumerate(segmentations):
        try:
            ratio = sum(run_lengths(segmentation, height, width)[1::2]) / (height * width)
        except SegmentError as error:
            raise UntrustedFileError("bad_segment", f"segment {number}: {error}") from error
        if options.min_segment_ratio <= ratio <= options.max_segment_ratio:
            segments.append((ratio, number))
    segments.sort(key=lambda entry: -entry[0])
    detail = f"{len(segmentations)} segments, {len(segments)} of an area in the range"
    segments = segments[: options.max_segments]
    return SegmentedImage(width, height, [number for _, number in segments], [ratio for ratio, _ in segments], detail)


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
    except UnidentifiedImageError as error:  # its text holds an address in memory, another one in each run
        raise UntrustedFileError("damaged", "no JPEG") from error
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise UntrustedFileError("damaged", f"no whole JPEG: {error}") from error
    if orientation != _NORMAL_ORIENTATION:
        raise UntrustedFileError("rotated", f"EXIF orientation {orientation}")
    return width, height


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
    """Read all headers in order, and pair images with their segments.

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
    members = list(_pair_members(files))
    paired_names = {info.name for member in members for info in (member.image, member.annotation)}
    return members, [name for name in files if name not in paired_names]


def _pair_members(files: dict[str, tarfile.TarInfo]) -> Iterator[ArchiveMember]:
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
