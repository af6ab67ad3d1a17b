"""Convert the images of a call to arrays and canvases, and check that they fit together."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mimicbrush.errors import InputError, choose_words
from mimicbrush.io.color_profiles import find_profile
from mimicbrush.io.images import normalise_mode
from mimicbrush.ops.canvas import IMAGE_FILL, MASK_THRESHOLD, letterbox, letterbox_mask
from mimicbrush.ops.crops import Box, Placement, crop_box, square_around
from mimicbrush.ranges import BATCH_RANGE, GUIDANCE_RANGE, REFERENCES_RANGE, STEPS_RANGE, NumberRange

ImageInput = Image.Image | np.ndarray
#: One reference, one for each source, or several for each.
References = ImageInput | Sequence[ImageInput] | Sequence[Sequence[ImageInput]]

#: A mask above this (of 255) shows when the result is pasted back: the crop around the mask must hold it.
_VISIBLE_WHEN_PASTED = 8


def list_images(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """List one image or several.

    Raises:
        InputError: something else than images.
    """
    listed = _list_items(images)
    for image in listed:
        if not isinstance(image, Image.Image | np.ndarray):
            raise InputError(f"an image must be a PIL image or a NumPy array, got {type(image).__name__}")
    return listed


def _list_items(given: Any) -> list[Any]:
    if isinstance(given, Image.Image | np.ndarray) or not isinstance(given, Iterable):
        return [given]
    return list(given)


def group_references(references: References, num_sources: int | None = None) -> list[list[ImageInput]]:
    """Group references by the source that they belong to.

    Args:
        references: one; a list, one for each source; a list of such lists, all of one length: several for each source.
        num_sources: for 1, a list of several belongs to the one source; None: each of a list is for another source.

    Raises:
        InputError: something else than images, or lists that do not fit.
    """
    listed = _list_items(references)
    if num_sources == 1 and len(listed) > 1 and not any(isinstance(each, Sequence) for each in listed):
        listed = [listed]
    groups = [list_images(each) for each in listed]
    lengths = [len(group) for group in groups]
    if len(set(lengths)) > 1:
        raise InputError(f"all sources must have the same number of references, got {', '.join(map(str, lengths))}")
    for length in lengths[:1]:
        REFERENCES_RANGE.check("references of a source", length)
    return groups


@dataclass(frozen=True)
class StoredColors:
    """The colours of a source as it came, in its own colour profile.

    Attributes:
        pixels: (H, W, 3) uint8, upright.
        icc: the profile.
    """

    pixels: np.ndarray
    icc: bytes


def find_stored_colors(image: ImageInput) -> StoredColors | None:
    """Find the colours of an image in its own profile; None if the result can only be sRGB."""
    if not isinstance(image, Image.Image) or find_profile(image) is None:
        return None
    with warnings.catch_warnings():  # `to_rgb_array` has said it
        warnings.simplefilter("ignore")
        kept = normalise_mode(image, "RGB", keep_profile=True)
    icc = kept.info.get("icc_profile")
    return None if icc is None else StoredColors(np.asarray(kept), icc)


def to_rgb_array(image: ImageInput) -> np.ndarray:
    """Convert an image to (H, W, 3) uint8 in sRGB, rotated by its EXIF data."""
    array = np.asarray(normalise_mode(image, "RGB")) if isinstance(image, Image.Image) else image
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise InputError(f"an image must be (H, W, 3) uint8, got {array.shape} {array.dtype}")
    return array


def to_mask_array(image: ImageInput) -> np.ndarray:
    """Convert a mask to (H, W) uint8 in 0..255; a boolean array is True where to repaint."""
    array = np.asarray(normalise_mode(image, "L")) if isinstance(image, Image.Image) else image
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.ndim != 2 or array.dtype != np.uint8:
        raise InputError(f"a mask must be (H, W), uint8 in 0..255 or bool, got {array.shape} {array.dtype}")
    return array


def check_masks(sources: list[np.ndarray], masks: list[np.ndarray]) -> None:
    """Check that there is one mask per source, of its size, and not empty.

    Raises:
        InputError: names the first that does not fit.
    """
    if not sources:
        raise InputError("no source was given")
    if len(masks) != len(sources):
        raise InputError(f"expected one mask per source, got {len(sources)} sources and {len(masks)} masks")
    for number, (image, mask) in enumerate(zip(sources, masks, strict=True)):
        name = _name_mask(number, len(masks))
        if image.shape[:2] != mask.shape:
            raise InputError(
                f"{name} is {mask.shape[1]} x {mask.shape[0]} px, "
                f"but its source is {image.shape[1]} x {image.shape[0]} px; both must have the same size"
            )
        if not (mask > MASK_THRESHOLD).any():
            raise InputError(f"{name} is empty: no pixel is above 128, so there is nothing to repaint")


def _name_mask(number: int, count: int) -> str:
    return "the mask" if count == 1 else f"mask[{number}]"


def list_boxes(images: list[np.ndarray], crops: Box | Sequence[Box | None] | None) -> list[Box]:
    """List the box of each image that is meant: one for all, or a list with one each; None is the full image.

    Raises:
        InputError: a list of another length, or a box that does not lie within its image.
    """
    listed = crops if isinstance(crops, list) else [crops] * len(images)
    if len(listed) != len(images):
        raise InputError(f"expected one crop, or one for each of {len(images)} references, got {len(listed)}")
    boxes = [box or full_box(image) for image, box in zip(images, listed, strict=True)]
    for image, box in zip(images, boxes, strict=True):
        crop_box(image, box, "reference")
    return boxes


def full_box(image: np.ndarray) -> Box:
    """Find the box that holds the full image, (x0, y0, x1, y1)."""
    return 0, 0, image.shape[1], image.shape[0]


def place_sources(sources: list[np.ndarray], masks: list[np.ndarray], how: str, size_px: int) -> list[Placement]:
    """Choose the part of each source to edit: the full image ("full") or a square around the mask ("auto").

    Args:
        sources, masks: (H, W, 3) and (H, W) uint8.
        how: "full" or "auto".
        size_px: side of the canvas.

    Raises:
        InputError: `how` is something else.
    """
    if how not in ("full", "auto"):
        raise InputError(f"crop must be full or auto, got {how!r}")
    boxes = [
        square_around(mask > _VISIBLE_WHEN_PASTED, size_px) if how == "auto" else full_box(source)
        for source, mask in zip(sources, masks, strict=True)
    ]
    return [Placement(box, size_px) for box in boxes]


def letterbox_images(images: list[np.ndarray], placements: list[Placement], size_px: int, order: str) -> np.ndarray:
    """Put images, (H, W, 3) uint8, onto square canvases, (B, S, S, 3) uint8.

    Args:
        images: B of them.
        placements: which part of each is shown.
        size_px: S.
        order: see `ops.canvas.letterbox`.
    """
    return np.stack(
        [
            letterbox(crop_box(image, placement.box, "image"), size_px, IMAGE_FILL, order)
            for image, placement in zip(images, placements, strict=True)
        ]
    )


def letterbox_masks(
    masks: list[np.ndarray], placements: list[Placement], size_px: int, order: str, px_per_latent: int
) -> np.ndarray:
    """Put masks, (H, W) uint8 in 0..255, onto square canvases, (B, S, S) uint8, 0 or 1.

    Args:
        masks: B of them.
        placements, size_px, order: see `letterbox_images`.
        px_per_latent: along a side.

    Raises:
        InputError: nothing is left of a mask on the grid of the latents.
    """
    canvases = [
        letterbox_mask(crop_box(mask, placement.box, "mask"), size_px, order)
        for mask, placement in zip(masks, placements, strict=True)
    ]
    for number, canvas in enumerate(canvases):
        # The mask of the latents takes every eighth pixel of it.
        if not canvas[::px_per_latent, ::px_per_latent].any():
            way = choose_words(
                python='crop="auto"', command="--crop auto", page='switch on "Use only the area around the mask"'
            )
            raise InputError(
                f"{_name_mask(number, len(masks))} is too thin: nothing of it is left at the model's resolution of "
                f"{size_px} px, {px_per_latent} px per latent; make it wider, or edit a square around it ({way})"
            )
    return np.stack(canvases)


#: What numbers the arguments of a call may be, by their names.
_RANGES = {
    "num_images_per_prompt": NumberRange(at_least=1, whole=True),
    "num_inference_steps": STEPS_RANGE,
    "guidance_scale": GUIDANCE_RANGE,
    "eta": NumberRange(at_least=0, at_most=1),
    "reference_batch_size": BATCH_RANGE,
    "max_graphs": NumberRange(at_least=1, whole=True),
}


def check_numbers(**arguments: object) -> None:
    """Check the numbers in a call of the pipeline, by argument name.

    Raises:
        InputError: names the argument, its value and its range.
    """
    for name, value in arguments.items():
        _RANGES[name].check(name, value)


def check_generators(sources: int, num_images_per_prompt: int, generator: object) -> None:
    """Check that there is one generator for all results, or one each.

    Raises:
        InputError: says how many there are, and how many are needed.
    """
    rows = sources * num_images_per_prompt
    if isinstance(generator, list) and len(generator) != rows:
        raise InputError(
            f"expected one generator, or {rows} for {sources} sources x {num_images_per_prompt} images, got "
            f"{len(generator)}"
        )


def check_recording(has_reference: bool, has_reference_unet: bool, correspondence: bool, record: object | None) -> None:
    """Check that reference attention can be recorded, if that is requested.

    Args:
        has_reference: of the call.
        has_reference_unet: of the pipeline.
        correspondence, record: the options of the call that record.

    Raises:
        InputError: there is none, or both options are given.
    """
    if not correspondence and record is None:
        return
    option = "return_correspondence" if correspondence else "attention_record"
    if not has_reference:
        raise InputError(f"{option} needs a reference")
    if not has_reference_unet:
        raise InputError(f"{option} needs a reference U-Net, but this pipeline has none")
    if correspondence and record is not None:
        raise InputError(
            "return_correspondence also records attention: use either return_correspondence or attention_record"
        )
