from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention

from mimicbrush.models.reference_attention import PlainAttentionProcessor, ReferenceReadProcessor, attend_with_lse
from mimicbrush.types import ReferenceStates


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_log_sum_exp_and_the_attention_written_out(dtype: torch.dtype, off: float) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 70, 3, 8, dtype=dtype)
    key, value = torch.randn(2, 2, 50, 3, 8, dtype=dtype).unbind(0)
    out, lse = attend_with_lse(query, key, value)
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    scores = q @ k.mT / 8**0.5
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1).transpose(1, 2), atol=off, rtol=0)
    torch.testing.assert_close(out.double(), (scores.softmax(-1) @ v).transpose(1, 2), atol=off, rtol=0)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("keep", [None, [True], [False]])
@pytest.mark.parametrize("blend", [0.0, 0.3, 0.5, 1.0])
def test_merged_equals_concatenated(blend: float, keep: list[bool] | None, rows: int) -> None:
    """What inference computes is what training computes, for every blend, and for rows that have no reference."""
    torch.manual_seed(0)
    layer = Attention(24, heads=3, dim_head=8, processor=ReferenceReadProcessor("layer", blend))
    own, feature = torch.randn(3, 40, 24), torch.randn(rows, 30 if keep is None else 40, 24)
    states = ReferenceStates({"layer": feature}, keep=None if keep is None else torch.tensor(keep * rows))
    trained = layer(own, reference_states=states)
    assert trained.requires_grad
    with torch.no_grad():
        merged = layer(own, reference_states=states)
    torch.testing.assert_close(merged, trained.detach(), atol=1e-6, rtol=1e-5)


def test_cached_keys_and_values_are_those_that_would_be_projected() -> None:
    torch.manual_seed(0)
    layer = Attention(24, cross_attention_dim=10, heads=3, dim_head=8, processor=PlainAttentionProcessor("layer"))
    hidden, context = torch.randn(2, 40, 24), torch.randn(2, 5, 10)
    key, value = (projection(context).unflatten(-1, (3, 8)) for projection in (layer.to_k, layer.to_v))
    cached = ReferenceStates(keys_values={"layer": (key, value)})
    expected = layer(hidden, encoder_hidden_states=context)
    torch.testing.assert_close(
        layer(hidden, encoder_hidden_states=context, reference_states=cached), expected, atol=1e-6, rtol=1e-5
    )
    # Those of another layer are no concern of this one.
    other = ReferenceStates(keys_values={"other": (value, key)})
    assert torch.equal(layer(hidden, encoder_hidden_states=context, reference_states=other), expected)


def test_an_attention_mask_is_heeded() -> None:
    torch.manual_seed(0)
    layer = Attention(24, cross_attention_dim=10, heads=3, dim_head=8, processor=PlainAttentionProcessor("layer"))
    hidden, context = torch.randn(2, 40, 24), torch.randn(2, 5, 10)
    mask = torch.zeros(2, 1, 5)
    mask[..., 3:] = -torch.inf
    masked = layer(hidden, encoder_hidden_states=context, attention_mask=mask)
    torch.testing.assert_close(masked, layer(hidden, encoder_hidden_states=context[:, :3]), atol=1e-6, rtol=1e-5)
