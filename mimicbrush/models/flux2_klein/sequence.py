"""The token sequence of FLUX.2 klein: text | noisy target | source with its hole | references 1 to R.

Packing, normalisation and position ids are those of diffusers' `Flux2KleinPipeline`, called with
``image=[source with its hole, reference 1, ...]``. So a model that is trained on such sequences works in that pipeline.
All images here have the same size, so each has the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLFlux2

#: Latents along a side of a token.
PATCH_SIDE = 2
#: Distance of the position ids of two images along the axis of time, as in diffusers; the target is at 0.
TIME_STEP = 10


@dataclass(frozen=True)
class TokenLayout:
    """Positions of the tokens of each image; slices are over the whole sequence, which starts with the text.

    Attributes:
        num_text: number of text tokens.
        num_image: number of tokens of one image.
        num_references: number of references after the source.
    """

    num_text: int
    num_image: int
    num_references: int

    def image(self, number: int) -> slice:
        """Find the tokens of one image: 0 is the target, 1 the source, and 2 and more are the references."""
        start = self.num_text + number * self.num_image
        return slice(start, start + self.num_image)

    @property
    def target(self) -> slice:
        """Tokens of the noisy target."""
        return self.image(0)

    @property
    def source(self) -> slice:
        """Tokens of the source with its hole."""
        return self.image(1)

    @property
    def references(self) -> slice:
        """Tokens of all references together; empty without references."""
        return slice(self.image(2).start, self.num_tokens)

    @property
    def num_tokens(self) -> int:
        """Length of the whole sequence."""
        return self.image(1 + self.num_references).stop


class ImageSequence(NamedTuple):
    """Image tokens of a batch, as the transformer takes them: target, source, references.

    Attributes:
        tokens: (B, N, C).
        ids: (N, 4) int64, positions along time, height, width and text; the same for all samples.
        layout: positions of the tokens of each image.
    """

    tokens: torch.Tensor
    ids: torch.Tensor
    layout: TokenLayout


def encode_images(vae: AutoencoderKLFlux2, pixels: torch.Tensor) -> torch.Tensor:
    """Encode images to normalised latents of tokens: (B, 3, H, W) in [-1, 1] -> (B, 4 C, h, w) in the VAE's type.

    The latents are the mode of the posterior, as in the pipeline. Height and width must be multiples of the pixels of a
    token.
    """
    latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
    return normalise_latents(vae, patchify(latents))


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """Put each patch of 2 x 2 latents into the channels of one token: (B, C, 2 h, 2 w) -> (B, 4 C, h, w)."""
    return torch.nn.functional.pixel_unshuffle(latents, PATCH_SIDE)


def normalise_latents(vae: AutoencoderKLFlux2, latents: torch.Tensor) -> torch.Tensor:
    """Give each channel mean 0 and deviation 1 by the VAE's batch norm: (B, 4 C, h, w) -> the same."""
    norm = vae.bn
    mean = norm.running_mean.view(1, -1, 1, 1).to(latents)
    deviation = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(latents)
    return (latents - mean) / deviation


def pack_tokens(latents: torch.Tensor) -> torch.Tensor:
    """Turn latents into tokens, row by row: (B, C, h, w) -> (B, h w, C)."""
    return latents.flatten(2).transpose(1, 2)


def unpack_tokens(tokens: torch.Tensor, height: int) -> torch.Tensor:
    """Turn the tokens of one image into latents: (B, h w, C) -> (B, C, h, w).

    Args:
        tokens: tokens of one image, row by row.
        height: number of rows of tokens, h.
    """
    return tokens.transpose(1, 2).unflatten(2, (height, -1))


def make_text_ids(length: int, device: torch.device | None = None) -> torch.Tensor:
    """Make the position ids of the text tokens, which differ in the last column: (length, 4) int64."""
    ids = torch.zeros(length, 4, dtype=torch.int64, device=device)
    ids[:, 3] = torch.arange(length, device=device)
    return ids


def make_image_ids(height: int, width: int, num_conditions: int, device: torch.device | None = None) -> torch.Tensor:
    """Make the position ids of the tokens of the target and of the condition images after it.

    Args:
        height, width: sides of each image, in tokens.
        num_conditions: number of images after the target; image i = 0, 1, ... is at time 10 (i + 1).
        device: device of the ids; None: the CPU.

    Returns:
        (N, 4) int64.
    """
    counts = (1 + num_conditions, height, width, 1)
    times, *others = (torch.arange(count, device=device) for count in counts)
    return torch.cartesian_prod(times * TIME_STEP, *others)


def make_sequence(noisy: torch.Tensor, conditions: Sequence[torch.Tensor], num_text: int) -> ImageSequence:
    """Put a noisy target and its conditions into one sequence.

    Args:
        noisy: (B, C, h, w), normalised latents of the target with noise.
        conditions: latents of the source with its hole, then of each reference, shaped like `noisy`.
        num_text: number of text tokens before the image tokens.
    """
    height, width = noisy.shape[-2:]
    tokens = torch.cat([pack_tokens(each) for each in (noisy, *conditions)], dim=1)
    ids = make_image_ids(height, width, len(conditions), noisy.device)
    return ImageSequence(tokens, ids, TokenLayout(num_text, height * width, len(conditions) - 1))
