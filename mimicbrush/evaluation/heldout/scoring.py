"""Edits a batch of pairs with each reference, scores the results, and makes their images for contact sheets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from mimicbrush.errors import InputError
from mimicbrush.evaluation.editors import baselines
from mimicbrush.evaluation.editors.protocol import Editor, PairBatch, PairResults
from mimicbrush.evaluation.heldout.options import SetName
from mimicbrush.evaluation.heldout.reference_gain import PairScores, score_inside_mask
from mimicbrush.evaluation.heldout.samples import EvalSample, SamplePlan, load_sample
from mimicbrush.ops import canvas
from mimicbrush.ops.correspondence import Correspondence, tint_correspondence
from mimicbrush.ops.crops import Box
from mimicbrush.ops.masks import mask_box
from mimicbrush.ops.plot import mark_mask

Results = dict[str, np.ndarray]  # row name -> (S, S, 3) uint8

#: Headings of the columns of contact sheets, by the names of the images in `EditedPair.make_images`.
SHEET_COLUMNS = {
    "source": "source\n(mask in stripes)",
    "mask": "mask\n(white = repaint)",
    "reference": "reference",
    "model": "result",
    "target": "target",
    "wrong": "wrong\nreference",
    "wrong_reference": "result with\nwrong one",
    "no_reference": "result without\nreference",
    "copy_in_place": "copy in place\n(no model)",
    "opencv_inpaint": "OpenCV inpainting\n(no model)",
    "sift_homography": "SIFT, homography\n(no model)",
    "reference_places": "places of\nthe reference",
    "correspondence": "where the hole\ncame from",
}

#: Height of the images that show a correspondence: the marks have a fixed size, whatever the size of the canvas is.
_CORRESPONDENCE_PX = 256


@dataclass(frozen=True)
class EditedPair:
    """The results and scores of one pair in one set.

    Attributes:
        set_name: `natural` or `warped`.
        sample: the images that the editor got.
        results: the edited images, by row name.
        scores: scores of the results.
        correspondence: with the true reference; None if not requested or not supported by the editor.
    """

    set_name: SetName
    sample: EvalSample
    results: Results
    scores: PairScores
    correspondence: Correspondence | None = None

    def make_images(self) -> dict[str, np.ndarray]:
        """Make all images, by the names of `SHEET_COLUMNS`: (H, W, 3) or (H, W) uint8."""
        sample = self.sample
        images = {
            "source": mark_mask(sample.source, sample.mask),
            "mask": sample.mask * np.uint8(255),
            "reference": sample.reference,
            "target": sample.source,
            "wrong": sample.wrong_reference,
            **self.results,
        }
        if self.correspondence is not None:
            source, mask, reference = (
                Image.fromarray(pixels) for pixels in (sample.source, images["mask"], sample.reference)
            )
            places, painted = tint_correspondence(source, mask, reference, self.correspondence, _CORRESPONDENCE_PX)
            images |= {"reference_places": np.asarray(places), "correspondence": np.asarray(painted)}
        return images

    def make_cells(self) -> dict[str, np.ndarray]:
        """Make all images without the padding of their canvases."""
        source, reference, wrong = find_area_boxes(self.sample, self.set_name)
        boxes = {"reference": reference, "reference_places": reference, "wrong": wrong}
        cells = {}
        for name, image in self.make_images().items():
            scale = len(image) / len(self.sample.mask)
            x0, y0, x1, y1 = (round(side * scale) for side in boxes.get(name, source))
            cells[name] = image[y0:y1, x0:x1]
        return cells

    def make_caption(self) -> str:
        """Describe the pair: its video and the scores with the true, a wrong and no reference."""
        psnr = {row: values.psnr for row, values in self.scores.rows.items()}
        return (
            f"{self.sample.plan.pair.source_path}   PSNR in the hole: {psnr['model']:.1f} dB, with the wrong "
            f"reference {psnr['wrong_reference']:.1f} dB, without {psnr['no_reference']:.1f} dB"
        )


def find_area_boxes(sample: EvalSample, set_name: SetName) -> tuple[Box, Box, Box]:
    """Find the boxes that source, reference and wrong reference fill on their canvases.

    A warped reference does not fill an upright rectangle, so its box is the whole canvas.
    """
    size_px, plan = len(sample.mask), sample.plan
    whole = (0, 0, size_px, size_px)
    of_pair, of_wrong = (
        mask_box(canvas.letterbox_mask(np.full(pair.size_px, 255, np.uint8), size_px))
        for pair in (plan.pair, plan.wrong_pair)
    )
    return (of_pair, of_pair, of_wrong) if set_name == "natural" else (of_pair, whole, whole)


def load_sets(plan: SamplePlan, sets: Sequence[SetName], size_px: int, seed: int) -> dict[SetName, EvalSample]:
    """Load the sample of a pair in each set, see `load_sample`."""
    return {name: load_sample(plan, name, size_px, seed) for name in sets}


def edit_batch(
    editor: Editor,
    batch: Sequence[Mapping[SetName, EvalSample]],
    with_baselines: bool = True,
    with_correspondences: bool = False,
) -> Iterator[EditedPair]:
    """Edit a few pairs with the true, the wrong and no reference, set by set, and score them.

    Args:
        editor: the editor to evaluate.
        batch: the samples of one or more pairs, by set; all have the same sets.
        with_baselines: also fill the masks with the baselines, which need no model.
        with_correspondences: ask the editor where the filled pixels came from, if it can tell.

    Raises:
        InputError: the editor returned something of another shape or type.
    """
    without: PairResults | None = None
    for name in batch[0]:
        samples = [sets[name] for sets in batch]
        model = edit_samples(editor, samples, "reference", with_correspondences)
        wrong = edit_samples(editor, samples, "wrong_reference")
        without = edit_samples(editor, samples, None) if without is None else without
        for number, sample in enumerate(samples):
            results = {
                "model": model.images[number],
                "wrong_reference": wrong.images[number],
                "no_reference": without.images[number],
            }
            if with_baselines:
                results |= {
                    "copy_in_place": baselines.copy_in_place(sample.source, sample.mask, sample.reference),
                    "opencv_inpaint": baselines.opencv_inpaint(sample.source, sample.mask, sample.area),
                    "sift_homography": baselines.sift_homography(
                        sample.source, sample.mask, sample.reference, sample.area, sample.reference_area
                    ),
                }
            rows = {row: score_inside_mask(result, sample.source, sample.mask) for row, result in results.items()}
            scores = PairScores(sample.plan.pair.source_hash, rows)
            correspondence = model.correspondences[number] if model.correspondences else None
            yield EditedPair(name, sample, results, scores, correspondence)


def edit_samples(
    editor: Editor,
    samples: Sequence[EvalSample],
    reference: Literal["reference", "wrong_reference"] | None,
    with_correspondences: bool = False,
) -> PairResults:
    """Edit samples in one batch, with their true or wrong reference or without one.

    Args:
        editor: the editor to evaluate.
        samples: one or more samples with the same canvas size.
        reference: which of their references the editor gets; None: no reference.
        with_correspondences: ask the editor where the filled pixels came from, if it can tell.

    Raises:
        InputError: the editor returned something of another shape or type.
    """

    def stack(name: str) -> np.ndarray:
        return np.stack([getattr(sample, name) for sample in samples])

    others = {"reference": "other_references", "wrong_reference": "wrong_other_references"}.get(reference or "")
    has_others = others is not None and getattr(samples[0], others) is not None
    if has_others and getattr(editor, "most_references", 1) == 1:
        raise InputError(f"num_references must be 1, because {editor.name} takes one reference")
    batch = PairBatch(
        sources=stack("source"),
        masks=stack("mask"),
        references=None if reference is None else stack(reference),
        seeds=[sample.noise_seed for sample in samples],
        source_areas=stack("area"),
        reference_areas=stack(f"{reference or 'reference'}_area"),
        other_references=stack(others) if others is not None and has_others else None,
    )
    results = editor.edit_pairs(batch, with_correspondences=with_correspondences)
    images, sources = results.images, batch.sources
    if images.shape != sources.shape or images.dtype != np.uint8:
        raise InputError(
            f"the editor returned {images.shape} {images.dtype} for sources of {sources.shape} uint8; "
            "both must have the same shape and type"
        )
    return results
