"""How alike two pictures are."""

from __future__ import annotations

import cv2
import numpy as np
from skimage.metrics import structural_similarity

#: Stored with every mining run: SSIM values are comparable only under one definition.
SSIM_DEFINITION = (
    "skimage.metrics.structural_similarity on 8-bit luma (OpenCV RGB2GRAY), long side reduced to 256 px by "
    "INTER_AREA, Gaussian weights sigma 1.5, population covariance, data_range 255"
)
SSIM_LONG_SIDE_PX = 256


def ssim_thumbnail(image: np.ndarray) -> np.ndarray:
    """The picture that SSIM is computed on: (H, W, 3) uint8 RGB -> (h, w) uint8 luma, long side 256 px or less."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = SSIM_LONG_SIDE_PX / max(grey.shape)
    if scale >= 1:
        return grey
    size = max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale))
    return cv2.resize(grey, size, interpolation=cv2.INTER_AREA)


def ssim_luma(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM in [-1, 1] of two thumbnails of one size (see `SSIM_DEFINITION`); needs at least 11 px a side."""
    return float(structural_similarity(a, b, data_range=255, gaussian_weights=True, use_sample_covariance=False))


def psnr_inside(result: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    """PSNR in dB over the pixels where mask is 1.

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
    """Mean of the SSIM map (luma, Gaussian weights, population covariance) over the pixels where mask is 1."""
    a, b = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (result, target))
    _, ssim_map = structural_similarity(
        a, b, data_range=255, gaussian_weights=True, use_sample_covariance=False, full=True
    )
    return float(ssim_map[mask > 0].mean())
