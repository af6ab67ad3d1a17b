"""Open a pipeline: `open_pipeline` for every command, and the steps that it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mimicbrush.errors import InputError, WeightsError
from mimicbrush.models.components import Components
from mimicbrush.models.library_logs import quiet_libraries
from mimicbrush.models.pretrained.check import check_every_byte, check_weights
from mimicbrush.models.pretrained.requirements import PartReport
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.pipelines.find_pipeline import find_pipeline
from mimicbrush.pipelines.folder import read_networks
from mimicbrush.pipelines.pipeline_mimicbrush import MimicBrushPipeline
from mimicbrush.ranges import NumberRange

if TYPE_CHECKING:
    from mimicbrush.pipelines.klein.pipeline import KleinPipeline


def open_pipeline(name: str | Path, device: str = "auto", dtype: torch.dtype | str | None = None) -> MimicBrushPipeline:
    """Open a pipeline by its name, on a device. Every command opens its pipeline here.

    Precision: float16 on a GPU and float32 on a CPU, unless `dtype` is given; see `default_dtype` for the reason.
    Seeds: every result has its own generator, `seeded_generator(seed)`. The generator is on the CPU, so a seed gives
    the same noise on every device, and each of many results can be repeated alone.

    Args:
        name: "small" (also "proof"), the model that comes with the project; "released", the released weights, which are
            downloaded and converted once; a pipeline folder; or the folder of a training run that has a pipeline.
        device: "cpu", "cuda", or "auto", which is a GPU if PyTorch finds one.
        dtype: of all networks, a torch.dtype or its name; None and "auto": as above.

    Raises:
        InputError: there is no such pipeline, it is not complete, the type is unknown, or the device is unknown or
            absent.
        WeightsError: the released weights are not in the local cache and cannot be downloaded.
    """
    dtype = default_dtype(device) if dtype is None or dtype == "auto" else read_dtype(dtype)
    choose_device(device)  # an absent one must show before gigabytes are read
    folder = find_pipeline(name)
    return move_to_device(load_pipeline(folder, dtype), device)


def open_any_pipeline(
    name: str | Path, device: str = "auto", dtype: torch.dtype | str | None = None
) -> MimicBrushPipeline | KleinPipeline:
    """Open a pipeline of either family by its name, for commands that only call it.

    Args:
        name: see `open_pipeline`; or the folder of a training run of FLUX.2 klein, or FLUX.2 klein itself.
        device, dtype: see `open_pipeline`. FLUX.2 klein uses bfloat16 on a GPU if no dtype is given.

    Raises:
        InputError, WeightsError: see `open_pipeline` and `flux2_klein.open_klein`.
    """
    from mimicbrush.pipelines.klein.folder import is_klein

    if not is_klein(Path(name)):
        return open_pipeline(name, device, dtype)
    from mimicbrush.pipelines.flux2_klein import open_klein

    return open_klein(name, device, None if dtype is None or dtype == "auto" else read_dtype(dtype))


#: Types that a command may choose, by name.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def read_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Convert the name of a dtype to a torch.dtype; a torch.dtype is returned as it is.

    Raises:
        InputError: there is no such dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"dtype must be auto, {', '.join(DTYPES)} or a torch.dtype, got {dtype!r}")
    return DTYPES[dtype]


def default_dtype(device: str) -> torch.dtype:
    """Choose the type of all networks on a device, "cpu", "cuda" or "auto": half precision on a GPU.

    Half precision halves memory and time on a GPU, and neither on a CPU. float16 rather than bfloat16: the released
    code runs in it, the values of SD-1.5 fit its range, and it rounds eight times finer.
    """
    return torch.float16 if device != "cpu" and torch.cuda.is_available() else torch.float32


def load_pipeline(folder: Path, dtype: torch.dtype | None = None) -> MimicBrushPipeline:
    """Load a pipeline folder without downloading anything.

    Args:
        folder: as `MimicBrushPipeline.save_pretrained` leaves it.
        dtype: of all networks; None: as diffusers chooses.

    Raises:
        InputError: the folder is absent, no pipeline, or not complete.
        WeightsError: a network lacks weights, or has others: the libraries would fill in random ones; or see
            `folder.check_components`.
    """
    networks = read_networks(folder)
    quiet_libraries()
    try:
        loaded = MimicBrushPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype)
    except (OSError, ValueError, TypeError, RuntimeError, AttributeError, LookupError, ArithmeticError) as error:
        raise InputError(f"{folder} cannot be loaded: {error}") from error
    for name, (class_name, network) in networks.items():
        check_weights(name, class_name, network, loaded.components[name])
    _check_steps(folder, loaded.scheduler.config)
    return loaded


def _check_steps(folder: Path, scheduler: Mapping[str, Any]) -> None:
    """Check the number of steps of a distilled model here; diffusers checks it only during an edit."""
    most = NumberRange(at_least=1, at_most=scheduler["num_train_timesteps"], whole=True)
    if fault := most.find_fault(scheduler.get("original_inference_steps", 1)):
        file = folder / "scheduler" / "scheduler_config.json"
        raise InputError(f"{file} cannot be used: original_inference_steps: {fault}")


def load_components(folder: Path, size_px: int) -> Components:
    """Load the networks of a pipeline folder in float32, to continue training.

    Args:
        folder: see `load_pipeline`.
        size_px: side of the canvas to train at.

    Raises:
        InputError: see `load_pipeline`; or the pipeline has another noise schedule than the method, or was distilled.
        WeightsError: see `load_pipeline`.
    """
    pipeline = load_pipeline(folder, torch.float32)
    if "original_inference_steps" in pipeline.scheduler.config:
        raise InputError(
            f"{folder} was distilled to a few steps, and more training would undo that; continue training from the "
            "pipeline before distillation"
        )
    for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"):
        actual, expected = (scheduler.config[key] for scheduler in (pipeline.scheduler, noise_scheduler()))
        if actual != expected:
            raise InputError(f"{folder} has a noise schedule with {key}={actual}, but training uses {key}={expected}")
    components = Components(**{each.name: getattr(pipeline, each.name) for each in fields(Components)})
    components.unet.register_to_config(sample_size=size_px // pipeline.vae_scale_factor)
    return components


def inspect_pipeline_networks(folder: Path, deep: bool) -> list[PartReport]:
    """Check the networks of a pipeline folder; for the reports see `models.pretrained.fetch.check_or_fetch_weights`.

    Raises:
        InputError, WeightsError: see `folder.read_networks`.
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


def choose_device(device: str) -> str:
    """Choose "cpu" or "cuda" from "cpu", "cuda" or "auto" (a GPU if there is one).

    Raises:
        InputError: the device is unknown or absent.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {device!r}")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise InputError("device is cuda, but PyTorch finds no CUDA GPU; use cpu or auto")
    return "cuda" if device != "cpu" and available else "cpu"


def move_to_device(pipeline: MimicBrushPipeline, device: str) -> MimicBrushPipeline:
    """Move a pipeline to a device; see `choose_device`."""
    target = choose_device(device)
    # Where it is already, there is nothing to move; diffusers would warn of half precision on a CPU, which works.
    return pipeline if pipeline.device.type == target else pipeline.to(target)


def seeded_generator(seed: int) -> torch.Generator:
    """Make a generator on the CPU, so that a seed gives the same noise on every device."""
    return torch.Generator().manual_seed(seed)
