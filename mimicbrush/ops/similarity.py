"""Similarity of two images: SSIM, PSNR, sharpness, near duplicates."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

#: Stored with every mining run: SSIM values are comparable only under one definition.
SSIM_DEFINITION = (
    "skimage.metrics.structural_similarity on 8-bit luma (OpenCV RGB2GRAY), long side reduced to 256 px by "
    "INTER_AREA, Gaussian weights sigma 1.5, population covariance, data_range 255"
)
SSIM_LONG_SIDE_PX = 256
_SSIM_SIGMA_PX, _SSIM_RADIUS_PX = 1.5, 5
#: No side of a thumbnail may be shorter.
SSIM_WINDOW_PX = 2 * _SSIM_RADIUS_PX + 1


def ssim_thumbnail(image: np.ndarray) -> np.ndarray:
    """Reduce an image for SSIM: (H, W, 3) uint8 RGB -> (h, w) uint8 luma, long side 256 px or less."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = SSIM_LONG_SIDE_PX / max(grey.shape)
    if scale >= 1:
        return grey
    size = max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale))
    return cv2.resize(grey, size, interpolation=cv2.INTER_AREA)


def ssim_luma(a: np.ndarray, b: np.ndarray) -> float:
    """Compute SSIM in [-1, 1] of two thumbnails of one size (see `SSIM_DEFINITION`), at least 11 px a side."""
    return float(structural_similarity(a, b, data_range=255, gaussian_weights=True, use_sample_covariance=False))


@dataclass(frozen=True)
class LumaStatistics:
    """What SSIM needs of one thumbnail, so that comparing it with many others computes it once.

    Attributes:
        luma: (h, w) float64.
        mean, variance: (h, w) float64, under the Gaussian window around each pixel.
    """

    luma: np.ndarray
    mean: np.ndarray
    variance: np.ndarray


def luma_statistics(thumbnail: np.ndarray) -> LumaStatistics:
    """Compute what SSIM needs of one (h, w) uint8 thumbnail, at least 11 px a side."""
    luma = thumbnail.astype(np.float64)
    mean = _weigh(luma)
    return LumaStatistics(luma, mean, _weigh(luma * luma) - mean * mean)


def ssim_statistics(a: LumaStatistics, b: LumaStatistics) -> float:
    """Compute SSIM in [-1, 1] of two thumbnails of one size by their statistics, to the bit as `ssim_luma` does."""
    covariance = _weigh(a.luma * b.luma) - a.mean * b.mean
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    contrast = (a.mean**2 + b.mean**2 + c1) * (a.variance + b.variance + c2)
    similarity = ((2 * a.mean * b.mean + c1) * (2 * covariance + c2)) / contrast
    margin = slice(_SSIM_RADIUS_PX, -_SSIM_RADIUS_PX)  # there the window reaches over the edge
    return float(similarity[margin, margin].mean())


def _weigh(values: np.ndarray) -> np.ndarray:
    """The Gaussian mean of (h, w) float64 around each pixel."""
    return gaussian_filter(values, _SSIM_SIGMA_PX, radius=_SSIM_RADIUS_PX)


def psnr_inside(result: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    """Compute PSNR in dB over the pixels where mask is 1.

    Args:
        result, target: (H, W, 3) uint8.
        mask: (H, W), 1 = counted; at least one pixel.

    Returns:
        dB, infinite where all pixels are equal.
    """
    inside = mask > 0
    difference = result[inside].astype(np.float64) - target[inside].astype(np.float64)
    mean_square = float(np.mean(difference**2))
    return float("inf") if mean_square == 0 else 10 * float(np.log10(255**2 / mean_square))


def ssim_inside(result: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    """Compute the mean SSIM (luma, Gaussian weights, population covariance) over the pixels where mask is 1."""
    a, b = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (result, target))
    _, ssim_map = structural_similarity(
        a, b, data_range=255, gaussian_weights=True, use_sample_covariance=False, full=True
    )
    return float(ssim_map[mask > 0].mean())


#: Second differences along the rows, the columns and both diagonals.
_SECOND_DIFFERENCES = tuple(
    np.array(kernel, np.float32)
    for kernel in (
        [[0, 0, 0], [1, -2, 1], [0, 0, 0]],
        [[0, 1, 0], [0, -2, 0], [0, 1, 0]],
        [[1, 0, 0], [0, -2, 0], [0, 0, 1]],
        [[0, 0, 1], [0, -2, 0], [1, 0, 0]],
    )
)
_SHARPNESS_LONG_SIDE_PX = 512


def sharpness(image: np.ndarray) -> float:
    """Measure how much of an image's contrast is fine detail, in the direction that has the least of it.

    A camera that swings, or a thing that passes, blurs along its path only; so the least of four directions tells.
    Measured at the size that training uses: a large image may be soft and still serve. Photographs and sharp
    frames have 0.003 to 0.5; blurred over 16 px, less than a twentieth of what they had.

    Args:
        image: (H, W, 3) uint8 RGB.

    Returns:
        Variance of the second difference over the variance of the luma, both at a long side of 512 px or less.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = _SHARPNESS_LONG_SIDE_PX / max(grey.shape)
    if scale < 1:
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    luma = grey.astype(np.float32)
    detail = min(float(cv2.filter2D(luma, cv2.CV_32F, kernel).var()) for kernel in _SECOND_DIFFERENCES)
    return detail / max(float(luma.var()), 1.0)


#: Of all pairs of images of one DreamBooth subject, the two known duplicates reach 0.995 and more; the next are
#: drawings on white with 0.88, photographs on white with 0.83.
NEAR_DUPLICATE_SSIM = 0.9
_SIDE_PX = 32
#: Phase correlation at 32 px of the two known duplicates (one mirrored, one shifted by a fifth): 0.998 and 0.64.
#: Of a thousand other pairs of the dataset one reaches 0.31, half of them 0.11.
LIKELY_AGREEMENT = 0.35


def highest_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the highest SSIM of two images as they are or one mirrored, in place or shifted (phase correlation).

    Args:
        a, b: (H, W, 3) uint8 RGB, of any sizes: both are squeezed to a square first.
    """
    size = (SSIM_LONG_SIDE_PX, SSIM_LONG_SIDE_PX)
    one, two = (ssim_thumbnail(cv2.resize(image, size, interpolation=cv2.INTER_AREA)) for image in (a, b))
    window = cv2.createHanningWindow(size, cv2.CV_64F)
    scores = []
    for other in (two, np.ascontiguousarray(two[:, ::-1])):
        (dx, dy), _ = cv2.phaseCorrelate(one.astype(np.float64), other.astype(np.float64), window)
        scores += [ssim_luma(one, other), _measure_overlap_ssim(one, other, round(dx), round(dy))]
    return max(scores)


def _measure_overlap_ssim(one: np.ndarray, two: np.ndarray, dx: int, dy: int) -> float:
    """SSIM where `two`, moved back by (dx, dy) px, covers `one`; -1 where that is less than half of a side."""
    height, width = one.shape
    if max(abs(dx) / width, abs(dy) / height) > 0.5:
        return -1.0
    rows, columns = slice(max(0, -dy), height - max(0, dy)), slice(max(0, -dx), width - max(0, dx))
    moved_rows, moved_columns = slice(max(0, dy), height - max(0, -dy)), slice(max(0, dx), width - max(0, -dx))
    return ssim_luma(np.ascontiguousarray(one[rows, columns]), np.ascontiguousarray(two[moved_rows, moved_columns]))


def phase_signature(image: np.ndarray) -> np.ndarray:
    """Compute an image's signature of few numbers, to compare with many others by `signature_agreement`.

    Args:
        image: (H, W, 3) uint8 RGB, of any size.

    Returns:
        (32, 17) complex: the phases of its spectrum.
    """
    small = cv2.resize(image, (_SIDE_PX, _SIDE_PX), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float64)
    spectrum = np.fft.rfft2(grey - grey.mean())
    return np.asarray(spectrum / (np.abs(spectrum) + 1e-3), np.complex64)


def signature_agreement(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compute the highest phase correlation of one signature with each of n others, over all shifts.

    Near duplicates have more than `LIKELY_AGREEMENT`. The converse does not hold: `highest_ssim` decides. A mirrored
    image has another signature.

    Args:
        one: (32, 17) complex.
        others: (n, 32, 17) complex.

    Returns:
        (n,) float, 1 for the same image.
    """
    return np.asarray(np.fft.irfft2(one * np.conj(others), s=(_SIDE_PX, _SIDE_PX)).max(axis=(1, 2)))
