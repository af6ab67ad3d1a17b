"""Released weights -> a pipeline folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPVisionModelWithProjection

from mimicbrush.errors import InputError, WeightsError
from mimicbrush.io.atomic import replace_folder
from mimicbrush.io.outputs import check_output_folder
from mimicbrush.models.library_logs import quiet_libraries
from mimicbrush.models.options import RELEASED_CONVENTIONS
from mimicbrush.models.pretrained.stored_weights import (
    StateDict,
    clip_config,
    describe_build_errors,
    rename_vae_attention,
)
from mimicbrush.models.projectors import DepthProjector, ImageProjector
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.models.unets import LATENT_CHANNELS, UNET_IN_CHANNELS, ReferenceUNet
from mimicbrush.pipelines.conversion.depth_anything import depth_estimator
from mimicbrush.pipelines.conversion.key_maps import (
    PARTS,
    cast_weights,
    fill_network,
    split_parts,
    without_position_ids,
)
from mimicbrush.pipelines.conversion.layout import ReleasedFiles
from mimicbrush.pipelines.conversion.untrusted_files import config_of, join_shards, read_groups, weights_of
from mimicbrush.pipelines.pipeline_mimicbrush import MimicBrushPipeline


def import_released(
    files: ReleasedFiles, output: Path, *, dtype: torch.dtype | None = None, force: bool = False
) -> None:
    """Make a pipeline folder of released weights, with the conventions that they were trained for.

    Args:
        files: the weights.
        output: the pipeline folder; it gets its name when it is complete.
        dtype: what to store the weights as; None keeps what they are.
        force: replace an older pipeline there.

    Raises:
        InputError: `output` is there already, its parent is not, or it cannot be written.
        WeightsError: weights are absent, cannot be read, or do not fit.
    """
    check_free(output, force)
    weights = [files.checkpoint, *weights_of(files.vae), *weights_of(files.depth)]
    size = sum(file.stat().st_size for file in weights if file.is_file())
    check_output_folder(output, is_replaced=True, needed_bytes=size)
    quiet_libraries()

    def write(aside: Path) -> None:
        released_pipeline(files, dtype=dtype, scratch=aside.parent).save_pretrained(aside)

    replace_folder(output, write)


def released_pipeline(
    files: ReleasedFiles, *, dtype: torch.dtype | None = None, scratch: Path | None = None
) -> MimicBrushPipeline:
    """Build the pipeline of released weights, to be saved (see `import_released`): its networks hold mapped files."""
    # 1. The sizes; what is absent shows before 10 GB are read.
    sizes = {
        "unet": config_of(files.inpainting, "unet") | {"in_channels": UNET_IN_CHANNELS},
        "reference_unet": config_of(files.sd15, "unet"),
        "vae": config_of(files.vae),
        "image_encoder": config_of(files.image_encoder),
    }
    vae_files, depth_files = weights_of(files.vae), weights_of(files.depth)

    # 2. All weights.
    contents = read_groups({"checkpoint": [files.checkpoint], "vae": vae_files, "depth": depth_files}, scratch=scratch)
    parts = split_parts(contents["checkpoint"][0], files.checkpoint)
    parts["vae"] = join_shards(vae_files, contents["vae"])
    parts["depth"] = join_shards(depth_files, contents["depth"])
    parts = {name: cast_weights(weights, dtype) for name, weights in parts.items()}

    # 3. The networks. Depth Anything has a way of its own.
    networks = build_filled_networks(sizes, parts)
    conventions: dict[str, Any] = {**RELEASED_CONVENTIONS}
    return MimicBrushPipeline(
        **networks,
        depth_estimator=depth_estimator(parts["depth"], files.depth, scratch=scratch),
        scheduler=noise_scheduler(),
        **conventions,
    )


def build_filled_networks(sizes: dict[str, dict[str, Any]], parts: dict[str, StateDict]) -> dict[str, Any]:
    """Build all networks but the depth estimator, by component.

    Args:
        sizes: the configs of ``unet``, ``reference_unet``, ``vae`` and ``image_encoder``; the two projectors' follow.
        parts: the released parts, and ``vae``; the networks hold these tensors, not copies.

    Raises:
        WeightsError: weights do not fit each other, or their configs.
    """
    with describe_build_errors("one of the config.json files of unet, reference_unet, vae and image_encoder"):
        networks: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(sizes["unet"]),
            "reference_unet": ReferenceUNet.from_config(sizes["reference_unet"]),
            "vae": AutoencoderKL.from_config(sizes["vae"]),
            "image_encoder": CLIPVisionModelWithProjection(clip_config(sizes["image_encoder"])),
            "depth_projector": DepthProjector(*depth_projector_sizes(parts["depth_guider"])),
        }
        widths = networks["image_encoder"].config.hidden_size, networks["unet"].config.cross_attention_dim
        networks["image_projector"] = ImageProjector(*widths)
    weights = {component: parts[part] for part, component in PARTS.items()}
    weights["image_encoder"] = without_position_ids(weights["image_encoder"])
    weights["vae"] = rename_vae_attention(parts["vae"])
    names = {component: part for part, component in PARTS.items()}
    for component, network in networks.items():
        fill_network(names.get(component, component), network, weights[component])

    halvings = [len(networks["depth_projector"].config.block_channels), len(networks["vae"].config.block_out_channels)]
    if halvings[0] != halvings[1]:
        raise WeightsError(
            f"depth_guider does not fit: it halves the image {halvings[0] - 1} times, but the VAE halves it "
            f"{halvings[1] - 1} times"
        )
    return networks


def depth_projector_sizes(weights: StateDict) -> tuple[int, int, tuple[int, ...]]:
    """Read the arguments of `DepthProjector` off the shapes of its weights.

    Raises:
        WeightsError: a key is missing that tells them.
    """
    halving = sorted(
        (int(key.split(".")[1]), key)
        for key in weights
        if key.startswith("blocks.") and key.endswith(".weight") and key.split(".")[1].isdecimal()
    )[1::2]
    for key in ("conv_in.weight", "conv_out.weight"):
        if key not in weights or weights[key].ndim != 4:
            raise WeightsError(f"depth_guider does not fit:\n  {key} is missing, or is not the kernel of a convolution")
    first = weights["conv_in.weight"]
    return first.shape[1], LATENT_CHANNELS, (first.shape[0], *(weights[key].shape[0] for _, key in halving))


def check_free(output: Path, force: bool) -> None:
    """Check that a pipeline folder can be written.

    Raises:
        InputError: something is there, or the folder around it is not.
    """
    if not output.absolute().parent.is_dir():
        raise InputError(f"{output}: the folder {output.absolute().parent} does not exist")
    if not output.exists():
        return
    if not force:
        raise InputError(f"{output} exists; choose another --output, or overwrite it with --force")
    if not (output / "model_index.json").is_file():
        raise InputError(
            f"{output} is not a pipeline folder, so --force does not replace it; remove it, or choose another --output"
        )
