"""Dead leaves: images of overlapping textured shapes, rendered without end where photographs are few.

Their statistics resemble those of photographs (Lee, Mumford and Huang 2001), networks trained on them see well
(Baradad et al. 2021, "Learning to See by Looking at Noise"), and what hides behind a mask can hardly be guessed from
around it, so that a model must look it up in its reference. Their segments are known exactly.
"""

from __future__ import annotations

import cv2
import numpy as np

_LEAVES = 160
#: Radii follow a power law between these, over the image's shorter side.
_RADII = (0.05, 0.45)
_TEXTURE_PX = 96


def dead_leaves(width_px: int, height_px: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Render an image from the back to the front.

    Returns:
        (H, W, 3) uint8 RGB, and (H, W) int32: the number of the leaf that is seen at each pixel, 0 is the ground.
    """
    palette = rng.uniform(10, 245, (int(rng.integers(3, 7)), 3))
    greys = palette.mean(axis=1, keepdims=True)
    palette = greys + rng.uniform(0.15, 0.9) * (palette - greys)  # few real scenes are as colourful as random colours
    ground = _texture(palette, rng)
    image = cv2.resize(ground, (width_px, height_px), interpolation=cv2.INTER_CUBIC)
    labels = np.zeros((height_px, width_px), np.int32)
    short = min(width_px, height_px)
    # Inverse square law of areas; the largest first, or the small ones would all be covered.
    low, high = (ratio * short for ratio in _RADII)
    radii = (low**-2 + rng.random(_LEAVES) * (high**-2 - low**-2)) ** -0.5
    order = np.argsort(-radii * rng.uniform(0.4, 1.6, _LEAVES))
    for number, radius in enumerate(radii[order], start=1):
        outline = _outline(radius, rng) + rng.uniform((0, 0), (width_px, height_px))
        left, top = np.floor(outline.min(axis=0)).astype(int).clip(0)
        right, bottom = np.ceil(outline.max(axis=0)).astype(int).clip(None, (width_px, height_px))
        if right - left < 2 or bottom - top < 2:
            continue
        shape = np.zeros((bottom - top, right - left), np.uint8)
        cv2.fillPoly(shape, [np.round((outline - (left, top)) * 16).astype(np.int32)], 255, cv2.LINE_AA, shift=4)
        alpha = shape[..., None] / np.float32(255)
        side = max(shape.shape)
        texture = cv2.resize(_texture(palette, rng), (side, side), interpolation=cv2.INTER_CUBIC)
        region = image[top:bottom, left:right]
        region += (texture[: shape.shape[0], : shape.shape[1]] - region) * alpha
        labels[top:bottom, left:right][shape > 127] = number
    return image.clip(0, 255).round().astype(np.uint8), labels


def _outline(radius: float, rng: np.random.Generator) -> np.ndarray:
    """A closed shape about (0, 0): an ellipse, a polygon or a wavy blob, (K, 2) px."""
    kind = rng.integers(3)
    corners = int(rng.integers(3, 7)) if kind == 0 else 40
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False) + rng.uniform(0, 2 * np.pi)
    distance = np.ones_like(angle)
    if kind == 2:
        for waves in (2, 3, 5):
            distance += rng.uniform(0.02, 0.15) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
    points = radius * distance[:, None] * np.stack([np.cos(angle), rng.uniform(0.4, 1) * np.sin(angle)], axis=1)
    turn = rng.uniform(0, 2 * np.pi)
    return points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])


def _texture(palette: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two colours mixed by a pattern, under a soft light: (T, T, 3) float32 in about 0..255."""
    size = _TEXTURE_PX
    first, second = (
        palette[rng.integers(len(palette))] * rng.uniform(0.7, 1.2) + rng.normal(0, 12, 3) for _ in range(2)
    )
    y, x = (np.mgrid[:size, :size] / size).astype(np.float32)
    turn = rng.uniform(0, np.pi)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    frequency = float(np.exp(rng.uniform(np.log(1.5), np.log(12))))
    kind = rng.integers(6)
    if kind == 0:  # plain
        mix = np.full_like(x, 0.5)
    elif kind == 1:  # stripes
        mix = 0.5 + 0.5 * np.sin(2 * np.pi * frequency * along)
    elif kind == 2:  # checks
        mix = (np.floor(frequency * along) + np.floor(frequency * across)) % 2
    elif kind == 3:  # spots
        mix = (np.sin(2 * np.pi * frequency * along) * np.sin(2 * np.pi * frequency * across) > 0.3).astype(np.float32)
    else:  # clouds, and grain
        grid = int(rng.integers(2, 7)) if kind == 4 else int(rng.integers(10, 40))
        mix = cv2.resize(rng.random((grid, grid)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    light = 1 + rng.uniform(0, 0.35) * (along - 0.5)
    texture = (first + (second - first) * mix[..., None]) * light[..., None]
    return texture.astype(np.float32)
