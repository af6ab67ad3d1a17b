"""Editors that need no model: bounds from above and below, and results that others made."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mimicbrush.errors import InputError
from mimicbrush.evaluation.benchmark.layout import TRACKS, Case, TrackName
from mimicbrush.evaluation.editors import baselines
from mimicbrush.evaluation.editors.protocol import CaseInputs, CaseResult, NotApplicableError
from mimicbrush.io.images import MASK_THRESHOLD, read_image
from mimicbrush.ops.masks import mask_box

#: Of `blur_fill`: the blur's standard deviation as a part of the longer side of the box around the hole.
BLUR_RATIO = 0.25


def blur_fill(source: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fill a hole by a wide Gaussian blur of the pixels around it, those of the hole left out (normalised).

    Where even the blur sees none, it is their mean.

    Args:
        source: (H, W, 3) uint8.
        mask: (H, W), not 0 = hole.

    Returns:
        (H, W, 3) uint8; outside of the hole the source.

    Raises:
        InputError: there is nothing around the hole.
    """
    known = (mask == 0).astype(np.float32)
    if not known.any():
        raise InputError("the mask is full: there is nothing around the hole to blur")
    x0, y0, x1, y1 = mask_box(mask)
    sigma_px = max(1.0, BLUR_RATIO * max(x1 - x0, y1 - y0))

    def blurred(image: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(image, (0, 0), sigma_px, borderType=cv2.BORDER_CONSTANT)

    weight = blurred(known)[..., None]
    total = blurred(source.astype(np.float32) * known[..., None])
    mean = source[known > 0].mean(axis=0)
    fill = np.where(weight > 1e-6, total / np.maximum(weight, 1e-6), mean)
    return np.where(known[..., None] > 0, source, fill.round().clip(0, 255).astype(np.uint8))


class OracleEditor:
    """The ground truth, which is the unmasked source: what a perfect editor would score."""

    def __init__(self) -> None:
        self.name = "oracle"
        self.about = {"editor": "the ground truth itself; tracks without one do not apply"}

    def __call__(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """See `CaseEditor`; an inter-ID track has no truth."""
        if not case.track.has_truth:
            raise NotApplicableError(f"oracle: the track {case.track.title} has no ground truth")
        return CaseResult(inputs.source.copy())


class SourceEditor:
    """The source, unedited: what harmony and background are worth without any imitation."""

    def __init__(self) -> None:
        self.name = "source"
        self.about = {"editor": "the source, unedited; tracks whose ground truth it is do not apply (see oracle)"}

    def __call__(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """See `CaseEditor`; on an inner-ID track it would be the truth."""
        if case.track.has_truth:
            raise NotApplicableError(
                f"source: on the track {case.track.title} the untouched source is the ground truth; that is oracle"
            )
        return CaseResult(inputs.source.copy())


class BlurEditor:
    """See `blur_fill`."""

    def __init__(self) -> None:
        self.name = "blur"
        self.about = {
            "editor": f"the hole filled by a Gaussian blur of what is around it, sigma {BLUR_RATIO} of its box's "
            "longer side; the reference is not looked at"
        }

    def __call__(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """See `CaseEditor`."""
        source, hole = _arrays(inputs)
        return CaseResult(Image.fromarray(blur_fill(source, hole)))


class CopyEditor:
    """See `baselines.copy_in_place`."""

    def __init__(self) -> None:
        self.name = "copy_in_place"
        self.about = {"editor": "the reference, stretched to the source's size (bilinear), at the place of the hole"}

    def __call__(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """See `CaseEditor`."""
        source, hole = _arrays(inputs)
        reference = np.asarray(inputs.reference.resize(inputs.source.size, Image.Resampling.BILINEAR))
        return CaseResult(Image.fromarray(baselines.copy_in_place(source, hole, reference)))


class InpaintEditor:
    """See `baselines.opencv_inpaint`."""

    def __init__(self) -> None:
        self.name = "opencv_inpaint"
        self.about = {
            "editor": f"OpenCV inpainting (Telea 2004), radius {baselines.INPAINT_RADIUS_PX} px; the reference is not "
            "looked at"
        }

    def __call__(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """See `CaseEditor`."""
        source, hole = _arrays(inputs)
        return CaseResult(Image.fromarray(baselines.opencv_inpaint(source, hole, np.ones_like(hole))))


class HomographyEditor:
    """See `baselines.sift_homography`."""

    def __init__(self) -> None:
        self.name = "sift_homography"
        self.about = {
            "editor": "SIFT matches outside of the hole, a RANSAC homography, the reference warped into the hole; "
            "OpenCV inpainting (Telea 2004) where that shows nothing, or where too few matches agree"
        }

    def __call__(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """See `CaseEditor`."""
        source, hole = _arrays(inputs)
        filled = baselines.sift_homography(source, hole, np.asarray(inputs.reference), np.ones_like(hole))
        return CaseResult(Image.fromarray(filled))


class ResultsEditor:
    """Results that some other program left in a folder.

    They lie as in the released layout, ``TRACK/FOLDER/NNN_result.png``. A flat folder of ``NNN_result.png`` can
    hold one track only, for numbers start anew in each: the first case that is asked for says which.

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
                f"{folder} holds neither NNN_result.png nor any of {', '.join(t.folder for t in TRACKS.values())}"
            )

    def __call__(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """See `CaseEditor`.

        Raises:
            InputError: the result is absent, no image, or not of the source's size.
        """
        path = self.folder / case.result_path
        if self._is_flat:
            self._flat_track = self._flat_track or case.track.name
            if self._flat_track != case.track.name:
                raise InputError(
                    f"{self.folder} is flat, and its results were taken for {self._flat_track}; those of "
                    f"{case.track.name} must lie in {case.track.folder}"
                )
            path = self.folder / case.result_path.name
        image = read_image(path, "RGB")
        if image.size != inputs.source.size:
            raise InputError(
                f"{path} is {image.width} x {image.height} px, its source {inputs.source.width} x "
                f"{inputs.source.height} px; a result must have its source's size"
            )
        return CaseResult(image)


def _arrays(inputs: CaseInputs) -> tuple[np.ndarray, np.ndarray]:
    """The source (H, W, 3) uint8, and the hole (H, W) uint8, 1 = repaint."""
    hole = (np.asarray(inputs.mask) > MASK_THRESHOLD).astype(np.uint8)
    if not hole.any():
        raise InputError("the mask is empty: there is nothing to repaint")
    return np.asarray(inputs.source), hole
