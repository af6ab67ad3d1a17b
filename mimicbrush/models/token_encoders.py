"""Networks that make image tokens of a reference: CLIP (the method), or DINOv2 (ablation of the paper's Table 3).

To add one, add an entry to `TOKEN_ENCODERS` and one to `options.REFERENCE_ENCODERS`, see docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model, PreTrainedModel

from mimicbrush.models.options import encoder_without_unet
from mimicbrush.models.pretrained.stored_weights import clip_config

# Pixel statistics that the public CLIP and DINOv2 weights were trained with (OpenAI CLIP; ImageNet).
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TokenEncoder:
    """A kind of network that makes image tokens.

    Attributes:
        model_class: its class in transformers.
        read_config: function: content of a config.json -> config of the network.
        mean, std: statistics of the pixels that it was trained with, in 0..1, red, green, blue.
        image_px: function: config -> side of its square input in px.
        tokens: function: network, normalised pixels (B, 3, s, s) -> tokens (B, N, C).
        class_tokens: number of tokens at the beginning that belong to no patch.
        toy: function that makes a network with random weights, for images of 32 px.
    """

    model_class: type[PreTrainedModel]
    read_config: Callable[[dict[str, Any]], Any]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_px: Callable[[Any], int]
    tokens: Callable[[Any, torch.Tensor], torch.Tensor]
    class_tokens: int
    toy: Callable[[], PreTrainedModel]


def clip_tokens(encoder: CLIPVisionModelWithProjection, pixels: torch.Tensor) -> torch.Tensor:
    """Compute `hidden_states[-2]` (paper Sec. 3.2) without the last layer and the projection, which are not needed."""
    vision = encoder.vision_model
    hidden = vision.pre_layrnorm(vision.embeddings(pixels))
    for layer in vision.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    return hidden


def last_tokens(encoder: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """Compute the normalised output of the last layer, (B, N, C)."""
    tokens: torch.Tensor = encoder(pixels).last_hidden_state
    return tokens


#: The encoders by their name in `ModelOptions.reference_encoder`.
TOKEN_ENCODERS: dict[str, TokenEncoder] = {
    "clip": TokenEncoder(
        model_class=CLIPVisionModelWithProjection,
        read_config=clip_config,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        image_px=lambda config: int(config.image_size),
        tokens=clip_tokens,
        class_tokens=1,
        toy=lambda: CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=64,
                intermediate_size=128,
                projection_dim=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
            )
        ),
    ),
    # *Ours*: the paper only says "DINOv2".
    "dinov2": TokenEncoder(
        model_class=Dinov2Model,
        read_config=Dinov2Config.from_dict,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        # It was trained at 518 px; its positions are interpolated for the 16 x 16 patches of Table 3.
        image_px=lambda config: min(16 * config.patch_size, int(config.image_size)),
        tokens=last_tokens,
        class_tokens=1,
        toy=lambda: Dinov2Model(
            Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
        ),
    ),
}


def token_encoder_name(encoder: PreTrainedModel) -> str:
    """Find the name of an encoder of image tokens in `TOKEN_ENCODERS`, also of a compiled one.

    Raises:
        InputError: it is not in `TOKEN_ENCODERS`.
    """
    return encoder_without_unet(type(getattr(encoder, "_orig_mod", encoder)).__name__)


def token_encoder_kind(encoder: PreTrainedModel) -> TokenEncoder:
    """Find the entry of an encoder in `TOKEN_ENCODERS`; raises as `token_encoder_name` does."""
    return TOKEN_ENCODERS[token_encoder_name(encoder)]
