"""Depth Anything: from its authors' file, or a folder of transformers, to the transformers class."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from mimicbrush.errors import WeightsError
from mimicbrush.models.pretrained.stored_weights import StateDict, check_fit, depth_hub_name, describe_build_errors
from mimicbrush.pipelines.conversion.untrusted_files import config_of

# Of every DINOv2; shapes do not tell how many heads there are.
_HEAD_CHANNELS = 64
# The DPT head reads the last four blocks.
_LAST_BLOCKS = 4


def depth_estimator(weights: StateDict, given: Path, *, scratch: Path | None = None) -> DepthAnythingForDepthEstimation:
    """Build the network from its weights.

    Args:
        weights: under the original names, or under the hub's.
        given: where they come from; with the hub's names there must be a config.json (see `untrusted_files.config_of`).
        scratch: an existing folder for temporary files.

    Raises:
        WeightsError: a key is missing, unexpected or of the wrong shape, or there is no config.json.
    """
    weights, config = hub_weights(weights, given)
    dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".depth-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        config.save_pretrained(folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        # Loaded rather than filled: only transformers knows all of its names for these weights.
        model, report = DepthAnythingForDepthEstimation.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    problems = [f"{kind}: {names}" for kind, names in report.items() if names]
    if problems:
        raise WeightsError(f"depth does not fit as transformers loads it: {'; '.join(problems)}")
    return model.eval()


def hub_weights(weights: StateDict, given: Path) -> tuple[StateDict, DepthAnythingConfig]:
    """Rename and check weights: those under the hub's names, and their config (see `depth_estimator`)."""
    original = any(key.startswith("pretrained.") for key in weights)
    with describe_build_errors(f"the config.json of {given}"):
        config = original_config(weights) if original else DepthAnythingConfig.from_dict(config_of(given))
        built = DepthAnythingForDepthEstimation(config)
    expected = {depth_hub_name(key): tensor for key, tensor in built.state_dict().items()}
    if original:
        weights = split_original(weights, expected, config.backbone_config.num_hidden_layers)
    else:
        named: StateDict = {}
        for key, tensor in weights.items():
            if depth_hub_name(key) in named:
                raise WeightsError(
                    f"depth does not fit:\n  {depth_hub_name(key)} appears twice, under two different names"
                )
            named[depth_hub_name(key)] = tensor
        weights = named
    check_fit("depth", weights, expected)
    return weights, config


def original_config(weights: StateDict) -> DepthAnythingConfig:
    """Read the size of a network, small, base, large or any other, off the shapes of its original weights.

    Raises:
        WeightsError: a key is missing that tells it, or the width is no multiple of DINOv2's 64 channels per head.
    """

    def shape(key: str) -> tuple[int, ...]:
        if key not in weights:
            raise WeightsError(f"depth does not fit:\n  {key} is missing")
        return tuple(weights[key].shape)

    width, channels, patch, _ = shape("pretrained.patch_embed.proj.weight")
    if width % _HEAD_CHANNELS:
        raise WeightsError(
            f"depth does not fit:\n  pretrained.patch_embed.proj.weight has width {width}, expected a multiple of "
            f"{_HEAD_CHANNELS}, because each attention head of DINOv2 has {_HEAD_CHANNELS} channels"
        )
    num_layers = len({key.split(".")[2] for key in weights if key.startswith("pretrained.blocks.")})
    side = math.isqrt(shape("pretrained.pos_embed")[1] - 1)
    last = range(num_layers - _LAST_BLOCKS + 1, num_layers + 1)
    return DepthAnythingConfig(
        backbone_config=Dinov2Config(
            hidden_size=width,
            num_channels=channels,
            patch_size=patch,
            image_size=side * patch,
            num_hidden_layers=num_layers,
            num_attention_heads=width // _HEAD_CHANNELS,
            mlp_ratio=shape("pretrained.blocks.0.mlp.fc1.weight")[0] // width,
            out_features=[f"stage{number}" for number in last],
            apply_layernorm=True,
            reshape_hidden_states=False,
        ),
        patch_size=patch,
        reassemble_hidden_size=width,
        neck_hidden_sizes=[shape(f"depth_head.projects.{number}.weight")[0] for number in range(_LAST_BLOCKS)],
        fusion_hidden_size=shape("depth_head.scratch.layer1_rn.weight")[0],
        head_hidden_size=shape("depth_head.scratch.output_conv2.0.weight")[0],
    )


def original_names(num_layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield Depth Anything's own names, and those on the hub for its transformers class.

    As LiheYoung/Depth-Anything writes them (`dpt.py`, over DINOv2), and as the hub's ``depth-anything-*-hf``
    repositories do. One name becomes three where query, key and value are one matrix.

    Args:
        num_layers: of the DINOv2 backbone.
    """

    def both(original: str, hub: str, *endings: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        for ending in endings or (".weight", ".bias"):
            yield original + ending, (hub + ending,)

    embeddings = "backbone.embeddings"
    for original, hub in (
        ("cls_token", "cls_token"),
        ("mask_token", "mask_token"),
        ("pos_embed", "position_embeddings"),
    ):
        yield f"pretrained.{original}", (f"{embeddings}.{hub}",)
    yield from both("pretrained.patch_embed.proj", f"{embeddings}.patch_embeddings.projection")
    for number in range(num_layers):
        block, layer = f"pretrained.blocks.{number}", f"backbone.encoder.layer.{number}"
        for ending in (".weight", ".bias"):
            attention = f"{layer}.attention.attention"
            yield (
                f"{block}.attn.qkv{ending}",
                (f"{attention}.query{ending}", f"{attention}.key{ending}", f"{attention}.value{ending}"),
            )
        yield from both(f"{block}.attn.proj", f"{layer}.attention.output.dense")
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            yield from both(f"{block}.{name}", f"{layer}.{name}")
        for one in (1, 2):
            yield f"{block}.ls{one}.gamma", (f"{layer}.layer_scale{one}.lambda1",)
    yield from both("pretrained.norm", "backbone.layernorm")
    for number in range(4):
        stage = f"neck.reassemble_stage.layers.{number}"
        yield from both(f"depth_head.projects.{number}", f"{stage}.projection")
        if number != 2:  # that one stays as large as it is
            yield from both(f"depth_head.resize_layers.{number}", f"{stage}.resize")
        yield from both(f"depth_head.scratch.layer{number + 1}_rn", f"neck.convs.{number}", ".weight")
        # The original counts from the finest map, transformers in the order in which they are used.
        original, fusion = f"depth_head.scratch.refinenet{number + 1}", f"neck.fusion_stage.layers.{3 - number}"
        yield from both(f"{original}.out_conv", f"{fusion}.projection")
        for unit in (1, 2):
            for conv in (1, 2):
                yield from both(
                    f"{original}.resConfUnit{unit}.conv{conv}", f"{fusion}.residual_layer{unit}.convolution{conv}"
                )
    for original, hub in (("output_conv1", "conv1"), ("output_conv2.0", "conv2"), ("output_conv2.2", "conv3")):
        yield from both(f"depth_head.scratch.{original}", f"head.{hub}")


def split_original(original: StateDict, hub: Mapping[str, torch.Tensor], num_layers: int) -> StateDict:
    """Rename weights from their original names to the hub's, with query, key and value split.

    Args:
        original: the weights.
        hub: tensors of the right shapes under the hub's names.
        num_layers: of the backbone.

    Raises:
        WeightsError: see `check_fit`.
    """
    names = dict(original_names(num_layers))
    check_fit("depth", original, {name: _joined(name, hub, parts) for name, parts in names.items()})
    return {
        part: piece.contiguous()
        for name, parts in names.items()
        for part, piece in zip(parts, original[name].chunk(len(parts)), strict=True)
    }


def _joined(name: str, hub: Mapping[str, torch.Tensor], parts: tuple[str, ...]) -> torch.Tensor:
    """Make a tensor of the shape that an original weight must have."""
    absent = [part for part in parts if part not in hub]
    if absent:
        raise WeightsError(f"depth does not fit:\n  {name} is unexpected, because this network has no {absent[0]}")
    rows, *rest = hub[parts[0]].shape
    return torch.empty(len(parts) * rows, *rest, device="meta")
