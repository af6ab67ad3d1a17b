"""Colour jitter as one affine map of RGB: all of it in a single pass over the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from mimicbrush.ranges import check_options, number

_LUMA = np.array([0.299, 0.587, 0.114])
_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


@dataclass
class JitterRanges:
    """Ranges of the colour jitter. The paper calls it aggressive (Sec. 3.3) and gives no ranges: these are ours.

    Attributes:
        brightness, contrast, saturation: factors are sampled from 1 - x to 1 + x.
        hue_ratio: the hue turns by up to this part of the circle, either way.
    """

    brightness: float = number(0.4, at_least=0, at_most=1)
    contrast: float = number(0.4, at_least=0, at_most=1)
    saturation: float = number(0.4, at_least=0, at_most=1)
    hue_ratio: float = number(0.05, at_least=0, at_most=0.5)

    def __post_init__(self) -> None:
        check_options(self, "data.jitter.")


@dataclass(frozen=True)
class Jitter:
    """One sample of the jitter: three factors, and the turn of the hue in radians."""

    brightness: float
    contrast: float
    saturation: float
    hue_rad: float

    def matrix(self, mean_rgb: Sequence[float]) -> np.ndarray:
        """Return the jitter as (3, 4) float64: ``[R G B 1]`` in 0..255 -> the new ``[R G B]``, not clipped yet.

        Args:
            mean_rgb: of the image: contrast turns about its mean luma.
        """
        turn = np.eye(3)
        turn[1:, 1:] = [[np.cos(self.hue_rad), -np.sin(self.hue_rad)], [np.sin(self.hue_rad), np.cos(self.hue_rad)]]
        # Hue turns the two chroma axes of YIQ; saturation mixes with the luma; brightness scales, and contrast scales
        # about the mean luma. Each is affine in RGB, so their product is one (3, 4) matrix.
        hue = np.linalg.inv(_RGB_TO_YIQ) @ turn @ _RGB_TO_YIQ
        grey = np.tile(_LUMA, (3, 1))
        saturated = self.saturation * np.eye(3) + (1 - self.saturation) * grey
        mean_luma = float(_LUMA @ np.asarray(mean_rgb)) * self.brightness
        offset = np.full((3, 1), (1 - self.contrast) * mean_luma)
        return np.hstack([hue @ saturated * self.brightness * self.contrast, offset])


def random_jitter(ranges: JitterRanges, rng: np.random.Generator) -> Jitter:
    """Sample brightness, contrast, saturation and hue."""
    brightness, contrast, saturation = (
        1 + rng.uniform(-amount, amount) for amount in (ranges.brightness, ranges.contrast, ranges.saturation)
    )
    return Jitter(brightness, contrast, saturation, 2 * np.pi * rng.uniform(-ranges.hue_ratio, ranges.hue_ratio))


def apply_jitter(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply a matrix of `Jitter.matrix` to the colours of an image: (H, W, 3) uint8 RGB -> the same shape.

    Differs from a chain of separate steps in that values are clipped once, at the end.
    """
    return image if np.allclose(matrix, np.eye(3, 4), rtol=0, atol=1e-9) else cv2.transform(image, matrix)
