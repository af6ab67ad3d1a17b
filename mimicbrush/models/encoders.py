"""The frozen encoders, in one place, for training and editing alike.

Three words: **pixels** (B, 3, H, W) RGB in [-1, 1]; **latents** (B, 4, h, w), scaled; **image tokens**
(B, N, C), what the CLIP encoder sees. Every function is an arrow from pixels to something else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from transformers import CLIPVisionModelWithProjection, DepthAnythingForDepthEstimation

from mimicbrush.models.patch_autoencoder import PatchAutoencoder

# Pixel statistics that the public CLIP and DINOv2 weights were trained with (OpenAI CLIP; ImageNet).
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def encode_latents(
    vae: AutoencoderKL | PatchAutoencoder, pixels: torch.Tensor, noise: torch.Tensor | None
) -> torch.Tensor:
    """Pixels -> latents (B, 4, h, w), scaled.

    Args:
        vae: the autoencoder.
        pixels: (B, 3, H, W) in [-1, 1].
        noise: (B, 4, h, w) standard normal to sample the posterior with, or None for its mean.
    """
    posterior = vae.encode(pixels.to(vae.dtype), return_dict=False)[0]
    # In float32 also for a half-precision VAE: these latents are what a model must recover.
    mean, std = posterior.mean.float(), posterior.std.float()
    latents = mean if noise is None else mean + std * noise.float()
    return latents * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL | PatchAutoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, 4, h, w) -> pixels (B, 3, H, W), about [-1, 1]."""
    return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]


def encode_image_tokens(image_encoder: CLIPVisionModelWithProjection, pixels: torch.Tensor) -> torch.Tensor:
    """Square pixels -> image tokens (B, N, C): the hidden states before the last layer (paper Sec. 3.2)."""
    size = image_encoder.config.image_size
    resized = F.interpolate(pixels.float(), (size, size), mode="bicubic", antialias=True)
    # Rounded to 8 bit like the picture that the released code hands to its CLIP processor.
    unit = ((resized + 1) * 127.5).round().clamp(0, 255) / 255
    return _image_tokens(image_encoder, _normalise(unit, _CLIP_MEAN, _CLIP_STD))


def encode_no_image_tokens(image_encoder: CLIPVisionModelWithProjection, batch: int) -> torch.Tensor:
    """Image tokens (B, N, C) of "no reference": an all-zero *normalised* pixel tensor (released code)."""
    size = image_encoder.config.image_size
    zeros = torch.zeros(1, 3, size, size, device=image_encoder.device)
    return _image_tokens(image_encoder, zeros).expand(batch, -1, -1)


def _image_tokens(image_encoder: CLIPVisionModelWithProjection, normalised: torch.Tensor) -> torch.Tensor:
    output = image_encoder(normalised.to(image_encoder.dtype), output_hidden_states=True)
    return output.hidden_states[-2]


def estimate_depth(
    depth_estimator: DepthAnythingForDepthEstimation, pixels: torch.Tensor, convention: str
) -> torch.Tensor:
    """Square pixels -> relative inverse depth (B, 1, any, any).

    The released code applies ImageNet statistics to pixels in 0..255 and divides by 255 *afterwards*
    (convention "released"); its weights need that. "standard" is what the estimator was trained with.
    """
    size = depth_estimator.config.backbone_config.image_size
    resized = F.interpolate(pixels.float(), (size, size), mode="bicubic")
    if convention == "released":
        normalised = _normalise((resized + 1) * 127.5, _IMAGENET_MEAN, _IMAGENET_STD) / 255
    else:
        normalised = _normalise((resized + 1) / 2, _IMAGENET_MEAN, _IMAGENET_STD)
    return depth_estimator(normalised.to(depth_estimator.dtype)).predicted_depth[:, None]


def no_depth(depth_estimator: DepthAnythingForDepthEstimation, batch: int, convention: str) -> torch.Tensor:
    """The depth map of "no depth", (B, 1, any, any).

    "zero_map" is all zeros (paper); "zero_input" is what the estimator makes of an all-zero tensor
    (released code). What training drops to must be what inference feeds.
    """
    size = depth_estimator.config.backbone_config.image_size
    zeros = torch.zeros(1, 3, size, size, device=depth_estimator.device, dtype=depth_estimator.dtype)
    if convention == "zero_map":
        return zeros[:, :1].expand(batch, -1, -1, -1)
    return depth_estimator(zeros).predicted_depth[:, None].expand(batch, -1, -1, -1)


def _normalise(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    return (pixels - pixels.new_tensor(mean).view(3, 1, 1)) / pixels.new_tensor(std).view(3, 1, 1)
