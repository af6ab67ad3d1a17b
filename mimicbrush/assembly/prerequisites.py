"""Prerequisites of a run: data, weights, packages, GPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mimicbrush.assembly.command_line import describe_hydra_error, list_training_options, translate_arguments
from mimicbrush.assembly.config import check_option_names, register_schemas
from mimicbrush.data.options import DataOptions
from mimicbrush.errors import InputError, WeightsError, install_command
from mimicbrush.models.flux2_klein.files import list_klein_files
from mimicbrush.models.options import Flux2KleinModel, KleinOptions, PipelineModel, PretrainedModel
from mimicbrush.models.pretrained.requirements import inspect_starting_weights

if TYPE_CHECKING:
    from mimicbrush.models.pretrained.requirements import PartReport

#: Where the experiment of the small model looks for its pairs.
SMALL_MODEL_DATA = "small_model_data"


def check_prerequisites(config: DictConfig) -> None:
    """Check within seconds that data, weights, packages and GPUs are available; the error lists all that are missing.

    Raises:
        InputError: says what is missing, which option points to it and how to get it.
    """
    missing: list[str] = []
    missing += _find_absent_folders(config.data)
    if config.eval.every_steps and config.eval.pairs and not Path(config.eval.pairs).is_dir():
        missing.append(f"eval.pairs={config.eval.pairs} is not a folder. Give a folder of mined pairs to evaluate on")
    model = OmegaConf.to_object(config.model)
    if isinstance(model, PretrainedModel | Flux2KleinModel):
        try:
            if isinstance(model, PretrainedModel):
                inspect_starting_weights(model)
            else:
                list_klein_files(model)
        except WeightsError as error:
            missing.append(str(error))
    if config.train.tracker != "none" and importlib.util.find_spec(config.train.tracker) is None:
        missing.append(
            f"train.tracker={config.train.tracker} needs the package {config.train.tracker}. "
            f"Install it (pip install {config.train.tracker}), or use train.tracker=none"
        )
    is_klein = isinstance(model, KleinOptions)
    parts = ("transformer",) if is_klein else ("unet", "reference_unet")
    if "lora" in [config.train[part] for part in parts] and importlib.util.find_spec("peft") is None:
        missing.append(f"adapters (lora) need the package peft. Install it: {install_command('lora')}")
    if config.train.device == "cuda" and not _has_gpu():
        paper = " The setting of the paper needs 8 GPUs such as A100, or much more time on one GPU."
        missing.append(
            f"train.device=cuda, but PyTorch sees no CUDA GPU.{'' if is_klein else paper}\n"
            "  With train.device=cpu, it runs on the CPU."
        )
    if missing:
        smoke = "klein_smoke" if is_klein else "smoke"
        toy = f"To try everything on a CPU, without any weights: mimicbrush train +experiment={smoke} data.root=DIR"
        raise InputError("\n".join(["this run cannot start:", *[f"- {item}" for item in missing], toy]))


def _find_absent_folders(data: DictConfig) -> list[str]:
    """List the folders of mined pairs that are not given or do not exist, with what to do."""
    named = {f"data.sources.{name}.root": source.root for name, source in data.sources.items()}
    if data.root or not named:
        named["data.root"] = data.root
    mine = "mimicbrush mine input=FOLDER_OF_VIDEOS output=DIR"
    make_small_model_data = f"mimicbrush data --output {SMALL_MODEL_DATA} (docs/training.md)"
    return [
        f"{f'{option}={root} is not a folder' if root else f'{option} is not set'}. Give a folder of mined pairs; "
        f"to make one:\n  {make_small_model_data if Path(root or '.').parts[:1] == (SMALL_MODEL_DATA,) else mine}"
        for option, root in named.items()
        if not root or not Path(root).is_dir()
    ]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def compose_training(overrides: Sequence[str], configs: Path) -> DictConfig:
    """Compose the config of a training run.

    Args:
        overrides: of ``configs/train.yaml``.
        configs: the folder of that.

    Raises:
        InputError: the options cannot be used.
    """
    register_schemas()
    try:
        with initialize_config_dir(str(configs.resolve()), version_base="1.3"):
            config = compose("train", translate_arguments(overrides, list_training_options(configs)))
    except (HydraException, OmegaConfBaseException) as error:
        raise describe_hydra_error(error) from error
    check_option_names(config)
    return config


def compose_data_options(overrides: Sequence[str], configs: Path) -> DataOptions:
    """Compose only the options of the training data, for commands that use samples without training.

    Args:
        overrides: of ``configs/train.yaml``, those of its group data.
        configs: the folder of that.

    Raises:
        InputError: the options cannot be used.
    """
    options = OmegaConf.to_object(compose_training(overrides, configs).data)
    assert isinstance(options, DataOptions)
    return options


def provide_weights(overrides: Sequence[str], configs: Path, *, fetching: bool, deep: bool) -> list[PartReport]:
    """Check the weights that a training run with these options starts from, and download missing ones if wanted.

    For FLUX.2 klein this also encodes the prompt, where fetching is wanted.

    Args:
        overrides: of ``configs/train.yaml``.
        configs: the folder of that.
        fetching: False only looks at the files on this machine.
        deep: read every byte.

    Returns:
        A report for each network; none where a model begins from random weights.

    Raises:
        InputError: the options cannot be used, or a pipeline cannot be fetched.
    """
    from mimicbrush.models.pretrained.fetch import check_or_fetch_weights

    config = compose_training(overrides, configs)
    if OmegaConf.get_type(config.model) is PipelineModel:
        from mimicbrush.pipelines.find_pipeline import find_pipeline
        from mimicbrush.pipelines.open_pipeline import inspect_pipeline_networks

        if not config.model.path:
            raise InputError("model=pipeline needs model.path=DIR (a pipeline folder) or model.path=released")
        return inspect_pipeline_networks(find_pipeline(config.model.path, fetch=fetching), deep)
    model = OmegaConf.to_object(config.model)
    if isinstance(model, Flux2KleinModel):
        from mimicbrush.models.flux2_klein.fetch import check_or_fetch_klein

        return check_or_fetch_klein(model, fetching=fetching, deep=deep)
    return check_or_fetch_weights(model, fetching=fetching, deep=deep) if isinstance(model, PretrainedModel) else []
