"""Evaluation samples: the images that an editor gets for a mined pair. They depend only on the pair and the seed."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from mimicbrush.data.other_references import ShotFrames, compare_frames
from mimicbrush.data.pair import Pair
from mimicbrush.data.schema import STILL_SSIM
from mimicbrush.data.transforms import Side
from mimicbrush.errors import DataError
from mimicbrush.evaluation.heldout.options import SetName
from mimicbrush.evaluation.heldout.selection import group_by_source, read_column, spread_numbers
from mimicbrush.ops import canvas, counter_rng, geometry, masks

#: The homographies of the warped set: *ours*, strong enough that copying in place gives bad results. No flips: a
#: mirrored image is not another view of the same scene.
WARP = geometry.GeometryRanges(flip_probability=0.0, rotation_deg=30.0, scale=(0.7, 1.4), projective_intensity=0.5)
_MASK_TRIES = 1000
# Purposes of random numbers; part of their keys, so that numbers for different purposes are independent.
_FOR_MASK, _FOR_NOISE, _FOR_WARP, _FOR_WRONG, _FOR_OTHERS = range(5)


class Frame(NamedTuple):
    """A frame, given by a pair that contains it and by its side."""

    pair: Pair
    side: Side

    def read(self) -> np.ndarray:
        """Read the frame, (H, W, 3) uint8 RGB.

        Raises:
            DataError: the frame cannot be read.
        """
        return self.pair.read_a() if self.side == "a" else self.pair.read_b()


@dataclass(frozen=True)
class SamplePlan:
    """A pair to evaluate, and a pair of another source whose reference is used as the wrong one.

    Attributes:
        pair, wrong_pair: the two pairs.
        other_frames, wrong_other_frames: with several references, further frames of the shots of the two pairs.
    """

    pair: Pair
    wrong_pair: Pair
    other_frames: tuple[Frame, ...] = ()
    wrong_other_frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class EvalSample:
    """The images that an editor gets for one pair, on canvases of side S.

    Attributes:
        plan: where the images come from.
        source: (S, S, 3) uint8 RGB, letterboxed, not masked; it is also the target.
        reference: (S, S, 3) uint8, the other frame of the pair.
        wrong_reference: (S, S, 3) uint8, a frame of another source, transformed by the same geometry.
        mask: (S, S) uint8, 1 = repaint; always 0 on the padding of the letterbox.
        area: (S, S) uint8, 1 where the canvas shows the source, 0 on the padding.
        reference_area, wrong_reference_area: (S, S) uint8, the same for the references.
        noise_seed: seed of the sampler's noise, the same for all references.
        other_references, wrong_other_references: (R-1, S, S, 3) uint8, the second and further references; None for
            R = 1.
    """

    plan: SamplePlan
    source: np.ndarray
    reference: np.ndarray
    wrong_reference: np.ndarray
    mask: np.ndarray
    area: np.ndarray
    reference_area: np.ndarray
    wrong_reference_area: np.ndarray
    noise_seed: int
    other_references: np.ndarray | None = None
    wrong_other_references: np.ndarray | None = None


def plan_samples(pairs: Sequence[Pair], max_pairs: int | None, seed: int, num_references: int = 1) -> list[SamplePlan]:
    """Choose pairs, and a wrong reference for each: from the other sources in turn, from a pair chosen by a hash.

    Args:
        pairs: all pairs that may be used; wrong references come from these too, also from pairs that are not chosen.
        max_pairs: see `spread_numbers`.
        seed: seed of the choice.
        num_references: references of each sample. Only pairs whose shot has enough frames are used.

    Raises:
        DataError: there is only one source, so there are no wrong references; or no pair can be used.
    """
    finder = OtherFrames(pairs, num_references - 1, seed)
    by_source = {
        source: [number for number in numbers if finder.may_have(number)]
        for source, numbers in group_by_source(pairs).items()
    }
    # The frames of chosen pairs are read. If a pair has too few, it is left out, and the choice is made again.
    while True:
        plans, lacking, faults = _draw_plans(pairs, by_source, max_pairs, seed, finder)
        if not lacking:
            break
        by_source = {source: [n for n in numbers if n not in lacking] for source, numbers in by_source.items()}
    left_out = len(pairs) - sum(map(len, by_source.values()))
    if left_out:
        warnings.warn(
            f"{left_out} of {len(pairs)} held-out pairs are left out: their shots have fewer than {num_references} "
            "frames besides the source",
            stacklevel=2,
        )
    for fault in faults:  # damaged rows of the manifest
        warnings.warn(f"a held-out pair is left out: {fault}", stacklevel=2)
    if not plans:
        raise DataError(f"none of {len(pairs)} held-out pairs can be used: the rows of the manifest are damaged")
    return plans


def _draw_plans(
    pairs: Sequence[Pair],
    by_source: Mapping[str, Sequence[int]],
    max_pairs: int | None,
    seed: int,
    finder: OtherFrames,
) -> tuple[list[SamplePlan], set[int], list[DataError]]:
    """Choose samples from the pairs of each source.

    Returns:
        The samples; the numbers of pairs with too few frames, without which the choice must be made again; and the
        errors of damaged rows.
    """
    sources = [source for source, numbers in by_source.items() if numbers]
    usable = sum(map(len, by_source.values()))
    if len(sources) < 2 and usable < len(pairs):
        raise DataError(
            f"only {usable} of {len(pairs)} pairs have enough frames in their shots for all references, and they come "
            "from fewer than two sources; decrease num_references, or mine more clips"
        )
    if len(sources) < 2:
        raise DataError(
            f"all {usable} pairs come from one source, but the reference gain needs a reference from another one; mine "
            "at least two clips (or use split=all if the folder has more)"
        )
    plans: list[SamplePlan] = []
    lacking, faults = set[int](), list[DataError]()
    turn = dict.fromkeys(sources, 0)
    for source, number in spread_numbers(by_source, max_pairs):
        step = 1 + turn[source] % (len(sources) - 1)
        turn[source] += 1
        others = by_source[sources[(sources.index(source) + step) % len(sources)]]
        try:
            pair = pairs[number]
            wrong = others[counter_rng.mix(hash_pair(pair), seed, _FOR_WRONG) % len(others)]
            frames, wrong_frames = finder.find(number), finder.find(wrong)
            lacking |= {each for each, found in ((number, frames), (wrong, wrong_frames)) if found is None}
            if frames is not None and wrong_frames is not None:
                plans.append(SamplePlan(pair, pairs[wrong], frames, wrong_frames))
        except DataError as error:
            faults.append(error)
    return plans, lacking, faults


class OtherFrames:
    """Finds further references of pairs: frames of a pair's shot that are not too similar to its source.

    Args:
        pairs: all pairs that may be used.
        count: number of frames for each pair.
        seed: seed of the choice.
    """

    def __init__(self, pairs: Sequence[Pair], count: int, seed: int) -> None:
        self._pairs, self._count, self._seed = pairs, count, seed
        self._found: dict[int, tuple[Frame, ...] | None] = {}
        if count:
            _, keys = np.unique(read_column(pairs, "source_hash"), return_inverse=True)
            self._a_frames, self._b_frames = (read_column(pairs, name) for name in ("a_frame", "b_frame"))
            self._shots = ShotFrames(keys.astype(np.uint64), self._a_frames, self._b_frames)

    def may_have(self, number: int) -> bool:
        """Whether the shot of a pair has enough frames; no frame is read to find out."""
        return not self._count or len(self._list_places(number)) >= self._count

    def find(self, number: int) -> tuple[Frame, ...] | None:
        """Choose frames for a pair, and check them once; None if too few can be read and differ from the source."""
        if not self._count:
            return ()
        if number not in self._found:
            self._found[number] = None
            with suppress(DataError):
                self._found[number] = self._choose(self._pairs[number], self._list_places(number))
        return self._found[number]

    def _list_places(self, number: int) -> list[tuple[int, Side]]:
        own = (self._a_frames[number], self._b_frames[number])
        return [place for frame, place in self._shots.find(number).items() if frame not in own]

    def _choose(self, pair: Pair, places: Sequence[tuple[int, Side]]) -> tuple[Frame, ...] | None:
        order = counter_rng.generator(hash_pair(pair), self._seed, _FOR_OTHERS).permutation(len(places))
        candidates = (Frame(self._pairs[places[n][0]], places[n][1]) for n in order)
        source = pair.read_a()
        unlike = (frame for frame in candidates if compare_frames(frame.read(), source) <= STILL_SSIM)
        frames = tuple(islice(unlike, self._count))
        return frames if len(frames) == self._count else None


def choose_shown_samples(count: int, at_most: int) -> list[int]:
    """Choose which of `count` samples the sheets show: spread evenly from the first one, in order."""
    return [count * i // min(count, at_most) for i in range(min(count, at_most))]


def load_sample(plan: SamplePlan, set_name: SetName, size_px: int, seed: int) -> EvalSample:
    """Read and prepare one sample. Source, mask and noise are the same in both sets.

    Raises:
        DataError: an image cannot be read, or is too thin for a mask on this canvas.
    """
    image = plan.pair.read_a()
    area = canvas.letterbox_mask(np.full(image.shape[:2], 255, np.uint8), size_px)
    fit = geometry.letterbox_matrix(image.shape[1], image.shape[0], size_px)
    points = geometry.transform_points(plan.pair.a_points, fit)
    key = hash_pair(plan.pair)
    matrix = None
    if set_name == "warped":
        matrix = geometry.random_matrix(WARP, size_px, counter_rng.generator(key, seed, _FOR_WARP), flip=False)
    reference, wrong_reference = plan.pair.read_b(), plan.wrong_pair.read_b()
    return EvalSample(
        plan=plan,
        source=canvas.letterbox(image, size_px, canvas.IMAGE_FILL),
        reference=_put_on_canvas(reference, matrix, size_px),
        wrong_reference=_put_on_canvas(wrong_reference, matrix, size_px),
        mask=_sample_mask(points, area, plan.pair, seed),
        area=area,
        reference_area=_find_area(reference, matrix, size_px),
        wrong_reference_area=_find_area(wrong_reference, matrix, size_px),
        noise_seed=counter_rng.mix(key, seed, _FOR_NOISE),
        other_references=_put_frames_on_canvas(plan.other_frames, matrix, size_px),
        wrong_other_references=_put_frames_on_canvas(plan.wrong_other_frames, matrix, size_px),
    )


def hash_pair(pair: Pair) -> int:
    """Hash a pair to a 64-bit number, the same in every run and on every machine."""
    return int.from_bytes(hashlib.sha256(pair.pair_id.encode()).digest()[:8], "big")


def _put_on_canvas(image: np.ndarray, matrix: np.ndarray | None, size_px: int) -> np.ndarray:
    if matrix is None:
        return canvas.letterbox(image, size_px, canvas.IMAGE_FILL)
    fit = geometry.letterbox_matrix(image.shape[1], image.shape[0], size_px)
    return geometry.warp_to_canvas(image, matrix @ fit, size_px, canvas.IMAGE_FILL)


def _put_frames_on_canvas(frames: Sequence[Frame], matrix: np.ndarray | None, size_px: int) -> np.ndarray | None:
    return np.stack([_put_on_canvas(frame.read(), matrix, size_px) for frame in frames]) if frames else None


def _find_area(image: np.ndarray, matrix: np.ndarray | None, size_px: int) -> np.ndarray:
    """Find the area that the image fills after `_put_on_canvas`: (S, S) uint8, 1 inside."""
    whole = np.full(image.shape[:2], 255, np.uint8)
    if matrix is None:
        return canvas.letterbox_mask(whole, size_px)
    fit = geometry.letterbox_matrix(image.shape[1], image.shape[0], size_px)
    return (geometry.warp_to_canvas(whole, matrix @ fit, size_px, canvas.MASK_FILL) == 255).astype(np.uint8)


def _sample_mask(points: np.ndarray, area: np.ndarray, pair: Pair, seed: int) -> np.ndarray:
    """Sample a mask as in training, without the padding; again in the rare case that it is empty or full.

    The padding is not masked, because users do not repaint it, and white is too easy to predict.
    """
    for draw in range(_MASK_TRIES):
        rng = counter_rng.generator(hash_pair(pair), seed, _FOR_MASK, draw)
        mask = masks.sift_grid_mask(points, len(area), rng) * area
        if mask.any() and (mask != area).any():
            return mask
    raise DataError(
        f"pair {pair.pair_id} covers only {int(area.sum())} px of the {len(area)} px canvas, which is too thin for a "
        "mask"
    )
