"""Trains the small model's three frozen networks from scratch: there are no pretrained ones of this size.

Each replaces a network of the full-size model. All but the first have the same classes:

* the **autoencoder**, a `PatchAutoencoder` that reduces by 4, as the VAE of Stable Diffusion does by 8;
* the **image encoder**, the visual half of a CLIP. It learns which two of many images are views of one scene, by
  CLIP's own loss (Radford et al. 2021, Fig. 3), between two views instead of an image and its caption;
* the **depth estimator**, a Depth Anything. It learns the relative inverse depth of rendered clips, up to scale and
  shift (Ranftl et al. 2020, Sec. 5). This depth shows little more than that objects are in front of the background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from mimicbrush.models.components import small_depth_estimator
from mimicbrush.models.encoders import encoder_pixels, normalise_pixels
from mimicbrush.models.patch_autoencoder import PatchAutoencoder
from mimicbrush.models.token_encoders import IMAGENET_MEAN, IMAGENET_STD
from mimicbrush.models.unets import LATENT_CHANNELS

#: Number of batches from which the scales of latents are measured.
_NUM_SCALE_BATCHES = 16
#: Standard deviation of noise that is added to latents before decoding, because a diffusion model is never exact.
_LATENT_NOISE = 0.05
#: Weight of the error of image gradients in the autoencoder's loss, which also has that of pixels. Keeps edges sharp.
_GRADIENT_WEIGHT = 0.3
#: Temperature of the image encoder's contrastive loss.
_TEMPERATURE = 0.1

#: Batches of (source, reference), each (B, 3, S, S) in [-1, 1].
Pairs = Iterator[tuple[torch.Tensor, torch.Tensor]]
#: Batches of pixels (B, 3, S, S) in [-1, 1] and relative inverse depth (B, 1, S, S).
Depths = Iterator[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rate. The rate warms up in the first 5 % of the steps, and decreases to zero as a cosine."""

    steps: int
    learning_rate: float = 1e-3


def train_autoencoder(pairs: Pairs, schedule: Schedule, seed: int) -> PatchAutoencoder:
    """Train an autoencoder that reduces by 4. Its scales are measured so that latents have unit variance."""
    torch.manual_seed(seed)
    sample = torch.cat([torch.cat(next(pairs)) for _ in range(_NUM_SCALE_BATCHES)])
    shape = {"block_out_channels": (1, 1, 1), "hidden_channels": 64}
    linear = PatchAutoencoder(channel_std=(1.0,) * LATENT_CHANNELS, **shape)
    with torch.no_grad():
        stds = linear.encode(sample).latent_dist.mean.std(dim=(0, 2, 3))
    vae = PatchAutoencoder(channel_std=tuple(stds.tolist()), **shape)

    def compute_loss() -> torch.Tensor:
        pixels = torch.cat(next(pairs))
        latents = vae.encode(pixels).latent_dist.mean
        error = vae.decode(latents + _LATENT_NOISE * torch.randn_like(latents)).sample - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + error.square().mean() + _GRADIENT_WEIGHT * edges

    _optimise(vae, compute_loss, schedule, "autoencoder")
    with torch.no_grad():
        vae.register_to_config(scaling_factor=float(1 / vae.encode(sample).latent_dist.mean.std()))
    return vae


def train_image_encoder(pairs: Pairs, schedule: Schedule, seed: int) -> CLIPVisionModelWithProjection:
    """Train an image encoder for images of 32 px: 16 patches and a class token, with 64 channels."""
    torch.manual_seed(seed)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            projection_dim=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    )

    def compute_loss() -> torch.Tensor:
        # InfoNCE in both directions: row i of the first views belongs to row i of the second ones.
        first, second = (
            F.normalize(encoder(encoder_pixels(encoder, pixels).float()).image_embeds, dim=1) for pixels in next(pairs)
        )
        logits = first @ second.T / _TEMPERATURE
        labels = torch.arange(len(logits))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    _optimise(encoder, compute_loss, schedule, "image encoder")
    return encoder


def train_depth_estimator(depths: Depths, schedule: Schedule, seed: int) -> nn.Module:
    """Train a depth estimator for images of 56 px."""
    torch.manual_seed(seed)
    estimator = small_depth_estimator(image_px=56, patch_px=7, initializer_range=0.05)

    def compute_loss() -> torch.Tensor:
        pixels, depth = next(depths)
        size = estimator.config.backbone_config.image_size
        unit = F.interpolate((pixels + 1) / 2, (size, size), mode="bicubic")
        predicted = estimator(normalise_pixels(unit, IMAGENET_MEAN, IMAGENET_STD)).predicted_depth[:, None]
        target = F.interpolate(depth, predicted.shape[-2:], mode="area")
        return (_standardise(predicted) - _standardise(target)).abs().mean()

    _optimise(estimator, compute_loss, schedule, "depth estimator")
    return estimator


def _standardise(depth: torch.Tensor) -> torch.Tensor:
    """Normalise shift and scale, which are arbitrary for relative depth."""
    centred = depth - depth.mean(dim=(1, 2, 3), keepdim=True)
    return centred / centred.square().mean(dim=(1, 2, 3), keepdim=True).add(1e-4).sqrt()


def _optimise(module: nn.Module, compute_loss: Callable[[], torch.Tensor], schedule: Schedule, name: str) -> None:
    """Train with AdamW; then set the module to evaluation mode, without gradients."""
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), schedule.learning_rate, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.learning_rate, schedule.steps, pct_start=0.05)
    smooth = 0.0
    with tqdm(range(schedule.steps), desc=name, unit="step", mininterval=1.0) as progress:
        for step in progress:
            loss = compute_loss()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            rate.step()
            smooth += (loss.item() - smooth) / min(step + 1, 50)
            progress.set_postfix(loss=f"{smooth:.4f}", refresh=False)
    module.eval().requires_grad_(False)
