"""Attention for diffusers' `Attention` layers, through diffusers' own extension point.

Two ways to attend: `PlainAttentionProcessor` goes through diffusers' attention back ends, as its newer models do
(`unet.set_attention_backend(...)`); `attend_with_lse` also returns the log-sum-exp, with which two attentions of
the same queries can be merged exactly instead of computed again over the concatenation.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention

from mimicbrush.types import ReferenceStates


class PlainAttentionProcessor:
    """Self- or cross-attention without regard to the reference's features.

    It *names* `reference_states`, because diffusers drops, with a warning, the keyword arguments that a
    processor's signature does not name. A cross-attention takes its keys and values from there, if they are at
    hand: the context is the same at every step.

    Args:
        path: of the layer in its U-Net.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        # Set by diffusers' set_attention_backend(); None is PyTorch's own choice.
        self._attention_backend: str | None = None
        self._parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        reference_states: ReferenceStates | None = None,
    ) -> torch.Tensor:
        """Attend: (B, N, C), context (B, M, D) or none -> (B, N, C)."""
        at_hand = None if reference_states is None or encoder_hidden_states is None else reference_states.projected
        if at_hand is not None and self.path in at_hand:
            key, value = at_hand[self.path]
        else:
            key, value = project(attn, hidden_states if encoder_hidden_states is None else encoder_hidden_states)
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[1], len(query))
            attention_mask = attention_mask.unflatten(0, (len(query), attn.heads))
        return join_heads(attn, self.attend(query, key, value, attention_mask))

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, N, heads, d), (B, M, heads, d) twice -> (B, N, heads, d), by the chosen back end."""
        return dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )


def split_heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, N, C) -> (B, N, heads, C / heads), diffusers' layout."""
    return tokens.unflatten(-1, (heads, -1))


def project(attn: Attention, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, M, D) -> a layer's keys and values, (B, M, heads, C / heads) each."""
    return split_heads(attn.to_k(tokens), attn.heads), split_heads(attn.to_v(tokens), attn.heads)


def join_heads(attn: Attention, attended: torch.Tensor) -> torch.Tensor:
    """(B, N, heads, C / heads) -> (B, N, C), through the layer's output projection and dropout."""
    return attn.to_out[1](attn.to_out[0](attended.flatten(2)))


def attend_with_lse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the log-sum-exp of its scores, by PyTorch's flash or memory-efficient kernels.

    Neither has a gradient through the log-sum-exp: for inference only.

    Args:
        query: (B, N, heads, d).
        key, value: (B, M, heads, d).

    Returns:
        (B, N, heads, d), and (B, N, heads) in float32 (float64 for float64).
    """
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    aten = torch.ops.aten
    if q.device.type == "cuda":
        half = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
        if half and torch.cuda.get_device_properties(q.device).major >= 8:  # flash attention needs Ampere or later
            out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
        else:
            out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
            lse = lse[..., : q.shape[2]]  # that kernel rounds the number of queries up
    elif q.device.type in ("cpu", "meta"):
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]
    else:
        scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp().to(v.dtype) @ v
    return out.transpose(1, 2), lse.transpose(1, 2)
