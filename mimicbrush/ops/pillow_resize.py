"""Pillow's bicubic resize of 8-bit images, bit for bit, on whatever device the pixels are.

The released code hands 8-bit images to CLIP's processor, which resizes with Pillow: horizontally, rounded to
8 bit, then vertically, rounded again, with weights of 22 bit. Any other bicubic filter moves the image tokens by
about 2 %. All sums here are integers below 2 ** 53, so float64 holds them exactly.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

_WEIGHT_BITS = 22


def resize_like_pillow(values: torch.Tensor, size_px: int) -> torch.Tensor:
    """Resize by bicubic interpolation, as `PIL.Image.resize(..., BICUBIC)` does.

    Args:
        values: (B, C, H, W), whole numbers in 0..255, any dtype that holds them.
        size_px: side of the square result.

    Returns:
        (B, C, size_px, size_px) float64, whole numbers in 0..255.
    """
    pixels = values.double()
    for axis in (-1, -2):  # Pillow's order: along the rows first
        weights = _weights_beside(pixels, pixels.shape[axis], size_px)
        sums = torch.tensordot(pixels.movedim(axis, -1), weights, dims=([-1], [1])).movedim(-1, axis)
        pixels = ((sums + 2.0 ** (_WEIGHT_BITS - 1)) * 2.0**-_WEIGHT_BITS).floor().clamp(0, 255)
    return pixels


def _weights_beside(pixels: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """The weights on the device of the pixels, brought there once: the copy waits for all that a GPU has to do."""
    if type(pixels) is torch.Tensor:
        return _weights_on(pixels.device, old, new)
    return torch.from_numpy(_weights(old, new)).to(pixels.device)  # tensors without content are not kept


@functools.lru_cache(maxsize=64)
def _weights_on(device: torch.device, old: int, new: int) -> torch.Tensor:
    return torch.from_numpy(_weights(old, new)).to(device)


@functools.lru_cache(maxsize=64)
def _weights(old: int, new: int) -> np.ndarray:
    """(new, old) float64: what each old pixel adds to a new one, in units of 2 ** -22, whole numbers."""
    scale = old / new
    widened = max(scale, 1.0)  # an antialiasing filter: it spans more old pixels where the image shrinks
    table = np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) * scale
        first = max(0, int(centre - 2 * widened + 0.5))
        last = min(old, int(centre + 2 * widened + 0.5))
        raw = [_cubic((column - centre + 0.5) / widened) for column in range(first, last)]
        total = sum(raw)
        for column, weight in zip(range(first, last), raw, strict=True):
            fixed = weight / total * 2**_WEIGHT_BITS
            table[row, column] = math.trunc(fixed + math.copysign(0.5, fixed))
    return table


def _cubic(x: float) -> float:
    """Keys' cubic kernel with a = -0.5, which Pillow uses (OpenCV's and PyTorch's plain bicubic use -0.75)."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    if x < 2:
        return ((-0.5 * x + 2.5) * x - 4) * x + 2
    return 0.0
