"""Depth Anything as its authors built it, under their names, written for the tests from the description alone.

DINOv2's vision transformer (pre-norm, layer scale, one matrix for query, key and value) whose last four blocks'
outputs, each through the final norm, go into a DPT head. Images must have the size of the position embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

PATCH, HEAD = 14, 64


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.rand(width)}) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(batch, tokens, 3, width // HEAD, HEAD)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) / HEAD**0.5).softmax(-1)
        attended = (weights @ value).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.ls1["gamma"] * self.attn["proj"](attended)
        return x + self.ls2["gamma"] * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class _ResidualUnit(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(features, features, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class _RefineNet(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.resConfUnit1, self.resConfUnit2 = _ResidualUnit(features), _ResidualUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, x: torch.Tensor, finer: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor:
        if finer is not None:
            x = x + self.resConfUnit1(finer)
        x = F.interpolate(self.resConfUnit2(x), size, mode="bilinear", align_corners=True)
        return self.out_conv(x)


class OriginalDepthAnything(nn.Module):
    """(B, 3, H, W) normalised pixels -> (B, H, W) depth."""

    def __init__(
        self, *, width: int, num_blocks: int, out_channels: tuple[int, int, int, int], features: int, side: int
    ) -> None:
        super().__init__()
        self.pretrained = nn.Module()
        self.pretrained.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pretrained.pos_embed = nn.Parameter(torch.randn(1, side * side + 1, width))
        self.pretrained.mask_token = nn.Parameter(torch.zeros(1, width))
        self.pretrained.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, stride=PATCH)})
        self.pretrained.blocks = nn.ModuleList(_Block(width) for _ in range(num_blocks))
        self.pretrained.norm = nn.LayerNorm(width, eps=1e-6)
        self.depth_head = nn.Module()
        self.depth_head.projects = nn.ModuleList(nn.Conv2d(width, channels, 1) for channels in out_channels)
        first, second, _, last = out_channels
        self.depth_head.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(first, first, 4, stride=4),
                nn.ConvTranspose2d(second, second, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(last, last, 3, stride=2, padding=1),
            ]
        )
        scratch = self.depth_head.scratch = nn.Module()
        for number, channels in enumerate(out_channels, 1):
            scratch.add_module(f"layer{number}_rn", nn.Conv2d(channels, features, 3, padding=1, bias=False))
            scratch.add_module(f"refinenet{number}", _RefineNet(features))
        scratch.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        scratch.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 1), nn.ReLU(), nn.Identity()
        )
        for parameter in self.parameters():  # an untrained norm or bias that is 1 or 0 would hide a wrong map
            nn.init.normal_(parameter, std=0.1)
        nn.init.constant_(scratch.output_conv2[2].bias, 1.0)  # or the final ReLU might leave nothing

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        height, width = (side // PATCH for side in pixels.shape[-2:])
        vit, head = self.pretrained, self.depth_head
        x = vit.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + vit.pos_embed
        outputs = []
        for block in vit.blocks:
            x = block(x)
            outputs.append(x)
        maps = []
        for number, output in enumerate(outputs[-4:]):
            tokens = vit.norm(output)[:, 1:]
            grid = tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)
            grid = head.resize_layers[number](head.projects[number](grid))
            maps.append(head.scratch.get_submodule(f"layer{number + 1}_rn")(grid))
        path = head.scratch.refinenet4(maps[3], None, maps[2].shape[-2:])
        path = head.scratch.refinenet3(path, maps[2], maps[1].shape[-2:])
        path = head.scratch.refinenet2(path, maps[1], maps[0].shape[-2:])
        path = head.scratch.refinenet1(path, maps[0], tuple(2 * side for side in maps[0].shape[-2:]))
        depth = F.interpolate(
            head.scratch.output_conv1(path), (height * PATCH, width * PATCH), mode="bilinear", align_corners=True
        )
        depth = head.scratch.output_conv2(depth)
        depth = F.interpolate(depth, pixels.shape[-2:], mode="bilinear", align_corners=True)
        return F.relu(depth).squeeze(1)
