"""Checks that starting weights fit the networks that their configs describe.

The headers of the files are checked in `files`. Hashes and values are only checked by `check_every_byte`, for example
with `mimicbrush fetch --deep`. The checksums of pipeline folders are in `pipelines.checksums`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2Transformer2DModel, UNet2DConditionModel
from safetensors import safe_open
from torch import nn
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Qwen3Config, Qwen3ForCausalLM

from mimicbrush.errors import WeightsError
from mimicbrush.io.hashing import hash_file
from mimicbrush.models.patch_autoencoder import PatchAutoencoder
from mimicbrush.models.pretrained.files import DamagedFileError, StoredNetwork
from mimicbrush.models.pretrained.stored_weights import (
    POSITION_IDS,
    check_fit,
    depth_hub_name,
    describe_build_errors,
    rename_vae_attention,
    take_vision_half,
)
from mimicbrush.models.projectors import DepthProjector, ImageProjector
from mimicbrush.models.token_encoders import TOKEN_ENCODERS
from mimicbrush.models.unets import KeyValueReferenceUNet, ReferenceUNet, SharedUNet

#: Part, see `weights.LAYOUTS` -> the class that reads its weights.
CLASSES = {
    "unet": "UNet2DConditionModel",
    "reference_unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "image_encoder": "CLIPVisionModelWithProjection",
    "dinov2": "Dinov2Model",
    "depth_estimator": "DepthAnythingForDepthEstimation",
    "base.transformer": "Flux2Transformer2DModel",
    "base.vae": "AutoencoderKLFlux2",
    "base.text_encoder": "Qwen3ForCausalLM",
}

# Classes that are built with `from_config`, by name.
_DIFFUSERS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (UNet2DConditionModel, SharedUNet, ReferenceUNet, KeyValueReferenceUNet, AutoencoderKL,
                 PatchAutoencoder, ImageProjector, DepthProjector, Flux2Transformer2DModel, AutoencoderKLFlux2)
}  # fmt: skip
_DEPTH, _TEXT = DepthAnythingForDepthEstimation.__name__, Qwen3ForCausalLM.__name__


def check_networks(networks: Mapping[str, StoredNetwork]) -> None:
    """Check that each network of `PretrainedModel` has the weights that its config asks for, see `check_weights`."""
    for part, network in networks.items():
        check_weights(part, CLASSES[part], network)


def check_weights(part: str, class_name: str, network: StoredNetwork, built: nn.Module | None = None) -> None:
    """Check that a network has the weights, by names and shapes, that its config asks for.

    The libraries would fill in random numbers for weights that are missing.

    Args:
        part: name of the network in errors.
        class_name: class of the network.
        network: its config and the stored tensors.
        built: the network itself, if it is already built.

    Raises:
        WeightsError: tensors do not fit (the message names the first ten), or the class is unknown.
    """
    with describe_build_errors(network.folder / "config.json", class_name):
        built = _build(class_name, network) if built is None else built
        expected = {depth_hub_name(key): tensor for key, tensor in built.state_dict().items()}
        stored = {key: torch.empty(tensor.shape) for key, tensor in network.tensors.items()}
    if class_name == "CLIPVisionModelWithProjection":
        stored = take_vision_half(stored)
        stored.pop(POSITION_IDS, None)
    elif class_name == "AutoencoderKL":
        stored = rename_vae_attention(stored)
    elif class_name == _TEXT and network.config.get("tie_word_embeddings"):
        for weights in (stored, expected):
            weights.pop("lm_head.weight", None)  # the same tensor as the word embeddings, which is stored once
    check_fit(f"{part} in {network.folder}", {depth_hub_name(key): tensor for key, tensor in stored.items()}, expected)


def _build(class_name: str, network: StoredNetwork) -> nn.Module:
    token_encoders = {kind.model_class.__name__: kind for kind in TOKEN_ENCODERS.values()}
    if class_name not in (buildable := (*_DIFFUSERS, *token_encoders, _DEPTH, _TEXT)):
        raise WeightsError(
            f"{network.folder} should be a {class_name}, which is not supported; expected one of {', '.join(buildable)}"
        )
    built: nn.Module
    if class_name in _DIFFUSERS:
        built = _DIFFUSERS[class_name].from_config(network.config)
    elif class_name == _DEPTH:
        built = DepthAnythingForDepthEstimation(DepthAnythingConfig.from_dict(network.config))
    elif class_name == _TEXT:
        built = Qwen3ForCausalLM(Qwen3Config.from_dict(network.config))
    else:
        kind = token_encoders[class_name]
        built = kind.model_class(kind.read_config(network.config))
    return built


def check_every_byte(network: StoredNetwork) -> None:
    """Read all bytes of the weights: they must be finite and, in the hub's cache, have the hash that the hub states.

    Raises:
        DamagedFileError: names the file, and the tensor.
    """
    for file in network.files:
        expected = _hash_of_hub(file)
        if expected is not None:
            actual = hash_file(file)
            if actual != expected:
                raise DamagedFileError(file, f"its SHA-256 is {actual}, but the hub states {expected}")
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                tensor = opened.get_tensor(key)
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    raise DamagedFileError(file, f"{key} contains NaN or infinite values")


def _hash_of_hub(file: Path) -> str | None:
    """Return the SHA-256 of a file in the hub's cache, where files are links to files that are named by it."""
    name = file.resolve().name
    return name if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", name) else None
