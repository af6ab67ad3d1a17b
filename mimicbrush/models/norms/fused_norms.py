"""GroupNorm and the SiLU after it as one operation, for channels-last activations in half precision on a GPU.

PyTorch takes several passes: under autocast, it makes a float32 copy, normalises it, applies SiLU in float32, and makes
a half-precision copy for the convolution. Before PyTorch 2.15, it also changes the memory order and changes it back.
The kernels of `group_norm_kernels` read and write half precision in the memory order of the convolutions, and keep only
their input for the backward pass. They compute in float32 and round once, as PyTorch does.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from mimicbrush.models.norms.low_precision import HalfGroupNorm

_log = logging.getLogger(__name__)


class FusedGroupNorm(HalfGroupNorm):
    """`GroupNorm` and optionally SiLU as one operation if the kernels can do it, otherwise as in PyTorch.

    Args:
        norm: the norm whose parameters are used.
        silu: whether SiLU follows.
    """

    def __init__(self, norm: nn.GroupNorm, silu: bool) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.silu, self.is_half = silu, isinstance(norm, HalfGroupNorm)
        self.train(norm.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise (B, C, H, W); the result has the same shape."""
        # Inductor fuses the plain norm with the operations around it.
        if not torch.compiler.is_compiling():
            obstacle = find_obstacle(input)
            if obstacle is None:
                from mimicbrush.models.norms.group_norm_kernels import fused_group_norm

                fused: torch.Tensor = fused_group_norm(
                    input, self.weight, self.bias, self.num_groups, self.eps, self.silu
                )[0]
                return fused
            _tell_once(obstacle)
        result = super().forward(input) if self.is_half else nn.GroupNorm.forward(self, input)
        return F.silu(result) if self.silu else result


class _SiLUOfTime(nn.SiLU):
    """SiLU of only the time embedding (B, D): the norms of the resnet already include the SiLU of (B, C, H, W)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) if input.ndim == 2 else input


def use_fused_norms(unet: UNet2DConditionModel) -> None:
    """Fuse the GroupNorms of a U-Net with the SiLU after them; its parameters and its state dict stay the same."""
    silus: set[nn.Module] = set()
    for module in unet.modules():
        # With another time_embedding_norm, a scale and a shift come between the second norm and its SiLU.
        if (
            isinstance(module, ResnetBlock2D)
            and type(module.nonlinearity) is nn.SiLU
            and module.time_embedding_norm == "default"
        ):
            module.nonlinearity = _SiLUOfTime()
            silus |= {module.norm1, module.norm2}
    if unet.conv_norm_out is not None and type(unet.conv_act) is nn.SiLU:
        unet.conv_act = nn.Identity()
        silus.add(unet.conv_norm_out)
    for name, module in list(unet.named_modules()):
        if isinstance(module, nn.GroupNorm) and module.affine:
            unet.set_submodule(name, FusedGroupNorm(module, module in silus))


def find_obstacle(input: torch.Tensor) -> str | None:
    """Return why the kernels cannot take this input; None if they can."""
    if input.device.type != "cuda":
        return f"it needs a CUDA GPU, but the model is on {input.device.type}"
    if input.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs half precision (train.mixed_precision), but the activations are {input.dtype}"
    if input.ndim != 4 or not input.is_contiguous(memory_format=torch.channels_last):
        return "it needs activations in channels-last order, which sharded networks do not have"
    return None if _has_triton() else "it needs Triton, which is not installed"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _tell_once(obstacle: str) -> None:
    _log.warning("train.fused_norms has no effect here: %s", obstacle)
