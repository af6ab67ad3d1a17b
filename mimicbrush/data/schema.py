"""The columns of a manifest. Their meanings for a reader of the files: data_manifests/README.md."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 2
VERSION_KEY = b"mimicbrush_schema_version"

Status = Literal["pair", "rejected", "quarantined"]
Kind = Literal["video", "image"]
Store = Literal["mined", "input"]

#: Above this SSIM, two frames of a video count as a still image.
STILL_SSIM = 0.96
#: Matched points are stored in these fractions of a pixel, from the edge of the image; SIFT is less precise.
POINT_UNITS_PER_PX = 16
#: The longest side of an image whose points fit into 16 bits.
MAX_POINT_SIDE_PX = 2**16 // POINT_UNITS_PER_PX - 1

SCHEMA = pa.schema(
    [
        ("status", pa.string()),  # pair | rejected (readable, but no pair) | quarantined (cannot be trusted)
        ("reason", pa.string()),  # a short fixed word for rows that are no pair, else ""
        ("detail", pa.string()),  # the reason as text for people
        ("kind", pa.string()),  # video | image
        ("source_path", pa.string()),  # of the raw file, relative to the mined input
        ("source_hash", pa.string()),  # SHA-256 of the raw file, hex; it decides the split
        ("licence", pa.string()),  # as the input list gives it
        ("url", pa.string()),  # as the input list gives it
        ("pair_id", pa.string()),  # unique in the manifest, "" for rows that are no pair
        ("store", pa.string()),  # mined: the files are in the mined folder; input: they are in the input folder
        ("file", pa.string()),  # the file that contains the images, relative to that folder
        ("width_px", pa.int32()),  # of the stored images
        ("height_px", pa.int32()),
        ("a_offset", pa.int64()),  # offset of the first JPEG in the file, in bytes; -1 if there is none
        ("a_length", pa.int64()),
        ("a_sha256", pa.string()),  # of the JPEG
        ("b_offset", pa.int64()),  # offset of the second JPEG; -1 for a photograph
        ("b_length", pa.int64()),
        ("b_sha256", pa.string()),
        ("a_frame", pa.int64()),  # frame number in presentation order
        ("b_frame", pa.int64()),
        ("a_time_s", pa.float64()),
        ("b_time_s", pa.float64()),
        ("ssim", pa.float32()),  # definition: mimicbrush.ops.similarity.SSIM_DEFINITION
        ("a_points", pa.list_(pa.uint16())),  # x0 y0 x1 y1 ... matched SIFT keypoints, see pack_points
        ("b_points", pa.list_(pa.uint16())),
        ("annotation_file", pa.string()),  # photographs: the JSON of their segments, in the same store
        ("annotation_offset", pa.int64()),
        ("annotation_length", pa.int64()),
        ("segments", pa.list_(pa.int32())),  # indices of the segments that can be masks, largest first
        ("segment_ratios", pa.list_(pa.float32())),  # their areas as shares of the image
        ("decoder", pa.string()),  # name and version
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()},
)


def manifest_row(**values: Any) -> dict[str, Any]:
    """Build a full manifest row: columns that are not given have neutral values; unknown names are errors."""
    unknown = set(values) - set(SCHEMA.names)
    if unknown:
        raise KeyError(f"not in the manifest schema: {sorted(unknown)}; known: {SCHEMA.names}")
    return {column.name: neutral_value(column.type) for column in SCHEMA} | values


def neutral_value(kind: pa.DataType) -> Any:
    """Return the value that means "none" in a column of this type: "", [], NaN or -1."""
    if pa.types.is_string(kind):
        return ""
    if pa.types.is_list(kind):
        return []
    return float("nan") if pa.types.is_floating(kind) else -1


def pack_points(points: np.ndarray) -> list[int]:
    """Pack (K, 2) points (x, y), in pixels with centres at whole numbers, as integers x0 y0 x1 y1 ...

    A stored value is ``round((x + 0.5) * 16)``: 0 is the edge of the image, and the error is at most 1/32 px.
    """
    units = np.rint((points.astype(np.float64) + 0.5) * POINT_UNITS_PER_PX)
    if len(units) and not (units.min() >= 0 and units.max() < 2**16):
        raise ValueError(f"points of {points.min()}..{points.max()} px lie outside of 0..{MAX_POINT_SIDE_PX} px")
    packed: list[int] = units.astype(np.uint16).ravel().tolist()
    return packed


def unpack_points(units: np.ndarray) -> np.ndarray:
    """Undo `pack_points`: (2 K,) uint16 -> (K, 2) float32 in pixels."""
    return (units.astype(np.float32) / POINT_UNITS_PER_PX - 0.5).reshape(-1, 2)
