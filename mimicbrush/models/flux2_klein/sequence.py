"""The token sequence of FLUX.2 klein: text | noisy target | source with its hole | references 1 to R.

Packing, normalisation and position ids are those of diffusers' `Flux2KleinPipeline`, called with
``image=[source with its hole, reference 1, ...]``. What is trained on such sequences therefore works in that pipeline.
All images here have one size, so each takes the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLFlux2

#: Latents along a side of a token.
PATCH_SIDE = 2
#: Between the position ids of two condition images along the axis of time; the target is at 0 (diffusers).
TIME_STEP = 10


@dataclass(frozen=True)
class TokenLayout:
    """Positions of the tokens of each image; slices are over the whole sequence, which starts with the text.

    Attributes:
        num_text: text tokens.
        num_image: tokens of one image.
        num_references: how many references follow the source.
    """

    num_text: int
    num_image: int
    num_references: int

    def image(self, number: int) -> slice:
        """Find the tokens of one image: 0 the target, 1 the source, from 2 on the references."""
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
        """Tokens of all references together; none where there is no reference."""
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
        layout: which tokens belong to what.
    """

    tokens: torch.Tensor
    ids: torch.Tensor
    layout: TokenLayout


def encode_images(vae: AutoencoderKLFlux2, pixels: torch.Tensor) -> torch.Tensor:
    """Encode images to normalised latents of tokens: (B, 3, H, W) in [-1, 1] -> (B, 4 C, h, w) in the VAE's type.

    The latents are the mode of the posterior, as the pipeline takes them. Height and width must be multiples of the
    pixels of a token.
    """
    latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
    return normalise_latents(vae, patchify(latents))


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """Put each 2 x 2 latents into the channels of one token: (B, C, 2 h, 2 w) -> (B, 4 C, h, w)."""
    return torch.nn.functional.pixel_unshuffle(latents, PATCH_SIDE)


def normalise_latents(vae: AutoencoderKLFlux2, latents: torch.Tensor) -> torch.Tensor:
    """Give each channel mean 0 and deviation 1 by the VAE's batch norm: (B, 4 C, h, w) -> the same."""
    norm = vae.bn
    mean = norm.running_mean.view(1, -1, 1, 1).to(latents)
    deviation = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(latents)
    return (latents - mean) / deviation


def pack_tokens(latents: torch.Tensor) -> torch.Tensor:
    """Make tokens of latents, row by row: (B, C, h, w) -> (B, h w, C)."""
    return latents.flatten(2).transpose(1, 2)


def unpack_tokens(tokens: torch.Tensor, height: int) -> torch.Tensor:
    """Make latents of the tokens of one image: (B, h w, C) -> (B, C, h, w).

    Args:
        tokens: of one image, row by row.
        height: rows of tokens, h.
    """
    return tokens.transpose(1, 2).unflatten(2, (height, -1))


def make_text_ids(length: int, device: torch.device | None = None) -> torch.Tensor:
    """Number the text tokens along the last axis: (length, 4) int64, on a device."""
    ids = torch.zeros(length, 4, dtype=torch.int64, device=device)
    ids[:, 3] = torch.arange(length, device=device)
    return ids


def make_image_ids(height: int, width: int, num_conditions: int, device: torch.device | None = None) -> torch.Tensor:
    """Number the tokens of the target and of the condition images behind it.

    Args:
        height, width: of each image, in tokens.
        num_conditions: how many images follow the target; number i lies at time 10 (i + 1).
        device: where they are made; None: the CPU.

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
        conditions: of the source with its hole, then of each reference, like `noisy`.
        num_text: text tokens that come before all of it.
    """
    height, width = noisy.shape[-2:]
    tokens = torch.cat([pack_tokens(each) for each in (noisy, *conditions)], dim=1)
    ids = make_image_ids(height, width, len(conditions), noisy.device)
    return ImageSequence(tokens, ids, TokenLayout(num_text, height * width, len(conditions) - 1))
