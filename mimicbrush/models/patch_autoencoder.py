"""A small autoencoder with the interface of diffusers' AutoencoderKL: fixed and linear, or with a learned correction.

A toy VAE with random weights cannot reproduce images. The fixed one can, without training or download. The learned one
starts as the fixed one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from mimicbrush.models.options import vae_scale_factor

_LOG_VARIANCE_OF_NONE = -30.0


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Autoencoder of patches: pixels to four channels by an orthonormal linear map, and back by its transpose.

    The channels are the patch's mean luma, two mean colour differences, and its horizontal luma detail. Each is
    divided by its approximate standard deviation on photographs, so that latents have about unit variance. Fine
    vertical and colour details are lost: photographs reduced to 64 px are reproduced with 22 to 26 dB.

    With `hidden_channels`, convolutions on the grid of patches add a correction to the output of the linear maps, in
    both directions. Their last layers are zero at the start, so training starts from the linear maps and their colours.
    An AutoencoderKL of this size did not learn the colours in the same time (docs/dev/log.md).

    Args:
        channel_std: standard deviations of the four channels on photographs with pixels in [-1, 1] (measured on the
            photographs of scikit-image).
        scaling_factor: as in AutoencoderKL; it may be 1, because the channels are already scaled by `channel_std`.
        block_out_channels: its length is the number of halvings plus 1: (1, 1) has patches of 2 x 2 pixels, (1, 1, 1)
            of 4 x 4.
        hidden_channels: channels of the learned correction; 0: no correction.
    """

    @register_to_config
    def __init__(
        self,
        channel_std: tuple[float, ...] = (2.0, 0.5, 0.14, 0.22),
        scaling_factor: float = 1.0,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (1, 1),
        hidden_channels: int = 0,
    ) -> None:
        super().__init__()
        self.patch_px = side = vae_scale_factor(self.config)
        luma = torch.tensor([1.0, 1.0, 1.0]) / 3**0.5
        red_blue = torch.tensor([1.0, 0.0, -1.0]) / 2**0.5
        green = torch.tensor([-1.0, 2.0, -1.0]) / 6**0.5
        mean = torch.full((side, side), 1 / side)
        horizontal = mean * torch.tensor([1.0, -1.0]).repeat_interleave(side // 2)
        patches = [(luma, mean), (red_blue, mean), (green, mean), (luma, horizontal)]
        basis = torch.stack([colour[:, None, None] * shape for colour, shape in patches])  # (4, 3, p, p)
        std = torch.tensor(channel_std).view(4, 1, 1, 1)
        self.encoder = torch.nn.Parameter(basis / std, requires_grad=False)
        self.decoder = torch.nn.Parameter(basis * std, requires_grad=False)
        if hidden_channels:
            self.encoder_correction = _Correction(3 * side**2, hidden_channels, latent_channels, blocks=1)
            self.decoder_correction = _Correction(latent_channels, hidden_channels, 3 * side**2, blocks=3)

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Encode (B, 3, H, W) in [-1, 1] -> posterior of (B, 4, H / p, W / p) without variance; p is 2 or 4."""
        mean = F.conv2d(x, self.encoder, stride=self.patch_px)
        if self.config.hidden_channels:
            mean = mean + self.encoder_correction(F.pixel_unshuffle(x, self.patch_px))
        moments = torch.cat([mean, torch.full_like(mean, _LOG_VARIANCE_OF_NONE)], dim=1)
        posterior = DiagonalGaussianDistribution(moments, deterministic=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple:
        """Decode (B, 4, h, w) -> (B, 3, p h, p w)."""
        sample = F.conv_transpose2d(z, self.decoder, stride=self.patch_px)
        if self.config.hidden_channels:
            sample = sample + F.pixel_shuffle(self.decoder_correction(z), self.patch_px)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


class _Correction(nn.Module):
    """Residual convolutions at one resolution, whose output is zero at the start."""

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int, blocks: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(),
                nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1),
            )
            for _ in range(blocks)
        )
        self.conv_out = nn.Conv2d(hidden_channels, out_channels, 1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the correction: (B, in, h, w) -> (B, out, h, w)."""
        x = self.conv_in(x)
        for block in self.blocks:
            x = x + block(x)
        return self.conv_out(F.silu(x))
