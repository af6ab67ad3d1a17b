"""The images of the report: kept pairs, refused pairs and photographs, each as a data URI of limited size."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mimicbrush.data.manifest import PairTable, list_manifest_parts
from mimicbrush.data.pair import Pair, decode_jpeg
from mimicbrush.errors import DataError
from mimicbrush.mining.jpeg import encode_jpeg, shrink_to_side
from mimicbrush.mining.report.statistics import build_grid_mask, find_image_box, hash_rows, measure_motion, spread_rows
from mimicbrush.ops.plot import plot_matches, tint, tint_segments

KEPT_PAIRS, REFUSED_EXAMPLES, PHOTOGRAPHS = 12, 24, 6
_PANEL_HEIGHT_PX, _PANEL_WIDTH_PX, _PHOTOGRAPH_PX = 200, 640, 420
_JPEG_QUALITY = 78
_MASK_COLOUR = (236, 64, 122)
_MAX_SEGMENTS = 12
#: The miner's thumbnails have at most about 20 KB; much larger ones are not from the miner.
_MAX_THUMBNAIL_BYTES = 40_000


@dataclass(frozen=True)
class EmbeddedImage:
    """A JPEG inside the page.

    Attributes:
        uri: "data:image/jpeg;base64,...".
        width_px, height_px: of the image.
        alt: description of the image for people who do not see it.
    """

    uri: str
    width_px: int
    height_px: int
    alt: str


@dataclass(frozen=True)
class CaptionedImages:
    """Images side by side, with their caption.

    Attributes:
        images: from left to right; none if they could not be read, and `note` then says why.
        title, note: the two lines below the images.
        tag: a word on a badge; "" for none.
    """

    images: tuple[EmbeddedImage, ...]
    title: str
    note: str
    tag: str = ""


def render_kept_pairs(pairs: PairTable) -> list[CaptionedImages]:
    """Render video pairs, spread over the clips, with lines between matches and the paper's mask over one frame."""
    keys = hash_rows(pairs.column("source_key"), pairs.column("a_frame"))
    numbers = spread_rows(pairs.column("source_key"), keys, KEPT_PAIRS)
    gaps = pairs.column("b_time_s") - pairs.column("a_time_s")
    return [_render_kept_pair(pairs[int(number)], float(gaps[number])) for number in numbers]


def _render_kept_pair(pair: Pair, gap_s: float) -> CaptionedImages:
    note = f"SSIM {pair.ssim:.2f}, {len(pair.a_points)} matches, {gap_s:.1f} s apart, moved {measure_motion(pair):.1%}"
    try:
        a, b = pair.read_a(), pair.read_b()
    except DataError as error:
        return _caption_unreadable(pair.source_path, error)
    mask = _mask_on_image(pair)
    masked = tint(a, cv2.resize(mask, a.shape[1::-1], interpolation=cv2.INTER_NEAREST), _MASK_COLOUR)
    panel = plot_matches(a, b, pair.a_points, pair.b_points, _PANEL_HEIGHT_PX)
    panel = shrink_to_side(panel, _PANEL_WIDTH_PX)
    masked = shrink_to_side(masked, max(1, round(masked.shape[1] * panel.shape[0] / masked.shape[0])))
    lines = min(60, len(pair.a_points))
    images = (
        _embed_image(masked, f"A frame of {pair.source_path} with a grid mask over it"),
        _embed_image(panel, f"This frame and a later one, with lines between {lines} of their matches"),
    )
    return CaptionedImages(images, pair.source_path, note)


def _mask_on_image(pair: Pair) -> np.ndarray:
    rows, columns = find_image_box(pair.size_px)
    return np.ascontiguousarray(build_grid_mask(pair)[0][rows, columns])


def render_photographs(pairs: PairTable) -> list[CaptionedImages]:
    """Render photographs with their largest segments in colours."""
    keys = hash_rows(pairs.column("source_key"), pairs.column("a_frame"))
    numbers = spread_rows(pairs.column("source_key"), keys, PHOTOGRAPHS)
    return [_render_photograph(pairs[int(number)]) for number in numbers]


def _render_photograph(pair: Pair) -> CaptionedImages:
    count = min(_MAX_SEGMENTS, len(pair.segments))
    try:
        image = shrink_to_side(pair.read_a(), _PHOTOGRAPH_PX)
        segments = [
            cv2.resize(pair.read_segment(number), image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
            for number in range(count)
        ]
    except DataError as error:
        return _caption_unreadable(pair.source_path, error)
    ratios = pair.segment_ratios
    note = f"{len(ratios)} segments that can be masks, with {ratios.min():.1%} to {ratios.max():.1%} of the image"
    alt = f"The photograph {pair.source_path} with {count} segments in colours"
    return CaptionedImages((_embed_image(tint_segments(image, segments), alt),), pair.source_path, note)


def render_refused_pairs(root: Path) -> list[CaptionedImages]:
    """Collect the audit's thumbnails of refused pairs, spread over the reasons."""
    parts = [root / "audit" / part.name for part in list_manifest_parts(root)]
    tables = [(part, table) for part in parts if (table := _read_audit_words(part)) is not None and len(table)]
    if not tables:
        return []
    words = pa.concat_tables([table for _, table in tables])
    part_of = np.repeat(np.arange(len(tables)), [len(table) for _, table in tables])
    row_of = np.concatenate([np.arange(len(table)) for _, table in tables])
    frames = words["a_frame"].to_numpy() * 2**20 + words["b_frame"].to_numpy()
    names = words["source_path"].combine_chunks().dictionary_encode()
    of_name = np.array([hash_text(name) for name in names.dictionary.to_pylist()], np.uint64)
    keys = hash_rows(of_name[names.indices.to_numpy()], frames)
    reasons = words["reason"].combine_chunks().dictionary_encode().indices.to_numpy()
    images = []
    for number in spread_rows(reasons, keys, REFUSED_EXAMPLES):
        values = {name: words[name][int(number)].as_py() for name in words.column_names}
        data = _read_audit_image(tables[part_of[number]][0], int(row_of[number]))
        images.append(_caption_refused(values, data))
    return sorted(images, key=lambda image: (image.tag, image.title))


def hash_text(text: str) -> int:
    """Hash a text to 64 bits, the same in every process."""
    value = 0xCBF29CE484222325  # FNV-1a
    for byte in text.encode("utf-8", "backslashreplace"):
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def _read_audit_words(part: Path) -> pa.Table | None:
    try:
        return pq.read_table(
            pa.OSFile(os.fsencode(part)), columns=["source_path", "reason", "a_frame", "b_frame", "ssim", "num_matches"]
        )
    except (pa.ArrowException, OSError):  # `mimicbrush pairs verify` reports what is wrong with the file
        return None


def _read_audit_image(part: Path, row: int) -> bytes:
    try:
        data: bytes = pq.read_table(pa.OSFile(os.fsencode(part)), columns=["picture"])["picture"][row].as_py()
    except (pa.ArrowException, OSError):
        return b""
    return data


def _caption_refused(values: dict[str, object], data: bytes) -> CaptionedImages:
    is_single = values["b_frame"] == -1
    facts = [f"frame {values['a_frame']}" if is_single else f"frames {values['a_frame']} and {values['b_frame']}"]
    if values["ssim"] == values["ssim"]:  # NaN if it was not computed
        facts.append(f"SSIM {values['ssim']:.2f}")
    if values["num_matches"] != -1:
        facts.append(f"{values['num_matches']} matches")
    title, tag = str(values["source_path"]), str(values["reason"])
    alt = f"{'A frame' if is_single else 'Two frames'} of {title}, refused as {tag}"
    try:
        if len(data) > _MAX_THUMBNAIL_BYTES:
            raise ValueError(f"{len(data)} bytes")
        height, width = decode_jpeg(data).shape[:2]
    except (OSError, ValueError, SyntaxError) as error:
        return CaptionedImages((), title, f"the thumbnail cannot be read: {error}", tag)
    return CaptionedImages((EmbeddedImage(_encode_uri(data), width, height, alt),), title, ", ".join(facts), tag)


def _caption_unreadable(title: str, error: DataError) -> CaptionedImages:
    return CaptionedImages((), title, str(error))


def _embed_image(pixels: np.ndarray, alt: str) -> EmbeddedImage:
    return EmbeddedImage(_encode_uri(encode_jpeg(pixels, _JPEG_QUALITY)), pixels.shape[1], pixels.shape[0], alt)


def _encode_uri(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
