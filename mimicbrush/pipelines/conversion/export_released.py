"""A pipeline folder, or a checkpoint of a run, -> a ``mimicbrush.bin`` that the released code loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPVisionModelWithProjection

from mimicbrush.errors import InputError, WeightsError
from mimicbrush.io.atomic import write_aside
from mimicbrush.io.outputs import check_output_file
from mimicbrush.models.options import RELEASED_CONVENTIONS
from mimicbrush.models.pretrained.files import read_object
from mimicbrush.models.pretrained.stored_weights import StateDict, check_fit, clip_config, describe_build_errors
from mimicbrush.models.projectors import DepthProjector, ImageProjector
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.models.unets import REFERENCE_UNETS, UNET_IN_CHANNELS, ReferenceUNet
from mimicbrush.pipelines.checksums import check_checksums
from mimicbrush.pipelines.conversion.key_maps import PARTS, with_position_ids
from mimicbrush.pipelines.conversion.untrusted_files import config_of, read_state_dict, weights_of
from mimicbrush.pipelines.folder import read_conventions

# What the trainer calls the files of a checkpoint (training/state.py).
_CHECKPOINT_WEIGHTS, _CHECKPOINT_AVERAGE = "weights.safetensors", "ema.safetensors"

# The side that the released depth guider resizes every depth map to.
_RELEASED_SIZE_PX = 512


def export_released(
    pipeline: Path, output: Path, *, checkpoint: Path | None = None, average: bool = True, force: bool = False
) -> list[str]:
    """Write a file with the released names, for the released code and what was built on it.

    Args:
        pipeline: a pipeline folder.
        output: the file; it gets its name when it is complete.
        checkpoint: a checkpoint folder of a run, whose weights replace those of the trained networks.
        average: take the checkpoint's averaged (EMA) weights, which is what the run's own pipeline holds, too.
        force: replace an older file.

    Returns:
        Warnings: what the released code would do differently from this pipeline.

    Raises:
        InputError: `output` is there already or cannot be written, or `pipeline` is no pipeline folder.
        WeightsError: weights are absent, do not fit, or are such that the released code has no place for them.
    """
    check_output_file(output, force=force)
    index = pipeline_index(pipeline)
    check_checksums(pipeline, deep=True)
    if not index.get("reference_unet", [None])[0]:
        raise WeightsError(f"{pipeline} has no reference U-Net, but the released code needs one")
    networks = _networks(pipeline)
    files = [file for component in PARTS.values() for file in weights_of(pipeline / component)]
    check_output_file(output, force=force, needed_bytes=sum(file.stat().st_size for file in files))
    weights = {part: read_state_dict(weights_of(pipeline / component)) for part, component in PARTS.items()}
    if checkpoint is not None:
        weights |= checkpoint_weights(checkpoint, networks, average=average)
    _check_shares_hidden_states(index, weights["referencenet"])
    released: dict[str, StateDict] = {}
    for part, network in networks.items():
        expected = network.state_dict()
        check_fit(part, weights[part], expected)
        released[part] = {key: weights[part][key] for key in expected}  # in the order that people know
    released["image_encoder"] = with_position_ids(released["image_encoder"])
    _check_conv_in(released)

    def write(aside: Path) -> None:
        # As an open file: PyTorch would write the hidden name into the archive.
        with aside.open("wb") as file:
            torch.save(released, file)

    write_aside(output, write)
    return find_released_differences(pipeline, released)


def checkpoint_weights(checkpoint: Path, networks: dict[str, nn.Module], *, average: bool) -> dict[str, StateDict]:
    """Read the trained parts that a checkpoint of a run holds; frozen parts are not among them.

    Args:
        checkpoint: its folder (``run_dir/checkpoints/step-...``).
        networks: by part, on the meta device; they know the names of the parameters.
        average: the averaged weights, or those of the last step.

    Raises:
        WeightsError: no whole checkpoint of such networks, or no average in it.
    """
    file = checkpoint / (_CHECKPOINT_AVERAGE if average else _CHECKPOINT_WEIGHTS)
    if not (checkpoint / _CHECKPOINT_WEIGHTS).is_file():
        raise WeightsError(f"{checkpoint} is not a checkpoint of a training run (it has no {_CHECKPOINT_WEIGHTS})")
    if not file.is_file():
        raise WeightsError(
            f"{checkpoint} has no averaged weights (train.ema_decay=0); use --raw to export the weights themselves"
        )
    joined = read_state_dict([file])
    if any(".lora_" in key for key in joined):
        raise WeightsError(
            f"{file} contains only LoRA adapters, without the weights that they were trained on; export the run's "
            "pipeline instead, which contains the merged weights: --pipeline RUN/pipeline"
        )
    found: dict[str, StateDict] = {}
    for part, component in PARTS.items():
        weights = {
            key.removeprefix(f"{component}."): tensor
            for key, tensor in joined.items()
            if key.startswith(f"{component}.")
        }
        if weights:
            check_fit(f"{part} of {checkpoint}", weights, networks[part].state_dict())
            found[part] = weights
    return found


def find_released_differences(pipeline: Path, released: dict[str, StateDict]) -> list[str]:
    """List what the released code, which has its choices wired in, would do differently with these weights."""
    index = pipeline_index(pipeline)
    warnings = [
        f"these weights were trained for {name}={index.get(name)!r}, but the released code always uses {value!r}; "
        "its results will be worse"
        for name, value in RELEASED_CONVENTIONS.items()
        if index.get(name) != value
    ]
    scheduler, wired = read_object(pipeline / "scheduler" / "scheduler_config.json"), dict(noise_scheduler().config)
    warnings += [
        f"the scheduler's {name} is {scheduler.get(name)!r}, but the released code always uses {wired[name]!r}"
        for name in (
            "prediction_type",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "num_train_timesteps",
            "rescale_betas_zero_snr",
        )
        if scheduler.get(name) != wired[name]
    ]
    if "original_inference_steps" in scheduler:
        warnings.append("these weights were distilled for a few steps of LCM, but the released code samples with DDIM")
    size_px = read_conventions(pipeline).options["size_px"]
    if size_px != _RELEASED_SIZE_PX:
        warnings.append(
            f"these weights were trained for {size_px} px, but the depth guider of the released code always uses "
            f"{_RELEASED_SIZE_PX} px; its results will be worse"
        )
    with torch.device("meta"):
        # The released code takes the width of the context from the U-Net, and that of the image tokens as it is here.
        context_width = config_of(pipeline / PARTS["unet"]).get("cross_attention_dim")
        sizes = {"image_proj": ImageProjector(context_width=context_width), "depth_guider": DepthProjector()}
    for part, module in sizes.items():
        for key, tensor in module.state_dict().items():
            if key not in released[part] or released[part][key].shape != tensor.shape:
                warnings.append(
                    f"{part} has other sizes than in the released code ({key} is {_shape(released[part].get(key))} "
                    f"here and {_shape(tensor)} there); change the sizes in the released code to load it"
                )
                break
    vae = index.get("vae", [None, None])[1]
    if vae != "AutoencoderKL":
        warnings.append(
            f"the autoencoder is a {vae}, but the released code uses an AutoencoderKL, which the file does not contain"
        )
    return warnings


def pipeline_index(pipeline: Path) -> dict[str, Any]:
    """Read the model_index.json of a pipeline folder of ours.

    Raises:
        InputError: it is none.
        WeightsError: it has lost files.
    """
    check_checksums(pipeline)
    file = pipeline / "model_index.json"
    index = read_object(file) if file.is_file() else {}
    if index.get("_class_name") != "MimicBrushPipeline":
        raise InputError(f"{pipeline} is not a MimicBrush pipeline folder")
    return index


def _networks(pipeline: Path) -> dict[str, nn.Module]:
    """Build each part's network as the released code would, on the meta device."""
    configs = {part: config_of(pipeline / component) for part, component in PARTS.items()}
    with describe_build_errors(f"one of the config.json files in {pipeline}"):
        return {
            "unet": UNet2DConditionModel.from_config(configs["unet"]),
            "referencenet": ReferenceUNet.from_config(configs["referencenet"]),
            "image_proj": ImageProjector.from_config(configs["image_proj"]),
            "depth_guider": DepthProjector.from_config(configs["depth_guider"]),
            "image_encoder": CLIPVisionModelWithProjection(clip_config(configs["image_encoder"])),
        }


def _check_shares_hidden_states(index: dict[str, Any], weights: StateDict) -> None:
    kind, expected = index.get("reference_unet", [None, None])[1], REFERENCE_UNETS["hidden_states"].__name__
    if kind != expected:
        raise WeightsError(
            f"referencenet does not fit the released code: it is a {kind} with {len(weights)} keys, but the "
            f"released code needs a {expected}, which shares hidden states"
        )


def _check_conv_in(released: dict[str, StateDict]) -> None:
    for part, expected in (("unet", UNET_IN_CHANNELS), ("depth_guider", 1)):
        given = released[part]["conv_in.weight"].shape[1]
        if given != expected:
            raise WeightsError(
                f"{part} does not fit the released code:\n  conv_in.weight takes {given} channels, expected {expected}"
            )


def _shape(tensor: torch.Tensor | None) -> object:
    return "absent" if tensor is None else tuple(tensor.shape)
