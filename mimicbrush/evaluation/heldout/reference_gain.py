"""Computes the numbers of an evaluation: scores inside the mask, gains of the reference, and means over pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mimicbrush.evaluation.statistics import LEVEL, MIN_SOURCES, RESAMPLES, bootstrap_by_cluster

#: PSNR of equal images is infinite, so one such pair would make the mean infinite. 60 dB is an error of a quarter of a
#: grey level; no painted image comes near it.
PSNR_CAP_DB = 60.0

#: The rows of every table, in order. `GAIN_DEFINITIONS` explains them.
ROWS = ("model", "wrong_reference", "no_reference", "copy_in_place", "opencv_inpaint", "sift_homography")


class Gain(NamedTuple):
    """A difference of PSNR inside the mask, in dB, between two rows of `ROWS`.

    Attributes:
        name: name in tables and sentences.
        between: the difference in words.
        row, minus: the row, and the row that is subtracted from it.
        above, below, neither: end of the sentence about an interval that is above zero, is below zero, or contains it.
    """

    name: str
    between: str
    row: str
    minus: str
    above: str
    below: str
    neither: str


#: The gains, in the order of every report. The third is the first minus the second, so it is also large if a wrong
#: reference only does harm. Therefore the first one comes first.
GAINS = {
    "gain_over_no_reference_db": Gain(
        "over none",
        "true minus no reference",
        "model",
        "no_reference",
        "so the true reference helps.",
        "the true reference does harm.",
        "so this does not show that the reference helps.",
    ),
    "wrong_against_none_db": Gain(
        "wrong against none",
        "wrong minus no reference",
        "wrong_reference",
        "no_reference",
        "so even a reference from another video helps, which is not imitation.",
        "a reference from another video does harm.",
        "so this does not show that a reference from another video does harm.",
    ),
    "reference_gain_db": Gain(
        "reference gain",
        "true minus wrong reference",
        "model",
        "wrong_reference",
        "so the true reference helps more than one from another video.",
        "the true reference helps less than one from another video.",
        "so this does not show that the model can tell the true reference from another one.",
    ),
}

GAIN_DEFINITIONS = {
    "psnr": "dB, 10 log10(255^2 / mean squared error) over the masked pixels of 8-bit RGB on the canvas of "
    f"size_px, not pasted back into the source, capped at {PSNR_CAP_DB:g} dB (equal images), mean over pairs",
    "ssim": "mean over the masked pixels of the SSIM map (scikit-image, 8-bit luma, Gaussian weights "
    "sigma 1.5, population covariance), not pasted back, mean over pairs; null if the canvas is below 11 px",
    "n": "number of pairs; the top-level n, psnr, ssim and gains are those of the natural set",
    "gain_over_no_reference_db": "over none: mean over pairs of PSNR with the true reference minus PSNR of the "
    "unconditional model (no reference), with the same source, same mask, same initial noise",
    "wrong_against_none_db": "wrong against none: mean over pairs of PSNR with a reference from another source video "
    "minus PSNR of the unconditional model; below zero it is the harm that an unrelated reference does",
    "reference_gain_db": "reference gain: mean over pairs of PSNR with the true reference minus PSNR with a reference "
    "from another source video, with the same source, mask and noise; it is over none minus wrong against none",
    "ci95": f"{LEVEL:.0%} percentile bootstrap interval, {RESAMPLES} resamples of whole source videos",
    "natural": "references as mined",
    "warped": "each reference (right and wrong) is warped by a seeded homography: rotation up to "
    "30 deg, scale 0.7 to 1.4, corners moved by up to a fifth of the side; no flip",
    "model": "the editor with the true reference, the other frame of the pair",
    "wrong_reference": "the editor with a reference from another source video",
    "no_reference": "the editor without a reference",
    "copy_in_place": "no model: the reference's pixels at the same place",
    "opencv_inpaint": "no model and no reference: the hole filled by cv2.inpaint (Telea, radius 5 px)",
    "sift_homography": "no model: SIFT matches outside of the hole, a RANSAC homography (trusted above 8 + 0.3 n of "
    "n matches), the reference warped by it into the hole; cv2.inpaint where that leaves gaps, or no homography is "
    "trusted",
    "num_inference_steps": "null: the pipeline's own default",
    "guidance_scale": "null: the pipeline's own default",
}


class MaskScore(NamedTuple):
    """A score inside the mask: PSNR in dB, and SSIM in -1..1 (None if it cannot be computed)."""

    psnr: float
    ssim: float | None


def score_inside_mask(result: np.ndarray, target: np.ndarray, mask: np.ndarray) -> MaskScore:
    """Score an image inside the mask: (S, S, 3) uint8, (S, S, 3) uint8, (S, S) with 1 = counted."""
    # Imported here because it is heavy, and other modules need only the names of this module.
    from mimicbrush.ops.similarity import SSIM_WINDOW_PX, psnr_inside, ssim_inside

    psnr = min(psnr_inside(result, target, mask), PSNR_CAP_DB)
    return MaskScore(psnr, ssim_inside(result, target, mask) if len(target) >= SSIM_WINDOW_PX else None)


class PairScores(NamedTuple):
    """The scores of one pair in one set, by row name, and the source they belong to."""

    source_hash: str
    rows: dict[str, MaskScore]

    def gain(self, name: str) -> float:
        """Compute one of `GAINS`, in dB."""
        gain = GAINS[name]
        return self.rows[gain.row].psnr - self.rows[gain.minus].psnr


def summarise_pairs(scores: Sequence[PairScores], seed: int) -> dict[str, Any]:
    """Average the rows and the gains over pairs, with intervals over source videos.

    Returns:
        `n`, `n_sources`, `rows` (name -> psnr, ssim, n; only rows that were scored), and each of `GAINS` with its
        `_ci95` (two bounds).
    """
    sources = [item.source_hash for item in scores]
    summary: dict[str, Any] = {"n": len(scores), "n_sources": len(set(sources))}
    summary["rows"] = {name: _mean_row([item.rows[name] for item in scores]) for name in ROWS if name in scores[0].rows}
    for name in GAINS:
        gains = np.array([item.gain(name) for item in scores])
        summary[name] = float(gains.mean())
        summary[f"{name}_ci95"] = list(bootstrap_by_cluster(gains, sources, seed))
    return summary


def _mean_row(scores: Sequence[MaskScore]) -> dict[str, float | int | None]:
    ssim = [item.ssim for item in scores if item.ssim is not None]
    return {
        "psnr": float(np.mean([item.psnr for item in scores])),
        "ssim": float(np.mean(ssim)) if ssim else None,
        "n": len(scores),
    }


def describe_few_sources(n_sources: int) -> str | None:
    """Describe the effect of few source videos on the intervals; None if there are enough."""
    if n_sources >= MIN_SOURCES:
        return None
    return (
        f"Only {n_sources} source videos were evaluated. With so few, the bootstrap intervals are too narrow, and an "
        f"interval without zero shows little. Evaluate on at least {MIN_SOURCES} videos, or better on 20 or more."
    )


def describe_gain(name: str, low: float, high: float) -> str:
    """Describe in a sentence what the interval of one of `GAINS` shows."""
    gain = GAINS[name]
    if low > 0:
        return f"the interval is above zero, {gain.above}"
    if high < 0:
        return f"the interval is below zero: {gain.below}"
    return f"the interval contains zero, {gain.neither}"
