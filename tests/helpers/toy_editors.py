"""Checkpoints of the editors that are compared, at toy size with random weights, in the formats of the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    PaintByExamplePipeline,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

WIDTH = 32


def vision(layers: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=37,
        projection_dim=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )


def unet(in_channels: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=in_channels,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


def scheduler() -> PNDMScheduler:
    return PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )


def write_paint_by_example(folder: Path) -> Path:
    torch.manual_seed(0)
    PaintByExamplePipeline(
        vae=vae(),
        image_encoder=PaintByExampleImageEncoder(vision(5), proj_size=WIDTH).eval(),
        unet=unet(9),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(size=32, crop_size=32),
    ).save_pretrained(folder)
    # The published index names the module as diffusers called it then.
    index = folder / "model_index.json"
    values: dict[str, Any] = json.loads(index.read_text())
    values["image_encoder"] = ["paint_by_example", "PaintByExampleImageEncoder"]
    index.write_text(json.dumps(values))
    return folder


def write_stable_diffusion(root: Path) -> Path:
    """Inpainting, the plain U-Net, and an IP-Adapter, side by side under their own names."""
    torch.manual_seed(1)
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "a", "a</w>"]
    files = root / "tokenizer_files"
    files.mkdir(parents=True)
    (files / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (files / "merges.txt").write_text("#version: 0.2\n")
    text = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(vocabulary),
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    inpainting = StableDiffusionInpaintPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(files, model_max_length=77),
        unet=unet(9),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(size=32, crop_size=32),
        requires_safety_checker=False,
    )
    inpainting.save_pretrained(root / "stable-diffusion-inpainting")
    unet(4).save_pretrained(root / "stable-diffusion-v1-5" / "unet")
    models = root / "IP-Adapter" / "models"
    CLIPVisionModelWithProjection(vision(2)).save_pretrained(models / "image_encoder")
    save_file(_adapter(inpainting.unet), models / "ip-adapter_sd15.safetensors")
    return root


def _adapter(model: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """As h94/IP-Adapter has it: the layers are numbered 1, 3, 5, ..., in the order of the processors."""
    weights = {
        "image_proj.proj.weight": torch.randn(4 * WIDTH, WIDTH) * 0.1,
        "image_proj.proj.bias": torch.randn(4 * WIDTH),
        "image_proj.norm.weight": torch.ones(WIDTH),
        "image_proj.norm.bias": torch.zeros(WIDTH),
    }
    number = 1
    for name in model.attn_processors:
        if name.endswith("attn1.processor"):
            continue
        layer = model.get_submodule(name.removesuffix(".processor"))
        processor = IPAdapterAttnProcessor(hidden_size=layer.query_dim, cross_attention_dim=WIDTH, scale=1.0)
        for key in ("to_k_ip", "to_v_ip"):
            weights[f"ip_adapter.{number}.{key}.weight"] = processor.state_dict()[f"{key}.0.weight"].contiguous()
        number += 2
    return weights
