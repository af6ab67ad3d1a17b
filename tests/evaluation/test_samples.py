from __future__ import annotations

import numpy as np
import pytest

from mimicbrush.data.pair import Pair
from mimicbrush.errors import DataError
from mimicbrush.evaluation.heldout.samples import load_sample, plan_samples
from mimicbrush.ops.canvas import letterbox

SIZE = 48


@pytest.mark.parametrize("seed", range(5))
def test_the_wrong_reference_is_never_of_the_same_source_and_the_others_take_turns(
    rendered: list[Pair], seed: int
) -> None:
    plans = plan_samples(rendered, None, seed)
    assert len(plans) == len(rendered)
    by_source: dict[str, list[str]] = {}
    for plan in plans:
        assert plan.wrong_pair.source_hash != plan.pair.source_hash
        by_source.setdefault(plan.pair.source_hash, []).append(plan.wrong_pair.source_hash)
    assert all(len(set(wrong)) == len(wrong) for wrong in by_source.values())


def test_one_pair_can_be_evaluated_as_long_as_the_folder_has_another_source(rendered: list[Pair]) -> None:
    (plan,) = plan_samples(rendered, 1, 0)
    assert plan.wrong_pair.source_hash != plan.pair.source_hash


def test_a_single_source_is_an_error(rendered: list[Pair]) -> None:
    with pytest.raises(DataError, match="at least two clips"):
        plan_samples(rendered[:2], None, 0)


def test_source_mask_and_noise_are_the_same_in_both_sets(rendered: list[Pair]) -> None:
    for plan in plan_samples(rendered, None, 0):
        natural, warped = (load_sample(plan, name, SIZE, 0) for name in ("natural", "warped"))
        assert np.array_equal(natural.source, letterbox(plan.pair.read_a(), SIZE, 255))
        assert np.array_equal(natural.reference, letterbox(plan.pair.read_b(), SIZE, 255))
        assert np.array_equal(natural.source, warped.source)
        assert np.array_equal(natural.mask, warped.mask)
        assert natural.noise_seed == warped.noise_seed
        moved = natural.reference.astype(int) - warped.reference
        assert np.abs(moved).mean() > 10


def test_masks_leave_the_padding_alone_and_are_never_empty_or_full(rendered: list[Pair]) -> None:
    for seed in range(20):
        sample = load_sample(plan_samples(rendered, 1, seed)[0], "natural", SIZE, seed)
        rows = np.flatnonzero(sample.area.any(axis=1))
        assert (rows[0], rows[-1]) == (6, 41)  # 160 x 120 on a square of 48: 36 rows in the middle
        assert sample.mask.any()
        assert not np.any(sample.mask > sample.area)
        assert np.any(sample.mask < sample.area)


def test_a_sample_depends_on_its_pair_and_the_seed_alone(rendered: list[Pair]) -> None:
    plan = plan_samples(rendered, None, 0)[3]
    again = plan_samples(rendered, None, 0)[3]
    other = [load_sample(plan, "warped", SIZE, 1), load_sample(plan, "warped", SIZE, 0)]
    first, second = load_sample(plan, "warped", SIZE, 0), load_sample(again, "warped", SIZE, 0)
    for name in ("source", "reference", "wrong_reference", "mask", "area"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
    assert first.noise_seed == second.noise_seed == other[1].noise_seed != other[0].noise_seed
