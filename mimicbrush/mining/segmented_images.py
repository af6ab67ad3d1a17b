"""Photographs with segments in the layout of SA-1B: NAME.jpg and NAME.json, as files or inside a tar.

They stay where they are: only the place of an image and of its segments is stored: file and offset. What is beside
what is decided here alone, for files and for members of tars: names are compared after `normalise_name`.
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import struct
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import ExifTags, Image, UnidentifiedImageError

from mimicbrush.data.pair import decode_jpeg
from mimicbrush.io.text import make_storable
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.refusals import UntrustedFileError
from mimicbrush.ops.rle import AnnotationError, SegmentError, read_annotation, run_lengths

JPEG_SUFFIXES = (".jpg", ".jpeg")
#: Suffixes of the segments of a photograph; the first that exists is used.
ANNOTATION_SUFFIXES = (".json", ".JSON")
#: Characters of a name, about what an operating system takes for a path.
LONGEST_NAME = 4096
#: Zeros that a writer of tars may put behind the end mark to fill its last record; usual are at most 10 kB.
_LONGEST_PADDING = 1 << 20
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
    width, height, notes = _check_jpeg(jpeg, options.max_pixels)
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
    detail = f"{len(segmentations)} segments, {len(segments)} with an area in the accepted range"
    detail = make_storable("; ".join([detail, *notes]))
    segments = segments[: options.max_segments]
    return SegmentedImage(width, height, [number for _, number in segments], [ratio for ratio, _ in segments], detail)


def _check_jpeg(jpeg: bytes, max_pixels: int) -> tuple[int, int, list[str]]:
    """Decode once, to know that it can be done; width and height in px, and what Pillow warns of."""
    notes: list[str] = []
    try:
        with warnings.catch_warnings(action="ignore"):  # decoding meets the same ones again
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
                width, height = image.size
                orientation = image.getexif().get(ExifTags.Base.Orientation, _NORMAL_ORIENTATION)
        if width * height > max_pixels:
            raise UntrustedFileError("too_large", f"{width} x {height} px, more than {max_pixels} pixels")
        decode_jpeg(jpeg, notes=notes)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UntrustedFileError("too_large", str(error)) from error
    except UnidentifiedImageError as error:  # its text holds an address in memory, another one in each run
        raise UntrustedFileError("damaged", "not a JPEG") from error
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise UntrustedFileError("damaged", f"not a complete JPEG: {error}") from error
    if orientation != _NORMAL_ORIENTATION:
        raise UntrustedFileError("rotated", f"EXIF orientation {orientation}")
    return width, height, notes


def normalise_name(name: str) -> str:
    """Give the one spelling of a name with forward slashes: `./a//b/../c.jpg` is `a/c.jpg`."""
    return posixpath.normpath(name)


def annotation_names(name: str) -> list[str]:
    """List the names that the segments of a photograph may have; of several that are there, the first counts."""
    path = PurePosixPath(name)
    if path.suffix.lower() not in JPEG_SUFFIXES:
        return []
    return [str(path.with_suffix(suffix)) for suffix in ANNOTATION_SUFFIXES]


def find_annotation(path: Path) -> Path:
    """Find the segments beside a photograph on disk; where there are none, the name that they should have."""
    names = [path.with_suffix(suffix) for suffix in ANNOTATION_SUFFIXES]
    return next((name for name in names if os.path.lexists(name)), names[0])


@dataclass(frozen=True)
class ArchiveMember:
    """A photograph of a tar with its segments; the two are read only when asked for.

    Attributes:
        name: of the photograph inside the tar, see `normalise_name`.
        image, annotation: where the tar has them.
    """

    name: str
    image: tarfile.TarInfo
    annotation: tarfile.TarInfo


@dataclass
class ArchiveListing:
    """What the headers of a tar name.

    Attributes:
        photographs: with segments, as they lie in the tar.
        refused: names, fit to be stored, of photographs with segments that cannot be told apart, and why.
        others: names of all other files.
    """

    photographs: list[ArchiveMember] = field(default_factory=list)
    refused: list[tuple[str, UntrustedFileError]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def open_archive(path: Path) -> tarfile.TarFile:
    """Open an uncompressed tar for reading by member; nothing is ever extracted to disk.

    Raises:
        UntrustedFileError: "bad_archive".
    """
    try:
        return tarfile.open(path, mode="r:", encoding="utf-8", errors="surrogateescape")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UntrustedFileError("bad_archive", str(error)) from error


def list_archive(archive: tarfile.TarFile) -> ArchiveListing:
    """Read all headers in order, and pair images with their segments.

    Raises:
        UntrustedFileError: "bad_archive": no file at all, a broken header, an end without end mark, or data behind it.
    """
    files: dict[str, tarfile.TarInfo] = {}
    twice: set[str] = set()
    try:
        for info in archive:
            if info.size < 0:  # the next header would be searched before this one, without end
                raise UntrustedFileError("bad_archive", f"{info.name!r} has a size of {info.size}")
            if info.isdir():
                continue
            name = normalise_name(info.name.lstrip("/"))
            if name in files:
                twice.add(name)
            files[name] = info
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UntrustedFileError("bad_archive", str(error)) from error
    _check_end(archive)
    listing = ArchiveListing()
    paired_names: set[str] = set()
    for member, annotation_name in _pair_members(files):
        paired_names |= {member.name, annotation_name}
        fault = _find_name_fault(member.name, annotation_name, twice)
        if fault is None:
            listing.photographs.append(member)
        else:
            listing.refused.append((make_name_storable(member.name), fault))
    listing.others = [name for name in files if name not in paired_names]
    return listing


def _pair_members(files: dict[str, tarfile.TarInfo]) -> Iterator[tuple[ArchiveMember, str]]:
    for name, info in files.items():
        annotation_name = next((each for each in annotation_names(name) if each in files), None)
        if annotation_name is not None:
            yield ArchiveMember(name, info, files[annotation_name]), annotation_name


def _find_name_fault(name: str, annotation_name: str, twice: set[str]) -> UntrustedFileError | None:
    for each in (name, annotation_name):
        if each in twice:
            return UntrustedFileError("ambiguous", f"the tar has {each!r} twice")
    return None if is_storable_name(name) else UntrustedFileError("bad_name", "not valid UTF-8, or too long")


def is_storable_name(name: str) -> bool:
    """Check whether a file name can be stored as it is: valid Unicode, and not too long."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return len(name) <= LONGEST_NAME


def make_name_storable(name: str) -> str:
    """Return a name as it is, or one that can be stored instead; different names stay different."""
    if is_storable_name(name):
        return name
    text = make_storable(name)
    if len(name) <= len(text):  # nothing was cut
        return text
    return f"{text} ({hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:16]})"


def _check_end(archive: tarfile.TarFile) -> None:
    """tarfile takes a broken header, or a part that was never downloaded, for the end; the true end is near it."""
    assert archive.fileobj is not None
    if not archive.getmembers():
        raise UntrustedFileError("bad_archive", "it has no files, only zeros: it is empty, or was not downloaded")
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) != tarfile.BLOCKSIZE or any(block):
        raise UntrustedFileError("bad_archive", f"no end mark at byte {archive.offset}: damaged or cut short")
    behind = archive.fileobj.read(_LONGEST_PADDING + 1)
    if len(behind) > _LONGEST_PADDING or any(behind):
        detail = f"much data or zeros after the end mark at byte {archive.offset}: an incomplete download, or two tars"
        raise UntrustedFileError("bad_archive", detail)


def read_member(archive: tarfile.TarFile, info: tarfile.TarInfo, max_bytes: int) -> bytes:
    """All bytes of one regular file of a tar.

    Raises:
        UntrustedFileError: a link or device, too large, or cut short.
    """
    if not info.isreg() or info.issparse():
        raise UntrustedFileError("not_a_file", f"{info.name!r} in the tar is a link, a device or a sparse file")
    if info.size > max_bytes:
        raise UntrustedFileError("too_large", f"{info.size} bytes, more than {max_bytes}")
    try:
        file = archive.extractfile(info)
        data = file.read() if file is not None else b""
    except (tarfile.TarError, OSError) as error:
        raise UntrustedFileError("bad_archive", str(error)) from error
    if len(data) != info.size:
        raise UntrustedFileError("bad_archive", f"only {len(data)} of {info.size} bytes are present")
    return data
