"""Starting weights at toy size, in the layout that they have on the hub, with all that lies beside them there."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Dinov2Model,
)
from transformers.utils import logging as transformers_logging

from mimicbrush.models.flux2_klein.components import toy_klein
from mimicbrush.models.options import PretrainedModel, ToyFlux2KleinModel

#: Part -> repository that `write_repositories` makes for it.
REPOSITORIES = {
    "unet": "toy/inpainting",
    "reference_unet": "toy/sd15",
    "vae": "toy/sd-vae-ft-mse",
    "image_encoder": "toy/CLIP-ViT-H-14",
    "dinov2": "toy/dinov2-large",
    "depth_estimator": "toy/depth-anything-base-hf",
}
#: Repository that `write_klein` makes.
KLEIN = "toy/klein"
SIZE_PX = 64
# As diffusers called the layers of the VAE's attention when these weights were published.
_OLD_VAE_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def write_repositories(root: Path) -> None:
    """Make a folder for each of `REPOSITORIES`."""
    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inpainting = root / REPOSITORIES["unet"]
        _unet(9).save_pretrained(inpainting / "unet")
        # What must not be fetched, and not be opened.
        for name in ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors",
                     "sd-v1-5-inpainting.ckpt", "model_index.json"):  # fmt: skip
            (inpainting / name).write_text("not for us")
        _unet(4).save_pretrained(root / REPOSITORIES["reference_unet"] / "unet", max_shard_size="60KB")
        _write_vae(root / REPOSITORIES["vae"])
        _write_clip(root / REPOSITORIES["image_encoder"])
        backbone = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 14}
        dinov2 = Dinov2Config(**backbone, image_size=56)
        Dinov2Model(dinov2).save_pretrained(root / REPOSITORIES["dinov2"])
        depth = DepthAnythingConfig(
            backbone_config=Dinov2Config(
                **backbone,
                image_size=28,
                out_features=["stage1", "stage2", "stage3", "stage4"],
                reshape_hidden_states=False,
            ),
            patch_size=14,
            reassemble_hidden_size=32,
            neck_hidden_sizes=[8, 16, 16, 16],
            fusion_hidden_size=16,
            head_hidden_size=8,
        )
        DepthAnythingForDepthEstimation(depth).save_pretrained(root / REPOSITORIES["depth_estimator"])


def model_of(root: Path, **others: object) -> PretrainedModel:
    """Options that point to the folders of `write_repositories`."""
    folders = {part: str(root / name) for part, name in REPOSITORIES.items()}
    return PretrainedModel(**{"size_px": SIZE_PX, **folders, **others})


def weights_file(root: Path, part: str) -> Path:
    """The (last) weights file of a part."""
    found = sorted((root / REPOSITORIES[part]).rglob("*model*.safetensors"))
    return [path for path in found if "fp16" not in path.name and "open_clip" not in path.name][-1]


def write_klein(root: Path) -> None:
    """Make a folder for `KLEIN`: a pipeline, with its transformer and text encoder in shards."""
    parts = toy_klein(ToyFlux2KleinModel(num_single_layers=1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts.vae = AutoencoderKLFlux2(
            block_out_channels=(4,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=64
        )
    folder = root / KLEIN
    parts.build_pipeline().save_pretrained(folder)
    assert parts.text_encoder is not None
    (folder / "text_encoder" / "model.safetensors").unlink()
    parts.text_encoder.save_pretrained(folder / "text_encoder", max_shard_size="40KB")
    (folder / "flux-2-klein-base-4b.safetensors").write_text("everything once more, not for us")


def _unet(in_channels: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    )


def _write_vae(folder: Path) -> None:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        sample_size=64,
    )
    vae.save_pretrained(folder)
    file, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    weights = load_file(file)
    for present, old in _OLD_VAE_NAMES.items():
        weights = {key.replace(present, old) if "attentions" in key else key: value for key, value in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})
    said = json.loads(config.read_text())
    del said["scaling_factor"]  # nobody wrote it down then
    config.write_text(json.dumps(said))


def _write_clip(folder: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
              "image_size": 56, "patch_size": 14}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    file = folder / "model.safetensors"
    ids = torch.arange(17)[None]
    weights = {**load_file(file), "vision_model.embeddings.position_ids": ids}
    save_file(weights, file, metadata={"format": "pt"})
    (folder / "open_clip_model.safetensors").write_text("not for us")
