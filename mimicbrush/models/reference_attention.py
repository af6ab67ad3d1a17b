"""Reference attention by diffusers' own extension point: processors, and a value that travels past them.

The reference U-Net writes the normalised hidden states that enter its self-attention into a
`ReferenceStates`; the imitative U-Net reads them at the layer of the same module path::

    states = ReferenceStates()
    reference_unet(ref_latents, t_ref, context, cross_attention_kwargs={"reference_states": states})
    noise = unet(stem, t, context, cross_attention_kwargs={"reference_states": states}).sample

Paper Sec. 3.2 shares keys and values; the released code shares the hidden states and projects them with the
imitative U-Net's own ``to_k`` and ``to_v``, which is what this does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from mimicbrush.errors import WeightsError
from mimicbrush.types import ReferenceStates


class PlainAttention(AttnProcessor2_0):
    """diffusers' attention for all other layers; it only *names* `reference_states`.

    diffusers drops, with a warning, the keyword arguments that a processor's signature does not name.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        reference_states: ReferenceStates | None = None,
    ) -> torch.Tensor:
        """Attend without regard to the reference: (B, N, C) -> (B, N, C)."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class WriteReference(PlainAttention):
    """Self-attention of the reference U-Net: note what enters the layer, then attend as usual."""

    def __init__(self, path: str, is_last: bool) -> None:
        super().__init__()
        self.path = path
        self.is_last = is_last

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        reference_states: ReferenceStates | None = None,
    ) -> torch.Tensor:
        """Write (B, N, C) under this layer's path. Nothing reads what the last layer would return."""
        if reference_states is not None:
            reference_states.features[self.path] = hidden_states
        if self.is_last:
            return hidden_states
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class ReadReference:
    """Self-attention of the imitative U-Net over [own tokens ; reference tokens].

    ``out = (1 - blend) * attn(q; own) + blend * attn(q; [own ; reference])``. The paper's softmax over both
    is blend 1.0; the released code averages the two, blend 0.5.
    """

    def __init__(self, path: str, blend: float) -> None:
        self.path = path
        self.blend = blend

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        reference_states: ReferenceStates | None = None,
    ) -> torch.Tensor:
        """Attend: (B, N, C) -> (B, N, C). See `ReferenceStates` for which rows have a reference."""
        query, key, value = (
            _split_heads(projection(hidden_states), attn.heads) for projection in (attn.to_q, attn.to_k, attn.to_v)
        )  # each (B, heads, N, C / heads)
        if reference_states is None:
            attended = F.scaled_dot_product_attention(query, key, value)
        else:
            feature = reference_states.features[self.path]  # (R, M, C)
            alone = len(hidden_states) - len(feature)
            parts = [self._with_reference(attn, query[alone:], key[alone:], value[alone:], reference_states)]
            if alone:
                parts.insert(0, F.scaled_dot_product_attention(query[:alone], key[:alone], value[:alone]))
            attended = torch.cat(parts) if alone else parts[0]
        batch, _, tokens, _ = attended.shape
        merged = attended.transpose(1, 2).reshape(batch, tokens, -1)  # (B, N, C)
        return attn.to_out[1](attn.to_out[0](merged))

    def _with_reference(
        self,
        attn: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        states: ReferenceStates,
    ) -> torch.Tensor:
        feature = states.features[self.path]
        ref_key = _split_heads(attn.to_k(feature), attn.heads)  # (R, heads, M, C / heads)
        ref_value = _split_heads(attn.to_v(feature), attn.heads)
        if states.keep is not None:
            # A softmax over [own ; own] equals one over [own]: dropped rows need neither a mask, which would
            # rule out flash attention, nor a second attention.
            keep = states.keep.view(-1, 1, 1, 1)
            ref_key, ref_value = torch.where(keep, ref_key, key), torch.where(keep, ref_value, value)
        both = F.scaled_dot_product_attention(
            query, torch.cat([key, ref_key], dim=2), torch.cat([value, ref_value], dim=2)
        )
        if self.blend == 1.0:
            return both
        return torch.lerp(F.scaled_dot_product_attention(query, key, value), both, self.blend)


def _split_heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def reference_paths(unet: UNet2DConditionModel) -> list[str]:
    """Module paths of the self-attention layers in the mid and up blocks, in forward order (paper Sec. 3.2)."""
    paths = [name.removesuffix(".processor") for name in unet.attn_processors]
    chosen = [p for p in paths if p.endswith(".attn1") and p.startswith(("mid_block.", "up_blocks."))]
    return sorted(chosen, key=lambda path: path.startswith("up_blocks."))  # stable: mid before up


def read_references(unet: UNet2DConditionModel, blend: float) -> None:
    """Let the mid and up self-attention of the imitative U-Net read references, with this blend."""
    paths = set(reference_paths(unet))
    unet.set_attn_processor(
        {
            name: ReadReference(path, blend) if (path := name.removesuffix(".processor")) in paths else PlainAttention()
            for name in unet.attn_processors
        }
    )


def write_references(unet: UNet2DConditionModel) -> None:
    """Let the mid and up self-attention of the reference U-Net write what enters it."""
    paths = reference_paths(unet)
    if not paths:
        raise WeightsError("this U-Net has no self-attention in its mid and up blocks: nothing to refer to")
    unet.set_attn_processor(
        {
            name: WriteReference(path, is_last=path == paths[-1])
            if (path := name.removesuffix(".processor")) in paths
            else PlainAttention()
            for name in unet.attn_processors
        }
    )
