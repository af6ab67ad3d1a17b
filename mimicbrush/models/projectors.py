"""The two projectors: small trained networks for image tokens and for depth maps."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class ImageProjector(ModelMixin, ConfigMixin):
    """Projector of image tokens: makes the context of both U-Nets' cross-attention (paper Sec. 3.2).

    One linear layer, 1280 -> 768 for ViT-H/14 and SD-1.5; it replaces the text embedding.
    """

    @register_to_config
    def __init__(self, image_width: int = 1280, context_width: int = 768) -> None:
        super().__init__()
        self.projector = nn.Linear(image_width, context_width)

    def forward(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """Project image tokens: (B, N, image_width) -> (B, N, D)."""
        return self.projector(image_tokens)


class DepthProjector(ModelMixin, ConfigMixin):
    """Projector of depth maps: makes four of the imitative U-Net's input channels (paper Sec. 3.2).

    It has 3 x 3 convolutions with SiLU between them. Each step of `block_channels` halves the size, so
    ``len(block_channels) - 1`` is log2 of the VAE's reduction. The released one takes one channel (the paper says
    three) and has 150,260 parameters.
    """

    @register_to_config
    def __init__(
        self,
        depth_channels: int = 1,
        latent_channels: int = 4,
        block_channels: tuple[int, ...] = (16, 32, 64, 128),
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(depth_channels, block_channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in pairwise(block_channels):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        # Not zero-initialised: its output meets zero weights in conv_in, and with both zero, neither gets a gradient.
        self.conv_out = nn.Conv2d(block_channels[-1], latent_channels, 3, padding=1)

    def forward(self, depth_map: torch.Tensor, size_px: int) -> torch.Tensor:
        """Project depth maps, resized to `size_px`: (B, 1, any, any) relative inverse depth -> (B, 4, h, w)."""
        x = F.interpolate(depth_map, (size_px, size_px), mode="bilinear", align_corners=True)
        x = x.expand(-1, self.config.depth_channels, -1, -1)
        x = F.silu(self.conv_in(x))  # (B, 16, H, W)
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)  # (B, 4, H / 8, W / 8)
