"""The released files at toy size: the same names, formats and layout on the hub, random weights."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from original_depth_anything import OriginalDepthAnything
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from mimicbrush.models.projectors import DepthProjector, ImageProjector
from mimicbrush.models.unets import ReferenceUNet

# As diffusers 0.4 wrote the config of Stable Diffusion 1.5, with other numbers.
UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0.dev0",
    "act_fn": "silu",
    "attention_head_dim": 2,
    "block_out_channels": [8, 16, 16, 16],
    "center_input_sample": False,
    "cross_attention_dim": 16,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 4,
    "out_channels": 4,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 64,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
# As transformers 4.25 wrote it: much that has nothing to do with CLIP, some of it long gone.
CLIP = {
    "_name_or_path": "./image_encoder",
    "add_cross_attention": False,
    "architectures": ["CLIPVisionModelWithProjection"],
    "attention_dropout": 0.0,
    "bad_words_ids": None,
    "bos_token_id": None,
    "dropout": 0.0,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "hidden_act": "gelu",
    "hidden_size": 32,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "image_size": 56,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 4,
    "num_beams": 1,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "patch_size": 14,
    "prefix": None,
    "projection_dim": 24,
    "pruned_heads": {},
    "tf_legacy_loss": False,
    "torch_dtype": "float16",
    "torchscript": False,
    "transformers_version": "4.25.1",
    "use_bfloat16": False,
}

OLD_VAE_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
COMMITS = {"xichenhku/MimicBrush": "1" * 40, "xichenhku/cleansd": "2" * 40}


def write_snapshot(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """Write what the two repositories hold, at toy size.

    Returns:
        The folders of both, to be given as --snapshot and --base.
    """
    snapshot, base = folder / "MimicBrush", folder / "cleansd"
    torch.manual_seed(seed)
    stock = stock_parts()
    for name, part in (("stable-diffusion-v1-5", "sd15"), ("stable-diffusion-inpainting", "inpainting")):
        config = {**UNET, "in_channels": stock[part]["conv_in.weight"].shape[1]}
        _write(base / name / "unet", config, stock[part], "diffusion_pytorch_model.bin")
    _write(snapshot / "image_encoder", CLIP, _with_position_ids(stock["image_encoder"]), "pytorch_model.bin")
    vae = dict(AutoencoderKL.from_config(VAE).state_dict())
    for present, old in OLD_VAE_NAMES.items():
        vae = {key.replace(present, old) if "attentions" in key else key: tensor for key, tensor in vae.items()}
    _write(snapshot / "sd-vae-ft-mse", VAE, vae, "diffusion_pytorch_model.bin")
    depth = OriginalDepthAnything(width=64, num_blocks=4, out_channels=(8, 8, 16, 16), features=16, side=2)
    (snapshot / "depth_model").mkdir()
    torch.save(depth.state_dict(), snapshot / "depth_model" / "depth_anything_vitb14.pth")
    (snapshot / "mimicbrush").mkdir()
    torch.save(released_checkpoint(stock), snapshot / "mimicbrush" / "mimicbrush.bin")
    return snapshot, base


def stock_parts() -> dict[str, dict[str, torch.Tensor]]:
    """State dicts of the networks that training started from."""
    clip = {key: value for key, value in CLIP.items() if key in CLIPVisionConfig().to_dict() and key != "model_type"}
    for legacy in ("torch_dtype", "transformers_version", "_name_or_path"):
        clip.pop(legacy, None)
    return {
        "sd15": UNet2DConditionModel.from_config({**UNET, "in_channels": 4}).state_dict(),
        "inpainting": UNet2DConditionModel.from_config({**UNET, "in_channels": 9}).state_dict(),
        "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**clip)).state_dict(),
    }


def released_checkpoint(stock: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """What ``mimicbrush.bin`` holds: a trained U-Net; the reference U-Net moved a little; the image encoder only
    rounded to half precision, in which it is stored."""
    with torch.device("meta"):
        reference_keys = list(ReferenceUNet.from_config({**UNET, "in_channels": 4}).state_dict())
    unet = {key: tensor + 0.01 * torch.randn_like(tensor) for key, tensor in stock["inpainting"].items()}
    new = torch.randn(*unet["conv_in.weight"].shape[:1], 4, 3, 3)
    unet["conv_in.weight"] = torch.cat([unet["conv_in.weight"], new], dim=1)
    reference = {key: stock["sd15"][key].clone() for key in reference_keys}
    for key in reference:
        if key.startswith("up_blocks.2."):
            reference[key] += 0.01 * torch.randn_like(reference[key])
    return {
        "unet": OrderedDict(unet),
        "referencenet": OrderedDict(reference),
        "image_proj": ImageProjector(CLIP["hidden_size"], UNET["cross_attention_dim"]).state_dict(),
        "depth_guider": DepthProjector().state_dict(),
        "image_encoder": OrderedDict(
            _with_position_ids({key: tensor.half() for key, tensor in stock["image_encoder"].items()})
        ),
    }


def as_hub_cache(folder: Path, home: Path) -> None:
    """Lay the two repositories of `write_snapshot` out as a Hugging Face cache: blobs, links to them, a reference."""
    for (repository, commit), name in zip(COMMITS.items(), ("MimicBrush", "cleansd"), strict=True):
        root = home / "hub" / f"models--{repository.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(commit)
        (root / "blobs").mkdir()
        for number, file in enumerate(sorted(path for path in (folder / name).rglob("*") if path.is_file())):
            blob = root / "blobs" / f"{number:040x}"
            blob.write_bytes(file.read_bytes())
            link = root / "snapshots" / commit / file.relative_to(folder / name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)


def _with_position_ids(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    count = len(weights["vision_model.embeddings.position_embedding.weight"])
    return {"vision_model.embeddings.position_ids": torch.arange(count)[None], **weights}


def _write(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], name: str) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    torch.save(OrderedDict(weights), folder / name)
