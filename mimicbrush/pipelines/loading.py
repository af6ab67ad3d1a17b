"""A pipeline from a folder, for scripts."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from mimicbrush.errors import InputError, WeightsError
from mimicbrush.models.components import Components
from mimicbrush.models.pretrained.check import check_every_byte, check_weights
from mimicbrush.models.pretrained.requirements import PartReport
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.pipelines.folder import read_index, read_networks
from mimicbrush.pipelines.pipeline_mimicbrush import MimicBrushPipeline


def quiet_libraries() -> None:
    """No progress bars for reading and writing weights: scripts have their own, for what takes long."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def load_pipeline(folder: Path, dtype: torch.dtype | None = None) -> MimicBrushPipeline:
    """Load a pipeline folder; nothing is looked up anywhere else.

    Args:
        folder: as `MimicBrushPipeline.save_pretrained` leaves it.
        dtype: of all networks; None: as diffusers chooses.

    Raises:
        InputError: the folder is absent, no pipeline, or not whole.
    """
    read_index(folder)
    quiet_libraries()
    try:
        return MimicBrushPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder} cannot be loaded: {error}") from error


def load_components(folder: Path, size_px: int) -> Components:
    """The networks of a pipeline folder in float32, to train on from them.

    Args:
        folder: see `load_pipeline`.
        size_px: side of the canvas to train at.

    Raises:
        InputError: see `load_pipeline`; or the pipeline has another noise schedule than the method.
        WeightsError: a network lacks weights, or has others; the libraries would fill in random ones.
    """
    for name, (class_name, network) in read_networks(folder).items():
        check_weights(name, class_name, network)
    pipeline = load_pipeline(folder, torch.float32)
    for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"):
        found, expected = (scheduler.config[key] for scheduler in (pipeline.scheduler, noise_scheduler()))
        if found != expected:
            raise InputError(f"{folder} was made for a noise schedule with {key}={found}, training has {expected}")
    parts = Components(**{each.name: getattr(pipeline, each.name) for each in fields(Components)})
    parts.unet.register_to_config(sample_size=size_px // pipeline.vae_scale_factor)
    return parts


def inspect_pipeline_networks(folder: Path, deep: bool) -> list[PartReport]:
    """What is known of the networks of a pipeline folder, see `models.weight_fetching.check_or_fetch_weights`.

    Raises:
        InputError, WeightsError: see `conventions.read_networks`.
    """
    reports = []
    for name, (class_name, network) in read_networks(folder).items():
        report = PartReport(name, f"model.path={folder}", network)
        try:
            check_weights(name, class_name, network)
            if deep:
                check_every_byte(network)
        except WeightsError as error:
            report.problem = error
        reports.append(report)
    return reports


def move_to_device(pipeline: MimicBrushPipeline, device: str) -> MimicBrushPipeline:
    """Move a pipeline to "cpu", "cuda" or "auto" (whatever is there).

    Raises:
        InputError: the device is unknown or absent.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"the device must be auto, cpu or cuda, got {device!r}")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise InputError("the device is cuda, but PyTorch sees no CUDA GPU here; use cpu or auto")
    target = "cuda" if device != "cpu" and available else "cpu"
    # Where it is already, there is nothing to move; diffusers would warn of half precision on a CPU, which works.
    return pipeline if pipeline.device.type == target else pipeline.to(target)


def seeded_generator(seed: int) -> torch.Generator:
    """A generator on the CPU: the same noise for every kind of device."""
    return torch.Generator().manual_seed(seed)
