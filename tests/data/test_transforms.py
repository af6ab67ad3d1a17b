"""The ways to mask, through real pairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mimicbrush.data.manifest import PairTable, read_manifest
from mimicbrush.data.options import IMAGE_STRATEGIES, VIDEO_STRATEGIES, DataOptions, MaskOptions, SegmentOptions
from mimicbrush.data.pair import Pair
from mimicbrush.data.transforms import SampleTransform
from mimicbrush.errors import InputError
from mimicbrush.ops.geometry import GeometryRanges

STILL = GeometryRanges(flip_probability=0, rotation_deg=0, scale=(1, 1), projective_intensity=0)


@pytest.fixture(scope="module")
def pairs(mined: Path) -> PairTable:
    return read_manifest(mined)


def of_kind(pairs: PairTable, kind: str) -> Pair:
    return pairs.where(pairs.column("kind") == kind)[0]


def masks_of(pair: Pair, mask: MaskOptions, count: int, geometry: GeometryRanges | None = None) -> list[np.ndarray]:
    make = SampleTransform(64, DataOptions(mask=mask, geometry=geometry or GeometryRanges()))
    return [make(pair, np.random.default_rng(seed)).mask for seed in range(count)]


@pytest.mark.parametrize("strategy", VIDEO_STRATEGIES)
def test_every_strategy_masks_videos_neither_wholly_nor_not_at_all(pairs: PairTable, strategy: str) -> None:
    found = masks_of(of_kind(pairs, "video"), MaskOptions(strategy=strategy), 40)
    assert all(mask.shape == (64, 64) and set(np.unique(mask)) == {0, 1} for mask in found)


@pytest.mark.parametrize("strategy", IMAGE_STRATEGIES)
def test_every_strategy_masks_photographs_neither_wholly_nor_not_at_all(pairs: PairTable, strategy: str) -> None:
    found = masks_of(of_kind(pairs, "image"), MaskOptions(image_strategy=strategy), 40)
    assert all(mask.shape == (64, 64) and set(np.unique(mask)) == {0, 1} for mask in found)


def test_the_strategy_changes_the_mask_alone(pairs: PairTable) -> None:
    pair = of_kind(pairs, "video")
    made = [
        SampleTransform(64, DataOptions(mask=MaskOptions(strategy=strategy)))(pair, np.random.default_rng(0))
        for strategy in VIDEO_STRATEGIES
    ]
    assert all(np.array_equal(views.source.matrix, made[0].source.matrix) for views in made)
    assert len({views.mask.tobytes() for views in made}) == len(made)


def test_orb_follows_what_is_there(pairs: PairTable) -> None:
    """All keypoints in the lower right quarter: its cells must be masked, and no others."""
    pair = of_kind(pairs, "video")
    flat = np.full((160, 160, 3), 90, np.uint8)
    flat[100:140, 100:140] = np.random.default_rng(0).integers(0, 256, (40, 40, 3))
    pair_with_image = PairWithImage(**{f.name: getattr(pair, f.name) for f in dataclasses.fields(pair)})
    object.__setattr__(pair_with_image, "image", flat)
    options = MaskOptions(strategy="orb_grid", cells=(4, 4), num_fullest=1, fullest=1.0, others=0.0)
    for mask in masks_of(pair_with_image, options, 10, STILL):
        assert mask[32:, 32:].sum() == mask.sum() == 16 * 16


class PairWithImage(Pair):
    """A pair whose image is not in a file."""

    image: np.ndarray

    def read(self, span: tuple[int, int], reduce: int = 1) -> np.ndarray:
        return self.image[::reduce, ::reduce]


class Discs(Pair):
    """A photograph with three segments: squares in three corners."""

    def read_segment(self, number: int) -> np.ndarray:
        segment = np.zeros(self.size_px, np.uint8)
        y, x = ((0, 0), (0, 120), (120, 0))[number]
        segment[y : y + 40, x : x + 40] = 1
        return segment


@pytest.fixture(scope="module")
def three_segments(pairs: PairTable) -> Pair:
    pair = of_kind(pairs, "image")
    ratios = np.array([0.3, 0.1, 0.05], np.float32)
    values = {f.name: getattr(pair, f.name) for f in dataclasses.fields(pair)}
    values |= {"segment_ratios": ratios, "segments": np.arange(3, dtype=np.int32)}
    return Discs(**values)


def corners_of(masks: list[np.ndarray]) -> set[tuple[int, ...]]:
    return {tuple(int(part) for part in (m[8, 8], m[8, 56], m[56, 8])) for m in masks}


def test_segments_are_united_as_many_as_asked_for(three_segments: Pair) -> None:
    for count, sums in (((1, 1), {1}), ((2, 2), {2}), ((1, 3), {1, 2, 3}), ((5, 9), {3})):
        options = MaskOptions(segments=SegmentOptions(count=count))
        assert {sum(each) for each in corners_of(masks_of(three_segments, options, 40, STILL))} == sums


def test_segments_outside_of_the_range_are_not_sampled(three_segments: Pair) -> None:
    options = MaskOptions(segments=SegmentOptions(segment_ratio=(0.06, 0.2)))
    assert corners_of(masks_of(three_segments, options, 20, STILL)) == {(0, 1, 0)}


def test_segments_are_dilated_by_a_part_of_the_canvas(three_segments: Pair) -> None:
    options = MaskOptions(segments=SegmentOptions(segment_ratio=(0.2, 1), dilation=(0.125, 0.125)))
    (mask,) = masks_of(three_segments, options, 1, STILL)
    assert mask[0, :24].all() and not mask[0, 25:].any()  # 16 px of segment, 8 px of 64 more


def test_where_no_segment_will_do_a_grid_is_taken(three_segments: Pair) -> None:
    for segments in (SegmentOptions(segment_ratio=(0.9, 1.0)), SegmentOptions(mask_ratio=(0.5, 0.6))):
        for mask in masks_of(three_segments, MaskOptions(segments=segments, cells=(4, 4)), 10, STILL):
            cells = mask.reshape(4, 16, 4, 16).mean(axis=(1, 3))
            assert set(np.unique(cells)) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"strategy": "sift"},
            r"mask.strategy=sift: expected one of sift_grid, .* or module:function\. Did you mean 'sift_grid",
        ),
        ({"strategy": "segment"}, "a video has no segments"),
        ({"image_strategy": "sift_grid"}, "expected one of segment, .* no stored matches"),
        ({"box_area": 0.9}, r"data.mask.box_area=0.9 is not possible .* from 0\.16 to 0\.81"),
        (
            {"cells": (10, 3)},
            r"data.mask.cells=\[10,3\]: expected a list of .* from 2 to 1000, in ascending order",
        ),
        ({"cells": (1, 1)}, r"data.mask.cells=\[1,1\]: expected a list of 2 values, each a whole number from 2 to "),
        ({"probability": 1.5}, r"data.mask.probability=1.5: expected a number from 0 to 1"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MaskOptions(**options)
