"""Options of the models. This module imports no torch: the command line reads it first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimicbrush.errors import InputError
from mimicbrush.ranges import NumberRange, check_options, number, numbers, word

#: The side of a canvas, in pixels.
_SIZE = NumberRange(at_least=1, at_most=16384, whole=True)


@dataclass(frozen=True)
class ReferenceEncoder:
    """A network, or a pair of networks, that reads the reference.

    Attributes:
        weights: the options of `PretrainedModel` that name its weights, in addition to those that all models need; the
            last one is for the network that makes image tokens.
        token_class: class of the network that makes image tokens.
        has_network: whether a U-Net reads the reference, in addition to CLIP's image tokens.
    """

    weights: tuple[str, ...]
    token_class: str
    has_network: bool = False


#: The encoders by the value of `ModelOptions.reference_encoder`. Their image tokens: `models.token_encoders`.
REFERENCE_ENCODERS = {
    "unet": ReferenceEncoder(("reference_unet", "image_encoder"), "CLIPVisionModelWithProjection", has_network=True),
    "shared": ReferenceEncoder(("image_encoder",), "CLIPVisionModelWithProjection", has_network=True),
    "clip": ReferenceEncoder(("image_encoder",), "CLIPVisionModelWithProjection"),
    "dinov2": ReferenceEncoder(("dinov2",), "Dinov2Model"),
}


def vae_scale_factor(config: Mapping[str, Any]) -> int:
    """Return how many pixels a latent covers along a side: each level of the autoencoder but the last halves the image.

    Args:
        config: config of the autoencoder; without ``block_out_channels`` there is one level, so a latent is a pixel.
    """
    return int(2 ** (len(config.get("block_out_channels", (0,))) - 1))


def encoder_without_unet(token_class: str) -> str:
    """Find the name of the encoder without a U-Net whose image tokens come from a network of this class.

    Args:
        token_class: class of the network that makes image tokens.

    Raises:
        InputError: no encoder has this class, or several have it.
    """
    names = [
        name for name, each in REFERENCE_ENCODERS.items() if each.token_class == token_class and not each.has_network
    ]
    if not names:
        classes = sorted({encoder.token_class for encoder in REFERENCE_ENCODERS.values()})
        raise InputError(f"image tokens of {token_class} are not supported; supported: {', '.join(classes)}")
    if len(names) > 1:
        raise InputError(
            f"{' and '.join(names)} have the same class {token_class}; derive a separate class for each of them"
        )
    return names[0]


def token_encoder_of(reference_encoder: str) -> str:
    """Return the name of the encoder of image tokens: "clip" if a U-Net reads the reference."""
    return "clip" if REFERENCE_ENCODERS[reference_encoder].has_network else reference_encoder


_ORDERS = ("resize_then_pad", "pad_then_resize")
_SHARINGS = ("hidden_states", "keys_values")
_TIMESTEPS = ("current", "zero")
_CHANNELS = (1, 3)
_DEPTHS = ("standard", "released")
_NO_DEPTHS = ("zero_map", "zero_input")
_BLEND = NumberRange(at_least=0, at_most=1)


@dataclass
class FamilyOptions:
    """Options that every family of models has.

    Attributes:
        size_px: side of the square canvas.
    """

    size_px: int = number(512, _SIZE)

    def _size_step_px(self) -> int:
        """Return the number that the size must be a multiple of."""
        return 1

    def __post_init__(self) -> None:
        check_options(self, "model.")
        if self.size_px % self._size_step_px():
            raise InputError(f"model.size_px must be a multiple of {self._size_step_px()}, got {self.size_px}")


@dataclass
class ModelOptions(FamilyOptions):
    """Options of MimicBrush in which paper and released code differ (docs/paper_vs_code.md); saved with every pipeline.

    Attributes:
        size_px: side of the square canvas.
        letterbox_order: "resize_then_pad" (released benchmark script) or "pad_then_resize" (paper; released demo).
        reference_encoder: network that reads the reference: "unet" (the method): a reference U-Net; "shared" (ours):
            the imitative U-Net itself, in a separate pass before denoising; "clip" or "dinov2" (ablation of the paper's
            Table 3): no U-Net, only patch tokens of this encoder in the cross-attention.
        reference_sharing: what the self-attention of the reference U-Net shares: its "hidden_states", which the
            imitative U-Net projects (released code), or its own "keys_values" (paper). With "shared" there is no
            difference, and only "hidden_states" is allowed.
        reference_blend: 1.0: softmax over [own ; reference] (paper); 0.5: its mean with self-attention (released
            code).
        reference_timestep: timestep of the reference U-Net: "current" (released code), or "zero" (ours; it then runs
            only once for each edit).
        depth_channels: input channels of the depth projector: 1 (released code), or 3 (paper; the map three times).
        depth_convention: "standard" or "released" normalisation before the depth estimator.
        no_depth_convention: depth map of "no depth": "zero_map" (paper) or "zero_input" (released code).
    """

    size_px: int = number(512, _SIZE)
    letterbox_order: str = word("resize_then_pad", _ORDERS)
    reference_encoder: str = word("unet", REFERENCE_ENCODERS)
    reference_sharing: str = word("hidden_states", _SHARINGS)
    reference_blend: float = number(1.0, _BLEND)
    reference_timestep: str = word("current", _TIMESTEPS)
    depth_channels: int = word(1, _CHANNELS)
    depth_convention: str = word("standard", _DEPTHS)
    no_depth_convention: str = word("zero_map", _NO_DEPTHS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_encoder == "shared" and self.reference_sharing == "keys_values":
            raise InputError(
                "model.reference_sharing=keys_values does not work with model.reference_encoder=shared: a single "
                "network has a single set of keys and values; use model.reference_sharing=hidden_states"
            )


#: Options that the released weights were trained with, of `ModelOptions` and of `MimicBrushPipeline`.
RELEASED_CONVENTIONS = {
    "reference_blend": 0.5,
    "reference_timestep": "current",
    "depth_convention": "released",
    "no_depth_convention": "zero_input",
}


@dataclass
class PretrainedModel(ModelOptions):
    """Model at full size, from starting weights: each is a folder, or a hub id that is in the local cache.

    OWNER/NAME@REVISION names a revision; without it, that of `pretrained.weights.REVISIONS` is fetched.

    Attributes:
        unet: SD-1.5 inpainting, whose U-Net becomes the imitative U-Net (conv_in 9 -> 13).
        reference_unet: SD-1.5, whose U-Net becomes the reference U-Net.
        vae: the autoencoder between pixels and latents.
        image_encoder: CLIP ViT-H/14, which makes the image tokens.
        dinov2: DINOv2, which replaces CLIP with ``reference_encoder="dinov2"``. The paper does not say which one;
            ViT-L/14 is *ours*.
        depth_estimator: Depth Anything ViT-B/14, in the format of transformers.
    """

    unet: str = "stable-diffusion-v1-5/stable-diffusion-inpainting"
    reference_unet: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    vae: str = "stabilityai/sd-vae-ft-mse"
    image_encoder: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    dinov2: str = "facebook/dinov2-large"
    depth_estimator: str = "LiheYoung/depth-anything-base-hf"

    def _size_step_px(self) -> int:
        return 64  # the VAE reduces by 8, SD-1.5 by another 8

    def weight_options(self) -> tuple[str, ...]:
        """List the options that name the weights of this model."""
        return ("unet", *REFERENCE_ENCODERS[self.reference_encoder].weights, "vae", "depth_estimator")


@dataclass
class PipelineModel(ModelOptions):
    """Model from the weights of a pipeline: the released ones, or those of a training run.

    The defaults here mean "not given". Before an object is made, such options get the values that the pipeline was made
    for (`assembly.apply_pipeline_conventions`).

    Attributes:
        path: folder of a pipeline or of a run, "small" for the model that comes with the project, or "released".
    """

    size_px: int = number(0, _SIZE)
    letterbox_order: str = word("", _ORDERS)
    reference_encoder: str = word("", REFERENCE_ENCODERS)
    reference_sharing: str = word("", _SHARINGS)
    reference_blend: float = number(-1.0, _BLEND)
    reference_timestep: str = word("", _TIMESTEPS)
    depth_channels: int = word(0, _CHANNELS)
    depth_convention: str = word("", _DEPTHS)
    no_depth_convention: str = word("", _NO_DEPTHS)
    path: str = ""


@dataclass
class ToyModel(ModelOptions):
    """Small model of the same classes with random weights: for tests, a first try, and the small model.

    Attributes:
        size_px: side of the square canvas, a multiple of 2 ** levels, or of a larger number with `encoders`.
        block_out_channels: channels of both U-Nets at each level; the lowest level has no attention (as in SD-1.5).
        layers_per_block: number of layers of each block of both U-Nets.
        attention_heads: number of heads of each attention layer of both U-Nets.
        context_width: channels of the tokens that the cross-attention of both U-Nets reads.
        encoders: a folder with the frozen networks, written by `mimicbrush encoders`, or "small" for those of the
            small model; "": a fixed linear autoencoder, and untrained encoders of image tokens and depth.
        shared_start: both U-Nets start with the same weights, as at full size, where both start as SD-1.5. Then both
            have similar features for similar images, which reference attention needs.
    """

    size_px: int = number(32, _SIZE)
    block_out_channels: tuple[int, ...] = numbers((32, 64), lengths=(2, 8), ascending=False, at_least=1, at_most=2**16)
    layers_per_block: int = number(1, at_least=1, at_most=64)
    attention_heads: int = number(2, at_least=1, at_most=1024)
    context_width: int = number(64, at_least=1, at_most=2**16)
    encoders: str = ""
    shared_start: bool = False

    def _size_step_px(self) -> int:
        return 2 ** len(self.block_out_channels)  # the autoencoder reduces by 2, each level but the last by 2


#: Limits of diffusers' pipeline, which refuses smaller images and would reduce larger ones.
KLEIN_SIZE_RANGE = NumberRange(at_least=64, at_most=1024, whole=True)
KLEIN_HUB_ID = "black-forest-labs/FLUX.2-klein-base-4B"
#: The default prompt, of trained models and of the base model.
KLEIN_PROMPT = "Fill the black area of the first image with the matching part of the second image."


@dataclass
class KleinOptions(FamilyOptions):
    """Options of FLUX.2 klein: one transformer that sees source and references as one sequence of tokens.

    Attributes:
        size_px: side of the square canvas, 64 to 1024.
        prompt: the text prompt, the same for all training and editing.
    """

    prompt: str = KLEIN_PROMPT

    def __post_init__(self) -> None:
        super().__post_init__()
        KLEIN_SIZE_RANGE.check("model.size_px", self.size_px)


@dataclass
class Flux2KleinModel(KleinOptions):
    """FLUX.2 klein at full size, from its published weights.

    Attributes:
        size_px: side of the square canvas, 64 to 1024, a multiple of 16.
        prompt: the text prompt, the same for all training and editing.
        base: the pipeline to start from: a folder as diffusers writes it, or a hub id that is in the local cache;
            OWNER/NAME@REVISION names a revision.
        prompt_embeddings: file with the encoded prompt, so that training needs no text encoder.
    """

    base: str = KLEIN_HUB_ID
    prompt_embeddings: str = "runs/flux2_klein_prompt.safetensors"

    def _size_step_px(self) -> int:
        return 16  # the VAE reduces by 8, and a token is 2 x 2 latents


@dataclass
class ToyFlux2KleinModel(KleinOptions):
    """Small FLUX.2 klein of the same classes with random weights: for tests and a first try.

    Attributes:
        size_px: side of the square canvas, 64 to 1024, a multiple of 8.
        prompt: the text prompt, the same for all training and editing.
        num_layers: number of blocks with a stream for the text and one for the images.
        num_single_layers: number of blocks with one stream for everything.
        attention_heads: number of heads of each block.
        head_width: channels of a head, a multiple of 8.
        text_width: channels of the text encoder, a multiple of 8; the transformer sees three of its layers.
    """

    size_px: int = number(64, _SIZE)
    num_layers: int = number(1, at_least=1, at_most=64)
    num_single_layers: int = number(2, at_least=1, at_most=64)
    attention_heads: int = number(2, at_least=1, at_most=1024)
    head_width: int = number(16, at_least=8, at_most=1024)
    text_width: int = number(8, at_least=8, at_most=2**16)

    def _size_step_px(self) -> int:
        return 8  # the VAE reduces by 4, and a token is 2 x 2 latents

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("head_width", "text_width"):
            if getattr(self, name) % 8:
                raise InputError(f"model.{name} must be a multiple of 8, got {getattr(self, name)}")
