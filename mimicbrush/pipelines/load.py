"""A pipeline from a folder, for scripts."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from mimicbrush.errors import InputError
from mimicbrush.pipelines.conventions import read_index
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


def on_device(pipeline: MimicBrushPipeline, device: str) -> MimicBrushPipeline:
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


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU: the same noise for every kind of device."""
    return torch.Generator().manual_seed(seed)
