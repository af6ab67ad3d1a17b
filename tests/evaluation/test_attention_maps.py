"""Attention at keypoints' tokens against the record of a whole hole, explicit formulas, and planted attention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted_attention import plant

from mimicbrush.errors import InputError
from mimicbrush.evaluation.keypoint_transfer import pck
from mimicbrush.evaluation.keypoint_transfer.attention import ATTENTION_STEPS, AttentionTransfer
from mimicbrush.evaluation.keypoint_transfer.attention_maps import THIRDS, AttentionAtTokens
from mimicbrush.evaluation.keypoint_transfer.tasks import TransferTask
from mimicbrush.models.attention_recorder import CorrespondenceRecorder
from mimicbrush.models.components import toy_components
from mimicbrush.models.options import ToyModel
from mimicbrush.models.reference_attention import attend_with_lse, reference_paths
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.pipelines import MimicBrushPipeline

#: Of the made-up layers: module path -> tokens along a side, heads.
LAYERS = {"mid": (2, 3), "up.0": (4, 2), "up.1": (8, 2)}


def attend(*records: AttentionAtTokens | CorrespondenceRecorder, steps: int = 4, louder: str = "") -> None:
    """Random attention of `LAYERS`, noted in every record; one layer's scores can be a hundred times as large."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for path, (side, heads) in LAYERS.items():
            query, own, key = torch.randn(3, 1, side * side, heads, 8, generator=rng).unbind(0)
            query = query * (100 if path == louder else 1)
            (_, own_lse), (_, lse) = (attend_with_lse(query, each, each) for each in (own, key))
            for record in records:
                record.add(path, query, key, torch.logaddexp(own_lse, lse), 0.7)


def test_all_layers_and_steps_together_are_what_the_record_of_a_hole_says() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[0, 0, 1:4, 2:7] = 1
    whole = CorrespondenceRecorder(mask)
    tokens = torch.tensor([1 * 8 + 2, 3 * 8 + 6, 2 * 8 + 5])
    ours = AttentionAtTokens(tokens, 8, 4)
    attend(whole, ours)
    ((numbers, attention, _),) = whole.attention()
    there = [numbers.tolist().index(token) for token in tokens.tolist()]
    torch.testing.assert_close(ours.maps.average(), attention[there])
    assert ours.maps.sides == {path: side for path, (side, _) in LAYERS.items()}
    # Steps 1 and 2, 3, and 4 of four; and the parts make the whole.
    assert [ours.maps.counts["up.1", third] for third in range(3)] == [4, 2, 2]
    parts = torch.stack([ours.maps.average(third=third) * (2, 1, 1)[third] / 4 for third in range(3)]).sum(0)
    torch.testing.assert_close(parts, ours.maps.average())
    assert ours.maps.average("mid").shape == (3, 2, 2)


@pytest.mark.parametrize("scores", [False, True])
def test_transposed_maps_are_columns_of_the_same_attention(scores: bool) -> None:
    every = torch.arange(64)
    straight = AttentionAtTokens(every, 8, 4, scores)
    transposed = AttentionAtTokens(every[5:40], 8, 4, scores, transposed=True)
    attend(straight, transposed)
    full = straight.maps.average("up.1").view(64, 64)
    torch.testing.assert_close(transposed.maps.average("up.1"), full.T[5:40].reshape(-1, 8, 8))


def test_scores_are_standardised_so_that_layers_count_alike() -> None:
    tokens = torch.tensor([9, 30])
    record = AttentionAtTokens(tokens, 8, 1, scores=True)
    side, heads = LAYERS["up.1"]
    query, key = torch.randn(2, 1, side * side, heads, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    record.add("up.1", query, key, torch.zeros(1, side * side, heads), 1.0)
    scores = torch.einsum("nhd,mhd->hnm", query[0], key[0]).mean(0) / 8**0.5  # (N, M)
    centred = scores - scores.mean(dim=1, keepdim=True)
    expected = centred / centred.std(correction=0)
    torch.testing.assert_close(record.maps.average().view(2, -1), expected[tokens])

    quiet, loud = (AttentionAtTokens(tokens, 8, 4, scores=True) for _ in range(2))
    attend(quiet)
    attend(loud, louder="up.0")
    torch.testing.assert_close(loud.maps.average(), quiet.maps.average())


def test_what_it_cannot_note_is_refused() -> None:
    record = AttentionAtTokens(torch.tensor([0]), 8, 4)
    with pytest.raises(InputError, match="no reference attention"):
        record.maps.average()
    attend(record)
    with pytest.raises(InputError, match="4 steps"):
        attend(record)
    with pytest.raises(InputError, match="one source"):
        two = torch.zeros(2, 16, 1, 4)
        AttentionAtTokens(torch.tensor([0]), 4, 4).add("mid", two, two, torch.zeros(2, 16, 1), 1.0)


@pytest.fixture
def pipeline(smallest: ToyModel) -> MimicBrushPipeline:
    pipe = MimicBrushPipeline(**vars(toy_components(smallest)), scheduler=noise_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def task_of(shift_px: tuple[int, int]) -> TransferTask:
    """A keypoint at the middle of every token of 2 px that has its place, `shift_px` (rows, columns) on, in 16 px."""
    rng = np.random.default_rng(0)
    source, reference = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
    centres = np.arange(8) * 2 + 0.5
    points = np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)
    target = points + shift_px[::-1]
    kept = ((target > 0) & (target < 15)).all(axis=1)
    return TransferTask(source, reference, points[kept], target[kept], 16.0, "a")


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("shift", [(0, 0), (2, -2), (-2, 2)])
def test_planted_attention_is_found_in_holes_and_where_it_is_seen(
    pipeline: MimicBrushPipeline, shift: tuple[int, int], scores: bool
) -> None:
    for path in reference_paths(pipeline.unet):
        plant(pipeline, path, shift)
    task = task_of((shift[0] * 2, shift[1] * 2))
    found = AttentionTransfer(pipeline, scores=scores)(task)
    assert set(found.sides.values()) == {4, 8}
    for places in (found.inside_mask, found.outside_mask):
        assert pck.find_correct(places, task, 0.1).all()  # 1.6 px
    for (path, _), places in found.by_layer.items():  # tokens of 4 px, in places at the edge, say less
        assert pck.find_correct(places, task, 0.3 if path and found.sides[path] == 4 else 0.1).all()
    layers = pck.measure_layers([found, found], [task, task], seed=0)
    assert [layer["path"] for layer in layers] == [*reference_paths(pipeline.unet), None]
    assert "| all layers |  | 100.0 | 100.0 | 100.0 | 100.0 [100.0, 100.0] |" in pck.format_layers(layers)


def test_one_layer_that_looks_elsewhere_is_told_from_the_others(pipeline: MimicBrushPipeline) -> None:
    *others, last = reference_paths(pipeline.unet)
    for path in others:
        plant(pipeline, path, (0, 0))
    plant(pipeline, last, (4, 0))
    task = task_of((8, 0))
    task = replace(task, reference_xy=task.source_xy)
    found = AttentionTransfer(pipeline)(task)
    right = {path: pck.find_correct(found.by_layer[path, None], task, 0.2).mean() for path in (*others, last)}
    assert right == {**dict.fromkeys(others, 1.0), last: 0.0}


def test_steps_are_told_apart_by_when_they_come(pipeline: MimicBrushPipeline) -> None:
    """Attention that turns round half-way, which is in the middle third."""
    path = reference_paths(pipeline.unet)[-1]
    plant(pipeline, path, (0, 0))
    calls = 0

    def turn(_: object, args: tuple, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output if (calls - 1) % ATTENTION_STEPS < ATTENTION_STEPS // 2 else output.flip(1)

    pipeline.unet.get_submodule(path).to_q.register_forward_hook(turn)
    task = task_of((0, 0))
    found = AttentionTransfer(pipeline)(task)
    early, late = (
        pck.find_correct(found.by_layer[path, THIRDS.index(name)], task, 0.1).mean() for name in ("early", "late")
    )
    assert early == 1 and late < 0.1


@pytest.mark.parametrize("scores", [False, True])
def test_reciprocal_adds_the_transposed_map(pipeline: MimicBrushPipeline, scores: bool) -> None:
    """Planted attention hangs on places alone, so that of the swapped pair is the same."""
    path = reference_paths(pipeline.unet)[-1]
    plant(pipeline, path, (2, -1))
    task = task_of((0, 0))  # a keypoint for each of 8 x 8 tokens
    alone, both = (
        AttentionTransfer(pipeline, scores=scores, reciprocal=flag).record_maps(task) for flag in (False, True)
    )
    for single, double in zip(alone, both, strict=True):
        for third in range(len(THIRDS)):
            map_of = single.average(path, third).view(64, 64)
            torch.testing.assert_close(double.average(path, third).view(64, 64), (map_of + map_of.T) / 2)


def test_reciprocal_leaves_the_peaks_of_a_symmetric_map(pipeline: MimicBrushPipeline) -> None:
    for path in reference_paths(pipeline.unet):
        plant(pipeline, path, (0, 0))
    task = task_of((0, 0))
    alone, both = (AttentionTransfer(pipeline, reciprocal=flag)(task) for flag in (False, True))
    np.testing.assert_allclose(both.inside_mask, alone.inside_mask, atol=0.5)
    assert pck.find_correct(both.outside_mask, task, 0.1).all()
