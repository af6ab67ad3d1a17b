"""Names and configs of networks in files, as different versions of the libraries write them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig

from mimicbrush.errors import MimicBrushError, WeightsError
from mimicbrush.io.text import make_storable

#: Name of a weight -> tensor.
StateDict: TypeAlias = dict[str, torch.Tensor]

#: A buffer that transformers 4.25 kept with the weights, and newer versions do not.
POSITION_IDS = "vision_model.embeddings.position_ids"

# Layers of the VAE's attention: name before diffusers 0.13 -> name now.
_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_MOST_NAMED = 10


@contextmanager
def describe_build_errors(file: object, kind: str = "valid network") -> Iterator[None]:
    """Build networks on the meta device; errors of the libraries become a WeightsError that names the config.

    Args:
        file: file of the config.
        kind: class of the network.

    Raises:
        WeightsError: the config describes no such network.
    """
    try:
        # The network is only compared and not used, so warnings do not matter.
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            yield
    except MimicBrushError:
        raise
    except (
        *(TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError, AssertionError),
        StrictDataclassError,
    ) as error:
        raise WeightsError(f"{file} does not describe a {kind} ({make_storable(repr(error))})") from error


def check_fit(part: str, weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Check that a state dict has exactly the keys and shapes that it should have.

    Args:
        part: name of the network in errors.
        weights: the state dict.
        expected: tensors of the right shapes, for example on the meta device.

    Raises:
        WeightsError: names the part, and key, given and expected shape of the first ten tensors that do not fit.
    """
    problems = [
        f"{key} has shape {_shape(tensor)}, expected {_shape(expected[key])}"
        for key, tensor in weights.items()
        if key in expected and tensor.shape != expected[key].shape
    ]
    problems += [f"{key} is missing, expected shape {_shape(expected[key])}" for key in expected if key not in weights]
    problems += [
        f"{key} is unexpected (its shape is {_shape(tensor)})" for key, tensor in weights.items() if key not in expected
    ]
    if problems:
        shown = [f"  {make_storable(problem)}" for problem in problems[:_MOST_NAMED]]
        if len(problems) > _MOST_NAMED:
            shown.append(f"  and {len(problems) - _MOST_NAMED} more")
        raise WeightsError(f"{part} does not fit:\n" + "\n".join(shown))


def rename_vae_attention(weights: StateDict) -> StateDict:
    """Rename the weights of the VAE's attention layers to their current names.

    Raises:
        WeightsError: a key appears under both its old and its current name.
    """
    renamed: StateDict = {}
    for key, tensor in weights.items():
        block, _, last = key.rpartition(".")
        before, _, layer = block.rpartition(".")
        name = f"{before}.{_VAE_ATTENTION[layer]}.{last}" if layer in _VAE_ATTENTION else key
        if name in renamed:
            raise WeightsError(f"vae does not fit:\n  {name} appears twice, under its old and its new name")
        renamed[name] = tensor
    return renamed


def take_vision_half(weights: StateDict) -> StateDict:
    """Take the weights of CLIP's image encoder, also from a file that contains the text encoder, too."""
    text = ("text_model.", "text_projection.", "logit_scale")
    return {key: tensor for key, tensor in weights.items() if not key.startswith(text)}


def depth_hub_name(name: str) -> str:
    """Map the name of a Depth Anything weight in memory, with any transformers version, to its name on the hub.

    In some versions of transformers 5, DINOv2's attention has other names in memory than in files.
    """
    for memory, hub in (
        (".attention.q_proj.", ".attention.attention.query."),
        (".attention.k_proj.", ".attention.attention.key."),
        (".attention.v_proj.", ".attention.attention.value."),
        (".attention.o_proj.", ".attention.output.dense."),
    ):
        name = name.replace(memory, hub)
    return name


def clip_config(stored: dict[str, Any]) -> CLIPVisionConfig:
    """Build the config of CLIP's image encoder from a config.json of any transformers version.

    Files of older versions have many other fields, for example about text generation, and newer versions refuse some of
    them. They can also describe the whole CLIP. Only fields that affect weights and results are used.
    """
    vision = dict(stored.get("vision_config", stored))
    # In the config of a whole CLIP, the projection_dim of vision_config is often only a default.
    vision["projection_dim"] = stored.get("projection_dim") or vision.get("projection_dim")
    names = (
        "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
        "num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout",
        "initializer_range", "initializer_factor",
    )  # fmt: skip
    return CLIPVisionConfig(**{name: vision[name] for name in names if vision.get(name) is not None})


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
