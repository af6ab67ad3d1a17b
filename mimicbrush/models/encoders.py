"""Functions that call the frozen networks, for training and editing: VAE, image encoder and depth estimator.

Terms: **pixels** are (B, 3, H, W) RGB in [-1, 1]; **latents** are (B, 4, h, w), scaled; **image tokens** are
(B, N, C), the output of the image encoder.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.utils.accelerate_utils import apply_forward_hook
from transformers import DepthAnythingForDepthEstimation, PreTrainedModel

from mimicbrush.models.patch_autoencoder import PatchAutoencoder
from mimicbrush.models.token_encoders import IMAGENET_MEAN, IMAGENET_STD, token_encoder_kind
from mimicbrush.ops.pillow_resize import resize_like_pillow


def encode_latents(
    vae: AutoencoderKL | PatchAutoencoder, pixels: torch.Tensor, noise: torch.Tensor | None
) -> torch.Tensor:
    """Encode pixels into latents (B, 4, h, w), scaled.

    Args:
        vae: the autoencoder.
        pixels: (B, 3, H, W) in [-1, 1].
        noise: (n * B, 4, h, w) standard normal, to sample the posterior of each image n times (the samples of an image
            are consecutive); None: return its mean, once.
    """
    mean, std = encode_posteriors(vae, pixels)
    if noise is None:
        latents = mean
    else:
        times = len(noise) // len(mean)
        latents = mean.repeat_interleave(times, 0) + std.repeat_interleave(times, 0) * noise.float()
    return latents * vae.config.scaling_factor


def encode_posteriors(vae: AutoencoderKL | PatchAutoencoder, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode pixels (B, 3, H, W) into mean and standard deviation of the posterior, (B, 4, h, w) each, not scaled."""
    posterior = vae.encode(pixels.to(vae.dtype), return_dict=False)[0]
    # In float32 also for a half-precision VAE, because these latents are the training target.
    return posterior.mean.float(), posterior.std.float()


def decode_latents(vae: AutoencoderKL | PatchAutoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents (B, 4, h, w) into pixels (B, 3, H, W), about [-1, 1]."""
    return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]


def encode_image_tokens(
    image_encoder: PreTrainedModel, pixels: torch.Tensor, patches_only: bool = False
) -> torch.Tensor:
    """Encode square pixels into image tokens (B, N, C), see `TOKEN_ENCODERS`.

    The image is resized as by the CLIP processor of the released code, which works on 8-bit images. So pixels are
    rounded to 8 bits first.

    Args:
        image_encoder: a network of one of `TOKEN_ENCODERS`.
        pixels: (B, 3, S, S) in [-1, 1].
        patches_only: leave out the class tokens, which come first.
    """
    return _image_tokens(image_encoder, encoder_pixels(image_encoder, pixels), patches_only)


def encoder_pixels(image_encoder: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """Resize and normalise square pixels (B, 3, S, S) in [-1, 1] for the image encoder: (B, 3, s, s)."""
    kind = token_encoder_kind(image_encoder)
    size = kind.image_px(image_encoder.config)
    resized = resize_like_pillow(((pixels.double() + 1) * 127.5).round(), size).float() / 255
    return normalise_pixels(resized, kind.mean, kind.std)


def encode_no_image_tokens(
    image_encoder: PreTrainedModel, batch: int, device: torch.device, patches_only: bool = False
) -> torch.Tensor:
    """Encode "no reference", an all-zero *normalised* pixel tensor (released code), into image tokens (B, N, C)."""
    size = token_encoder_kind(image_encoder).image_px(image_encoder.config)
    zeros = torch.zeros(1, 3, size, size, device=device)
    return _image_tokens(image_encoder, zeros, patches_only).expand(batch, -1, -1)


@apply_forward_hook  # only layers of the model are called here; without this, offloading would not notice it
def _image_tokens(image_encoder: PreTrainedModel, normalised: torch.Tensor, patches_only: bool) -> torch.Tensor:
    kind = token_encoder_kind(image_encoder)
    tokens = kind.tokens(image_encoder, normalised.to(image_encoder.dtype))
    return tokens[:, kind.class_tokens :] if patches_only else tokens


def estimate_depth(
    depth_estimator: DepthAnythingForDepthEstimation, pixels: torch.Tensor, convention: str
) -> torch.Tensor:
    """Estimate relative inverse depth (B, 1, any, any) of square pixels.

    The released code applies ImageNet statistics to pixels in 0..255 and divides by 255 *afterwards*
    (convention "released"); the released weights need that. "standard" is the normalisation that the estimator was
    trained with.
    """
    size = depth_estimator.config.backbone_config.image_size
    if convention == "released":
        # First resized by OpenCV in 8 bits, where overshoots of the cubic filter are cut off at 0 and 255.
        images = ((pixels + 1) * 127.5).round().permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()
        resized = np.stack([cv2.resize(p, (size, size), interpolation=cv2.INTER_CUBIC) for p in images])
        values = torch.from_numpy(resized).to(pixels.device, torch.float32).permute(0, 3, 1, 2)
        normalised = normalise_pixels(values, IMAGENET_MEAN, IMAGENET_STD) / 255
    else:
        unit = F.interpolate((pixels.float() + 1) / 2, (size, size), mode="bicubic")
        normalised = normalise_pixels(unit, IMAGENET_MEAN, IMAGENET_STD)
    return depth_estimator(normalised.to(depth_estimator.dtype)).predicted_depth[:, None]


def make_no_depth_map(
    depth_estimator: DepthAnythingForDepthEstimation, batch: int, convention: str, device: torch.device
) -> torch.Tensor:
    """Make the depth map of "no depth", (B, 1, any, any).

    "zero_map" is all zeros (paper); "zero_input" is the output of the estimator for an all-zero tensor (released code).
    Training (for dropped depth) and inference must use the same one.
    """
    size = depth_estimator.config.backbone_config.image_size
    zeros = torch.zeros(1, 3, size, size, device=device, dtype=depth_estimator.dtype)
    if convention == "zero_map":
        return zeros[:, :1].expand(batch, -1, -1, -1)
    return depth_estimator(zeros).predicted_depth[:, None].expand(batch, -1, -1, -1)


def normalise_pixels(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Normalise pixels (B, 3, H, W) channel by channel: subtract the mean, divide by the standard deviation."""
    # Made on the device of the pixels: a copy from the CPU would wait for all work that is queued on the GPU.
    means, stds = (torch.cat([pixels.new_full((1, 1, 1), value) for value in values]) for values in (mean, std))
    return (pixels - means) / stds
