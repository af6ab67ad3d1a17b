"""Sets how each network is trained: all weights, no weights, or low-rank adapters (LoRA) on frozen weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import PeftAdapterMixin
from diffusers.training_utils import cast_training_params
from torch import nn

from mimicbrush.errors import InputError
from mimicbrush.models.library_logs import silence_diffusers
from mimicbrush.training.options import TrainOptions


def freeze_and_adapt(parts: Mapping[str, nn.Module], options: TrainOptions) -> None:
    """Freeze the networks that are not trained, and add adapters to those that are trained with adapters.

    Adapters start as zero, so that the outputs do not change before the first step.

    Args:
        parts: the networks of the trained model, by name.
        options: says how each of them is trained.

    Raises:
        InputError: no parameter would be trained.
    """
    for name, part in parts.items():
        choice = getattr(options, name)
        part.requires_grad_(choice == "trained")
        if choice == "lora":
            add_adapters(part, options)
    if not any(parameter.requires_grad for part in parts.values() for parameter in part.parameters()):
        raise InputError(
            "nothing would be trained: " + " ".join(f"train.{name}={getattr(options, name)}" for name in parts)
        )


def add_adapters(network: nn.Module, options: TrainOptions) -> None:
    """Add low-rank adapters to the projections of a U-Net or a transformer, through diffusers and peft.

    Adapters are float32, whatever the frozen weights are.
    """
    from peft import LoraConfig

    assert isinstance(network, PeftAdapterMixin)
    # Targets have their full names: the reference U-Net lacks some projections, on which peft would fail.
    targets = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        and any(f".{name}".endswith(f".{each}") for each in options.lora_target_modules)
    ]
    if not targets:
        raise InputError(f"train.lora_target_modules={list(options.lora_target_modules)} match no layer of the network")
    network.add_adapter(
        LoraConfig(
            r=options.lora_rank,
            lora_alpha=options.lora_rank if options.lora_alpha is None else options.lora_alpha,
            lora_dropout=options.lora_dropout,
            init_lora_weights="gaussian",
            target_modules=targets,
        )
    )
    cast_training_params(network, torch.float32)


def merge_adapters(parts: Mapping[str, nn.Module], folder: Path | None = None) -> None:
    """Merge adapters into the weights; the networks have no adapters afterwards.

    Args:
        parts: networks, with adapters or without.
        folder: folder to also write the adapters into, in the format of diffusers (`load_lora_adapter`), one folder per
            network; None: they are not written.
    """
    for name, part in parts.items():
        if isinstance(part, UNet2DConditionModel) and hasattr(part, "peft_config"):
            if folder is not None:
                with silence_diffusers():  # it would warn about a cast to the type None
                    part.save_lora_adapter(folder / name)
            part.fuse_lora()
            part.unload_lora()
