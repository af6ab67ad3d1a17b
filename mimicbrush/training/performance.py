"""Options that make a step faster or smaller without changing what is learnt, and FLOP of a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mimicbrush.models.low_precision import use_half_norms
from mimicbrush.training.noise import NoiseSample
from mimicbrush.training.objective import FrozenEncoders, MimicBrushModel
from mimicbrush.training.options import TrainOptions
from mimicbrush.types import TrainBatch


def apply_speedups(model: nn.Module, options: TrainOptions, channels_last: bool) -> None:
    """Prepare the trained networks, before they are wrapped or sharded.

    Args:
        model: holds the U-Nets.
        options: of the run.
        channels_last: the order of memory that convolutions in half precision are fastest in on a GPU; FSDP cannot
            keep it.
    """
    unets = [part for part in model.children() if isinstance(part, UNet2DConditionModel)]
    for unet in unets:
        if options.attention_backend is not None:
            unet.set_attention_backend(options.attention_backend)
        if options.low_precision_norms:
            use_half_norms(unet)
        if options.activation_checkpointing:
            unet.enable_gradient_checkpointing()
        if options.compile:
            compile_unet(unet)
    if channels_last:
        model.to(memory_format=torch.channels_last)


def compile_unet(unet: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile a U-Net that writes or reads references, as one graph.

    Block by block does not work: each block writes or reads under its own path, so each would need a graph of its own
    of the same code, and PyTorch refuses more than 8. One graph also lets norms and activations between the blocks
    fuse with what stands beside them.

    Args:
        unet: either U-Net, in the state that it is trained in (adapters, checkpointing).
        backend: of `torch.compile`.
    """
    # Checkpointing runs a block again in the backward pass, which would write its features a second time. They are
    # the same, and the graph needs them once.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    unet.compile(fullgraph=True, backend=backend)


#: Dense half-precision FLOP per second by the makers' data sheets, without sparsity: part of the name -> rate.
PEAK_FLOP_PER_S = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "4090": 165e12,
    "3090": 71e12,
    "A10": 125e12,
    "V100": 125e12,
}


def find_peak_flop_per_s(device: torch.device, mixed_precision: str) -> float | None:
    """Look up what the device could do at best in half precision; None where that is not known or not used."""
    if device.type != "cuda" or mixed_precision == "no":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_FLOP_PER_S.items() if part in name), None)


def count_training_flop(model: MimicBrushModel, encoders: FrozenEncoders) -> float:
    """Count the FLOP of training on one sample: all networks forward, and the trained ones backward at twice that.

    It counts on tensors without content, which takes a second or two. A multiply-add is two. Nothing is dropped,
    nothing is computed twice, and frozen weights count as if they were trained.
    """
    size_px, side = model.size_px, model.unet.config.sample_size
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(encoders.vae.device):
        image, mask, number = torch.empty(1, 3, size_px, size_px), torch.empty(1, 1, size_px, size_px), torch.ones(1)
        batch = TrainBatch(image, image, mask, number.long(), number.long())
        latents = torch.empty(1, encoders.vae.config.latent_channels, side, side)
        keep, rows = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
        posteriors = latents.expand(3, -1, -1, -1, -1)
        noise_sample = NoiseSample(number.long(), latents, posteriors, keep, keep, rows, rows, number)
        counted = copy.copy(encoders)  # a copy, since its constants must not be replaced by tensors without content
        counted.depth_convention = "standard"  # the other resizes by OpenCV, which wants content; FLOP are the same
        counted.encode(batch, noise_sample)
        with FlopCounterMode(display=False) as frozen:
            conditions = counted.encode(batch, noise_sample)
        with FlopCounterMode(display=False) as trained, torch.no_grad():
            model(latents, noise_sample.timestep, conditions, keep)
    return float(frozen.get_total_flops() + 3 * trained.get_total_flops())
