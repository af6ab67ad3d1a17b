"""Names and configs of networks in files, as libraries of all ages wrote them."""

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

#: A state dict.
StateDict: TypeAlias = dict[str, torch.Tensor]

#: A buffer that transformers 4.25 kept with the weights, and newer versions do not.
POSITION_IDS = "vision_model.embeddings.position_ids"

# The VAE's attention, as diffusers called it before 0.13 -> now.
_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_MOST_NAMED = 10


@contextmanager
def describe_build_errors(file: object, kind: str = "valid network") -> Iterator[None]:
    """Build networks on the meta device; whatever the libraries raise about a config becomes an error that names it.

    Args:
        file: the config's.
        kind: class of the network.

    Raises:
        WeightsError: the config describes no such network.
    """
    try:
        # What is built here is compared, not used: there is nothing to warn of.
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
        part: what the errors call it.
        weights: the state dict.
        expected: tensors of the right shapes; those of a network on the meta device will do.

    Raises:
        WeightsError: names part, key, and what was given and expected, for the first ten that do not fit.
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
    """Rename VAE weights to the present names of its attention layers.

    Raises:
        WeightsError: a key under its old and its present name.
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
    """Take the weights of CLIP's image encoder, also out of a file that holds the text encoder beside it."""
    text = ("text_model.", "text_projection.", "logit_scale")
    return {key: tensor for key, tensor in weights.items() if not key.startswith(text)}


def depth_hub_name(name: str) -> str:
    """Map a name in memory of a Depth Anything of any transformers version to its name on the hub.

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

    Older ones also hold dozens of fields about text generation and the like, some of which newer versions refuse,
    or all of CLIP. What decides about weights and numbers is taken, and nothing else.
    """
    vision = dict(stored.get("vision_config", stored))
    # Of a whole CLIP, its own projection counts; that of its half is often left at a default.
    vision["projection_dim"] = stored.get("projection_dim") or vision.get("projection_dim")
    names = (
        "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
        "num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout",
        "initializer_range", "initializer_factor",
    )  # fmt: skip
    return CLIPVisionConfig(**{name: vision[name] for name in names if vision.get(name) is not None})


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
