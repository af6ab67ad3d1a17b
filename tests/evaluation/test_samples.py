from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from function_editor import FunctionEditor

from mimicbrush.data.pair import Pair
from mimicbrush.errors import DataError, InputError
from mimicbrush.evaluation.editors.protocol import PairBatch, PairResults
from mimicbrush.evaluation.heldout import samples
from mimicbrush.evaluation.heldout.options import EvaluationOptions
from mimicbrush.evaluation.heldout.run import evaluate_heldout
from mimicbrush.evaluation.heldout.samples import load_sample, plan_samples
from mimicbrush.evaluation.heldout.scoring import edit_samples
from mimicbrush.io.images import read_image
from mimicbrush.ops.canvas import letterbox
from mimicbrush.pipelines.editing.requests import list_edits

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


@pytest.fixture
def overlapping(rendered: list[Pair]) -> list[Pair]:
    """Two pairs of each clip: of one shot, but for those of the first clip."""
    first, clips = rendered[0].source_hash, {}
    for pair in rendered:
        clips.setdefault(pair.source_hash, []).append(pair)
    return [
        replace(pair, a_frame=number * (100 if pair.source_hash == first else 4), b_frame=number * 100 + 6)
        for pairs in clips.values()
        for number, pair in enumerate(pairs)
    ]


def test_further_references_are_frames_of_the_shot_that_are_not_the_pairs(overlapping: list[Pair]) -> None:
    with pytest.warns(UserWarning, match=r"2 of 8 held-out pairs are left out: their shots have fewer than 3 frames"):
        plans = plan_samples(overlapping, None, 0, num_references=3)
    assert len(plans) == 6
    for plan in plans:
        for pair, frames in ((plan.pair, plan.other_frames), (plan.wrong_pair, plan.wrong_other_frames)):
            numbers = [getattr(frame.pair, f"{frame.side}_frame") for frame in frames]
            assert len(set(numbers)) == 2 and not {pair.a_frame, pair.b_frame} & set(numbers)
            assert {frame.pair.source_hash for frame in frames} == {pair.source_hash}
        sample = load_sample(plan, "natural", SIZE, 0)
        assert sample.other_references is not None and sample.wrong_other_references is not None
        assert np.array_equal(sample.other_references[1], letterbox(plan.other_frames[1].read(), SIZE, 255))
        one = load_sample(replace(plan, other_frames=(), wrong_other_frames=()), "natural", SIZE, 0)
        assert one.other_references is None and np.array_equal(one.mask, sample.mask)


def test_frames_are_read_of_the_chosen_pairs_alone(overlapping: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def read_pair(pair: Pair, *args: object) -> np.ndarray:
        read.append(pair.source_hash)
        return reading(pair, *args)  # type: ignore[arg-type]

    reading = Pair.read
    monkeypatch.setattr(Pair, "read", read_pair)
    with pytest.warns(UserWarning, match="2 of 8 held-out pairs are left out"):
        (plan,) = plan_samples(overlapping, 1, 0, num_references=2)
    assert set(read) == {plan.pair.source_hash, plan.wrong_pair.source_hash} and len(read) <= 6


def test_a_pair_whose_other_frames_are_too_much_like_its_source_gives_way(
    overlapping: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match="left out"):
        (before,) = plan_samples(overlapping, 1, 0, num_references=2)
    still = before.pair.read_a()

    def compare(frame: np.ndarray, source: np.ndarray) -> float:
        return 1.0 if np.array_equal(source, still) else 0.0

    monkeypatch.setattr(samples, "compare_frames", compare)
    with pytest.warns(UserWarning, match="3 of 8 held-out pairs are left out"):
        (plan,) = plan_samples(overlapping, 1, 0, num_references=2)
        everything = plan_samples(overlapping, None, 0, num_references=2)
    assert plan.pair.pair_id != before.pair.pair_id
    ids = {each.pair_id for plan in everything for each in (plan.pair, plan.wrong_pair)}
    assert len(everything) == 5 and before.pair.pair_id not in ids


def test_only_an_editor_that_takes_several_references_gets_them(overlapping: list[Pair]) -> None:
    with pytest.warns(UserWarning, match="left out"):
        plans = plan_samples(overlapping, 2, 0, num_references=2)
    samples = [load_sample(plan, "warped", SIZE, 0) for plan in plans]
    seen: list[PairBatch] = []

    class Editor(FunctionEditor):
        most_references = 4

        def edit_pairs(self, batch: PairBatch, *, with_correspondences: bool = False) -> PairResults:
            seen.append(batch)
            return PairResults(batch.sources)

    for reference in ("reference", "wrong_reference", None):
        edit_samples(Editor(lambda sources, *_: sources), samples, reference)
    true, wrong, none = (batch.other_references for batch in seen)
    assert true is not None and wrong is not None and none is None
    assert true.shape == wrong.shape == (2, 1, SIZE, SIZE, 3) and not np.array_equal(true, wrong)
    with pytest.raises(InputError, match=r"num_references must be 1, because .* takes one reference"):
        edit_samples(FunctionEditor(lambda sources, *_: sources), samples, "reference")


def test_the_list_to_edit_again_names_all_references(overlapping: list[Pair], tmp_path: Path) -> None:
    class Editor(FunctionEditor):
        most_references = 4

    options = EvaluationOptions(sets=("natural",), max_pairs=2, sheet_pairs=1, num_references=2)
    with pytest.warns(UserWarning, match="left out"):
        evaluate_heldout(Editor(lambda sources, *_: sources), overlapping, SIZE, options, tmp_path / "out")
        plan, _ = plan_samples(overlapping, 2, 0, num_references=2)
    (edit,) = list_edits(tmp_path / "out/pictures/natural/edits.jsonl", tmp_path / "edits", 0, False)
    sample = load_sample(plan, "natural", SIZE, 0)
    assert sample.other_references is not None
    expected = [sample.reference, *sample.other_references]
    assert all(
        np.array_equal(read_image(path, "RGB"), image) for path, image in zip(edit.references, expected, strict=True)
    )
