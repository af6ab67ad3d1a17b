"""A mined pair. It reads its images by offset and length from a tar, or from their own files."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from mimicbrush.data.schema import Kind
from mimicbrush.errors import DataError, InputError, is_full_disk
from mimicbrush.io.color_profiles import convert_to_srgb
from mimicbrush.io.text import describe_error
from mimicbrush.ops.rle import AnnotationError, SegmentError, decode_segment, read_annotation

#: Where an image or a JSON is in its file: (offset, length) in bytes.
Span = tuple[int, int]

#: Largest size of an image or JSON of a pair. A row with a larger size is damaged; reading it would fill the memory.
_MAX_BYTES = 2**28
#: The longest side that a JPEG can have.
_MAX_SIDE_PX = 65_535


@contextmanager
def refuse_pair(pair_id: str) -> Iterator[None]:
    """Turn any error of a pair into a `DataError`, so that a bad pair does not end the run.

    Two errors are raised unchanged: a full disk, which no pair causes, and an `InputError`, which is about an option.

    Args:
        pair_id: name of the pair, for the message.

    Raises:
        DataError: something inside went wrong.
    """
    try:
        yield
    except (DataError, InputError):
        raise
    except Exception as error:
        if is_full_disk(error):
            raise
        raise DataError(f"pair {pair_id}: {describe_error(error)}") from error


@dataclass(frozen=True)
class Pair:
    """One pair of a manifest: a row with status "pair".

    Attributes:
        pair_id: unique in its manifest.
        kind: "video" (two frames) or "image" (a photograph with segments).
        source_path, source_hash: path and SHA-256 of the mined video or photograph.
        size_px: (height, width) of the stored images.
        a_file: the file that contains the images.
        a_span, b_span: (offset, length) of the two JPEGs in it; `b_span` is None for a photograph.
        a_points, b_points: (K, 2) float32 matched keypoints (x, y) in pixels of the stored images.
        ssim: SSIM of the two frames; NaN for photographs.
        annotation_file, annotation_span: where the JSON with the segments of a photograph is.
        segments: (K,) int32 indices of the segments in this JSON that can be masks.
        segment_ratios: (K,) float32, their areas as shares of the image, largest first.
        a_sha256, b_sha256: SHA-256 of the JPEGs, hex; "" if it was not stored.
        a_frame, b_frame: numbers of the frames in their video; -1 for photographs.
    """

    pair_id: str
    kind: Kind
    source_path: str
    source_hash: str
    size_px: tuple[int, int]
    a_file: Path
    a_span: Span
    b_span: Span | None
    a_points: np.ndarray
    b_points: np.ndarray
    ssim: float
    annotation_file: Path | None
    annotation_span: Span
    segments: np.ndarray
    segment_ratios: np.ndarray
    a_sha256: str = ""
    b_sha256: str = ""
    a_frame: int = -1
    b_frame: int = -1

    def check(self) -> None:
        """Check that the values of the row are possible, before any file is opened.

        Raises:
            DataError: its values contradict each other, or no image can have them.
        """
        if fault := _find_row_fault(self):
            raise DataError(f"pair {self.pair_id}: {fault}; mine {self.source_path} again")

    def read_a(self, reduce: int = 1) -> np.ndarray:
        """Read the first image, (H, W, 3) uint8 RGB; `reduce` as in `decode_jpeg`."""
        return self.read(self.a_span, reduce)

    def read_b(self, reduce: int = 1) -> np.ndarray:
        """Read the second image, (H, W, 3) uint8 RGB; for a photograph, the first image again."""
        return self.read(self.b_span or self.a_span, reduce)

    def read(self, span: Span, reduce: int = 1) -> np.ndarray:
        """Read the image at a span, (H, W, 3) uint8 RGB.

        Raises:
            DataError: see `check`; or the file is missing or has changed. The hash is compared, because a JPEG can
                still be decoded when half of its bytes are replaced by zeros.
        """
        self.check()
        data = self._bytes(self.a_file, span)
        expected = self.a_sha256 if span == self.a_span else self.b_sha256
        if expected and hashlib.sha256(data).hexdigest() != expected:
            raise self._fault(self.a_file, span, "are not what was mined (different SHA-256)")
        try:
            return decode_jpeg(data, reduce, self.size_px)
        except (OSError, ValueError, SyntaxError) as error:
            raise self._fault(self.a_file, span, f"are not a complete JPEG ({error})") from error

    def read_segment(self, number: int) -> np.ndarray:
        """Read a segment of a photograph, (H, W) uint8, 0 or 1.

        Args:
            number: 0..K-1, index in `segment_ratios`.

        Raises:
            DataError: the JSON is missing or has changed.
        """
        assert self.annotation_file is not None, f"pair {self.pair_id} is no photograph with segments"
        try:
            segmentation = read_annotation(self._bytes(self.annotation_file, self.annotation_span))[
                int(self.segments[number])
            ]
            return decode_segment(segmentation, *self.size_px)
        except (AnnotationError, SegmentError, IndexError) as error:
            what = f"are not the segments that were mined ({error})"
            raise self._fault(self.annotation_file, self.annotation_span, what) from error

    def _bytes(self, file: Path, span: Span) -> bytes:
        offset, length = span
        try:
            # Opened without blocking, because opening a FIFO or a device could wait forever.
            with open(file, "rb", opener=_open_at_once) as stream:
                status = os.fstat(stream.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise DataError(f"pair {self.pair_id}: {file} is not a regular file")
                stream.seek(offset)
                data = stream.read(max(0, min(length, status.st_size - offset)))
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL character
            raise DataError(f"pair {self.pair_id}: cannot read {file}: {error}") from error
        if len(data) != length:
            raise self._fault(file, span, f"end after {len(data)}")
        return data

    def _fault(self, file: Path, span: Span, what: str) -> DataError:
        offset, length = span
        return DataError(
            f"pair {self.pair_id}: bytes {offset}..{offset + length} of {file} {what}; "
            f"mine {self.source_path} again (delete this shard's marker and run the mining command again)"
        )


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _find_row_fault(pair: Pair) -> str:
    """Find what is wrong with a row; "" for nothing."""
    height, width = pair.size_px
    if not (1 <= height <= _MAX_SIDE_PX and 1 <= width <= _MAX_SIDE_PX):
        return f"its images are listed as {width} x {height} px; expected sides from 1 to {_MAX_SIDE_PX} px"
    spans = [("a", pair.a_span)]
    if pair.kind == "video" or pair.b_span is not None:
        spans.append(("b", pair.b_span or (-1, -1)))
    if pair.annotation_file is not None:
        spans.append(("annotation", pair.annotation_span))
    for name, (offset, length) in spans:
        if offset < 0 or not 1 <= length <= _MAX_BYTES:
            expected = f"an offset of at least 0 and a length from 1 to {_MAX_BYTES}"
            return f"{name}_offset={offset}, {name}_length={length}; expected {expected}"
    if len(pair.a_points) != len(pair.b_points):
        return f"it has {len(pair.a_points)} matched points in one image and {len(pair.b_points)} in the other"
    for points in (pair.a_points, pair.b_points):
        if ((points < -1) | (points > (width, height))).any():
            return f"a matched point is outside of its images of {width} x {height} px"
    if pair.kind == "video" and not np.isfinite(pair.ssim):
        return f"its SSIM is {pair.ssim}"
    if len(pair.segments) != len(pair.segment_ratios):
        return f"it has {len(pair.segments)} segments, but {len(pair.segment_ratios)} areas of segments"
    if (pair.segments < 0).any() or not np.isfinite(pair.segment_ratios).all():
        return "the index of a segment is negative, or its area is not a number"
    return ""


def decode_jpeg(
    data: bytes, reduce: int = 1, size_px: tuple[int, int] | None = None, notes: list[str] | None = None
) -> np.ndarray:
    """Decode a JPEG strictly: a truncated one is an error, never a half-grey image.

    Warnings of Pillow, such as about damaged EXIF data, are not printed, because they do not name the file.

    Args:
        data: the bytes of the whole file.
        reduce: 1, 2, 4 or 8: divide the size by this. The JPEG library does it during decoding, which is a good
            low-pass filter, and much faster.
        size_px: (height, width) that the whole image must have; None: any.
        notes: the texts of these warnings are appended to it.

    Returns:
        (ceil(H / reduce), ceil(W / reduce), 3) uint8 in sRGB, converted from the colour profile of the file.

    Raises:
        OSError, ValueError: it is not a JPEG, is truncated, or has another size.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pixels = _decode_jpeg(data, reduce, size_px)
    if notes is not None:
        notes += dict.fromkeys(str(each.message).strip() for each in caught)
    return pixels


def _decode_jpeg(data: bytes, reduce: int, size_px: tuple[int, int] | None) -> np.ndarray:
    try:
        opened = Image.open(io.BytesIO(data), formats=["JPEG"])
    except UnidentifiedImageError as error:  # its text has an address in memory, which differs between runs
        raise ValueError("it does not start like a JPEG") from error
    with opened as image:
        if size_px is not None and image.size != size_px[::-1]:
            # Checked before decoding, because a small file can contain a huge image.
            raise ValueError(f"it has {image.width} x {image.height} px, not {size_px[1]} x {size_px[0]}")
        expected = tuple(-(-side // reduce) for side in image.size)
        if reduce > 1:
            # Rounded down, because Pillow takes the largest reduction whose result is at least as large as requested.
            image.draft("RGB", (max(1, image.width // reduce), max(1, image.height // reduce)))
        icc = image.info.get("icc_profile")
        pixels = image if image.mode == "RGB" and not icc else convert_to_srgb(image, icc)
        if pixels.size != expected:
            raise ValueError(f"decoded to {pixels.size} instead of {expected} at 1/{reduce}")
        return np.asarray(pixels)
