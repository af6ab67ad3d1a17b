"""Subjects without their background on white squares, as the networks that measure likeness see them."""

from __future__ import annotations

import numpy as np

from mimicbrush.ops.masks import mask_box

#: What surrounds a subject whose background was removed, and pads its box to a square: white. *Ours*: the paper does
#: not say.
SUBJECT_FILL = 255


def cut_subject(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Cut out a subject without its background, on a square: (H, W, 3), (H, W) -> (S, S, 3) uint8."""
    left, top, right, bottom = mask_box(mask)
    alone = np.where(mask[..., None] > 0, image, np.uint8(SUBJECT_FILL))[top:bottom, left:right]
    return pad_to_square(alone)


def pad_to_square(image: np.ndarray) -> np.ndarray:
    """Pad an image with white to a square: (H, W, 3) -> (S, S, 3) uint8, S the longer side."""
    side = max(image.shape[:2])
    square = np.full((side, side, 3), SUBJECT_FILL, np.uint8)
    y, x = (side - image.shape[0]) // 2, (side - image.shape[1]) // 2
    square[y : y + image.shape[0], x : x + image.shape[1]] = image
    return square
