"""The seven networks of a MimicBrush, made from numbers (toy size) or from pretrained weights (full size).

Toy and full size are the same classes with other numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
)

from mimicbrush.errors import WeightsError
from mimicbrush.models.patch_autoencoder import PatchAutoencoder
from mimicbrush.models.projectors import DepthProjector, ImageProjector
from mimicbrush.models.unets import ReferenceUNet, widen_conv_in

LATENT_CHANNELS = 4
#: Noisy latent 4, mask 1, masked-source latent 4, depth latent 4, in this order (paper Sec. 3.2).
STEM_CHANNELS = 3 * LATENT_CHANNELS + 1


@dataclass
class Parts:
    """All networks. Trained: both U-Nets and both projectors. Frozen: the other three."""

    vae: AutoencoderKL | PatchAutoencoder
    unet: UNet2DConditionModel
    reference_unet: ReferenceUNet
    image_encoder: CLIPVisionModelWithProjection
    image_projector: ImageProjector
    depth_estimator: DepthAnythingForDepthEstimation
    depth_projector: DepthProjector


@dataclass(frozen=True)
class PretrainedNames:
    """Where the starting weights are: a folder, or the id of a hub repository that is in the local cache.

    Attributes:
        unet: SD-1.5 inpainting, whose U-Net becomes the imitative U-Net (conv_in 9 -> 13).
        reference_unet: SD-1.5, whose U-Net becomes the reference U-Net.
        vae: the autoencoder.
        image_encoder: CLIP ViT-H/14.
        depth_estimator: Depth Anything ViT-B/14, in the transformers format.
    """

    unet: str = "stable-diffusion-v1-5/stable-diffusion-inpainting"
    reference_unet: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    vae: str = "stabilityai/sd-vae-ft-mse"
    image_encoder: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    depth_estimator: str = "LiheYoung/depth-anything-base-hf"


def toy_parts(
    *,
    size_px: int = 32,
    block_out_channels: tuple[int, ...] = (32, 64, 64),
    layers_per_block: int = 1,
    attention_heads: int = 4,
    context_width: int = 64,
    seed: int = 0,
) -> Parts:
    """All parts at toy size with random weights: for tests, for the demo and to try a training run.

    The picture is honest (a fixed linear autoencoder); image tokens and depth come from *untrained*
    encoders: fixed random features of the picture, of the right type and shape.

    Args:
        size_px: side of the square canvas, a multiple of 2 ** levels.
        block_out_channels: of both U-Nets, one per level; the lowest level has no attention (as in SD-1.5).
        layers_per_block: of both U-Nets.
        attention_heads: in every attention layer of both U-Nets.
        context_width: D, of the cross-attention of both U-Nets.
        seed: of the weights.
    """
    levels = len(block_out_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=size_px // 2,
            in_channels=STEM_CHANNELS,
            out_channels=LATENT_CHANNELS,
            block_out_channels=block_out_channels,
            down_block_types=(*["CrossAttnDownBlock2D"] * (levels - 1), "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * (levels - 1)),
            layers_per_block=layers_per_block,
            attention_head_dim=attention_heads,
            cross_attention_dim=context_width,
            norm_num_groups=8,
        )
        clip_width = 64
        image_encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=clip_width,
                intermediate_size=2 * clip_width,
                projection_dim=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
            )
        )
        depth_estimator = DepthAnythingForDepthEstimation(
            DepthAnythingConfig(
                backbone_config=Dinov2Config(
                    image_size=28,
                    patch_size=14,
                    hidden_size=32,
                    num_hidden_layers=4,
                    num_attention_heads=2,
                    out_features=["stage1", "stage2", "stage3", "stage4"],
                    reshape_hidden_states=False,
                ),
                patch_size=14,
                reassemble_hidden_size=32,
                neck_hidden_sizes=[8, 16, 16, 16],
                fusion_hidden_size=16,
                head_hidden_size=8,
            )
        )
        reference_unet = ReferenceUNet.from_config({**unet.config, "in_channels": LATENT_CHANNELS})
        return Parts(
            vae=PatchAutoencoder(),
            unet=unet,
            reference_unet=reference_unet,
            image_encoder=image_encoder.eval(),
            image_projector=ImageProjector(clip_width, context_width),
            depth_estimator=depth_estimator.eval(),
            depth_projector=DepthProjector(block_channels=(16, 32)),
        )


def pretrained_parts(names: PretrainedNames) -> Parts:
    """All parts at full size, from the starting weights of paper Sec. 3.2.

    Raises:
        WeightsError: weights are absent; the message names all of them, their options and how to get them.
    """
    folders = find_weights(names)
    unet = widen_conv_in(
        UNet2DConditionModel.from_pretrained(folders["unet"], subfolder="unet"), STEM_CHANNELS
    )
    stock = UNet2DConditionModel.from_pretrained(folders["reference_unet"], subfolder="unet")
    image_encoder = CLIPVisionModelWithProjection.from_pretrained(folders["image_encoder"])
    return Parts(
        vae=AutoencoderKL.from_pretrained(folders["vae"]),
        unet=unet,
        reference_unet=ReferenceUNet.from_unet(stock),
        image_encoder=image_encoder,
        image_projector=ImageProjector(image_encoder.config.hidden_size, unet.config.cross_attention_dim),
        depth_estimator=DepthAnythingForDepthEstimation.from_pretrained(folders["depth_estimator"]),
        depth_projector=DepthProjector(),
    )


def find_weights(names: PretrainedNames) -> dict[str, Path]:
    """Part -> local folder. Nothing is downloaded: a run of days should not begin by surprise.

    Raises:
        WeightsError: names every part whose weights are not there.
    """
    found: dict[str, Path] = {}
    missing: list[str] = []
    for part in PretrainedNames.__dataclass_fields__:
        name = getattr(names, part)
        if Path(name).is_dir():
            found[part] = Path(name)
            continue
        try:
            found[part] = Path(snapshot_download(name, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            missing.append(f"  model.{part}={name}")
    if missing:
        raise WeightsError(
            "starting weights are missing: neither a folder nor in the local Hugging Face cache\n"
            + "\n".join(missing)
            + "\nFetch a repository with `hf download ID`, or point the option to a folder, "
            f"for instance {missing[0].strip().split('=')[0]}=/path/to/folder.\n"
            "To try everything without weights: python scripts/train.py +experiment=smoke data.root=MINED"
        )
    return found


def count_parameters(module: ModelMixin | ConfigMixin) -> int:
    """How many numbers a module holds."""
    return sum(parameter.numel() for parameter in module.parameters())
