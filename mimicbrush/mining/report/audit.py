"""Examples of refused pairs, as thumbnails for the report."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import pyarrow as pa

from mimicbrush.mining.jpeg import encode_jpeg

THUMBNAIL_PX = 160
_JPEG_QUALITY = 80

AUDIT_SCHEMA = pa.schema(
    [
        ("source_path", pa.string()),
        ("reason", pa.string()),  # a key of refusals.REJECTED
        ("a_frame", pa.int64()),
        ("b_frame", pa.int64()),  # -1 if a single frame was refused
        ("ssim", pa.float32()),  # NaN if it was not computed
        ("num_matches", pa.int32()),  # -1 if the frames were not matched
        ("picture", pa.binary()),  # JPEG of the single frame, or of both side by side
    ]
)


@dataclass(frozen=True)
class RefusedExample:
    """A pair, or a single frame, that was tried and refused.

    Attributes:
        reason: a key of `refusals.REJECTED`.
        a_frame, b_frame: frame numbers; b is -1 for a single frame.
        ssim: NaN if it was not computed.
        num_matches: -1 if the frames were not matched.
        image: (h, w, 3) uint8 RGB thumbnail, both frames side by side.
    """

    reason: str
    a_frame: int
    b_frame: int
    ssim: float
    num_matches: int
    image: np.ndarray

    def to_row(self, source_path: str) -> dict[str, object]:
        """Return the example as a row of the audit's Parquet part."""
        return {
            "source_path": source_path,
            "reason": self.reason,
            "a_frame": self.a_frame,
            "b_frame": self.b_frame,
            "ssim": self.ssim,
            "num_matches": self.num_matches,
            "picture": encode_jpeg(self.image, _JPEG_QUALITY),
        }


def make_thumbnail(image: np.ndarray) -> np.ndarray:
    """Reduce an image, (H, W, 3) uint8, so that its long side is at most `THUMBNAIL_PX`."""
    scale = min(1.0, THUMBNAIL_PX / max(image.shape[:2]))
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
