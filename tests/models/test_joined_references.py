"""Attention to several references is attention to one long one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention

from mimicbrush.models.attention_recorder import CorrespondenceRecorder
from mimicbrush.models.reference_attention import (
    ReferenceReadProcessor,
    attend_with_lse,
    join_references,
    join_tokens,
    split_heads,
)
from mimicbrush.ops.correspondence import Correspondence
from mimicbrush.ops.crops import Placement
from mimicbrush.types import ReferenceStates

ROWS, TOKENS, WIDTH, HEADS = 2, 16, 24, 3


@pytest.fixture
def layer() -> Attention:
    torch.manual_seed(0)
    return Attention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS, processor=ReferenceReadProcessor("layer"))


def read(layer: Attention, own: torch.Tensor, *features: torch.Tensor, keep: list[bool] | None = None) -> torch.Tensor:
    """Attend to references, (ROWS, TOKENS, WIDTH) each, as a reference U-Net writes them for all rows in one batch."""
    written = torch.stack(features, dim=1).flatten(0, 1)  # (ROWS n, TOKENS, WIDTH)
    states = ReferenceStates({"layer": written}, keep=None if keep is None else torch.tensor(keep))
    return layer(own, reference_states=join_references(states, ROWS))


def test_tokens_of_one_row_are_joined_in_order() -> None:
    written = torch.arange(ROWS * 3 * 4 * 2).view(ROWS * 3, 4, 2)
    joined = join_tokens(written, ROWS)
    assert joined.shape == (ROWS, 12, 2)
    assert all(torch.equal(joined[row], torch.cat(list(written[3 * row : 3 * row + 3]))) for row in range(ROWS))
    one = ReferenceStates({"layer": written})
    assert join_references(one, len(written)) is one


@pytest.mark.parametrize("blend", [0.5, 1.0])
@pytest.mark.parametrize("trained", [False, True])
def test_equal_references_weigh_as_their_number(layer: Attention, blend: float, trained: bool) -> None:
    """r copies: o = o_self + blend sigmoid(lse_ref + log r - lse_self) (o_ref - o_self)."""
    layer.processor.blend = blend
    own, feature = torch.randn(2, ROWS, TOKENS, WIDTH).unbind(0)
    with torch.set_grad_enabled(trained):
        found = read(layer, own, feature, feature, feature).detach()
    with torch.no_grad():
        query = split_heads(layer.to_q(own), HEADS)
        (o_self, lse_self), (o_ref, lse_ref) = (
            attend_with_lse(query, split_heads(layer.to_k(each), HEADS), split_heads(layer.to_v(each), HEADS))
            for each in (own, feature)
        )
        weight = blend * torch.sigmoid(lse_ref + math.log(3) - lse_self)[..., None]
        expected = layer.to_out[0]((o_self + weight * (o_ref - o_self)).flatten(2))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_the_order_does_not_matter_and_a_dropped_row_sees_none(layer: Attention, trained: bool) -> None:
    own, one, two = torch.randn(3, ROWS, TOKENS, WIDTH).unbind(0)
    with torch.set_grad_enabled(trained):
        both, swapped = read(layer, own, one, two), read(layer, own, two, one)
        alone, dropped = layer(own), read(layer, own, one, two, keep=[True, False])
    torch.testing.assert_close(both, swapped, atol=1e-6, rtol=1e-5)
    assert (both - read(layer, own, one)).abs().max() > 1e-2
    torch.testing.assert_close(dropped[0], both[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(dropped[1], alone[1], atol=1e-6, rtol=1e-5)


def test_the_record_tells_which_reference() -> None:
    torch.manual_seed(0)
    side, width = 4, 8
    mask = torch.zeros(1, 1, side, side)
    mask[0, 0, 1, 1:3] = 1
    record, expected = CorrespondenceRecorder(mask), torch.zeros(2, 2 * side * side)
    for _ in range(2):
        query, own, *keys = torch.randn(4, 1, side * side, HEADS, width).unbind(0)
        key = torch.cat(keys, dim=1)
        (_, own_lse), (_, lse) = (attend_with_lse(query, k, k) for k in (own, key))
        record.add("layer", query, key, torch.logaddexp(own_lse, lse), 1.0)
        scores = torch.einsum("mhd,nhd->hmn", query[0, 5:7], torch.cat([own, key], 1)[0]) / width**0.5
        expected += scores.softmax(-1)[..., side * side :].sum(0)
    ((tokens, attention, _),) = record.attention()
    assert attention.shape == (2, 2 * side, side)
    torch.testing.assert_close(attention.flatten(1), expected / (2 * HEADS))

    # The second reference is twice as large as the first, and only a part of it was shown.
    places = [Placement((0, 0, 8, 8), 8), Placement((4, 2, 20, 18), 8)]
    found = Correspondence.from_attention(tokens.numpy(), attention.numpy(), places[0], places)
    parts = [
        Correspondence.from_attention(tokens.numpy(), each.numpy(), places[0], place)
        for each, place in zip(attention.split(side, dim=1), places, strict=True)
    ]
    peaks = attention.view(2, 2, -1).amax(dim=2)
    assert found.reference_index.tolist() == peaks.argmax(dim=1).tolist()
    np.testing.assert_allclose(found.share, parts[0].share + parts[1].share, rtol=1e-6)
    for token, index in enumerate(found.reference_index):
        assert np.array_equal(found.reference_xy[token], parts[index].reference_xy[token])
    assert not parts[0].reference_index.any() and found.reference_token_px == 2
    for index in (0, 1):
        selected = found.select_reference(index)
        assert np.array_equal(selected.reference_xy, found.reference_xy[found.reference_index == index])
        assert (selected.reference_index == index).all() and len(selected.share) == len(selected.source_xy)
