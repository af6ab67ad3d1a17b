"""Networks that measure similarity, from a folder or the local cache; nothing is downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPTokenizerFast, Dinov2Model, ViTModel
from transformers.utils import logging as transformers_logging

from mimicbrush.errors import InputError, install_command
from mimicbrush.evaluation.benchmark.efficientnet_lite0 import (
    PACKAGE,
    EfficientNetDistance,
    find_efficientnet_weights,
    load_efficientnet,
)
from mimicbrush.evaluation.benchmark.options import BackboneOptions
from mimicbrush.evaluation.benchmark.subjects import pad_to_square
from mimicbrush.models.token_encoders import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from mimicbrush.pipelines.conversion.untrusted_files import read_state_dict

#: Side of the images that DINO and DINOv2 see, a multiple of their patches (16 and 14).
DINO_PX = 224
Loaded = TypeVar("Loaded")


class ImageSimilarity:
    """The cosine similarity of class tokens of a ViT.

    Args:
        model: DINO or DINOv2.
        size_px: side of the image that it sees.
    """

    def __init__(self, model: ViTModel | Dinov2Model, size_px: int) -> None:
        self.model, self.size_px = model.eval(), size_px

    @torch.no_grad()
    def compare(self, one: np.ndarray, other: np.ndarray) -> float:
        """Compare two square images, (S, S, 3) uint8: -1..1."""
        pixels = torch.cat([_prepare_pixels(each, self.size_px, IMAGENET_MEAN, IMAGENET_STD) for each in (one, other)])
        tokens = self.model(pixels.to(self.model.device)).last_hidden_state[:, 0]
        return float(F.cosine_similarity(tokens[:1], tokens[1:]))


class ClipSimilarity:
    """The cosine similarity of CLIP embeddings, of two images or of an image and a text."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizerFast) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.size_px = int(model.config.vision_config.image_size)

    @torch.no_grad()
    def compare(self, one: np.ndarray, other: np.ndarray) -> float:
        """Compare two square images, (S, S, 3) uint8: -1..1."""
        return float(F.cosine_similarity(self._image(one), self._image(other)))

    @torch.no_grad()
    def compare_with_text(self, image: np.ndarray, text: str) -> float:
        """Compare an image, (H, W, 3) uint8, padded to a square, with a text: -1..1."""
        tokens = self.tokenizer(text, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        hidden = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        embedding = self.model.text_projection(hidden.pooler_output)
        return float(F.cosine_similarity(self._image(pad_to_square(image)), embedding))

    def _image(self, image: np.ndarray) -> torch.Tensor:
        pixels = _prepare_pixels(image, self.size_px, CLIP_MEAN, CLIP_STD).to(self.model.device)
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)


class Lpips:
    """LPIPS (Zhang et al. 2018) with AlexNet, by torchmetrics."""

    #: AlexNet's pooling leaves nothing of smaller images.
    smallest_px = 32

    def __init__(self, net: torch.nn.Module) -> None:
        self.net = net.eval()

    def is_large_enough(self, image: np.ndarray) -> bool:
        """Tell whether an image (H, W, 3) is large enough."""
        return min(image.shape[:2]) >= self.smallest_px

    @torch.no_grad()
    def measure(self, one: np.ndarray, other: np.ndarray) -> float:
        """Measure the distance of two images of one size, (H, W, 3) uint8."""
        a, b = (torch.from_numpy(each.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for each in (one, other))
        return float(self.net(a, b))


@dataclass(frozen=True)
class Backbones:
    """The networks that measure, and the metrics that have none.

    Attributes:
        absent: metric -> why it cannot be measured.
        about: option -> what was loaded, for the metric card.
    """

    dino: ImageSimilarity | None = None
    dinov2: ImageSimilarity | None = None
    clip: ClipSimilarity | None = None
    lpips: Lpips | None = None
    efficientnet_lite0: EfficientNetDistance | None = None
    absent: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)


def load_backbones(options: BackboneOptions) -> Backbones:
    """Load the networks that are named, and the one that comes in an installed package.

    Raises:
        InputError: one that is named cannot be loaded, or is another kind of network.
    """
    transformers_logging.disable_progress_bar()
    dino = _load(options.dino, "dino", _load_dino)
    dinov2 = _load(options.dinov2, "dinov2", _load_dinov2)
    clip = _load(options.clip, "clip", _load_clip)
    lpips = _load(options.lpips, "lpips", _load_lpips)
    of = {"dino_i": "dino", "dinov2_i": "dinov2", "clip_i": "clip", "clip_t": "clip", "lpips": "lpips"}
    absent = {
        metric: f"{name} is null: no weights are given" for metric, name in of.items() if getattr(options, name) is None
    }
    named = {name: getattr(options, name) for name in ("dino", "dinov2", "clip", "lpips")}
    about = {name: _describe(value) for name, value in named.items() if value is not None}
    efficientnet, weights = None, find_efficientnet_weights()
    if weights is None:
        absent["efficientnet_lite0"] = f"{PACKAGE} is not installed: {install_command('eval')}"
    else:
        about["efficientnet_lite0"] = f"{PACKAGE}, {_describe(str(weights))}"
        efficientnet = EfficientNetDistance(load_efficientnet(weights))
    return Backbones(dino, dinov2, clip, lpips, efficientnet, absent, about)


def _load(given: str | None, option: str, load: Callable[[str], Loaded]) -> Loaded | None:
    if given is None:
        return None
    try:
        return load(given)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            f"{option}={given} cannot be loaded: {error}\n  Give a folder with its config.json and weights in "
            "safetensors, or a hub id that is in the local cache. With null its metrics are not measured (n/a)"
        ) from error


def _load_dino(given: str) -> ImageSimilarity:
    model, info = ViTModel.from_pretrained(
        given, add_pooling_layer=False, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    _check_complete("dino", given, info)
    return ImageSimilarity(model, _find_side(model.config.image_size))


def _load_dinov2(given: str) -> ImageSimilarity:
    model, info = Dinov2Model.from_pretrained(
        given, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    _check_complete("dinov2", given, info)
    return ImageSimilarity(model, min(DINO_PX, _find_side(model.config.image_size)))


def _load_clip(given: str) -> ClipSimilarity:
    model, info = CLIPModel.from_pretrained(
        given, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    _check_complete("clip", given, info)
    return ClipSimilarity(model, CLIPTokenizerFast.from_pretrained(given, local_files_only=True))


def _check_complete(option: str, given: str, info: Any) -> None:
    """Refuse missing weights, because the libraries would use random numbers and only warn."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"{option}={given} lacks {len(missing)} expected weights, such as {missing[0]}: it is another kind of "
            "network, or incomplete"
        )


def _load_lpips(given: str) -> Lpips:
    """torchvision's AlexNet, a .pth file or .safetensors; the linear layers come with torchmetrics."""
    try:
        # Its public class takes AlexNet from the network only; this is what that one wraps.
        from torchmetrics.functional.image.lpips import _LPIPS
    except ImportError as error:
        raise InputError(f"lpips={given} needs torchmetrics and torchvision: {install_command('eval')}") from error

    path = Path(given)
    if not path.is_file():
        raise InputError(
            f"lpips={given}: no such file; expected the weights of torchvision's AlexNet (alexnet-owt-*.pth)"
        )
    net = _LPIPS(net="alex", pnet_rand=True)
    weights = read_state_dict([path])
    for number in range(1, net.net.N_slices + 1):
        for name, layer in getattr(net.net, f"slice{number}").named_children():
            for kind, parameter in layer.named_parameters():
                key = f"features.{name}.{kind}"
                if key not in weights or weights[key].shape != parameter.shape:
                    raise InputError(
                        f"lpips={given} has no {key} of shape {tuple(parameter.shape)}: it is not an AlexNet"
                    )
                parameter.data.copy_(weights[key])
    return Lpips(net)


def _find_side(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])


def _prepare_pixels(
    image: np.ndarray, size_px: int, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> torch.Tensor:
    """Prepare a square image for a network: (1, 3, size_px, size_px), resized by Pillow (bicubic)."""
    resized = Image.fromarray(image).resize((size_px, size_px), Image.Resampling.BICUBIC)
    values = (np.asarray(resized) / 255 - np.array(mean)) / np.array(std)
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None]


def _describe(named: str) -> str:
    """Describe a folder or file, with the hashes of its weights."""
    path = Path(named)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    digests = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]
    return named + (f" (sha256 {', '.join(digests)})" if digests else "")
