"""Names of weights, in released files and here. All maps are total: what does not fit, both ways, is an error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mimicbrush.errors import WeightsError
from mimicbrush.pipelines.conversion.reading import Weights

#: Parts of ``mimicbrush.bin`` -> components of the pipeline.
PARTS = {
    "unet": "unet",
    "referencenet": "reference_unet",
    "image_proj": "image_projector",
    "depth_guider": "depth_projector",
    "image_encoder": "image_encoder",
}

#: A buffer that transformers 4.25 kept with the weights, and newer versions do not.
POSITION_IDS = "vision_model.embeddings.position_ids"
_POSITIONS = "vision_model.embeddings.position_embedding.weight"

# The VAE's attention, as diffusers called it before 0.13 -> now.
_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_MOST_NAMED = 10


def check_fit(part: str, given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Whether a state dict has exactly the keys and shapes that it should have.

    Args:
        part: what the errors call it.
        given: the weights.
        expected: tensors of the right shapes; those of a network on the meta device will do.

    Raises:
        WeightsError: names part, key, and what was given and expected, for the first ten that do not fit.
    """
    problems = [
        f"{key} has shape {_shape(tensor)}, expected {_shape(expected[key])}"
        for key, tensor in given.items()
        if key in expected and tensor.shape != expected[key].shape
    ]
    problems += [f"{key} is missing, expected shape {_shape(expected[key])}" for key in expected if key not in given]
    problems += [
        f"{key} is unexpected, given with shape {_shape(tensor)}"
        for key, tensor in given.items()
        if key not in expected
    ]
    if problems:
        shown = [f"  {problem}" for problem in problems[:_MOST_NAMED]]
        if len(problems) > _MOST_NAMED:
            shown.append(f"  and {len(problems) - _MOST_NAMED} more")
        raise WeightsError(f"{part} does not fit:\n" + "\n".join(shown))


def fill(part: str, module: nn.Module, weights: Weights) -> None:
    """Put weights into a network that was built on the meta device; they are taken as they are, not copied.

    Raises:
        WeightsError: see `check_fit`.
    """
    check_fit(part, weights, module.state_dict())
    module.load_state_dict(weights, assign=True)


def cast(weights: Weights, dtype: torch.dtype | None) -> Weights:
    """Floating-point weights as another type; None leaves them as they are."""
    if dtype is None:
        return weights
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in weights.items()}


def split_parts(contents: Mapping[tuple[str, ...], torch.Tensor], file: object) -> dict[str, Weights]:
    """A released checkpoint, part by part.

    Args:
        contents: see `reading.read_files`.
        file: what the errors call it.

    Raises:
        WeightsError: other parts than those of `PARTS`.
    """
    parts: dict[str, Weights] = {}
    for path, tensor in contents.items():
        name = path[0] if len(path) == 2 else "/".join(path) or "a bare tensor"
        parts.setdefault(name, {})[path[-1] if path else name] = tensor
    missing, unexpected = [name for name in PARTS if name not in parts], [name for name in parts if name not in PARTS]
    if missing or unexpected:
        shown = ", ".join(unexpected[:_MOST_NAMED]) + (", ..." if len(unexpected) > _MOST_NAMED else "")
        raise WeightsError(
            f"{file} is no released checkpoint, which holds {', '.join(PARTS)}: "
            + " and ".join(
                [f"{', '.join(missing)} missing"] * bool(missing) + [f"{shown} unexpected"] * bool(unexpected)
            )
        )
    return parts


def without_position_ids(weights: Weights) -> Weights:
    """CLIP weights of any transformers version as newer ones keep them.

    Raises:
        WeightsError: the buffer that is left out holds something else than 0, 1, 2, ...
    """
    if POSITION_IDS not in weights:
        return weights
    rest = dict(weights)
    ids = rest.pop(POSITION_IDS)
    if _POSITIONS in rest:
        expected = position_ids(rest)
        if ids.shape != expected.shape or not torch.equal(ids.to(expected.dtype), expected):
            raise WeightsError(
                f"image_encoder does not fit:\n  {POSITION_IDS} has shape {_shape(ids)}, expected "
                f"{_shape(expected)} with 0 to {expected.numel() - 1} in order"
            )
    return rest


def with_position_ids(weights: Weights) -> Weights:
    """CLIP weights as transformers 4.25 wants them: the released code loads strictly."""
    return {POSITION_IDS: position_ids(weights), **weights}


def position_ids(weights: Weights) -> torch.Tensor:
    """What `POSITION_IDS` holds: (1, N) int64."""
    return torch.arange(len(weights[_POSITIONS]))[None]


def present_vae_names(weights: Weights) -> Weights:
    """VAE weights with the attention's present names, whichever they have.

    Raises:
        WeightsError: a key under its old and its present name.
    """
    renamed: Weights = {}
    for key, tensor in weights.items():
        block, _, last = key.rpartition(".")
        before, _, layer = block.rpartition(".")
        name = f"{before}.{_VAE_ATTENTION[layer]}.{last}" if layer in _VAE_ATTENTION else key
        if name in renamed:
            raise WeightsError(f"vae does not fit:\n  {name} is there twice, under its old and its present name")
        renamed[name] = tensor
    return renamed


def vision_half(weights: Weights) -> Weights:
    """CLIP's image encoder, also out of a file that holds the text encoder beside it."""
    text = ("text_model.", "text_projection.", "logit_scale")
    return {key: tensor for key, tensor in weights.items() if not key.startswith(text)}


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
