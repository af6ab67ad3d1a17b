"""Names of weights, in released files and here. All maps are total: what does not fit, both ways, is an error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mimicbrush.errors import WeightsError
from mimicbrush.models.pretrained.stored_weights import POSITION_IDS, StateDict, check_fit

#: Parts of ``mimicbrush.bin`` -> components of the pipeline.
PARTS = {
    "unet": "unet",
    "referencenet": "reference_unet",
    "image_proj": "image_projector",
    "depth_guider": "depth_projector",
    "image_encoder": "image_encoder",
}

_POSITIONS = "vision_model.embeddings.position_embedding.weight"

_MOST_NAMED = 10


def fill_network(part: str, module: nn.Module, weights: StateDict) -> None:
    """Put weights into a network that was built on the meta device; they are taken as they are, not copied.

    Raises:
        WeightsError: see `check_fit`.
    """
    check_fit(part, weights, module.state_dict())
    module.load_state_dict(weights, assign=True)


def cast_weights(weights: StateDict, dtype: torch.dtype | None) -> StateDict:
    """Convert floating-point weights to another type; None leaves them as they are."""
    if dtype is None:
        return weights
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in weights.items()}


def split_parts(contents: Mapping[tuple[str, ...], torch.Tensor], file: object) -> dict[str, StateDict]:
    """Split a released checkpoint into its parts.

    Args:
        contents: see `untrusted_files.read_files`.
        file: what the errors call it.

    Raises:
        WeightsError: other parts than those of `PARTS`.
    """
    parts: dict[str, StateDict] = {}
    for path, tensor in contents.items():
        name = path[0] if len(path) == 2 else "/".join(path) or "a bare tensor"
        parts.setdefault(name, {})[path[-1] if path else name] = tensor
    missing, unexpected = [name for name in PARTS if name not in parts], [name for name in parts if name not in PARTS]
    if missing or unexpected:
        shown = ", ".join(unexpected[:_MOST_NAMED]) + (", ..." if len(unexpected) > _MOST_NAMED else "")
        raise WeightsError(
            f"{file} is not a released checkpoint: expected the parts {', '.join(PARTS)}, but "
            + " and ".join(
                [f"it lacks {', '.join(missing)}"] * bool(missing) + [f"it also has {shown}"] * bool(unexpected)
            )
        )
    return parts


def without_position_ids(weights: StateDict) -> StateDict:
    """Remove from CLIP weights of any transformers version what newer versions do not keep.

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
                f"{_shape(expected)} with the numbers 0 to {expected.numel() - 1} in order"
            )
    return rest


def with_position_ids(weights: StateDict) -> StateDict:
    """Add to CLIP weights what transformers 4.25 keeps: the released code loads strictly."""
    return {POSITION_IDS: position_ids(weights), **weights}


def position_ids(weights: StateDict) -> torch.Tensor:
    """Make the tensor of `POSITION_IDS`, (1, N) int64."""
    return torch.arange(len(weights[_POSITIONS]))[None]


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
