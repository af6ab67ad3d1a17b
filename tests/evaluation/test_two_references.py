"""The script that measures two references against one: its samples, and its numbers with an editor that copies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from function_editor import FunctionEditor
from measurements.several_references import HOLE, edit_all, make_sample, print_table

from mimicbrush.data.pair import Pair
from mimicbrush.evaluation.editors.protocol import PairBatch, PairResults
from mimicbrush.evaluation.heldout.samples import plan_samples
from mimicbrush.ops.canvas import letterbox

SIZE = 48


class LastReference(FunctionEditor):
    """Fills the hole from the last reference, in place."""

    most_references = 4

    def edit_pairs(self, batch: PairBatch, *, with_correspondences: bool = False) -> PairResults:
        assert batch.references is not None
        last = batch.references if batch.other_references is None else batch.other_references[:, -1]
        return PairResults(np.where(batch.masks[..., None] > 0, last, batch.sources))


def test_only_the_third_frame_shows_what_the_hole_covers(
    rendered: list[Pair], capsys: pytest.CaptureFixture[str]
) -> None:
    """The matches lie in the left half of each frame: what is left of the other frame is its right half."""
    overlapping = [replace(pair, a_frame=4 * (n % 2), b_frame=100 * (n % 2) + 6) for n, pair in enumerate(rendered)]
    plans = plan_samples(overlapping, None, 0, num_references=2)
    found = [make_sample(plan, "cut", SIZE) for plan in plans]
    samples = [sample for sample in found if sample is not None]
    assert len(samples) >= 4
    for sample in samples:
        rows, columns = np.nonzero(sample.mask)
        side = round(HOLE * SIZE)
        assert sample.mask.sum() == side**2 and rows.max() - rows.min() == columns.max() - columns.min() == side - 1
        # The cut part is narrower than high, so it reaches the canvas's upper and lower edge, and begins late enough.
        whole = sample.plan.pair.read_b()
        starts = range(round(columns.max() / SIZE * 160), 120)
        parts = [letterbox(np.ascontiguousarray(whole[:, start:]), SIZE, 255) for start in starts]
        assert any(np.array_equal(sample.reference, part) for part in parts)
        assert make_sample(sample.plan, "as mined", SIZE).mask.sum() > 0  # type: ignore[union-attr]
    records = edit_all(LastReference(lambda sources, *_: sources), samples)
    for record in records:
        assert record["two"] == record["third frame"] and record["twice"] == record["one"]
    print_table("cut", records)
    told = capsys.readouterr().out
    assert f"cut: {len(records)} pairs of " in told and "two - third frame: +0.00 [+0.00, +0.00] dB" in told
    print_table("cut", [])
    assert capsys.readouterr().out == "cut: no pairs\n"
