"""Reduces frames to the stored size and encodes them as JPEGs."""

from __future__ import annotations

import cv2
import numpy as np


def shrink_to_side(image: np.ndarray, max_side_px: int) -> np.ndarray:
    """Reduce an image by INTER_AREA so that its long side is at most `max_side_px`; smaller ones are returned as is."""
    height, width = image.shape[:2]
    scale = max_side_px / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """Encode (H, W, 3) uint8 RGB as the bytes of a JPEG file."""
    is_encoded, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not is_encoded:
        raise ValueError(f"OpenCV could not encode an image of shape {image.shape}")
    return bytes(data)
