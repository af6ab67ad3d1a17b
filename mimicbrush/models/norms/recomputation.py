"""Norms and activations that are computed again in the backward pass, instead of being kept for it.

A convolution or a matrix product keeps its input, for the gradient of its weights. Often that input was made by a norm
or an activation, which are cheap to compute again. So in a chain such as::

    x -> GroupNorm -> SiLU -> convolution

only x is kept. `_Recomputed` computes one of these layers: it keeps only the layer's input, and marks the result.
While a U-Net runs, PyTorch's hooks see each tensor that is about to be kept. If it is marked, they keep the layer
instead. In the backward pass, the layer computes its result again, once, when it is first needed.

Convolutions, matrix products, attention and the processors that write references run once, as without this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from mimicbrush.models.reference_attention import reference_paths
from mimicbrush.models.unets import ReferenceUNet


def recompute_cheap_layers(unet: UNet2DConditionModel) -> None:
    """Let the norms, SiLUs and gates of a U-Net be computed again in the backward pass, instead of being kept.

    Results and names of weights stay the same. So do gradients, except for one rounding under autocast: if a LayerNorm
    feeds three projections, their gradients are added in half precision and not in float32.

    Args:
        unet: either U-Net, ready for training (with its adapters and its norms in half precision).
    """
    before_silu = []
    for module in list(unet.modules()):
        layer: Any = module
        if isinstance(module, nn.GroupNorm | nn.LayerNorm) or type(module) is nn.SiLU:
            layer.__class__ = _recomputed_class(layer.__class__)
        elif isinstance(module, GEGLU):
            layer.__class__ = _RecomputedGEGLU
        elif isinstance(module, ResnetBlock2D):
            before_silu += [module.norm1, module.norm2]
    for norm in (*before_silu, unet.conv_norm_out):
        # A reference U-Net ends before its conv_norm_out; a fused norm includes its SiLU.
        if norm is not None and not getattr(norm, "silu", False):
            norm.feeds_matmul = False
    if isinstance(unet, ReferenceUNet):
        for path in reference_paths(unet):
            unet.get_submodule(path.removesuffix("attn1") + "norm1").is_kept = True
    hooks = saved_tensors_hooks(_keep, _give_back)
    unet.register_forward_pre_hook(lambda *_: hooks.__enter__())
    unet.register_forward_hook(lambda *_: hooks.__exit__(), always_call=True)


class _RecomputedLayer(nn.Module):
    """A norm or an activation whose result is computed again.

    Attributes:
        feeds_matmul: whether only convolutions or matrix products read the result. Autocast would give them a cast
            copy. It is cast here, so that they keep the result itself.
        is_kept: whether the result is kept, too. This is needed if the other U-Net reads it: in the backward pass of
            that U-Net, this layer cannot compute, because FSDP has not gathered its weights.
    """

    feeds_matmul, is_kept = True, False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.ndim < 3:  # the embedding of the timestep, which is small
            return cast(torch.Tensor, super().forward(input))
        return _compute(self._run, input, *self.parameters(), is_kept=self.is_kept)

    def _run(self, input: torch.Tensor) -> torch.Tensor:
        result, kind = super().forward(input), input.device.type
        cast_too = self.feeds_matmul and torch.is_autocast_enabled(kind)
        return cast(torch.Tensor, result.to(torch.get_autocast_dtype(kind)) if cast_too else result)


@functools.cache
def _recomputed_class(layer: type[nn.Module]) -> type[nn.Module]:
    return type(f"Recomputed{layer.__name__}", (_RecomputedLayer, layer), {})


class _RecomputedGEGLU(GEGLU):
    """GEGLU that keeps the output of its projection, but not the gate and the product."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _compute(self._gate, self.proj(hidden_states))

    def _gate(self, projected: torch.Tensor) -> torch.Tensor:
        hidden, gate = projected.chunk(2, dim=-1)
        return hidden * self.gelu(gate)


def _compute(
    run: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor, *weights: nn.Parameter, is_kept: bool = False
) -> torch.Tensor:
    """Compute a layer, and mark the storage of its result, which all views of the result share."""
    result = cast(torch.Tensor, _Recomputed.apply(run, tensor, *weights))
    if result.grad_fn is not None and not is_kept:
        storage: Any = result.untyped_storage()
        storage.recomputed_by = result.grad_fn
    return result


class _Recomputed(torch.autograd.Function):
    """A layer whose input is kept, and whose result is not."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor, *weights: nn.Parameter
    ) -> torch.Tensor:
        ctx.save_for_backward(tensor)
        ctx.run, ctx.weights, ctx.again = run, weights, None
        kind = tensor.device.type
        ctx.autocast = functools.partial(
            torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )
        return run(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (tensor, result), ctx.again = _run_again(ctx), None
        needed = ctx.needs_input_grad[1:]
        inputs = [each for each, is_needed in zip((tensor, *ctx.weights), needed, strict=True) if is_needed]
        gradients = iter(torch.autograd.grad(result, inputs, gradient))
        return None, *(next(gradients) if is_needed else None for is_needed in needed)


def _run_again(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a layer again, only once; return its input and its result, with the graph between them.

    Args:
        layer: the context of a `_Recomputed`, which is a node of the graph.
    """
    if layer.again is None:
        (kept,) = layer.saved_tensors
        tensor = kept.detach().requires_grad_(layer.needs_input_grad[1])
        with torch.enable_grad(), layer.autocast():
            layer.again = tensor, layer.run(tensor)
    return cast(tuple[torch.Tensor, torch.Tensor], layer.again)


def _keep(tensor: torch.Tensor) -> Any:
    """Return what is kept for a tensor: the layer and the view if a layer can compute it again, else the tensor."""
    layer = getattr(tensor.untyped_storage(), "recomputed_by", None)
    return tensor if layer is None else (layer, tensor.size(), tensor.stride(), tensor.storage_offset())


def _give_back(kept: Any) -> torch.Tensor:
    """Return the tensor for the result of `_keep`."""
    if isinstance(kept, torch.Tensor):
        return kept
    layer, *view = kept
    return _run_again(layer)[1].detach().as_strided(*view)
