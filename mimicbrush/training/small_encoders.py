"""The three frozen networks of the proof model, trained from scratch: no pretrained ones are at hand.

They are of the same classes as those of the full-size model, and play the same parts:

* the **autoencoder**, an `AutoencoderKL` that reduces by 4, as the VAE of Stable Diffusion does by 8;
* the **image encoder**, the visual half of a CLIP. It learns to tell which two of many pictures are views of one scene, by
  CLIP's own loss (Radford et al. 2021, Fig. 3), between two views instead of a picture and its caption;
* the **depth estimator**, a Depth Anything. It learns the relative inverse depth of rendered clips, up to scale and shift
  (Ranftl et al. 2020, Sec. 5), which is no more than: a thing is before the ground.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from mimicbrush.models.encoders import IMAGENET_MEAN, IMAGENET_STD, encoder_pixels, normalise
from mimicbrush.models.parts import LATENT_CHANNELS, small_depth_estimator

#: Pictures whose latents tell the scaling factor, which brings them to unit variance.
_SCALED_BY = 256
#: Of the autoencoder's loss, beside the absolute error: that of gradients, which keeps edges sharp, and the KL term.
_GRADIENT_WEIGHT, _KL_WEIGHT = 0.5, 1e-6
#: Side of what it learns from: more pictures are seen in the same time.
_CROP_PX = 32
_TEMPERATURE = 0.1

#: Batches of (source, reference), each (B, 3, S, S) in [-1, 1].
Pairs = Iterator[tuple[torch.Tensor, torch.Tensor]]
#: Batches of pixels (B, 3, S, S) in [-1, 1] and relative inverse depth (B, 1, S, S).
Depths = Iterator[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: the rate warms up over the first twentieth, and falls to zero by a cosine."""

    steps: int
    learning_rate: float = 1e-3


def train_autoencoder(pairs: Pairs, schedule: Schedule, seed: int, size_px: int = 64) -> AutoencoderKL:
    """An autoencoder for pictures of `size_px`, its scaling factor measured."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=1,  # with several, each forgets its mean, and with it the colour of a plain crop
        mid_block_add_attention=False,  # so that it does the same to a crop as to the picture
        latent_channels=LATENT_CHANNELS,
        sample_size=size_px,
        scaling_factor=1.0,
    )
    with torch.no_grad():  # begins with next to no noise on the latents, or it would first learn to do without them
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6

    def loss_of() -> torch.Tensor:
        pixels = torch.cat(next(pairs))
        left, top = (int(torch.randint(size_px - _CROP_PX + 1, ())) for _ in range(2))
        pixels = pixels[..., top : top + _CROP_PX, left : left + _CROP_PX]
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample()).sample - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + _GRADIENT_WEIGHT * edges + _KL_WEIGHT * posterior.kl().mean()

    _optimise(vae, loss_of, schedule, "autoencoder")
    with torch.no_grad():
        drawn = [torch.cat(next(pairs)) for _ in range(2)]
        while sum(map(len, drawn)) < _SCALED_BY:
            drawn.append(torch.cat(next(pairs)))
        latents = torch.cat([vae.encode(pixels).latent_dist.mean for pixels in drawn])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae


def train_image_encoder(pairs: Pairs, schedule: Schedule, seed: int) -> CLIPVisionModelWithProjection:
    """An image encoder for pictures of 32 px: 16 patches and a class token, 64 wide."""
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

    def loss_of() -> torch.Tensor:
        first, second = (
            F.normalize(encoder(encoder_pixels(encoder, pixels).float()).image_embeds, dim=1) for pixels in next(pairs)
        )
        similar = first @ second.T / _TEMPERATURE
        same = torch.arange(len(similar))
        return (F.cross_entropy(similar, same) + F.cross_entropy(similar.T, same)) / 2

    _optimise(encoder, loss_of, schedule, "image encoder")
    return encoder


def train_depth_estimator(depths: Depths, schedule: Schedule, seed: int) -> nn.Module:
    """A depth estimator for pictures of 56 px."""
    torch.manual_seed(seed)
    estimator = small_depth_estimator(image_px=56, patch_px=7, initializer_range=0.05)

    def loss_of() -> torch.Tensor:
        pixels, depth = next(depths)
        size = estimator.config.backbone_config.image_size
        unit = F.interpolate((pixels + 1) / 2, (size, size), mode="bicubic")
        found = estimator(normalise(unit, IMAGENET_MEAN, IMAGENET_STD)).predicted_depth[:, None]
        known = F.interpolate(depth, found.shape[-2:], mode="area")
        return (_standard(found) - _standard(known)).abs().mean()

    _optimise(estimator, loss_of, schedule, "depth estimator")
    return estimator


def _standard(depth: torch.Tensor) -> torch.Tensor:
    """Without scale and shift, which a relative depth has not."""
    centred = depth - depth.mean(dim=(1, 2, 3), keepdim=True)
    return centred / centred.square().mean(dim=(1, 2, 3), keepdim=True).add(1e-4).sqrt()


def _optimise(module: nn.Module, loss_of: Callable[[], torch.Tensor], schedule: Schedule, name: str) -> None:
    """Train by AdamW, leaving the module in evaluation mode and in need of no gradients."""
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), schedule.learning_rate, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.learning_rate, schedule.steps, pct_start=0.05)
    smooth = 0.0
    with tqdm(range(schedule.steps), desc=name, unit="step", mininterval=1.0) as progress:
        for step in progress:
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            rate.step()
            smooth += (float(loss) - smooth) / min(step + 1, 50)
            progress.set_postfix(loss=f"{smooth:.4f}", refresh=False)
    module.eval().requires_grad_(False)
