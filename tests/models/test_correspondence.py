"""Planted attention, of which it is known where it goes."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from planted_attention import plant
from toy_data import photograph

from mimicbrush.models.attention_recorder import CorrespondenceRecorder
from mimicbrush.models.components import toy_components
from mimicbrush.models.options import ToyModel
from mimicbrush.models.reference_attention import attend_with_lse, reference_paths
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.ops.correspondence import TITLE_PX, Correspondence, plot_correspondence
from mimicbrush.pipelines import MimicBrushPipeline


def test_the_record_sums_the_softmax_over_both() -> None:
    torch.manual_seed(0)
    side, heads, width = 4, 2, 8
    mask = torch.zeros(1, 1, side, side)
    mask[0, 0, 1, 1:3] = 1
    record = CorrespondenceRecorder(mask)
    expected = torch.zeros(2, side * side)
    for _ in range(3):  # layers or steps
        query, own, key = torch.randn(3, 1, side * side, heads, width).unbind(0)
        (_, own_lse), (_, lse) = (attend_with_lse(query, k, k) for k in (own, key))
        record.add("layer", query, key, torch.logaddexp(own_lse, lse), 1.0)
        scores = torch.einsum("mhd,nhd->hmn", query[0, 5:7], torch.cat([own, key], 1)[0]) / width**0.5
        expected += scores.softmax(-1)[..., side * side :].sum(0)
    ((tokens, attention, _),) = record.attention()
    assert tokens.tolist() == [5, 6]
    torch.testing.assert_close(attention.flatten(1), expected / (3 * heads))


def test_what_a_head_pays_to_the_reference_counts_at_its_peak() -> None:
    mask = torch.zeros(1, 1, 2, 2)
    mask[0, 0, 0, 0] = 1
    record = CorrespondenceRecorder(mask)
    query, key = torch.zeros(1, 4, 2, 1), torch.zeros(1, 4, 2, 1)
    query[:, 0], key[0, 1, 0], key[0, 3, 1] = 1.0, 3.0, 2.0  # the two heads look at different tokens
    lse = torch.logsumexp(torch.cat([key, torch.zeros(1, 4, 2, 1)], 1)[..., 0], 1)  # (1, heads), of the first token
    record.add("layer", query, key, lse[:, None].expand(1, 4, 2), 0.5)
    ((_, attention, head_peaks),) = record.attention()
    shares = (torch.logsumexp(key[0, ..., 0], 0) - lse[0]).exp() * 0.5 / 2  # of the mean over two heads
    torch.testing.assert_close(head_peaks[0], torch.tensor([[0.0, shares[0]], [0.0, shares[1]]]))
    torch.testing.assert_close(head_peaks.sum(), attention.sum())


def test_coarse_layers_spread_over_the_tokens_they_cover() -> None:
    mask = torch.zeros(1, 1, 4, 4)
    mask[0, 0, 0, 0] = 1
    record = CorrespondenceRecorder(mask)
    # One head, two tokens a side: the first token attends to the last reference token alone.
    query = torch.zeros(1, 4, 1, 1)
    key = torch.zeros(1, 4, 1, 1)
    query[0, 0], key[0, 3] = 40.0, 40.0
    record.add("layer", query, key, query[:, :, :, 0] * 40.0, 1.0)
    fine = torch.zeros(1, 16, 1, 1)
    record.add("layer", fine, fine, torch.full((1, 16, 1), torch.inf), 1.0)  # pays the reference nothing
    ((tokens, attention, _),) = record.attention()
    assert tokens.tolist() == [0]
    expected = torch.zeros(4, 4)
    expected[2:, 2:] = 0.25 / 2
    torch.testing.assert_close(attention[0], expected)


@pytest.mark.parametrize("shift", [(0, 0), (2, -2), (-2, 2)])
def test_planted_projections_are_found_in_pixels(smallest: ToyModel, shift: tuple[int, int]) -> None:
    """Every reading layer is made to look for the token that lies `shift` (rows, columns) away in the reference."""
    pipe = MimicBrushPipeline(**vars(toy_components(smallest)), scheduler=noise_scheduler(), reference_blend=0.5)
    pipe.set_progress_bar_config(disable=True)
    for path in reference_paths(pipe.unet):
        plant(pipe, path, shift)
    source, mask = np.full((40, 80, 3), 90, np.uint8), np.zeros((40, 80), np.uint8)
    mask[10:30, 30:55] = 255
    reference = Image.fromarray(photograph("chelsea.png")[:240, :120])
    result = pipe(source, mask, reference, num_inference_steps=2, return_correspondence=True)
    (found,) = result.correspondences
    # A token is 2 of the canvas's 16 px: 10 px of the source (80 px wide), 30 px of the reference (240 px high).
    assert found.source_token_px == 10 and found.reference_token_px == 30
    expected = (found.source_xy + np.array([0, 20])) / 80 * 8 + [shift[1], shift[0]]  # on the canvas, in tokens
    # Half a token: the lower level's tokens are twice as large.
    np.testing.assert_allclose((found.reference_xy + np.array([60, 0])) / 240 * 8, expected, atol=0.5)
    assert (found.share > 0.49).all() and (found.share <= 0.5).all()  # the blend
    assert (found.focus > 0.99).all()
    assert found.maps is not None and found.maps.boxes.tolist() == [[-60, 0, 180, 240]]
    np.testing.assert_allclose(found.maps.head_peaks.sum(axis=(1, 2, 3)), found.share, rtol=1e-5)
    hole = {(int(y) // 10, int(x) // 10) for x, y in found.source_xy}
    assert hole == {(row, column) for row in (1, 2) for column in (3, 4, 5)}


def test_it_is_saved_and_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    found = Correspondence(
        source_xy=rng.uniform([14, 18], [46, 24], (5, 2)).astype(np.float32),
        reference_xy=rng.uniform(-5, 90, (5, 2)).astype(np.float32),
        share=rng.uniform(size=5).astype(np.float32),
        focus=rng.uniform(size=5).astype(np.float32),
        source_token_px=7.5,
        reference_token_px=10.0,
    )
    path = tmp_path / "map.npz"
    found.save(path)
    assert sorted(np.load(path)) == sorted(each.name for each in fields(found) if each.name != "maps")
    again = Correspondence.load(path)
    assert again.source_token_px == 7.5 and np.array_equal(again.reference_xy, found.reference_xy)
    source, mask = Image.new("RGB", (600, 400), "grey"), Image.new("L", (600, 400), 0)
    mask.paste(255, (100, 100, 500, 300))
    places = replace(found, source_xy=found.source_xy * 10, reference_xy=found.reference_xy * 10)
    image = plot_correspondence(source, mask, Image.new("RGB", (800, 800), "white"), places, height_px=400)
    assert image.width == 600 + 28 + 400 and image.height > TITLE_PX + 400
    panel = np.asarray(image)[TITLE_PX : TITLE_PX + 400, :600]
    assert (panel[:70] == 128).all() and (panel[330:] == 128).all()  # lines and marks aside, nothing else is painted
