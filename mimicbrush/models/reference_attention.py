"""Reference attention, the core of the method (paper Sec. 3.2): one U-Net attends to the features of another one.

A self-attention layer of the imitative U-Net has queries, keys and values of its own tokens: Q, K, V. The same layer of
the reference U-Net gets the reference image and provides K', V'. The imitative U-Net then attends to both::

    o = softmax(Q [K ; K']^T / sqrt(d)) [V ; V']                        (paper Sec. 3.2; `_attend_to_both`)

So each query can copy from its own image or from the reference. The paper does not supervise this choice.

The same softmax can be computed without the concatenation. Let o_self and o_ref be the attention outputs over only its
own tokens and only the reference's tokens, and lse_self and lse_ref the log-sum-exp of their scores. The softmax over
both has weights proportional to exp(lse_self) and exp(lse_ref), and a ``blend`` below 1 keeps a part of the
self-attention::

    o = o_self + blend * sigmoid(lse_ref - lse_self) * (o_ref - o_self)            (`_merge_by_lse`)

``blend`` is 1.0 in the paper. It is 0.5 in the released code, which averages self-attention and the softmax over both.

How a layer of one U-Net finds the same layer of the other: both U-Nets have the same architecture, so both layers have
the same *module path*, for example ``up_blocks.1.attentions.0.transformer_blocks.0.attn1``. `ReferenceStates` has
dictionaries with this path as key. The caller makes one, the processors of the reference U-Net write into it, and those
of the imitative U-Net read from it::

    states = ReferenceStates()
    reference_unet(ref_latents, t_ref, context, cross_attention_kwargs={"reference_states": states})
    noise = unet(unet_input, t, context, cross_attention_kwargs={"reference_states": states}).sample

Both U-Nets remain unchanged diffusers models: in diffusers, a *processor* computes an attention layer, and gets
``cross_attention_kwargs``. A processor must *name* each of these keyword arguments in its signature: diffusers drops
all others, only with a warning, and the reference would be ignored. So every processor here has the argument
``reference_states``, also those that hardly use it.

Several references of one source (our extension, not in the paper) are one long reference: K' and V' have the tokens of
all references, concatenated (`join_references`). So a query can attend to any of them.

What is shared: the released code shares the normalised hidden states that enter the layer, and the imitative U-Net
projects them with its own ``to_k`` and ``to_v``. The paper shares the reference's own keys and values
(``ReferenceWriteProcessor(shares_keys_values=True)``).

A single U-Net can also do both (`unets.SharedUNet`, our extension). It reads the reference in a separate pass before
the denoising pass. ``ReferenceStates.is_writing`` is True in this first pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.utils.accelerate_utils import apply_forward_hook

from mimicbrush.errors import WeightsError
from mimicbrush.types import ReferenceStates

if TYPE_CHECKING:
    from mimicbrush.types import KeysValues


# --- The three processors -------------------------------------------------------------------------------------------


class PlainAttentionProcessor:
    """Self- or cross-attention that does not use features of the reference.

    A cross-attention takes its keys and values from `ReferenceStates.keys_values`, if this has them: the context is the
    same at every step, so they can be projected once (`project_context`).

    Args:
        path: module path of the layer in its U-Net.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._path_in_block = path[path.find("transformer_blocks.") :]
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
        """Compute attention: (B, N, C), context (B, M, D) or None -> (B, N, C)."""
        is_cross = encoder_hidden_states is not None
        cached = None
        if reference_states is not None and is_cross:
            cached = reference_states.keys_values.get(self._state_path(reference_states))
        if cached is not None:
            key, value = cached  # (B, M, heads, d) each
        else:
            key, value = project(attn, hidden_states if encoder_hidden_states is None else encoder_hidden_states)
        query = split_heads(attn.to_q(hidden_states), attn.heads)  # (B, N, heads, d)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[1], len(query))
            attention_mask = attention_mask.unflatten(0, (len(query), attn.heads))  # (B, heads, 1 or N, M)
        return join_heads(attn, self.attend(query, key, value, attention_mask))

    def _state_path(self, states: ReferenceStates) -> str:
        """Return this layer's key in `states`: its module path, or its path within the block after `select_block`.

        Paths within a block are the same in all blocks, so one compiled graph serves them all.
        """
        return self._path_in_block if states.is_of_one_block else self.path

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute softmax attention: (B, N, heads, d), (B, M, heads, d) twice -> (B, N, heads, d)."""
        return dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )


class ReferenceWriteProcessor(PlainAttentionProcessor):
    """Self-attention of the reference U-Net, which stores its hidden states or keys and values to share them.

    Args:
        path: module path of the layer.
        is_last: no other layer reads the output of this one, so it is not computed.
        shares_keys_values: share keys and values (paper) instead of hidden states (released code).
    """

    def __init__(self, path: str, is_last: bool, shares_keys_values: bool) -> None:
        super().__init__(path)
        self.is_last, self.shares_keys_values = is_last, shares_keys_values

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        reference_states: ReferenceStates | None = None,
    ) -> torch.Tensor:
        """Store the shared tensors, then compute attention: (B, N, C) -> (B, N, C). Masks are not allowed."""
        _refuse_mask(attention_mask)
        if reference_states is not None:
            path = self._state_path(reference_states)
            if self.shares_keys_values:
                reference_states.keys_values[path] = project(attn, hidden_states)  # K', V'
            else:
                reference_states.features[path] = hidden_states  # K', V' are projected by the reading layer
        if self.is_last:
            return hidden_states
        return super().__call__(attn, hidden_states)


class ReferenceReadProcessor(PlainAttentionProcessor):
    """Self-attention of the imitative U-Net over [its own tokens ; reference tokens].

    In inference, the two attentions are computed separately and merged by their log-sum-exp (`_merge_by_lse`): the
    attention to its own tokens for all rows, that to the reference's tokens only for rows that have a reference. The
    log-sum-exp has no gradient, so training cannot use this, and a backend that was chosen by name does not return it.
    Then there is one softmax over the concatenation (`_attend_to_both`). Both ways are equal up to rounding.

    Args:
        path: module path of the layer.
        blend: weight of the softmax over both, 0..1; the rest is self-attention.
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
        """Compute attention: (B, N, C) -> (B, N, C). Masks are not allowed.

        `ReferenceStates` explains which rows have a reference.
        """
        _refuse_mask(attention_mask)
        query = split_heads(attn.to_q(hidden_states), attn.heads)  # Q, (B, N, heads, d)
        own = project(attn, hidden_states)  # K, V, (B, N, heads, d) each
        if reference_states is None or not reference_states.holds_reference:
            return join_heads(attn, self.attend(query, *own))
        path = self._state_path(reference_states)
        reference = reference_states.keys_values.get(path)  # K', V', (R, M, heads, d) each
        if reference is None:
            reference = project(attn, reference_states.features[path])
        if reference_states.queries_and_keys is not None:
            reference_states.queries_and_keys[path] = query[-len(reference[0]) :], reference[0]
        # Recording needs the log-sum-exp, so it always uses `attend_with_lse`, even if another backend was chosen.
        can_use_lse = self._attention_backend is None or reference_states.record is not None
        can_merge = not torch.is_grad_enabled() and can_use_lse
        attend_to_reference = self._merge_by_lse if can_merge else self._attend_to_both
        return join_heads(attn, attend_to_reference(query, own, reference, reference_states))

    def _merge_by_lse(
        self, query: torch.Tensor, own: KeysValues, reference: KeysValues, states: ReferenceStates
    ) -> torch.Tensor:
        """o = o_self + blend * sigmoid(lse_ref - lse_self) * (o_ref - o_self), for inference."""
        blend = self.blend if states.blend is None else states.blend
        first = len(query) - len(reference[0])  # rows before this one have no reference
        o_self, lse_self = attend_with_lse(query, *own)  # (B, N, heads, d), (B, N, heads)
        o_ref, lse_ref = attend_with_lse(query[first:], *reference)  # (R, N, heads, d), (R, N, heads)
        lse_self = lse_self[first:]  # (R, N, heads)
        if states.record is not None:
            lse_both = torch.logaddexp(lse_self, lse_ref)  # log of the denominator of the softmax over both
            states.record.add(self.path, query[first:], reference[0], lse_both, blend)
        weight = blend * torch.sigmoid(lse_ref - lse_self)[..., None]  # (R, N, heads, 1)
        if states.keep is not None:
            weight = weight * states.keep.view(-1, 1, 1, 1)
        o_self[first:].lerp_(o_ref, weight.to(o_self.dtype))  # o_self + weight * (o_ref - o_self), in place
        return o_self

    def _attend_to_both(
        self, query: torch.Tensor, own: KeysValues, reference: KeysValues, states: ReferenceStates
    ) -> torch.Tensor:
        """o = (1 - blend) * attention(Q, K, V) + blend * attention(Q, [K ; K'], [V ; V']), for training."""
        blend = self.blend if states.blend is None else states.blend
        first = len(query) - len(reference[0])  # rows before this one have no reference
        query_r, (key, value), (key_r, value_r) = query[first:], (each[first:] for each in own), reference
        if states.keep is not None:
            # For rows whose reference is dropped, the reference's tokens are replaced by copies of their own tokens: a
            # softmax over copies is equal to that over [own]. This needs no mask, which flash attention does not
            # support, and no second attention.
            keep, times = states.keep.view(-1, 1, 1, 1), key_r.shape[1] // key.shape[1]
            key_r = torch.where(keep, key_r, _repeat_tokens(key, times))
            value_r = torch.where(keep, value_r, _repeat_tokens(value, times))
        both = self.attend(query_r, torch.cat([key, key_r], dim=1), torch.cat([value, value_r], dim=1))
        if blend != 1.0:
            both = torch.lerp(self.attend(query_r, key, value), both, blend)
        if not first:
            return both  # (B, N, heads, d)
        return torch.cat([self.attend(query[:first], own[0][:first], own[1][:first]), both])


class ReferenceReadWriteProcessor(ReferenceReadProcessor):
    """Self-attention of a U-Net that writes its keys and values in one pass, and reads them in another.

    Sharing hidden states would give the same result, because both passes project them with the same weights.

    Args:
        path: module path of the layer.
        is_last: in a pass that writes, no other layer reads the output of this one, so it is not computed.
    """

    def __init__(self, path: str, is_last: bool) -> None:
        super().__init__(path)
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
        """Write or read, depending on `ReferenceStates.is_writing`: (B, N, C) -> (B, N, C). Masks are not allowed."""
        if reference_states is None or not reference_states.is_writing:
            return super().__call__(
                attn, hidden_states, attention_mask=attention_mask, reference_states=reference_states
            )
        _refuse_mask(attention_mask)
        own = project(attn, hidden_states)  # K, V here, K', V' for the pass that reads; (B, N, heads, d) each
        reference_states.keys_values[self._state_path(reference_states)] = own
        if self.is_last:
            return hidden_states
        return join_heads(attn, self.attend(split_heads(attn.to_q(hidden_states), attn.heads), *own))


def _refuse_mask(attention_mask: torch.Tensor | None) -> None:
    """Raise a ValueError if there is a mask, because it cannot say which tokens of the reference to hide."""
    if attention_mask is not None:
        raise ValueError("self-attention that writes or reads a reference does not support attention_mask")


# --- Attention on tensors -------------------------------------------------------------------------------------------


def split_heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """Split channels into heads, in diffusers' layout: (B, N, C) -> (B, N, heads, C / heads)."""
    return tokens.unflatten(-1, (heads, -1))


def project(attn: Attention, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the keys and values of tokens in a layer: (B, M, D) -> (B, M, heads, C / heads) each."""
    return split_heads(attn.to_k(tokens), attn.heads), split_heads(attn.to_v(tokens), attn.heads)


def join_tokens(tokens: torch.Tensor, rows: int) -> torch.Tensor:
    """Join the tokens of the n consecutive references of each row: (rows n, M, ...) -> (rows, n M, ...)."""
    return tokens.reshape(rows, -1, *tokens.shape[2:])


def _repeat_tokens(tokens: torch.Tensor, times: int) -> torch.Tensor:
    """Repeat tokens: (B, N, ...) -> (B, times N, ...); without a copy if `times` is 1."""
    return tokens[:, None].expand(-1, times, *tokens.shape[1:]).flatten(1, 2)


def join_heads(attn: Attention, attended: torch.Tensor) -> torch.Tensor:
    """Join the heads and apply the layer's output projection and dropout: (B, N, heads, C / heads) -> (B, N, C)."""
    return attn.to_out[1](attn.to_out[0](attended.flatten(2)))


def attend_with_lse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention and the log-sum-exp of its scores, with PyTorch's flash or memory-efficient kernels.

    The kernels have no gradient through the log-sum-exp, so this is only for inference.

    Args:
        query: (B, N, heads, d).
        key, value: (B, M, heads, d).

    Returns:
        The attention, (B, N, heads, d), and the log-sum-exp, (B, N, heads) in float32 (float64 for float64).
    """
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # (B, heads, N or M, d)
    aten = torch.ops.aten
    if q.device.type == "cuda":
        half = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
        if half and torch.cuda.get_device_properties(q.device).major >= 8:  # flash attention needs Ampere or later
            out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
        else:
            out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
            lse = lse[..., : q.shape[2]]  # this kernel pads the number of queries
    elif q.device.type in ("cpu", "meta"):
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]
    else:
        scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp().to(v.dtype) @ v
    return out.transpose(1, 2), lse.transpose(1, 2)


# --- Which layers take part, and who sets their processors ----------------------------------------------------------


def attention_paths(unet: UNet2DConditionModel) -> list[str]:
    """List the module paths of all attention layers."""
    return [name.removesuffix(".processor") for name in unet.attn_processors]


def reference_paths(unet: UNet2DConditionModel) -> list[str]:
    """List the self-attention layers of the mid and up blocks, by path, in forward order (paper Sec. 3.2)."""
    chosen = [p for p in attention_paths(unet) if p.endswith(".attn1") and p.startswith(("mid_block.", "up_blocks."))]
    return sorted(chosen, key=lambda path: path.startswith("up_blocks."))  # stable: mid before up


def set_reference_processors(unet: UNet2DConditionModel, blend: float) -> None:
    """Set processors so that the mid and up self-attention of the imitative U-Net reads references.

    That of a `SharedUNet` also writes them. Processors of the right type are kept, with their chosen backend.

    Args:
        unet: the imitative U-Net.
        blend: see `ReferenceReadProcessor`. `ReferenceStates.blend` overrides it.

    Raises:
        WeightsError: the U-Net is shared, but has no self-attention in its mid and up blocks.
    """
    reading, present = reference_paths(unet), unet.attn_processors
    makes: dict[str, Callable[[str], PlainAttentionProcessor]]
    if is_shared(unet):
        _check_has_layers(reading)
        makes = dict.fromkeys(reading, lambda path: ReferenceReadWriteProcessor(path, path == reading[-1]))
    else:
        makes = dict.fromkeys(reading, ReferenceReadProcessor)
    processors: dict[str, Any] = {}
    for path in attention_paths(unet):
        name, made = f"{path}.processor", makes.get(path, PlainAttentionProcessor)(path)
        processors[name] = present[name] if type(present[name]) is type(made) else made
        if isinstance(processors[name], ReferenceReadProcessor):
            processors[name].blend = blend
    unet.set_attn_processor(processors)


def set_reference_write_processors(unet: UNet2DConditionModel, shares_keys_values: bool = False) -> None:
    """Set processors so that the mid and up self-attention of the reference U-Net writes what it shares.

    Args:
        unet: the reference U-Net.
        shares_keys_values: see `ReferenceWriteProcessor`.

    Raises:
        WeightsError: the U-Net has no such layers.
    """
    writing = reference_paths(unet)
    _check_has_layers(writing)
    unet.set_attn_processor(
        {
            f"{path}.processor": ReferenceWriteProcessor(path, path == writing[-1], shares_keys_values)
            if path in writing
            else PlainAttentionProcessor(path)
            for path in attention_paths(unet)
        }
    )


def is_shared(unet: UNet2DConditionModel) -> bool:
    """Whether one U-Net both reads the reference and denoises: a `SharedUNet`, also a compiled one."""
    return bool(getattr(unet, "reads_and_paints", False))


def _check_has_layers(paths: list[str]) -> None:
    if not paths:
        raise WeightsError("this U-Net has no self-attention in its mid and up blocks, which reference attention needs")


def check_references_are_read(unet: UNet2DConditionModel, reference_network: UNet2DConditionModel) -> None:
    """Check that the U-Nets still have the processors of this module.

    Args:
        unet: the imitative U-Net.
        reference_network: the U-Net that reads the reference; for a `SharedUNet`, the same object.

    Raises:
        WeightsError: other processors replaced them, so the reference would silently be ignored.
    """
    writing = ReferenceReadWriteProcessor if is_shared(reference_network) else ReferenceWriteProcessor
    for model, kind in ((unet, ReferenceReadProcessor), (reference_network, writing)):
        processors = model.attn_processors
        for path in reference_paths(model):
            processor = processors[f"{path}.processor"]
            if not isinstance(processor, kind):
                raise WeightsError(
                    f"the attention of {path} is computed by {type(processor).__name__}, which does not use a "
                    "reference (attention slicing, xFormers and fused projections replace the processors); choose a "
                    "backend with unet.set_attention_backend(...) instead, and load the pipeline again"
                )


def join_references(states: ReferenceStates, rows: int) -> ReferenceStates:
    """Join the states of n references of each row, see `join_tokens`.

    Args:
        states: states of (rows n) references, without keys and values of a context.
        rows: number of rows of the imitative U-Net.

    Returns:
        States with this number of rows; for n = 1 the same object.
    """
    written = next(iter((*states.features.values(), *(key for key, _ in states.keys_values.values()))))
    if len(written) == rows:
        return states
    features = {path: join_tokens(feature, rows) for path, feature in states.features.items()}
    keys_values = {path: (join_tokens(k, rows), join_tokens(v, rows)) for path, (k, v) in states.keys_values.items()}
    return ReferenceStates(features, keys_values, states.keep, states.blend, states.record, states.queries_and_keys)


# --- Keys and values that can be used for several steps ---------------------------------------------------------------


@apply_forward_hook  # only layers of the U-Net are called here; without this, offloading would not notice it
def project_references(unet: UNet2DConditionModel, features: dict[str, torch.Tensor]) -> dict[str, KeysValues]:
    """Compute the imitative U-Net's keys and values of reference features, (R, N, C) by module path.

    They can be used at all steps that use the same features.
    """
    return {path: project(unet.get_submodule(path), feature) for path, feature in features.items()}


@apply_forward_hook
def project_context(unet: UNet2DConditionModel, context: torch.Tensor) -> dict[str, KeysValues]:
    """Compute keys and values of every cross-attention for a context (B, N, D), which is the same at every step."""
    return {path: project(unet.get_submodule(path), context) for path in attention_paths(unet) if "attn2" in path}
