"""A fixed linear autoencoder for toy sizes, behind the interface of diffusers' AutoencoderKL.

A toy VAE with random weights cannot show a picture. This one can, and it has nothing to train or download.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

_LOG_VARIANCE_OF_NONE = -30.0


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """2 x 2 pixel patches to four channels by an orthonormal linear map, and back by its transpose.

    The channels are the patch's mean luma, two mean colour differences, and its horizontal luma detail;
    each is divided by its rough standard deviation on photographs, so that latents have about unit variance.
    What it loses is fine vertical and colour detail: photographs reduced to 64 px come back at 22 to 26 dB.

    Args:
        channel_std: of the four channels on photographs with pixels in [-1, 1] (measured on the photographs
            that scikit-image bundles).
        scaling_factor: as in AutoencoderKL; the scale is in `channel_std` already.
    """

    @register_to_config
    def __init__(
        self,
        channel_std: tuple[float, ...] = (2.0, 0.5, 0.14, 0.22),
        scaling_factor: float = 1.0,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (1, 1),
    ) -> None:
        super().__init__()
        luma = torch.tensor([1.0, 1.0, 1.0]) / 3**0.5
        red_blue = torch.tensor([1.0, 0.0, -1.0]) / 2**0.5
        green = torch.tensor([-1.0, 2.0, -1.0]) / 6**0.5
        mean = torch.full((2, 2), 0.5)
        horizontal = torch.tensor([[0.5, -0.5], [0.5, -0.5]])
        patches = [(luma, mean), (red_blue, mean), (green, mean), (luma, horizontal)]
        basis = torch.stack([colour[:, None, None] * shape for colour, shape in patches])  # (4, 3, 2, 2)
        std = torch.tensor(channel_std).view(4, 1, 1, 1)
        self.encoder = torch.nn.Parameter(basis / std, requires_grad=False)
        self.decoder = torch.nn.Parameter(basis * std, requires_grad=False)

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """(B, 3, H, W) in [-1, 1] -> posterior over (B, 4, H / 2, W / 2), all of it at its mean."""
        mean = F.conv2d(x, self.encoder, stride=2)
        moments = torch.cat([mean, torch.full_like(mean, _LOG_VARIANCE_OF_NONE)], dim=1)
        posterior = DiagonalGaussianDistribution(moments, deterministic=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple:
        """(B, 4, h, w) -> (B, 3, 2h, 2w)."""
        sample = F.conv_transpose2d(z, self.decoder, stride=2)
        return DecoderOutput(sample=sample) if return_dict else (sample,)
