"""Plots of matches, masks and segments over images, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from mimicbrush.ops.geometry import resize_matrix, transform_points

_GAP_PX = 6

#: Two greys for stripes, of which one differs from any image, and a colour for the rim, which photographs lack.
STRIPE_GREYS, RIM_COLOUR = (95, 185), (255, 0, 200)
#: Stripes and rims over the long side of an image: as large at any size, when the image is fitted into a sheet.
_STRIPE_RATIO, _RIM_RATIO = 1 / 24, 1 / 64


def tint(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], opacity: float = 0.6) -> np.ndarray:
    """Lay a colour over part of an image: (H, W, 3) uint8, (H, W) not 0 where to -> (H, W, 3) uint8.

    Args:
        image, mask: of one size.
        colour: RGB, 0..255.
        opacity: 0 leaves the image as it is, 1 hides it.
    """
    mixed = image * (1 - opacity) + np.array(colour) * opacity
    return np.where(mask[..., None] > 0, mixed.round().astype(np.uint8), image)


def mark_mask(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mark what is to be repainted by stripes, visible on dark, light and grey images alike.

    Nothing outside of the mask is hidden: the rim lies within it.

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W), not 0 = repaint.

    Returns:
        (H, W, 3) uint8.
    """
    binary = (mask > 0).astype(np.uint8)
    long_side = max(binary.shape)
    y, x = np.mgrid[: binary.shape[0], : binary.shape[1]]
    light = (x + y) // max(1, round(long_side * _STRIPE_RATIO)) % 2
    stripes = np.array(STRIPE_GREYS, np.uint8)[light][..., None]
    # What lies beyond the image counts as the mask's inside: no rim runs along the image's edge.
    rim_px = max(1, round(long_side * _RIM_RATIO))
    inner = cv2.erode(binary, np.ones((3, 3), np.uint8), iterations=rim_px, borderType=cv2.BORDER_REPLICATE)
    marked = np.where(binary[..., None] > 0, stripes, image)
    marked[binary > inner] = RIM_COLOUR
    return marked


def tint_segments(image: np.ndarray, segments: Sequence[np.ndarray]) -> np.ndarray:
    """Tint each segment in a colour of its own: (H, W, 3) uint8 and (H, W) masks -> (H, W, 3) uint8."""
    for number, segment in enumerate(segments):
        # Steps by the golden ratio: neighbours in the list never look alike.
        image = tint(image, segment, _rainbow(number * 0.618 % 1, 170), 0.5)
        outlines, _ = cv2.findContours(segment.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        image = cv2.drawContours(np.ascontiguousarray(image), outlines, -1, (255, 255, 255), 1, cv2.LINE_AA)
    return image


def plot_matches(
    a: np.ndarray,
    b: np.ndarray,
    a_points: np.ndarray,
    b_points: np.ndarray,
    height_px: int = 220,
    lines: int = 60,
) -> np.ndarray:
    """Plot two images side by side, with lines between their matched keypoints.

    Args:
        a, b: (H, W, 3) uint8, of any size.
        a_points, b_points: (K, 2) matched points (x, y) in their pixels.
        height_px: of the panel.
        lines: at most so many are plotted, taken evenly, so that each can be seen.

    Returns:
        (height_px, W', 3) uint8. The colour of a line runs with its height in the first image.
    """
    images, points = [], []
    for image, image_points in ((a, a_points), (b, b_points)):
        scale = height_px / image.shape[0]
        size = (round(image.shape[1] * scale), height_px)
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        images.append(cv2.resize(image, size, interpolation=how))
        points.append(transform_points(image_points, resize_matrix(size[0] / image.shape[1], scale)))
    gap = np.full((height_px, _GAP_PX, 3), 255, np.uint8)
    panel = np.hstack([images[0], gap, images[1]])
    shift = np.array([images[0].shape[1] + _GAP_PX, 0])
    # Eight times finer than pixels, as OpenCV's fixed-point drawing allows.
    ends = np.stack([points[0], points[1] + shift], axis=1) * 8
    for i in np.unique(np.linspace(0, len(ends) - 1, min(lines, len(ends))).astype(int)):
        start, end = (tuple(int(value) for value in end) for end in ends[i].round())
        colour = _rainbow(float(points[0][i, 1]) / height_px)
        cv2.line(panel, start, end, colour, 1, cv2.LINE_AA, shift=3)
        for point in (start, end):
            cv2.circle(panel, point, 3 * 8, colour, 1, cv2.LINE_AA, shift=3)
    return panel


def _rainbow(position: float, saturation: int = 255) -> tuple[int, int, int]:
    hue = np.array([[[np.clip(position, 0, 1) * 150, saturation, 255]]], np.uint8)
    red, green, blue = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0]
    return int(red), int(green), int(blue)
