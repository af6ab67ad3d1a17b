"""Two ways to fill a hole that need no model: a model that does not beat them has learnt little."""

from __future__ import annotations

import cv2
import numpy as np

from mimicbrush.ops.masks import mask_box

#: How far around a pixel OpenCV looks for known ones.
INPAINT_RADIUS_PX = 5


def copy_in_place(source: np.ndarray, mask: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The reference's pixels at the same place: (S, S, 3), (S, S), (S, S, 3) -> (S, S, 3) uint8."""
    return np.where(mask[..., None] > 0, reference, source)


def opencv_inpaint(source: np.ndarray, mask: np.ndarray, area: np.ndarray) -> np.ndarray:
    """The hole filled from its surroundings by OpenCV (Telea 2004).

    Only the picture itself is worked on: the white padding around it would bleed into the hole.

    Args:
        source: (S, S, 3) uint8.
        mask: (S, S), 1 = hole.
        area: (S, S), 1 where the canvas shows the picture; a rectangle.

    Returns:
        (S, S, 3) uint8.
    """
    left, top, right, bottom = mask_box(area)
    hole = np.ascontiguousarray(mask[top:bottom, left:right] > 0, np.uint8)
    filled = source.copy()
    picture = np.ascontiguousarray(source[top:bottom, left:right])
    filled[top:bottom, left:right] = cv2.inpaint(picture, hole, INPAINT_RADIUS_PX, cv2.INPAINT_TELEA)
    return filled
