"""Reads and checks the images of an edit, as far as this needs no model. Imports nothing heavy."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from mimicbrush.errors import InputError, choose_words
from mimicbrush.io.image_formats import ImageEncoding
from mimicbrush.io.images import MASK_THRESHOLD, brightest_stored_value, normalise_mode, read_encoding, read_image
from mimicbrush.ops.crops import Box, crop_box
from mimicbrush.pipelines.editing.requests import Edit

#: Two sizes have the same shape, for `fit_mask`, if their aspect ratios differ by at most this (rounding to pixels).
ASPECT_TOLERANCE = 0.01
#: A mask that covers more than this share of the image may be inverted.
SUSPICIOUS_COVER = 0.75
#: If more than this share of a mask is neither black nor white, it may be a photograph that was given by mistake.
SUSPICIOUS_GREY = 0.25
_BLACK = 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EditInputs:
    """The checked images of an edit.

    Attributes:
        source: "RGB", in its own colour profile, which is in its ``info``.
        mask: "L", with the size of the source.
        reference: "RGB", in sRGB.
        encoding: how the source file is encoded, so that results are written with the same quality.
        other_references: the second and further references, like the first.
    """

    source: Image.Image
    mask: Image.Image
    reference: Image.Image
    encoding: ImageEncoding = field(default_factory=ImageEncoding)
    other_references: tuple[Image.Image, ...] = ()

    @property
    def references(self) -> list[Image.Image]:
        """Images of all references, the first one first."""
        return [self.reference, *self.other_references]

    def reference_argument(self) -> Image.Image | list[Image.Image]:
        """Return the `reference` argument of a pipeline: the image, or a list if there are several."""
        return self.references if self.other_references else self.reference

    def shown_source(self) -> Image.Image:
        """Return the source in sRGB, to show it with other images."""
        return normalise_mode(self.source, "RGB")


def read_inputs(edit: Edit, *, resize_mask: bool = False, allow_full_mask: bool = False) -> EditInputs:
    """Read and check the images of an edit.

    Args:
        edit: the edit, with the names of the files.
        resize_mask: resize a mask that has the aspect ratio of the source, but another size.
        allow_full_mask: accept a mask that covers all of the source.

    Raises:
        InputError: an image cannot be read, or the images do not fit together; the message names the file.
    """
    source = read_image(edit.source, "RGB", keep_profile=True)
    mask = None if edit.mask is None else read_image(edit.mask, "L")
    reference, *others = (read_image(path, "RGB") for path in edit.references)
    if edit.mask is None or mask is None:
        assert edit.mask_box is not None
        mask = draw_box_mask(source, edit.source, edit.mask_box, allow_full_mask)
    else:
        if mask.size != source.size:
            mask = _fit_mask_or_tell(mask, edit, source, reference, resize_mask)
        check_cover(mask, edit.mask, allow_full_mask)
    if edit.reference_crop is not None:
        crop_box(np.asarray(reference), edit.reference_crop, f"reference {edit.reference}")
    return EditInputs(source, mask, reference, read_encoding(edit.source), tuple(others))


def draw_box_mask(source: Image.Image, path: Path, box: Box, allow_full: bool) -> Image.Image:
    """Draw the mask of a box: "L", white inside the box, with the size of the source.

    Args:
        source: an image in any mode.
        path: the file of the source, for the error.
        box: the box in pixels of the source; column x1 and row y1 are not part of it.
        allow_full: accept a box that covers all of the source.

    Raises:
        InputError: the box is not inside the source, or covers all of it, and this is not allowed.
    """
    values = np.zeros((source.height, source.width), np.uint8)
    crop_box(values, box, f"source {path}")[:] = 255
    if values.all() and not allow_full:
        way = choose_words(
            python="allow_full_mask=True repaints the whole image",
            command="--allow-full-mask repaints the whole image",
            page="leave a part of the image out",
        )
        raise InputError(
            f"the box {','.join(map(str, box))} covers all of {path}, so nothing of the source is left ({way})"
        )
    return Image.fromarray(values)


def _fit_mask_or_tell(
    mask: Image.Image, edit: Edit, source: Image.Image, reference: Image.Image, resize: bool
) -> Image.Image:
    """Fit a mask of another size; warn if it fits the reference, because source and reference may be swapped."""
    assert edit.mask is not None
    order = choose_words(
        python="the arguments are source, mask, reference",
        command="the order is REF SRC MASK; --reference, --source and --mask name them",
        page="paint the mask on the source",
    )
    note = f"{edit.mask} has the size of {edit.reference}: did you swap source and reference? ({order})"
    fits_reference = mask.size == reference.size
    try:
        fitted = fit_mask(mask, edit.mask, source.size, edit.source, resize)
    except InputError as error:
        if fits_reference:
            raise InputError(f"{error}. {note}") from error
        raise
    if fits_reference:
        _log.warning("%s", note)
    return fitted


def fit_mask(mask: Image.Image, path: Path, size: tuple[int, int], source_path: Path, resize: bool) -> Image.Image:
    """Resize a mask to the size of its source by nearest neighbour, if `resize` is set.

    Args:
        mask: the mask, "L".
        path: file of the mask, for the error.
        size: size of the source, (width, height) px.
        source_path: file of the source, for the error.
        resize: False: any other size is an error.

    Raises:
        InputError: `resize` is False, or the aspect ratios differ by more than `ASPECT_TOLERANCE`.
    """
    sizes = f"{path} is {mask.width} x {mask.height} px but {source_path} is {size[0]} x {size[1]} px"
    stretch = mask.width * size[1] / (mask.height * size[0])
    if abs(stretch - 1) <= ASPECT_TOLERANCE:
        if resize:
            return mask.resize(size, Image.Resampling.NEAREST)
        way = choose_words(
            python="resize_mask=True resizes it",
            command="--resize-mask resizes it",
            page="paint the mask here, or upload a mask of that size",
        )
        raise InputError(f"{sizes}; the mask must have the size of its source ({way})")
    turned = mask.size == size[::-1]
    hint = "; is the mask rotated? A source is rotated as its EXIF data says before it is edited" if turned else ""
    within = f"its aspect ratio may differ by at most {ASPECT_TOLERANCE:.0%}"
    shape = choose_words(
        python=f" (with resize_mask=True {within})", command=f" (with --resize-mask {within})", page=""
    )
    raise InputError(f"{sizes}; the mask must have the size of its source{shape}{hint}")


def check_cover(mask: Image.Image, path: Path, allow_full: bool) -> None:
    """Check that a mask has a part to repaint and a part to keep; warn if it looks inverted, or not like a mask.

    Args:
        mask: the mask, "L".
        path: file of the mask, for the error.
        allow_full: accept a mask that covers all of the source.

    Raises:
        InputError: the mask is empty, or covers all, and this is not allowed.
    """
    values = np.asarray(mask)
    covered = float((values > MASK_THRESHOLD).mean())
    if covered == 0:
        stored = brightest_stored_value(path)
        as_stored = "" if stored is None else f", stored as {stored:g}"
        raise InputError(
            f"{path}: the mask is empty: no pixel is above {MASK_THRESHOLD} of 255 (the brightest value is "
            f"{values.max()}{as_stored}), so there is nothing to repaint; paint white where to repaint"
        )
    if covered == 1 and not allow_full:
        way = choose_words(
            python="allow_full_mask=True repaints the whole image",
            command="--allow-full-mask repaints the whole image",
            page="leave a part of the image unpainted",
        )
        raise InputError(
            f"{path}: the mask is full, so nothing of the source is left; white means repaint: is the mask inverted? "
            f"({way})"
        )
    grey = float(((values > _BLACK) & (values < 255 - _BLACK)).mean())
    if grey > SUSPICIOUS_GREY:
        _log.warning(
            "%s: %.0f %% of the pixels are neither black nor white, as in a photograph: is this the mask? "
            "(the order of a command line is REF SRC MASK)",
            path,
            grey * 100,
        )
    if covered > SUSPICIOUS_COVER and not allow_full:
        _log.warning(
            "%s: the mask covers %.1f %% of the image; white means repaint: is the mask inverted?", path, covered * 100
        )
