"""At full size, without memory: the released keys and shapes map onto our networks, all of them, both ways."""

from __future__ import annotations

import pytest
import torch

from mimicbrush.errors import WeightsError
from mimicbrush.models.components import Components, random_components
from mimicbrush.models.pretrained.stored_weights import POSITION_IDS
from mimicbrush.pipelines.conversion.comparison import find_dead_keys
from mimicbrush.pipelines.conversion.import_released import build_filled_networks
from mimicbrush.pipelines.conversion.key_maps import PARTS, split_parts

# As the hub's config.json of Stable Diffusion 1.5 says it.
SD15 = {
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
# As that of the image encoder does; the released code took it from transformers 4.25.
CLIP = {
    "hidden_act": "gelu", "hidden_size": 1280, "image_size": 224, "intermediate_size": 5120, "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model", "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 32,
    "patch_size": 14, "projection_dim": 1024, "torch_dtype": "float16", "transformers_version": "4.28.0.dev0",
}  # fmt: skip


@pytest.fixture(scope="module")
def parts() -> Components:
    with torch.device("meta"):
        return random_components()


def test_every_released_key_has_its_place(parts: Components) -> None:
    with torch.device("meta"):
        contents = {
            (part, key): tensor
            for part, name in PARTS.items()
            for key, tensor in getattr(parts, name).state_dict().items()
        }
    released = split_parts(contents, "mimicbrush.bin")
    counts = {part: len(weights) for part, weights in released.items()}
    assert counts["unet"] == 686 and counts["referencenet"] == 662 and counts["image_proj"] == 2
    assert released["unet"]["conv_in.weight"].shape == (320, 13, 3, 3)
    assert sum(tensor.numel() for tensor in released["depth_guider"].values()) == 150_260
    sizes = {
        "unet": {**SD15, "in_channels": 13},
        "reference_unet": SD15,
        "vae": dict(parts.vae.config),
        "image_encoder": CLIP,
    }
    networks = build_filled_networks(sizes, {**released, "vae": parts.vae.state_dict()})
    for name, network in networks.items():
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
        assert shapes == {key: tensor.shape for key, tensor in getattr(parts, name).state_dict().items()}
    assert networks["depth_projector"].config == parts.depth_projector.config
    assert networks["image_projector"].config.image_width == 1280

    whole = {**released, "vae": parts.vae.state_dict()}
    whole["referencenet"] = {**released["referencenet"], "conv_out.bias": torch.zeros(4)}
    with pytest.raises(WeightsError, match=r"referencenet does not fit:\n  conv_out\.bias is unexpected"):
        build_filled_networks(sizes, whole)
    whole["referencenet"] = released["referencenet"]
    whole["image_encoder"] = {**released["image_encoder"], POSITION_IDS: torch.arange(256)[None]}
    with pytest.raises(WeightsError, match=r"position_ids has shape \(1, 256\), expected \(1, 257\)"):
        build_filled_networks(sizes, whole)


def test_the_excused_keys_are_the_24_of_the_dead_tail() -> None:
    last = "up_blocks.3.attentions.2"
    block = f"{last}.transformer_blocks.0"
    expected = [f"{block}.attn{one}.to_{name}.weight" for one in (1, 2) for name in "qkv"]
    for layer in (
        "conv_norm_out", "conv_out", f"{last}.proj_out", f"{block}.attn1.to_out.0", f"{block}.attn2.to_out.0",
        f"{block}.ff.net.0.proj", f"{block}.ff.net.2", f"{block}.norm2", f"{block}.norm3",
    ):  # fmt: skip
        expected += [f"{layer}.weight", f"{layer}.bias"]
    assert sorted(find_dead_keys(SD15)) == sorted(expected) and len(expected) == 24
    assert len(find_dead_keys(SD15, "keys_values")) == 22
