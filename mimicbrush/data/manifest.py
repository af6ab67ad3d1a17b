"""The manifest: one Parquet row per pair, and one per file that gave none. Schema: data_manifests/README.md.

A mined folder holds ``manifest/*.parquet`` (one part per shard) and ``shards/*.tar``. A row knows the byte
offset and length of its pictures inside the tar, so the tar is a random-access store at training time.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mimicbrush.errors import DataError

SCHEMA_VERSION = 1

Status = Literal["pair", "rejected", "quarantined"]
Kind = Literal["video", "image"]
Split = Literal["train", "heldout", "all"]

SCHEMA = pa.schema(
    [
        ("status", pa.string()),  # pair | rejected (readable, but no pair) | quarantined (cannot be trusted)
        ("reason", pa.string()),  # a short fixed word for rows that are no pair, else ""
        ("detail", pa.string()),  # the same for a person to read
        ("kind", pa.string()),  # video | image
        ("source_path", pa.string()),  # of the raw file, relative to the mined input
        ("source_hash", pa.string()),  # SHA-256 of the raw file, hex: the identity that splits go by
        ("pair_id", pa.string()),  # unique in the manifest, "" for rows that are no pair
        ("shard", pa.string()),  # file name inside shards/
        ("width_px", pa.int32()),  # of the stored pictures
        ("height_px", pa.int32()),
        ("a_offset", pa.int64()),  # bytes into the shard of the first JPEG; -1 where there is none
        ("a_length", pa.int64()),
        ("b_offset", pa.int64()),  # of the second JPEG; an image with masks has only a first
        ("b_length", pa.int64()),
        ("a_frame", pa.int64()),  # frame number in decoding order
        ("b_frame", pa.int64()),
        ("a_time_s", pa.float64()),
        ("b_time_s", pa.float64()),
        ("ssim", pa.float32()),  # definition: mimicbrush.ops.similarity.SSIM_DEFINITION
        ("a_points", pa.list_(pa.float32())),  # x0 y0 x1 y1 ... matched SIFT keypoints, pixels of the
        ("b_points", pa.list_(pa.float32())),  # stored pictures, pixel centres at whole numbers
        ("segments", pa.string()),  # images: JSON list of COCO RLE {"size": [h, w], "counts": str}
        ("decoder", pa.string()),  # name and version
    ],
    metadata={b"mimicbrush_schema_version": str(SCHEMA_VERSION).encode()},
)


def row(**values: Any) -> dict[str, Any]:
    """A full manifest row: neutral values for all columns that are not named; unknown names are errors."""
    unknown = set(values) - set(SCHEMA.names)
    if unknown:
        raise KeyError(f"not in the manifest schema: {sorted(unknown)}; known: {SCHEMA.names}")
    neutral: dict[str, Any] = {}
    for column in SCHEMA:
        if pa.types.is_string(column.type):
            neutral[column.name] = ""
        elif pa.types.is_list(column.type):
            neutral[column.name] = []
        elif pa.types.is_floating(column.type):
            neutral[column.name] = float("nan")
        else:
            neutral[column.name] = -1
    return neutral | values


@dataclass(frozen=True)
class Pair:
    """One row with status "pair", ready to be read.

    Attributes:
        size_px: (height, width) of the stored pictures.
        a_span, b_span: (offset, length) in bytes into the shard; an image with masks has no second.
        a_points, b_points: (K, 2) float32 matched keypoints (x, y) in pixels of the stored pictures.
        segments: COCO RLEs, for kind "image" only.
    """

    pair_id: str
    kind: Kind
    source_path: str
    source_hash: str
    shard_path: Path
    size_px: tuple[int, int]
    a_span: tuple[int, int]
    b_span: tuple[int, int] | None
    a_points: np.ndarray
    b_points: np.ndarray
    ssim: float
    segments: list[dict[str, Any]]

    def read_a(self, reduce: int = 1) -> np.ndarray:
        """The first picture, (H, W, 3) uint8 RGB; `reduce` as in `decode_jpeg`."""
        return self.read(self.a_span, reduce)

    def read_b(self, reduce: int = 1) -> np.ndarray:
        """The second picture, (H, W, 3) uint8 RGB; for an image with masks it is the first again."""
        return self.read(self.b_span or self.a_span, reduce)

    def read(self, span: tuple[int, int], reduce: int = 1) -> np.ndarray:
        """The picture at a span, (H, W, 3) uint8 RGB.

        Raises:
            DataError: the shard is missing, or what is there is no whole JPEG.
        """
        offset, length = span
        try:
            with self.shard_path.open("rb") as shard:
                shard.seek(offset)
                data = shard.read(length)
        except OSError as error:
            raise DataError(f"pair {self.pair_id}: cannot read {self.shard_path}: {error}") from error
        try:
            if len(data) != length:
                raise ValueError(f"{len(data)} of {length} bytes are there")
            return decode_jpeg(data, reduce)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                f"pair {self.pair_id}: bytes {offset}..{offset + length} of {self.shard_path} are no whole "
                f"JPEG ({error}); mine {self.source_path} again (delete this shard's marker and rerun)"
            ) from error


def decode_jpeg(data: bytes, reduce: int = 1) -> np.ndarray:
    """Decode a JPEG strictly: a truncated one is an error, never a half-grey picture.

    Args:
        data: the whole file.
        reduce: 1, 2, 4 or 8: decode at this fraction of the size (done by the JPEG library while decoding,
            a good low-pass filter, and much faster).

    Returns:
        (ceil(H / reduce), ceil(W / reduce), 3) uint8 RGB.

    Raises:
        OSError, ValueError: not a JPEG, or not all of it.
    """
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        expected = tuple(-(-side // reduce) for side in image.size)
        if reduce > 1:
            # Pillow takes the largest reduction that leaves at least what is asked for: hence rounded down.
            image.draft("RGB", (max(1, image.width // reduce), max(1, image.height // reduce)))
        pixels = image.convert("RGB")
        if pixels.size != expected:
            raise ValueError(f"decoded to {pixels.size} instead of {expected} at 1/{reduce}")
        return np.asarray(pixels)


def read_manifest(root: Path) -> list[Pair]:
    """All pairs of a mined folder, in a fixed order (by shard, then as mined).

    Raises:
        DataError: no manifest there, another schema version, or a shard path that leaves the folder.
    """
    parts = sorted((root / "manifest").glob("*.parquet"))
    if not parts:
        raise DataError(
            f"{root} holds no mined pairs (no manifest/*.parquet); mine some first: "
            f"python scripts/mine_pairs.py input=FOLDER_OF_VIDEOS output={root}"
        )
    pairs: list[Pair] = []
    for part in parts:
        try:
            table = pq.read_table(part)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{part} cannot be read ({error}); delete its marker and mine again") from error
        version = (table.schema.metadata or {}).get(b"mimicbrush_schema_version", b"none").decode()
        if version != str(SCHEMA_VERSION):
            raise DataError(f"{part} has schema version {version}, this code reads {SCHEMA_VERSION}; mine again")
        pairs += [_pair(values, root) for values in table.to_pylist() if values["status"] == "pair"]
    return pairs


def _pair(values: dict[str, Any], root: Path) -> Pair:
    shards = (root / "shards").resolve()
    shard_path = (shards / values["shard"]).resolve()
    if shard_path.parent != shards:
        raise DataError(f"pair {values['pair_id']} names the shard {values['shard']!r}, outside {shards}")
    return Pair(
        pair_id=values["pair_id"],
        kind=values["kind"],
        source_path=values["source_path"],
        source_hash=values["source_hash"],
        shard_path=shard_path,
        size_px=(values["height_px"], values["width_px"]),
        a_span=(values["a_offset"], values["a_length"]),
        b_span=(values["b_offset"], values["b_length"]) if values["b_offset"] >= 0 else None,
        a_points=np.asarray(values["a_points"], np.float32).reshape(-1, 2),
        b_points=np.asarray(values["b_points"], np.float32).reshape(-1, 2),
        ssim=values["ssim"],
        segments=json.loads(values["segments"]) if values["segments"] else [],
    )


def split_pairs(pairs: Sequence[Pair], split: Split, heldout_ratio: float = 0.1) -> list[Pair]:
    """Split by the hash of the source file, so that no clip is on both sides and new clips do not move old ones.

    A source is held out where its hash falls below `heldout_ratio` of the range. Small collections would
    often hold out nothing; so at least two sources of a kind are held out (the lowest hashes) where there
    are four or more, because the reference gain needs a second source to compare with.
    """
    if split == "all":
        return list(pairs)
    heldout: set[tuple[str, str]] = set()
    for kind in ("video", "image"):
        hashes = sorted({pair.source_hash for pair in pairs if pair.kind == kind})
        below = sum(int(value[:8], 16) < heldout_ratio * 2**32 for value in hashes)
        floor = 2 if heldout_ratio > 0 and len(hashes) >= 4 else 0
        heldout |= {(kind, value) for value in hashes[: max(below, floor)]}
    return [pair for pair in pairs if ((pair.kind, pair.source_hash) in heldout) == (split == "heldout")]
