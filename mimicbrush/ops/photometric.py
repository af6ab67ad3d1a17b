"""Colour jitter as one affine map of RGB: all of it in a single pass over the pixels."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

_LUMA = np.array([0.299, 0.587, 0.114])
_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


@dataclass
class JitterRanges:
    """Ranges of the colour jitter. The paper calls it aggressive (Sec. 3.3) and gives no ranges: these are ours.

    Attributes:
        brightness, contrast, saturation: factors are drawn from 1 - x to 1 + x.
        hue_ratio: the hue turns by up to this part of the circle, either way.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue_ratio: float = 0.05


def random_jitter(image: np.ndarray, ranges: JitterRanges, rng: np.random.Generator) -> np.ndarray:
    """Jitter brightness, contrast, saturation and hue: (H, W, 3) uint8 RGB -> the same shape.

    Differs from a chain of separate steps in that values are clipped once, at the end.
    """
    brightness, contrast, saturation = (
        1 + rng.uniform(-amount, amount) for amount in (ranges.brightness, ranges.contrast, ranges.saturation)
    )
    angle = 2 * np.pi * rng.uniform(-ranges.hue_ratio, ranges.hue_ratio)
    grey = np.tile(_LUMA, (3, 1))
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    hue = np.linalg.inv(_RGB_TO_YIQ) @ turn @ _RGB_TO_YIQ
    colour = hue @ (saturation * np.eye(3) + (1 - saturation) * grey) * brightness * contrast
    mean_luma = float(_LUMA @ cv2.mean(image)[:3]) * brightness
    offset = np.full((3, 1), (1 - contrast) * mean_luma)
    return cv2.transform(image, np.hstack([colour, offset]))
