"""LoRA files of FLUX.2 klein: written as diffusers reads them, and loaded after a check.

A file has two matrices per layer, A (rank, in) and B (out, rank). The layer's weight becomes W + s B A, with the scale
s = alpha / rank. Alpha is in the metadata, as part of PEFT's config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save_file

from mimicbrush.errors import WeightsError
from mimicbrush.io.atomic import write_aside
from mimicbrush.io.text import describe_error, make_storable
from mimicbrush.models.flux2_klein.files import read_lora_head


def write_klein_lora(file: Path, transformer: Flux2Transformer2DModel) -> None:
    """Write the adapters of a transformer as the LoRA file that `Flux2KleinPipeline.load_lora_weights` reads."""
    from peft import get_peft_model_state_dict

    layers = get_peft_model_state_dict(transformer)
    config = transformer.peft_config["default"].to_dict()
    facts = {f"transformer.{name}": sorted(each) if isinstance(each, set) else each for name, each in config.items()}
    # Only one entry: safetensors writes several in any order, but the same adapters should give the same bytes.
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(facts, indent=2, sort_keys=True)}

    def save(weights: Mapping[str, torch.Tensor], path: str) -> None:
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, path, metadata)

    write_aside(
        file,
        lambda aside: Flux2KleinPipeline.save_lora_weights(
            aside.parent, transformer_lora_layers=layers, weight_name=aside.name, save_function=save
        ),
    )


def load_klein_lora(pipeline: Flux2KleinPipeline, file: Path) -> None:
    """Load a LoRA file into diffusers' pipeline, after a check that it is for this transformer.

    Raises:
        WeightsError: the file is damaged, or is not a LoRA for this transformer.
    """
    stored = {key: tensor.shape for key, tensor in read_lora_head(file).items()}
    layers = {f"transformer.{name}": each for name, each in pipeline.transformer.named_modules()}
    for name in sorted({key.removesuffix(".weight").rpartition(".")[0] for key in stored}):
        layer = layers.get(name)
        if not isinstance(layer, torch.nn.Linear):
            raise WeightsError(f"{file} is not a LoRA for this transformer, which has no layer {make_storable(name)}")
        down, up = (stored.get(f"{name}.{half}.weight", ()) for half in ("lora_A", "lora_B"))
        rank = down[0] if down else 0
        if rank < 1 or down != (rank, layer.in_features) or up != (layer.out_features, rank):
            raise WeightsError(
                f"{file} does not fit this transformer: {name} has A of shape {down} and B of shape {up}, expected "
                f"(rank, {layer.in_features}) and ({layer.out_features}, rank)"
            )
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{file} cannot be loaded: {describe_error(error)}") from error
