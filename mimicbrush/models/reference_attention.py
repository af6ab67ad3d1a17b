"""Reference attention by diffusers' own extension point: processors, and a value that travels past them.

The reference U-Net writes the normalised hidden states that enter its self-attention into a
`ReferenceStates`; the imitative U-Net reads them at the layer of the same module path::

    states = ReferenceStates()
    reference_unet(ref_latents, t_ref, context, cross_attention_kwargs={"reference_states": states})
    noise = unet(stem, t, context, cross_attention_kwargs={"reference_states": states}).sample

The released code shares these hidden states and projects them with the imitative U-Net's own ``to_k`` and
``to_v``. Paper Sec. 3.2 shares the reference's own keys and values: `ReferenceWriteProcessor(keys_values=True)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.utils.accelerate_utils import apply_forward_hook

from mimicbrush.errors import WeightsError
from mimicbrush.models.attention import PlainAttentionProcessor, attend_with_lse, join_heads, project, split_heads
from mimicbrush.types import ReferenceStates

if TYPE_CHECKING:
    from mimicbrush.types import KeysValues


class ReferenceWriteProcessor(PlainAttentionProcessor):
    """Self-attention of the reference U-Net: note what is to be shared, then attend as usual.

    Args:
        path: of the layer.
        is_last: nothing reads what this layer would return.
        keys_values: share keys and values (paper) instead of hidden states (released code).
    """

    def __init__(self, path: str, is_last: bool, keys_values: bool) -> None:
        super().__init__(path)
        self.is_last, self.keys_values = is_last, keys_values

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        reference_states: ReferenceStates | None = None,
    ) -> torch.Tensor:
        """Write under this layer's path, and attend: (B, N, C) -> (B, N, C). Masks are refused."""
        _refuse_mask(attention_mask)
        if reference_states is not None:
            if self.keys_values:
                reference_states.projected[self.path] = project(attn, hidden_states)
            else:
                reference_states.features[self.path] = hidden_states
        if self.is_last:
            return hidden_states
        return super().__call__(attn, hidden_states)


class ReferenceReadProcessor(PlainAttentionProcessor):
    """Self-attention of the imitative U-Net over [own tokens ; reference tokens].

    ``out = (1 - blend) * attn(q; own) + blend * attn(q; [own ; reference])``. The paper's softmax over both
    is blend 1.0; the released code averages the two, blend 0.5.

    In inference the attention over the own tokens is computed once for all rows, the one over the reference's
    tokens only for the rows that have a reference, and they are merged through their log-sum-exp, which is exact::

        out = o_self + blend * sigmoid(lse_ref - lse_self) * (o_ref - o_self)

    In training, where that has no gradient, and with a back end that was chosen by name, the second softmax is
    computed over the concatenation.
    """

    def __init__(self, path: str, blend: float = 1.0) -> None:
        super().__init__(path)
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
        """Attend: (B, N, C) -> (B, N, C). See `ReferenceStates` for which rows have a reference. Masks are refused."""
        _refuse_mask(attention_mask)
        query = split_heads(attn.to_q(hidden_states), attn.heads)  # (B, N, heads, d)
        own = project(attn, hidden_states)
        if reference_states is None or not reference_states.holds_reference:
            return join_heads(attn, self.attend(query, *own))
        reference = reference_states.projected.get(self.path)  # (R, M, heads, d) each
        if reference is None:
            reference = project(attn, reference_states.features[self.path])
        if reference_states.attended is not None:
            reference_states.attended[self.path] = query[-len(reference[0]) :], reference[0]
        lean = not torch.is_grad_enabled() and self._attention_backend is None
        combine = self._merge if lean else self._concatenate
        return join_heads(attn, combine(query, own, reference, reference_states))

    def _merge(
        self, query: torch.Tensor, own: KeysValues, reference: KeysValues, states: ReferenceStates
    ) -> torch.Tensor:
        blend = self.blend if states.blend is None else states.blend
        alone = len(query) - len(reference[0])  # the first rows, which have no reference
        attended, own_lse = attend_with_lse(query, *own)
        attended_reference, reference_lse = attend_with_lse(query[alone:], *reference)
        own_lse = own_lse[alone:]
        if states.record is not None:
            lse = torch.logaddexp(own_lse, reference_lse)
            states.record.add(self.path, query[alone:], reference[0], lse, blend)
        weight = blend * torch.sigmoid(reference_lse - own_lse)[..., None]  # (R, N, heads, 1)
        if states.keep is not None:
            weight = weight * states.keep.view(-1, 1, 1, 1)
        attended[alone:].lerp_(attended_reference, weight.to(attended.dtype))
        return attended

    def _concatenate(
        self, query: torch.Tensor, own: KeysValues, reference: KeysValues, states: ReferenceStates
    ) -> torch.Tensor:
        blend = self.blend if states.blend is None else states.blend
        alone = len(query) - len(reference[0])
        own_last = (own[0][alone:], own[1][alone:])
        if states.keep is not None:
            # A softmax over [own ; own] equals one over [own]: dropped rows need neither a mask, which would
            # rule out flash attention, nor a second attention.
            keep = states.keep.view(-1, 1, 1, 1)
            reference = (torch.where(keep, reference[0], own_last[0]), torch.where(keep, reference[1], own_last[1]))
        both = self.attend(query[alone:], *(torch.cat(pair, dim=1) for pair in zip(own_last, reference, strict=True)))
        if blend != 1.0:
            both = torch.lerp(self.attend(query[alone:], *own_last), both, blend)
        if not alone:
            return both
        return torch.cat([self.attend(query[:alone], own[0][:alone], own[1][:alone]), both])


def _refuse_mask(attention_mask: torch.Tensor | None) -> None:
    """Raises ValueError: what a mask over the own tokens means for those of the reference is not defined."""
    if attention_mask is not None:
        raise ValueError("self-attention that writes or reads a reference takes no attention_mask")


@apply_forward_hook  # parts of the U-Net are called here, not the U-Net: offloading must hear of it
def project_references(unet: UNet2DConditionModel, features: dict[str, torch.Tensor]) -> dict[str, KeysValues]:
    """Keys and values that the imitative U-Net makes of reference features, (R, N, C) by module path.

    They can be used at every step that the features hold for.
    """
    return {path: project(unet.get_submodule(path), feature) for path, feature in features.items()}


@apply_forward_hook
def project_context(unet: UNet2DConditionModel, context: torch.Tensor) -> dict[str, KeysValues]:
    """Keys and values of every cross-attention for a context (B, N, D), which is the same at every step."""
    return {path: project(unet.get_submodule(path), context) for path in attention_paths(unet) if "attn2" in path}


def attention_paths(unet: UNet2DConditionModel) -> list[str]:
    """Module paths of all attention layers."""
    return [name.removesuffix(".processor") for name in unet.attn_processors]


def reference_paths(unet: UNet2DConditionModel) -> list[str]:
    """Module paths of the self-attention layers in the mid and up blocks, in forward order (paper Sec. 3.2)."""
    chosen = [p for p in attention_paths(unet) if p.endswith(".attn1") and p.startswith(("mid_block.", "up_blocks."))]
    return sorted(chosen, key=lambda path: path.startswith("up_blocks."))  # stable: mid before up


def set_reference_processors(unet: UNet2DConditionModel, blend: float) -> None:
    """Let the mid and up self-attention of the imitative U-Net read references.

    Processors that are in place already stay, with the back end that was chosen for them.

    Args:
        unet: the imitative U-Net.
        blend: see `ReferenceReadProcessor`; where `ReferenceStates.blend` says nothing else.
    """
    reading, found = set(reference_paths(unet)), unet.attn_processors
    processors: dict[str, Any] = {}
    for path in attention_paths(unet):
        name = f"{path}.processor"
        kind = ReferenceReadProcessor if path in reading else PlainAttentionProcessor
        processors[name] = found[name] if type(found[name]) is kind else kind(path)
        if isinstance(processors[name], ReferenceReadProcessor):
            processors[name].blend = blend
    unet.set_attn_processor(processors)


def set_reference_write_processors(unet: UNet2DConditionModel, keys_values: bool = False) -> None:
    """Let the mid and up self-attention of the reference U-Net write what is to be shared."""
    writing = reference_paths(unet)
    if not writing:
        raise WeightsError("this U-Net has no self-attention in its mid and up blocks: nothing to refer to")
    unet.set_attn_processor(
        {
            f"{path}.processor": ReferenceWriteProcessor(path, path == writing[-1], keys_values)
            if path in writing
            else PlainAttentionProcessor(path)
            for path in attention_paths(unet)
        }
    )


def check_references_are_read(unet: UNet2DConditionModel, reference_unet: UNet2DConditionModel) -> None:
    """Whether the processors of both U-Nets are still those of this module.

    Raises:
        WeightsError: others took their place, which would leave the reference out in silence.
    """
    for model, kind in ((unet, ReferenceReadProcessor), (reference_unet, ReferenceWriteProcessor)):
        processors = model.attn_processors
        for path in reference_paths(model):
            found = processors[f"{path}.processor"]
            if not isinstance(found, kind):
                raise WeightsError(
                    f"the attention of {path} is done by {type(found).__name__}, which knows no reference "
                    "(attention slicing, xFormers and fused projections replace the processors); choose a back end "
                    "with unet.set_attention_backend(...) instead, and load the pipeline again"
                )
