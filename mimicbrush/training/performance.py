"""Options that make a training step faster or save memory without changing its result, and the FLOP of a step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mimicbrush.models.norms.fused_norms import use_fused_norms
from mimicbrush.models.norms.low_precision import use_half_norms
from mimicbrush.models.norms.recomputation import recompute_cheap_layers
from mimicbrush.models.reference_attention import ReferenceReadWriteProcessor, is_shared
from mimicbrush.training.noise import NoiseSample
from mimicbrush.training.objective import FrozenEncoders, MimicBrushModel
from mimicbrush.training.options import TrainOptions
from mimicbrush.types import TrainBatch


def apply_speedups(model: nn.Module, options: TrainOptions, channels_last: bool) -> None:
    """Prepare the trained networks, before they are wrapped or sharded.

    Args:
        model: module with the U-Nets as children.
        options: options of the run.
        channels_last: use PyTorch's `channels_last` memory format, with which convolutions in half precision are
            fastest on a GPU; FSDP does not support it.
    """
    unets = [part for part in model.children() if isinstance(part, UNet2DConditionModel)]
    for unet in unets:
        if options.attention_backend is not None:
            unet.set_attention_backend(options.attention_backend)
        if options.low_precision_norms:
            use_half_norms(unet)
        if options.fused_norms:
            use_fused_norms(unet)
        if options.activation_checkpointing:
            unet.enable_gradient_checkpointing()
        if options.selective_checkpointing:
            recompute_cheap_layers(unet)
    if options.compile:
        if options.compile_parts == "blocks":
            compile_blocks(unets)
        else:
            for unet in unets:
                compile_unet(unet)
    if channels_last:
        model.to(memory_format=torch.channels_last)


def compile_unet(unet: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile a U-Net that writes or reads references, as one graph.

    Operations can be fused across blocks. But PyTorch then compiles each of the many equal blocks again;
    `compile_blocks` does not.

    Args:
        unet: one of the U-Nets, after adapters and checkpointing were set.
        backend: backend of `torch.compile`.
    """
    _prepare_dynamo(num_graphs=1 + is_shared(unet))
    unet.compile(fullgraph=True, backend=backend)


def compile_blocks(unets: list[UNet2DConditionModel], backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile the blocks of U-Nets: resnets, transformers, downsamplers and upsamplers.

    Blocks with equal shapes share a graph. If a transformer block looked up references by its full path, each block
    would need its own graph. So it only gets the states of its own block, by names that are the same in all blocks.

    Args:
        unets: both U-Nets, after adapters and checkpointing were set.
        backend: backend of `torch.compile`.

    Returns:
        The number of different blocks, which is the largest number of graphs with one reference per sample.
    """
    blocks = {
        (number, path): block
        for number, unet in enumerate(unets)
        for path, block in unet.named_modules()
        if isinstance(block, ResnetBlock2D | Transformer2DModel | Downsample2D | Upsample2D)
    }
    kinds = {(_describe_block(path, block), _find_writing(block)) for (_, path), block in blocks.items()}
    # A block that writes references in one pass and reads them in another has a graph for each of the passes.
    num_graphs = len({kind for kind, _ in kinds}) + sum(writing is not None for _, writing in kinds)
    _prepare_dynamo(2 * num_graphs)  # with several references, the pass that reads them has more rows than the other
    for (_, path), block in blocks.items():
        # Sizes are fixed: by default, PyTorch would make the sizes of all graphs dynamic after the second width.
        block.compile(fullgraph=True, dynamic=False, backend=backend)
        if isinstance(block, Transformer2DModel):
            # The attribute that `nn.Module.compile` sets; copies and saved modules do not include it.
            block._compiled_call_impl = functools.partial(_call_block, path, block._compiled_call_impl)
    return num_graphs


def _describe_block(path: str, block: nn.Module) -> tuple[object, ...]:
    """Collect what the graph of a block depends on: its resolution, its layers and their attention processors."""
    kinds = tuple((type(part), type(getattr(part, "processor", None))) for part in block.modules())
    shapes = tuple((tuple(each.shape), each.requires_grad) for each in block.parameters())
    return tuple(path.split(".")[:2]), kinds, shapes


def _find_writing(block: nn.Module) -> bool | None:
    """Return whether a block that both writes and reads is the last that writes; None if it does not do both."""
    processors = (getattr(part, "processor", None) for part in block.modules())
    return next((each.is_last for each in processors if isinstance(each, ReferenceReadWriteProcessor)), None)


def _call_block(
    path: str,
    block: Callable[..., Any],
    *args: Any,
    cross_attention_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Call a compiled transformer with the `ReferenceStates` of its own block, and add what it wrote to all states."""
    states = (cross_attention_kwargs or {}).get("reference_states")
    if states is None:
        return block(*args, cross_attention_kwargs=cross_attention_kwargs, **kwargs)
    own = states.select_block(path)
    output = block(*args, cross_attention_kwargs={"reference_states": own}, **kwargs)
    states.add_block(path, own)
    return output


def _prepare_dynamo(num_graphs: int) -> None:
    """Allow more graphs: PyTorch keeps at most 8 of a function, and all modules are called by the same function."""
    config = torch._dynamo.config
    config.recompile_limit += num_graphs
    config.accumulated_recompile_limit += num_graphs
    # Checkpointing runs a block again in the backward pass, which would write the same features a second time. The
    # graph does not need this.
    config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


#: Peak FLOP/s in half precision without sparsity, from data sheets: part of the name of the GPU -> rate.
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
    """Look up the peak FLOP/s of the device in half precision; None if it is not known or not used."""
    if device.type != "cuda" or mixed_precision == "no":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_FLOP_PER_S.items() if part in name), None)


def count_training_flop(
    model: MimicBrushModel, encoders: FrozenEncoders, is_encoded: bool = False, num_references: int = 1
) -> float:
    """Count the FLOP of training on one sample: a forward pass of all networks, plus twice the trained ones (backward).

    The networks run on fake tensors, which takes a second or two. A multiply-add counts as two. The count assumes that
    nothing is dropped or computed twice, and that all weights of the trained networks are trained. With `is_encoded`,
    samples are encoded views, and the frozen networks do not count.
    """
    size_px, side = model.size_px, model.unet.config.sample_size
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(encoders.vae.device):
        image, mask, number = torch.empty(1, 3, size_px, size_px), torch.empty(1, 1, size_px, size_px), torch.ones(1)
        others = image.expand(num_references - 1, -1, -1, -1)[None] if num_references > 1 else None
        batch = TrainBatch(image, image, mask, number.long(), number.long(), other_references=others)
        latents = torch.empty(1, encoders.vae.config.latent_channels, side, side)
        keep, rows = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
        posteriors = latents.expand(2 + num_references, -1, -1, -1, -1)
        noise_sample = NoiseSample(number.long(), latents, posteriors, keep, keep, rows, rows, number)
        counted = copy.copy(encoders)  # a copy, so that its constants are not replaced by fake tensors
        counted.depth_convention = "standard"  # OpenCV, used by the other one, needs real tensors; FLOP are the same
        counted.encode(batch, noise_sample)
        with FlopCounterMode(display=False) as frozen:
            conditions = counted.encode(batch, noise_sample)
        with FlopCounterMode(display=False) as trained, torch.no_grad():
            model(latents, noise_sample.timestep, conditions, keep)
    return float((0 if is_encoded else frozen.get_total_flops()) + 3 * trained.get_total_flops())
