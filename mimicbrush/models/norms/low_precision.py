"""Norms in half precision, to save activation memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class HalfGroupNorm(nn.GroupNorm):
    """`GroupNorm` in the type of its input, also under autocast, which would compute and keep it in float32.

    The kernels of PyTorch still sum in float32.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise (B, C, ...); the result has the same shape and type."""
        with torch.autocast(input.device.type, enabled=False):
            return F.group_norm(
                input, self.num_groups, self.weight.to(input.dtype), self.bias.to(input.dtype), self.eps
            )


class HalfLayerNorm(nn.LayerNorm):
    """`LayerNorm` in the type of its input, see `HalfGroupNorm`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise (..., C); the result has the same shape and type."""
        with torch.autocast(input.device.type, enabled=False):
            return F.layer_norm(
                input, self.normalized_shape, self.weight.to(input.dtype), self.bias.to(input.dtype), self.eps
            )


def use_half_norms(model: nn.Module) -> None:
    """Replace the norms of a model; its parameters and its state dict stay the same."""
    for name, module in list(model.named_modules()):
        half: nn.Module
        if type(module) is nn.GroupNorm:
            half = HalfGroupNorm(module.num_groups, module.num_channels, module.eps, device="meta")
        elif type(module) is nn.LayerNorm:
            half = HalfLayerNorm(module.normalized_shape, module.eps, device="meta")
        else:
            continue
        half.weight, half.bias = module.weight, module.bias
        model.set_submodule(name, half.train(module.training))
