"""What users hand to the pipeline, as arrays; errors say what does not fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from mimicbrush.errors import InputError
from mimicbrush.io.images import normalise_mode
from mimicbrush.ops.canvas import MASK_THRESHOLD
from mimicbrush.ops.crops import Box, crop_box

ImageInput = Image.Image | np.ndarray


def list_images(pictures: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """One picture or several, as a list."""
    found = [pictures] if isinstance(pictures, Image.Image | np.ndarray) else list(pictures)
    for picture in found:
        if not isinstance(picture, Image.Image | np.ndarray):
            raise InputError(f"a picture must be a PIL image or a NumPy array, got {type(picture).__name__}")
    return found


def to_rgb_array(picture: ImageInput) -> np.ndarray:
    """A picture as (H, W, 3) uint8, turned as its EXIF says."""
    array = np.asarray(normalise_mode(picture, "RGB")) if isinstance(picture, Image.Image) else picture
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise InputError(f"a picture must be (H, W, 3) uint8, got {array.shape} {array.dtype}")
    return array


def to_mask_array(picture: ImageInput) -> np.ndarray:
    """A mask as (H, W) uint8 in 0..255; a boolean array is True where to repaint."""
    array = np.asarray(normalise_mode(picture, "L")) if isinstance(picture, Image.Image) else picture
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.ndim != 2 or array.dtype != np.uint8:
        raise InputError(f"a mask must be (H, W), uint8 in 0..255 or bool, got {array.shape} {array.dtype}")
    return array


def check_masks(sources: list[np.ndarray], masks: list[np.ndarray]) -> None:
    """Whether there is one mask per source, of its size, and not empty.

    Raises:
        InputError: names the first that does not fit.
    """
    if not sources:
        raise InputError("no source was given")
    if len(masks) != len(sources):
        raise InputError(f"one mask per source is needed, got {len(sources)} sources, {len(masks)} masks")
    for number, (picture, mask) in enumerate(zip(sources, masks, strict=True)):
        if picture.shape[:2] != mask.shape:
            raise InputError(
                f"mask {number} is {mask.shape[1]} x {mask.shape[0]} px, "
                f"its source {picture.shape[1]} x {picture.shape[0]} px; they must be of one size"
            )
        if not (mask > MASK_THRESHOLD).any():
            raise InputError(f"mask {number} is empty: nothing in it is above 128, so there is nothing to repaint")


def list_boxes(pictures: list[np.ndarray], crops: Box | list[Box] | None) -> list[Box]:
    """Which part of each picture is meant: one box for all, a list with one each, or all of it.

    Raises:
        InputError: a list of another length, or a box that does not lie within its picture.
    """
    boxes = crops if isinstance(crops, list) else [crops or full_box(picture) for picture in pictures]
    if len(boxes) != len(pictures):
        raise InputError(f"{len(boxes)} crops for {len(pictures)} references; give one, or one each")
    for picture, box in zip(pictures, boxes, strict=True):
        crop_box(picture, box, "reference")
    return boxes


def full_box(picture: np.ndarray) -> Box:
    """The box of all of a picture."""
    return 0, 0, picture.shape[1], picture.shape[0]
