"""Editors without a model: bounds from above and below, classical fills, and results that others made.

A model that does not beat the fills has learnt little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mimicbrush.errors import InputError
from mimicbrush.evaluation.benchmark.layout import TRACKS, Case, TrackName
from mimicbrush.evaluation.editors.protocol import (
    CaseInputs,
    CaseOnlyEditor,
    CaseResult,
    Editor,
    NotApplicableError,
    PairBatch,
    PairResults,
)
from mimicbrush.io.images import MASK_THRESHOLD, read_image
from mimicbrush.ops.geometry import reduce_to_fit
from mimicbrush.ops.keypoints import Features, find_homography, sift_features
from mimicbrush.ops.masks import mask_box

#: How far around a pixel OpenCV looks for unmasked ones.
INPAINT_RADIUS_PX = 5
#: How far a match may lie from the homography: this part of the image's longer side, within bounds in pixels.
RANSAC_RATIO, RANSAC_PX = 0.01, (1.0, 3.0)
#: The standard deviation of `blur_fill`, as a part of the longer side of the box around the mask.
BLUR_RATIO = 0.25


# ---- fills: arrays in, arrays out


def blur_fill(source: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fill the mask with a wide Gaussian blur of the pixels around it.

    The blur is normalised: masked pixels have no weight. Where even the blur sees no other pixel, the fill is the
    mean of all unmasked pixels.

    Args:
        source: (H, W, 3) uint8.
        mask: (H, W), not 0 = repaint.

    Returns:
        (H, W, 3) uint8; outside of the mask the source.

    Raises:
        InputError: there is nothing around the mask.
    """
    is_kept = (mask == 0).astype(np.float32)
    if not is_kept.any():
        raise InputError("the mask is full, so there is nothing around the hole to blur")
    x0, y0, x1, y1 = mask_box(mask)
    sigma_px = max(1.0, BLUR_RATIO * max(x1 - x0, y1 - y0))

    def blur(image: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(image, (0, 0), sigma_px, borderType=cv2.BORDER_CONSTANT)

    weight = blur(is_kept)[..., None]
    total = blur(source.astype(np.float32) * is_kept[..., None])
    mean = source[is_kept > 0].mean(axis=0)
    fill = np.where(weight > 1e-6, total / np.maximum(weight, 1e-6), mean)
    return np.where(is_kept[..., None] > 0, source, fill.round().clip(0, 255).astype(np.uint8))


def copy_in_place(source: np.ndarray, mask: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Fill the mask with the reference's pixels at the same place: (S, S, 3), (S, S), (S, S, 3) -> (S, S, 3) uint8."""
    return np.where(mask[..., None] > 0, reference, source)


def opencv_inpaint(source: np.ndarray, mask: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Fill the mask from its surroundings by OpenCV (Telea 2004).

    OpenCV gets the image alone: the white padding around it would bleed into the fill.

    Args:
        source: (S, S, 3) uint8.
        mask: (S, S), not 0 = repaint.
        area: (S, S), 1 where the canvas shows the image; a rectangle.

    Returns:
        (S, S, 3) uint8.
    """
    left, top, right, bottom = mask_box(area)
    inner_mask = np.ascontiguousarray(mask[top:bottom, left:right] > 0, np.uint8)
    filled = source.copy()
    image = np.ascontiguousarray(source[top:bottom, left:right])
    filled[top:bottom, left:right] = cv2.inpaint(image, inner_mask, INPAINT_RADIUS_PX, cv2.INPAINT_TELEA)
    return filled


def sift_homography(
    source: np.ndarray,
    mask: np.ndarray,
    reference: np.ndarray,
    area: np.ndarray,
    reference_area: np.ndarray | None = None,
) -> np.ndarray:
    """Fill the mask with the reference as one plane: SIFT matches, a RANSAC homography, the reference warped.

    This is what a classical method makes of the task. It is exact where one plane, or a turning camera, explains both
    images. Where the reference shows another thing, or the same one in another shape, it finds no homography or a
    wrong one. `opencv_inpaint` fills what the warped reference does not show, and everything if too few matches agree
    (`find_homography`).

    Args:
        source: (S, S, 3) uint8; masked pixels are not looked at.
        mask: (S, S), not 0 = repaint.
        reference: (H, W, 3) uint8, of any size.
        area: (S, S), 1 where the canvas shows the image; a rectangle.
        reference_area: (H, W), 1 where the reference is an image and no padding; None: everywhere.

    Returns:
        (S, S, 3) uint8; outside of the mask the source.
    """
    is_masked = mask > 0
    inpainted = opencv_inpaint(source, mask, area)
    valid = np.full(reference.shape[:2], 255, np.uint8)
    if reference_area is not None:
        valid *= reference_area > 0
    matrix = _find_reference_to_source(inpainted, is_masked, reference, valid, area)
    if matrix is None:
        return inpainted
    height, width = is_masked.shape
    reference, to_source = reduce_to_fit(reference, matrix)
    warped = cv2.warpPerspective(reference, to_source, (width, height), flags=cv2.INTER_LINEAR)
    valid, to_source = reduce_to_fit(valid, matrix)
    is_shown = cv2.warpPerspective(valid, to_source, (width, height), flags=cv2.INTER_LINEAR) == 255
    filled = np.where((is_masked & is_shown)[..., None], warped, source)
    return opencv_inpaint(filled, (is_masked & ~is_shown).astype(np.uint8), area)


def _find_reference_to_source(
    inpainted: np.ndarray, is_masked: np.ndarray, reference: np.ndarray, valid: np.ndarray, area: np.ndarray
) -> np.ndarray | None:
    """The homography (3, 3) between them, of features outside of the mask only; what fills it gives none.

    Features of the reference count where `valid` is not 0.
    """
    left, top, right, bottom = mask_box(area)
    features = sift_features(np.ascontiguousarray(inpainted[top:bottom, left:right]))
    points = features.points + np.array([left, top], np.float32)
    x, y = points.round().astype(int).T
    is_visible = ~is_masked[y.clip(0, is_masked.shape[0] - 1), x.clip(0, is_masked.shape[1] - 1)]
    source_features = Features(points[is_visible], features.descriptors[is_visible])
    features = sift_features(reference)
    x, y = features.points.round().astype(int).T
    is_valid = valid[y.clip(0, valid.shape[0] - 1), x.clip(0, valid.shape[1] - 1)] > 0
    reference_features = Features(features.points[is_valid], features.descriptors[is_valid])
    threshold_px = float(np.clip(RANSAC_RATIO * max(right - left, bottom - top), *RANSAC_PX))
    return find_homography(reference_features, source_features, threshold_px)


# ---- editors


@dataclass(frozen=True)
class FillInputs:
    """The arrays of one fill.

    Attributes:
        source: (H, W, 3) uint8.
        mask: (H, W) uint8, 1 = repaint.
        area: (H, W) uint8, 1 where `source` is an image, 0 on its padding.
        reference: (H', W', 3) uint8; None: there is none.
        reference_area: (H', W') uint8, the same of the reference; None: it has no padding.
    """

    source: np.ndarray
    mask: np.ndarray
    area: np.ndarray
    reference: np.ndarray | None
    reference_area: np.ndarray | None


class FillEditor:
    """A fill as an editor, of cases and of pairs; see `Editor`.

    Args:
        name: of the editor.
        fill: `FillInputs` -> (H, W, 3) uint8.
        about: how it fills, in words.
    """

    def __init__(self, name: str, fill: Callable[[FillInputs], np.ndarray], about: str) -> None:
        self.name, self.about, self._fill = name, {"editor": about}, fill

    @property
    def size_px(self) -> None:
        """None: it edits on a canvas of any side."""
        return None

    def edit_pairs(self, batch: PairBatch, *, with_correspondences: bool = False) -> PairResults:
        """Edit a batch of held-out pairs, see `Editor`; without a reference OpenCV inpaints, where it needs one."""
        references = [None] * len(batch.sources) if batch.references is None else list(batch.references)
        images = [
            self._fill(FillInputs(source, mask, area, reference, reference_area))
            for source, mask, area, reference, reference_area in zip(
                batch.sources, batch.masks, batch.source_areas, references, batch.reference_areas, strict=True
            )
        ]
        return PairResults(np.stack(images))

    def edit_case(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """Edit one benchmark case, see `Editor`."""
        mask = (np.asarray(inputs.mask) > MASK_THRESHOLD).astype(np.uint8)
        if not mask.any():
            raise InputError("the mask is empty, so there is nothing to repaint")
        source, reference = np.asarray(inputs.source), np.asarray(inputs.reference)
        return CaseResult(Image.fromarray(self._fill(FillInputs(source, mask, np.ones_like(mask), reference, None))))


def _fill_by_blur(inputs: FillInputs) -> np.ndarray:
    left, top, right, bottom = mask_box(inputs.area)  # without the padding, which would bleed into the fill
    filled = inputs.source.copy()
    filled[top:bottom, left:right] = blur_fill(
        inputs.source[top:bottom, left:right], inputs.mask[top:bottom, left:right]
    )
    return filled


def _fill_by_inpainting(inputs: FillInputs) -> np.ndarray:
    return opencv_inpaint(inputs.source, inputs.mask, inputs.area)


def _fill_by_copying(inputs: FillInputs) -> np.ndarray:
    if inputs.reference is None:
        return _fill_by_inpainting(inputs)
    height, width = inputs.mask.shape
    stretched = Image.fromarray(inputs.reference).resize((width, height), Image.Resampling.BILINEAR)
    return copy_in_place(inputs.source, inputs.mask, np.asarray(stretched))


def _fill_by_homography(inputs: FillInputs) -> np.ndarray:
    if inputs.reference is None:
        return _fill_by_inpainting(inputs)
    return sift_homography(inputs.source, inputs.mask, inputs.reference, inputs.area, inputs.reference_area)


#: Name -> how it fills, and the same in words.
_FILLS: dict[str, tuple[Callable[[FillInputs], np.ndarray], str]] = {
    "blur": (
        _fill_by_blur,
        f"the hole filled by a Gaussian blur of what is around it, sigma {BLUR_RATIO} of its box's longer side; the "
        "reference is not looked at",
    ),
    "copy_in_place": (
        _fill_by_copying,
        "the reference, stretched to the source's size (bilinear), at the place of the hole",
    ),
    "opencv_inpaint": (
        _fill_by_inpainting,
        f"OpenCV inpainting (Telea 2004), radius {INPAINT_RADIUS_PX} px; the reference is not looked at",
    ),
    "sift_homography": (
        _fill_by_homography,
        "SIFT matches outside of the hole, a RANSAC homography, the reference warped into the hole; OpenCV inpainting "
        "(Telea 2004) where that shows nothing, or where too few matches agree",
    ),
}


class OracleEditor:
    """The ground truth, which is the unmasked source: what a perfect editor would score."""

    def __init__(self) -> None:
        self.name = "oracle"
        self.about = {"editor": "the ground truth itself; tracks without one do not apply"}

    @property
    def size_px(self) -> None:
        """None: it edits on a canvas of any side."""
        return None

    def edit_pairs(self, batch: PairBatch, *, with_correspondences: bool = False) -> PairResults:
        """Return the sources, see `Editor`: each is its pair's ground truth."""
        return PairResults(batch.sources.copy())

    def edit_case(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """Return the source, see `Editor`; an inter-ID track has no truth."""
        if not case.track.has_truth:
            raise NotApplicableError(f"oracle: the track {case.track.title} has no ground truth")
        return CaseResult(inputs.source.copy())


class SourceEditor(CaseOnlyEditor):
    """The source, unedited: what harmony and background are worth without any imitation."""

    def __init__(self) -> None:
        self.name = "source"
        self.about = {"editor": "the source, unedited; tracks whose ground truth it is do not apply (see oracle)"}

    def edit_case(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """Return the source, see `Editor`; on an inner-ID track it would be the truth."""
        if case.track.has_truth:
            raise NotApplicableError(
                f"source: on the track {case.track.title} the unedited source is the ground truth; use oracle instead"
            )
        return CaseResult(inputs.source.copy())


class ResultsEditor(CaseOnlyEditor):
    """Results that some other program left in a folder.

    They lie as in the released layout, ``TRACK/FOLDER/NNN_result.png``. A flat folder of ``NNN_result.png`` can
    hold one track only, for numbers start anew in each. It serves the track of the first case that is edited.

    Args:
        name: of this editor.
        folder: of the results.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.about = {"editor": "results read from a folder", "folder": str(folder)}
        self._is_flat = not any((folder / track.folder).is_dir() for track in TRACKS.values())
        self._flat_track: TrackName | None = None
        if self._is_flat and not any(folder.glob("*_result.png")):
            raise InputError(
                f"{folder} contains neither NNN_result.png nor any of the folders "
                f"{', '.join(t.folder for t in TRACKS.values())}"
            )

    def edit_case(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """Read the result of a case, see `Editor`.

        Raises:
            InputError: the result is absent, no image, or not of the source's size.
        """
        path = self.folder / case.result_path
        if self._is_flat:
            self._flat_track = self._flat_track or case.track.name
            if self._flat_track != case.track.name:
                raise InputError(
                    f"{self.folder} has no subfolders, so its results count for {self._flat_track} only; put the "
                    f"results of {case.track.name} into {case.track.folder}"
                )
            path = self.folder / case.result_path.name
        image = read_image(path, "RGB")
        if image.size != inputs.source.size:
            raise InputError(
                f"{path} is {image.width} x {image.height} px, but its source is {inputs.source.width} x "
                f"{inputs.source.height} px; a result must have the size of its source"
            )
        return CaseResult(image)


def open_baseline(name: str) -> Editor:
    """Make an editor that needs no model and no folder, by its name in `registry.KNOWN`."""
    if name in _FILLS:
        return FillEditor(name, *_FILLS[name])
    editors: dict[str, Callable[[], Editor]] = {"oracle": OracleEditor, "source": SourceEditor}
    return editors[name]()
