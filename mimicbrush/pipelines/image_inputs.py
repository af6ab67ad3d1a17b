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


def list_images(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """One image or several, as a list."""
    found = [images] if isinstance(images, Image.Image | np.ndarray) else list(images)
    for image in found:
        if not isinstance(image, Image.Image | np.ndarray):
            raise InputError(f"an image must be a PIL image or a NumPy array, got {type(image).__name__}")
    return found


def to_rgb_array(image: ImageInput) -> np.ndarray:
    """A image as (H, W, 3) uint8, turned as its EXIF says."""
    array = np.asarray(normalise_mode(image, "RGB")) if isinstance(image, Image.Image) else image
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise InputError(f"an image must be (H, W, 3) uint8, got {array.shape} {array.dtype}")
    return array


def to_mask_array(image: ImageInput) -> np.ndarray:
    """A mask as (H, W) uint8 in 0..255; a boolean array is True where to repaint."""
    array = np.asarray(normalise_mode(image, "L")) if isinstance(image, Image.Image) else image
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
    for number, (image, mask) in enumerate(zip(sources, masks, strict=True)):
        if image.shape[:2] != mask.shape:
            raise InputError(
                f"mask {number} is {mask.shape[1]} x {mask.shape[0]} px, "
                f"its source {image.shape[1]} x {image.shape[0]} px; they must be of one size"
            )
        if not (mask > MASK_THRESHOLD).any():
            raise InputError(f"mask {number} is empty: nothing in it is above 128, so there is nothing to repaint")


def list_boxes(images: list[np.ndarray], crops: Box | list[Box] | None) -> list[Box]:
    """Which part of each image is meant: one box for all, a list with one each, or all of it.

    Raises:
        InputError: a list of another length, or a box that does not lie within its image.
    """
    boxes = crops if isinstance(crops, list) else [crops or full_box(image) for image in images]
    if len(boxes) != len(images):
        raise InputError(f"{len(boxes)} crops for {len(images)} references; give one, or one each")
    for image, box in zip(images, boxes, strict=True):
        crop_box(image, box, "reference")
    return boxes


def full_box(image: np.ndarray) -> Box:
    """The box of all of an image."""
    return 0, 0, image.shape[1], image.shape[0]
