"""Whether two pictures are one picture: as it is, mirrored, shifted or at another size."""

from __future__ import annotations

import cv2
import numpy as np

from mimicbrush.ops.similarity import SSIM_LONG_SIDE_PX, ssim_luma, ssim_thumbnail

#: Of all pairs of pictures of one DreamBooth subject, the two known duplicates reach 0.995 and more; the next are
#: drawings on white with 0.88, photographs on white with 0.83.
NEAR_DUPLICATE_SSIM = 0.9
_SIDE_PX = 32
#: Phase correlation at 32 px of the two known duplicates (one mirrored, one shifted by a fifth): 0.998 and 0.64.
#: Of a thousand other pairs of the dataset one reaches 0.31, half of them 0.11.
LIKELY_AGREEMENT = 0.35


def highest_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """The highest SSIM of two pictures as they are or one mirrored, in place or shifted (phase correlation).

    Args:
        a, b: (H, W, 3) uint8 RGB, of any sizes: both are squeezed to a square first.
    """
    size = (SSIM_LONG_SIDE_PX, SSIM_LONG_SIDE_PX)
    one, two = (ssim_thumbnail(cv2.resize(image, size, interpolation=cv2.INTER_AREA)) for image in (a, b))
    window = cv2.createHanningWindow(size, cv2.CV_64F)
    found = []
    for other in (two, np.ascontiguousarray(two[:, ::-1])):
        (dx, dy), _ = cv2.phaseCorrelate(one.astype(np.float64), other.astype(np.float64), window)
        found += [ssim_luma(one, other), _ssim_of_overlap(one, other, round(dx), round(dy))]
    return max(found)


def _ssim_of_overlap(one: np.ndarray, two: np.ndarray, dx: int, dy: int) -> float:
    """SSIM where `two`, moved back by (dx, dy) px, covers `one`; -1 where that is less than half of a side."""
    height, width = one.shape
    if max(abs(dx) / width, abs(dy) / height) > 0.5:
        return -1.0
    rows, columns = slice(max(0, -dy), height - max(0, dy)), slice(max(0, -dx), width - max(0, dx))
    moved_rows, moved_columns = slice(max(0, dy), height - max(0, -dy)), slice(max(0, dx), width - max(0, -dx))
    return ssim_luma(np.ascontiguousarray(one[rows, columns]), np.ascontiguousarray(two[moved_rows, moved_columns]))


def signature(image: np.ndarray) -> np.ndarray:
    """A picture in few numbers, to be compared with those of many others by `agreement`.

    Args:
        image: (H, W, 3) uint8 RGB, of any size.

    Returns:
        (32, 17) complex: the phases of its spectrum.
    """
    small = cv2.resize(image, (_SIDE_PX, _SIDE_PX), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float64)
    spectrum = np.fft.rfft2(grey - grey.mean())
    return np.asarray(spectrum / (np.abs(spectrum) + 1e-3), np.complex64)


def agreement(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The highest phase correlation of one signature with each of n others, over all shifts.

    Near duplicates have more than `LIKELY_AGREEMENT`. The converse does not hold: `highest_ssim` decides. A mirrored
    picture has another signature.

    Args:
        one: (32, 17) complex.
        others: (n, 32, 17) complex.

    Returns:
        (n,) float, 1 for the same picture.
    """
    return np.asarray(np.fft.irfft2(one * np.conj(others), s=(_SIDE_PX, _SIDE_PX)).max(axis=(1, 2)))
