"""Builds the seven networks of MimicBrush: at toy size with random weights, or at full size from pretrained weights.

Both have the same classes with different sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
)

from mimicbrush.errors import InputError, WeightsError
from mimicbrush.models.library_logs import silence_unused_weights
from mimicbrush.models.options import (
    REFERENCE_ENCODERS,
    PretrainedModel,
    ToyModel,
    token_encoder_of,
    vae_scale_factor,
)
from mimicbrush.models.patch_autoencoder import PatchAutoencoder
from mimicbrush.models.pretrained.check import check_networks
from mimicbrush.models.pretrained.requirements import inspect_starting_weights
from mimicbrush.models.projectors import DepthProjector, ImageProjector
from mimicbrush.models.token_encoders import TOKEN_ENCODERS
from mimicbrush.models.unets import (
    LATENT_CHANNELS,
    REFERENCE_UNETS,
    UNET_IN_CHANNELS,
    ReferenceUNet,
    SharedUNet,
    init_reference_from_unet,
    widen_conv_in,
)


@dataclass
class Components:
    """All networks. Both U-Nets and both projectors are trained; the other three are frozen.

    `reference_unet` is None if patch tokens or a `SharedUNet` replace it (`ModelOptions.reference_encoder`).
    """

    vae: AutoencoderKL | PatchAutoencoder
    unet: UNet2DConditionModel
    reference_unet: ReferenceUNet | None
    image_encoder: PreTrainedModel
    image_projector: ImageProjector
    depth_estimator: DepthAnythingForDepthEstimation
    depth_projector: DepthProjector


def toy_components(options: ToyModel, *, seed: int = 0) -> Components:
    """Build all networks at toy size with random weights, for tests and for a first training run.

    The autoencoder is linear and fixed, and reproduces images. Image tokens and depth come from *untrained* encoders:
    fixed random features of the image, with the right type and shape. With `ToyModel.encoders`, these three networks
    are trained ones that are read from a folder, and only the networks to train are random.

    Args:
        options: the sizes.
        seed: seed of the random weights.

    Raises:
        InputError: `options.encoders` is not a folder of encoders, or they do not fit the sizes.
    """
    levels = len(options.block_out_channels)
    trained = read_encoders(Path(options.encoders)) if options.encoders else None
    reduction = vae_scale_factor(trained.vae.config) if trained else 2
    if options.size_px % (step := reduction * 2 ** (levels - 1)):
        raise InputError(f"model.size_px must be a multiple of {step} with model.encoders={options.encoders}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = _painting_class(options.reference_encoder)(
            sample_size=options.size_px // reduction,
            in_channels=UNET_IN_CHANNELS,
            out_channels=LATENT_CHANNELS,
            block_out_channels=tuple(options.block_out_channels),
            down_block_types=(*["CrossAttnDownBlock2D"] * (levels - 1), "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * (levels - 1)),
            layers_per_block=options.layers_per_block,
            attention_head_dim=options.attention_heads,
            cross_attention_dim=options.context_width,
            norm_num_groups=8,
        )
        tokens_of = token_encoder_of(options.reference_encoder)
        image_encoder = TOKEN_ENCODERS[tokens_of].toy()
        depth_estimator = small_depth_estimator()
        reference_unet = None
        if options.reference_encoder == "unet":
            reference_unet = REFERENCE_UNETS[options.reference_sharing].from_config(
                {**unet.config, "in_channels": LATENT_CHANNELS}
            )
        if reference_unet is not None and options.shared_start:
            init_reference_from_unet(reference_unet, unet)
        if trained and tokens_of != "clip":
            raise InputError(
                f"model.reference_encoder={tokens_of} cannot be used with model.encoders: the small encoders contain "
                "only CLIP"
            )
        if trained:
            image_encoder = trained.image_encoder
        depth_channels = (16, 32) if reduction == 2 else tuple(8 * 2**level for level in range(reduction.bit_length()))
        return Components(
            vae=trained.vae if trained else PatchAutoencoder(),
            unet=unet,
            reference_unet=reference_unet,
            image_encoder=image_encoder.eval(),
            # By name, because diffusers treats positional arguments as defaults, and from_config would lose them.
            image_projector=ImageProjector(
                image_width=image_encoder.config.hidden_size, context_width=options.context_width
            ),
            depth_estimator=trained.depth_estimator if trained else depth_estimator.eval(),
            depth_projector=DepthProjector(depth_channels=options.depth_channels, block_channels=depth_channels),
        )


def _painting_class(reference_encoder: str) -> type[UNet2DConditionModel]:
    return SharedUNet if reference_encoder == "shared" else UNet2DConditionModel


class SmallEncoders(NamedTuple):
    """Frozen networks of the small model."""

    vae: PatchAutoencoder
    image_encoder: CLIPVisionModelWithProjection
    depth_estimator: DepthAnythingForDepthEstimation


#: Classes of the small encoders, by the names of their folders.
SMALL_ENCODERS = {
    "vae": PatchAutoencoder,
    "image_encoder": CLIPVisionModelWithProjection,
    "depth_estimator": DepthAnythingForDepthEstimation,
}


def read_encoders(folder: Path) -> SmallEncoders:
    """Read the frozen networks from a folder that `mimicbrush encoders` has written.

    Raises:
        InputError: a network is missing.
    """
    absent = [name for name in SMALL_ENCODERS if not (folder / name / "config.json").is_file()]
    if absent:
        raise InputError(
            f"model.encoders={folder} lacks {', '.join(absent)}; mimicbrush encoders creates such a folder"
        )
    return SmallEncoders(
        *(kind.from_pretrained(folder / name, use_safetensors=True).eval() for name, kind in SMALL_ENCODERS.items())
    )


def small_depth_estimator(
    image_px: int = 28, patch_px: int = 14, initializer_range: float = 0.15
) -> DepthAnythingForDepthEstimation:
    """Build a Depth Anything with random weights, for images of `image_px` with patches of `patch_px`.

    With the default `initializer_range` of transformers, 0.02, untrained depth maps would be almost zero.
    """
    depth_estimator = DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=Dinov2Config(
                image_size=image_px,
                patch_size=patch_px,
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                out_features=["stage1", "stage2", "stage3", "stage4"],
                reshape_hidden_states=False,
            ),
            patch_size=patch_px,
            reassemble_hidden_size=32,
            neck_hidden_sizes=[8, 16, 16, 16],
            fusion_hidden_size=16,
            head_hidden_size=8,
            initializer_range=initializer_range,
        )
    )
    # The last layer ends with a ReLU: with the default bias of 0, the depth would be 0 everywhere for some seeds.
    torch.nn.init.ones_(depth_estimator.head.conv3.bias)
    return depth_estimator


def random_components(
    *,
    size_px: int = 512,
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
    reference_encoder: str = "unet",
) -> Components:
    """Build the released model with random weights, to count parameters and to measure speed and memory.

    Under ``torch.device("meta")`` it needs no memory. If there are fewer channels than in SD-1.5, the encoders are
    reduced by the same factor. The shapes of the U-Nets' inputs do not change: latents are an eighth of the image, and
    there are 257 image tokens.

    Args:
        size_px: side of the canvas, a multiple of 64.
        block_out_channels: channels of both U-Nets at each of the four levels.
        reference_encoder: see `ModelOptions`; "unet", "shared", "clip" or "dinov2".

    Raises:
        InputError: it is another encoder.
    """
    if reference_encoder not in ("unet", "shared", "clip", "dinov2"):
        raise InputError(f"random_components supports unet, shared, clip and dinov2, got {reference_encoder}")
    share = block_out_channels[0] / 320

    def scaled(width: int, step: int) -> int:
        return max(1, round(width * share / step)) * step

    depth_width = scaled(768, 64)
    image_encoder: PreTrainedModel
    if reference_encoder == "dinov2":
        token_width = scaled(1024, 64)
        heads = token_width // 64
        image_encoder = Dinov2Model(
            Dinov2Config(
                hidden_size=token_width, num_hidden_layers=24, num_attention_heads=heads, image_size=518, patch_size=14
            )
        )
    else:
        token_width = scaled(1280, 80)
        image_encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=token_width,
                intermediate_size=4 * token_width,
                projection_dim=1024,
                num_hidden_layers=32,
                num_attention_heads=token_width // 80,
                image_size=224,
                patch_size=14,
                hidden_act="gelu",
            )
        )
    unet = _painting_class(reference_encoder)(
        sample_size=size_px // 8,
        in_channels=UNET_IN_CHANNELS,
        block_out_channels=block_out_channels,
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    stages = [f"stage{number}" for number in (9, 10, 11, 12)]
    return Components(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=tuple(scaled(width, 32) for width in (128, 256, 512, 512)),
            layers_per_block=2,
            sample_size=size_px,
        ),
        unet=unet,
        reference_unet=(
            ReferenceUNet.from_config({**unet.config, "in_channels": LATENT_CHANNELS})
            if reference_encoder == "unet"
            else None
        ),
        image_encoder=image_encoder.eval(),
        image_projector=ImageProjector(image_width=token_width, context_width=768),
        depth_estimator=DepthAnythingForDepthEstimation(
            DepthAnythingConfig(
                backbone_config=Dinov2Config(
                    image_size=518,
                    patch_size=14,
                    hidden_size=depth_width,
                    num_hidden_layers=12,
                    num_attention_heads=depth_width // 64,
                    out_features=stages,
                    reshape_hidden_states=False,
                ),
                patch_size=14,
                reassemble_hidden_size=depth_width,
                neck_hidden_sizes=[scaled(width, 8) for width in (96, 192, 384, 768)],
                fusion_hidden_size=scaled(128, 8),
                head_hidden_size=32,
            )
        ).eval(),
        depth_projector=DepthProjector(),
    )


def pretrained_components(options: PretrainedModel, *, seed: int = 0) -> Components:
    """Load all networks at full size, from the starting weights of paper Sec. 3.2, in float32.

    Args:
        options: says where the weights are.
        seed: seed of the two projectors, which have no starting weights.

    Raises:
        WeightsError: weights are missing, damaged or the wrong ones; the message names all of them, their options and
            how to get them. Pickle files are not opened.
    """
    networks = inspect_starting_weights(options)
    check_networks(networks)
    # All weights are float32 in memory, whatever their type in the files is.
    stored = {
        part: {
            "pretrained_model_name_or_path": network.folder,
            "use_safetensors": True,
            "variant": network.variant,
        }
        for part, network in networks.items()
    }
    try:
        painting = _painting_class(options.reference_encoder)
        inpainting = painting.from_pretrained(**stored["unet"], torch_dtype=torch.float32)
        vae = AutoencoderKL.from_pretrained(**stored["vae"], torch_dtype=torch.float32)
        reference_unet = None
        if options.reference_encoder == "unet":
            stock = UNet2DConditionModel.from_pretrained(**stored["reference_unet"], torch_dtype=torch.float32)
            reference_unet = REFERENCE_UNETS[options.reference_sharing].from_unet(stock)
        tokens_of = token_encoder_of(options.reference_encoder)
        kind, encoder_part = TOKEN_ENCODERS[tokens_of], REFERENCE_ENCODERS[tokens_of].weights[-1]
        with silence_unused_weights():  # a whole CLIP has a text encoder
            image_encoder = kind.model_class.from_pretrained(
                **stored[encoder_part], config=kind.read_config(networks[encoder_part].config), dtype=torch.float32
            )
        depth_estimator = DepthAnythingForDepthEstimation.from_pretrained(
            **stored["depth_estimator"], dtype=torch.float32
        )
    except OSError as error:
        raise WeightsError(f"starting weights cannot be loaded (only .safetensors are supported): {error}") from error
    unet = widen_conv_in(inpainting, UNET_IN_CHANNELS)
    unet.register_to_config(sample_size=options.size_px // vae_scale_factor(vae.config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Components(
            vae=vae,
            unet=unet,
            reference_unet=reference_unet,
            image_encoder=image_encoder,
            image_projector=ImageProjector(
                image_width=image_encoder.config.hidden_size, context_width=unet.config.cross_attention_dim
            ),
            depth_estimator=depth_estimator,
            depth_projector=DepthProjector(depth_channels=options.depth_channels),
        )
