"""Depth Anything: the converted network gives the depth of the original, and the map of names is total."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from original_depth_anything import OriginalDepthAnything
from safetensors.torch import save_file

from mimicbrush.errors import WeightsError
from mimicbrush.models.components import random_components
from mimicbrush.models.pretrained.stored_weights import depth_hub_name
from mimicbrush.pipelines.conversion.depth_anything import (
    depth_estimator,
    hub_weights,
    original_config,
    original_names,
)
from mimicbrush.pipelines.conversion.untrusted_files import read_state_dict

SIDE = 3  # patches


@pytest.fixture(scope="module")
def original() -> OriginalDepthAnything:
    torch.manual_seed(0)
    return OriginalDepthAnything(width=128, num_blocks=5, out_channels=(8, 16, 24, 32), features=16, side=SIDE).eval()


@torch.no_grad()
def test_the_converted_network_gives_the_same_depth(original: OriginalDepthAnything, tmp_path: Path) -> None:
    file = tmp_path / "depth_anything_vitb14.pth"
    torch.save(original.state_dict(), file)
    converted = depth_estimator(read_state_dict([file]), file)
    pixels = torch.randn(2, 3, SIDE * 14, SIDE * 14)
    expected = original(pixels)
    assert expected.std() > 0.01 and expected.min() > 0
    torch.testing.assert_close(converted(pixels).predicted_depth, expected, atol=1e-5, rtol=0)
    # And so does a copy as transformers writes it.
    converted.save_pretrained(tmp_path / "hub")
    weights = read_state_dict([tmp_path / "hub" / "model.safetensors"])
    assert "backbone.encoder.layer.0.attention.attention.query.weight" in weights
    again = depth_estimator(weights, tmp_path / "hub")
    assert torch.equal(again(pixels).predicted_depth, converted(pixels).predicted_depth)


@torch.no_grad()
def test_every_weight_lands_where_it_counts(original: OriginalDepthAnything) -> None:
    """A weight that is changed changes both networks alike, in double precision; so no two can be exchanged."""
    original = copy.deepcopy(original).double()
    pixels = torch.randn(1, 3, SIDE * 14, SIDE * 14, dtype=torch.double)
    converted = depth_estimator({key: tensor.clone() for key, tensor in original.state_dict().items()}, Path("unused"))
    in_memory = {depth_hub_name(key): tensor for key, tensor in converted.state_dict().items()}
    plain, idle = original(pixels), []
    for name, parts in original_names(5):
        weight = original.get_parameter(name)
        kept, noise = weight.clone(), 0.1 * torch.randn_like(weight)
        weight.add_(noise)
        for part, piece in zip(parts, noise.chunk(len(parts)), strict=True):
            in_memory[part].add_(piece)
        moved = original(pixels)
        torch.testing.assert_close(converted(pixels).predicted_depth, moved, atol=1e-10, rtol=0, msg=name)
        if (moved - plain).abs().max() < 1e-8:
            idle.append(name)
        weight.copy_(kept)
        for part, piece in zip(parts, kept.chunk(len(parts)), strict=True):
            in_memory[part].copy_(piece)
    # Only these do nothing: the first refinement has nothing finer to add, and nothing is masked.
    unused = [name for name, _ in original_names(5) if "refinenet4.resConfUnit1" in name or "mask_token" in name]
    assert sorted(idle) == sorted(unused)


def test_at_full_size_the_names_are_those_of_the_hub() -> None:
    with torch.device("meta"):
        built = random_components().depth_estimator
    hub = {depth_hub_name(key): tensor for key, tensor in built.state_dict().items()}
    names = dict(original_names(12))
    parts = [part for one in names.values() for part in one]
    assert sorted(parts) == sorted(hub) and len(names) == len(hub) - 4 * 12  # one for three, weights and biases
    original = {
        name: torch.empty(len(one) * hub[one[0]].shape[0], *hub[one[0]].shape[1:], device="meta")
        for name, one in names.items()
    }
    assert original["pretrained.blocks.11.attn.qkv.weight"].shape == (2304, 768)
    assert original["pretrained.pos_embed"].shape == (1, 37 * 37 + 1, 768)
    config = original_config(original)
    assert config.backbone_config.to_dict() == built.config.backbone_config.to_dict()
    assert {key: value for key, value in config.to_dict().items() if key != "architectures"} == {
        key: value for key, value in built.config.to_dict().items() if key != "architectures"
    }
    mapped, _ = hub_weights(original, Path("unused"))
    assert {key: tensor.shape for key, tensor in mapped.items()} == {key: tensor.shape for key, tensor in hub.items()}


def test_what_does_not_fit_is_named(original: OriginalDepthAnything, tmp_path: Path) -> None:
    weights = original.state_dict()
    bias = weights.pop("depth_head.projects.1.bias")
    with pytest.raises(WeightsError, match=r"depth_head\.projects\.1\.bias is missing, expected shape \(16,\)"):
        hub_weights(weights, tmp_path)
    with pytest.raises(WeightsError, match=r"depth_head\.projects\.1\.bias has shape \(15,\), expected \(16,\)"):
        hub_weights({**weights, "depth_head.projects.1.bias": bias[1:]}, tmp_path)
    weights["depth_head.projects.1.bias"] = bias
    with pytest.raises(WeightsError, match=r"depth_head\.readout is unexpected"):
        hub_weights({**weights, "depth_head.readout": bias}, tmp_path)
    with pytest.raises(WeightsError, match="expected a multiple of 64"):
        hub_weights({**weights, "pretrained.patch_embed.proj.weight": torch.zeros(96, 3, 14, 14)}, tmp_path)
    hub, config = hub_weights(weights, tmp_path)
    save_file(hub, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(WeightsError, match=r"attention\.query\.bias appears twice, under two different names"):
        hub_weights({**hub, "backbone.encoder.layer.0.attention.q_proj.bias": bias}, tmp_path)
    hub.pop("head.conv1.bias")
    with pytest.raises(WeightsError, match=r"head\.conv1\.bias is missing"):
        hub_weights(hub, tmp_path)
