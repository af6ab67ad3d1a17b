"""Photographs with segments in the layout of SA-1B: NAME.jpg and NAME.json, as files or inside a tar.

They are not copied: the manifest stores the file and the offset of an image and of its segments. Only this module
decides which JSON belongs to which photograph, for files and for members of tars; names are compared after
`normalise_name`.
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
#: Longest name in characters, about the limit of operating systems for a path.
LONGEST_NAME = 4096
#: Largest number of zeros after the end mark of a tar, which fill its last record; at most 10 kB are common.
_LONGEST_PADDING = 1 << 20
_NORMAL_ORIENTATION = 1


@dataclass(frozen=True)
class SegmentedImage:
    """A photograph that can be decoded, with the segments that can be masks.

    Attributes:
        width_px, height_px: size of the photograph.
        segments: indices of the segments in the JSON, largest first; may be empty.
        ratios: their areas as shares of the photograph.
        detail: what was left out, as text for people.
    """

    width_px: int
    height_px: int
    segments: list[int]
    ratios: list[float]
    detail: str


def read_segmented_image(jpeg: bytes, annotation: bytes, options: MiningOptions) -> SegmentedImage:
    """Check a photograph and all of its segments, and choose segments by their area.

    Args:
        jpeg: the whole .jpg file.
        annotation: the whole .json file.
        options: limits of size and area.

    Raises:
        UntrustedFileError: one of them cannot be decoded, the EXIF data rotates the photograph, or a segment does not
            fit the photograph.
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
    """Check that a JPEG can be decoded, and return its width and height in px and the warnings of Pillow."""
    notes: list[str] = []
    try:
        with warnings.catch_warnings(action="ignore"):  # `decode_jpeg` collects the same warnings
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
                width, height = image.size
                orientation = image.getexif().get(ExifTags.Base.Orientation, _NORMAL_ORIENTATION)
        if width * height > max_pixels:
            raise UntrustedFileError("too_large", f"{width} x {height} px, more than {max_pixels} pixels")
        decode_jpeg(jpeg, notes=notes)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UntrustedFileError("too_large", str(error)) from error
    except UnidentifiedImageError as error:  # its text has an address in memory, which differs between runs
        raise UntrustedFileError("damaged", "not a JPEG") from error
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise UntrustedFileError("damaged", f"not a complete JPEG: {error}") from error
    if orientation != _NORMAL_ORIENTATION:
        raise UntrustedFileError("rotated", f"EXIF orientation {orientation}")
    return width, height, notes


def normalise_name(name: str) -> str:
    """Normalise a name with forward slashes: `./a//b/../c.jpg` becomes `a/c.jpg`."""
    return posixpath.normpath(name)


def annotation_names(name: str) -> list[str]:
    """List the names that the segments of a photograph may have; the first that exists is used."""
    path = PurePosixPath(name)
    if path.suffix.lower() not in JPEG_SUFFIXES:
        return []
    return [str(path.with_suffix(suffix)) for suffix in ANNOTATION_SUFFIXES]


def find_annotation(path: Path) -> Path:
    """Find the segments of a photograph on disk; if there are none, return the expected name."""
    names = [path.with_suffix(suffix) for suffix in ANNOTATION_SUFFIXES]
    return next((name for name in names if os.path.lexists(name)), names[0])


@dataclass(frozen=True)
class ArchiveMember:
    """A photograph of a tar with its segments. Only their headers have been read.

    Attributes:
        name: name of the photograph in the tar, see `normalise_name`.
        image, annotation: headers of the two members.
    """

    name: str
    image: tarfile.TarInfo
    annotation: tarfile.TarInfo


@dataclass
class ArchiveListing:
    """The files of a tar, by its headers.

    Attributes:
        photographs: photographs with segments, in the order of the tar.
        refused: photographs with segments that are not read: (name that can be stored, reason).
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
        UntrustedFileError: "bad_archive": no files, a damaged header, no end mark, or data after the end mark.
    """
    files: dict[str, tarfile.TarInfo] = {}
    twice: set[str] = set()
    try:
        for info in archive:
            if info.size < 0:  # tarfile would go backwards, in an endless loop
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
    """Return a name that can be stored: the name itself if possible; different names stay different."""
    if is_storable_name(name):
        return name
    text = make_storable(name)
    if len(name) <= len(text):  # nothing was cut
        return text
    return f"{text} ({hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:16]})"


def _check_end(archive: tarfile.TarFile) -> None:
    """Check that a tar has an end mark: tarfile also stops without error at a damaged header or at missing data."""
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
    """Read all bytes of a regular file of a tar.

    Raises:
        UntrustedFileError: it is a link or device, too large, or truncated.
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
