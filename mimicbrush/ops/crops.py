"""Boxes in images, and how an image lies on the model's square canvas.

A box is (x0, y0, x1, y1) in pixels, x1 and y1 just outside, as in Pillow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mimicbrush.errors import InputError
from mimicbrush.ops.masks import mask_box

Box = tuple[int, int, int, int]


def square_around(mask: np.ndarray, size_px: int) -> Box:
    """Choose a square to edit around a mask, so that a small one in a large image is painted at full resolution.

    Its side is one and a half times that of the mask's box, at least the model's size (nothing is magnified), and
    leaves room for the soft edge of the paste-back. Then it is moved and cut to lie within the image.

    Args:
        mask: (H, W), not 0 = repaint; not empty.
        size_px: side of the model's canvas.
    """
    height, width = mask.shape
    x0, y0, x1, y1 = mask_box(mask)
    mask_side = max(x1 - x0, y1 - y0)
    side = max(mask_side * 3 // 2, mask_side + 24, size_px)
    left, right = centre_interval(x0, x1, side, width)
    top, bottom = centre_interval(y0, y1, side, height)
    return left, top, right, bottom


def centre_interval(low: int, high: int, side: int, limit: int) -> tuple[int, int]:
    """Centre an interval of this length around another, moved and cut to lie within 0..limit."""
    side = min(side, limit)
    start = min(max(0, (low + high - side) // 2), limit - side)
    return start, start + side


def grow_box(box: Box, by_px: int, width: int, height: int) -> Box:
    """Grow a box by a margin on every side, as far as the image goes."""
    x0, y0, x1, y1 = box
    return max(0, x0 - by_px), max(0, y0 - by_px), min(width, x1 + by_px), min(height, y1 + by_px)


def crop_box(image: np.ndarray, box: Box, name: str) -> np.ndarray:
    """Cut a box out of an image (H, W[, C]).

    Args:
        image: any image.
        box: must lie within it.
        name: of the image, for the error.

    Raises:
        InputError: the box is empty or does not lie within the image.
    """
    height, width = image.shape[:2]
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise InputError(
            f"{x0},{y0},{x1},{y1} is not a box inside the {name}, which is {width} x {height} px; "
            "give X0,Y0,X1,Y1 with X0 < X1 and Y0 < Y1"
        )
    return image[y0:y1, x0:x1]


@dataclass(frozen=True)
class Placement:
    """Placement of an image, or a crop of it, on the model's square canvas.

    Attributes:
        box: the part of the image that is on the canvas.
        size_px: side of the canvas.
    """

    box: Box
    size_px: int

    @property
    def image_px_per_canvas_px(self) -> float:
        """Pixels of the image per pixel of the canvas."""
        x0, y0, x1, y1 = self.box
        return max(x1 - x0, y1 - y0) / self.size_px

    def to_image(self, points: np.ndarray) -> np.ndarray:
        """Map points (..., 2) as x, y in canvas pixels to pixels of the whole image.

        Undoes `letterbox`; a point on the padding comes to lie outside of the box.
        """
        x0, y0, x1, y1 = self.box
        width, height = x1 - x0, y1 - y0
        long_side = max(width, height)
        padding = np.array([(long_side - width) // 2, (long_side - height) // 2])
        return points * self.image_px_per_canvas_px - padding + np.array([x0, y0])
