"""Options of a run: their schemas, the search for unknown names, and the identity of a run.

Every group of ``configs/train.yaml`` is a dataclass, registered here as its schema: defaults and meanings are stated
once, in Python; YAML chooses; a misspelt key or a value of the wrong type is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from mimicbrush.data.options import DataOptions
from mimicbrush.errors import InputError, MimicBrushError
from mimicbrush.evaluation.heldout.options import DuringTrainingOptions
from mimicbrush.io.hashing import fingerprint
from mimicbrush.models.options import (
    FamilyOptions,
    Flux2KleinModel,
    PipelineModel,
    PretrainedModel,
    ToyFlux2KleinModel,
    ToyModel,
)
from mimicbrush.pipelines.small_model import model_folder
from mimicbrush.ranges import SEED_RANGE, check_options, number
from mimicbrush.training.options import TrainOptions

if TYPE_CHECKING:
    from mimicbrush.data.pair_sources import PairSource


@dataclass
class TrainConfig:
    """Options of ``configs/train.yaml``.

    Attributes:
        run_name: name of the run, in trackers and for its folder in runs/.
        run_dir: folder of the run.
        seed: seed of the weights (of toy models), data, noise and drops.
    """

    run_name: str = MISSING
    run_dir: str = MISSING
    seed: int = number(0, SEED_RANGE)
    data: DataOptions = field(default_factory=DataOptions)
    model: FamilyOptions = MISSING
    train: TrainOptions = field(default_factory=TrainOptions)
    eval: DuringTrainingOptions = field(default_factory=DuringTrainingOptions)

    def __post_init__(self) -> None:
        check_options(self)


@cache
def register_schemas() -> None:
    """Let Hydra check every group of the training config against its dataclass."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(group="data", name="schema", node=DataOptions)
    store.store(group="model", name="pretrained_schema", node=PretrainedModel)
    store.store(group="model", name="pipeline_schema", node=PipelineModel)
    store.store(group="model", name="toy_schema", node=ToyModel)
    store.store(group="model", name="flux2_klein_schema", node=Flux2KleinModel)
    store.store(group="model", name="flux2_klein_toy_schema", node=ToyFlux2KleinModel)
    store.store(group="train", name="schema", node=TrainOptions)
    store.store(group="eval", name="schema", node=DuringTrainingOptions)


def check_option_names(config: DictConfig) -> None:
    """Refuse options that do not exist: Hydra accepts ``+train.max_step=20``, and nothing would read it.

    Raises:
        InputError: names them, and what may have been meant.
    """
    unknown = _find_unknown(config, TrainConfig)
    if unknown:
        raise InputError("there is no such option:\n" + "\n".join(f"  {line}" for line in unknown))


def _find_unknown(config: DictConfig, schema: Any, prefix: str = "") -> list[str]:
    # The entries of a plain dict, such as data.sources, have names of the user's own.
    allowed = [str(key) for key in config] if schema is dict else [each.name for each in fields(schema)]
    lines: list[str] = []
    for key in map(str, config):
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            lines.append(f"{prefix}{key}" + (f". Did you mean {prefix + close[0]!r}?" if close else ""))
        elif not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            lines += _find_unknown(config[key], OmegaConf.get_type(config[key]), f"{prefix}{key}.")
    return lines


def apply_pipeline_conventions(config: DictConfig) -> tuple[DictConfig, list[str]]:
    """Set the options that ``model=pipeline`` leaves open to those of the pipeline.

    Returns:
        The config, and where it differs from the pipeline.

    Raises:
        InputError: the pipeline is absent, damaged, or its weights do not allow what was chosen.
    """
    model = config.model
    if OmegaConf.get_type(model) is not PipelineModel:
        return config, []
    from mimicbrush.pipelines.find_pipeline import find_pipeline
    from mimicbrush.pipelines.folder import read_conventions, read_networks

    if not model.path:
        raise InputError("model=pipeline needs model.path=DIR (a pipeline folder) or model.path=released")
    try:
        folder = find_pipeline(model.path, fetch=False)
        read_networks(folder)
        made_for = read_conventions(folder)
    except MimicBrushError as error:
        hint = (
            "Fetch the released weights with `mimicbrush fetch model=pipeline model.path=released`"
            if model.path == "released"
            else "An earlier run writes this folder into its run_dir. Train that run first, or give another folder"
        )
        raise InputError(f"model.path={model.path} cannot be used: {error}\n  {hint}") from error
    chosen = [each.name for each in fields(PipelineModel) if model[each.name] != each.default and each.name != "path"]
    options, changed = made_for.with_choices(
        {name: model[name] for name in chosen}, config.train.prediction_type, config.train.rescale_betas_zero_snr
    )
    return cast(DictConfig, OmegaConf.merge(config, {"model": options})), changed


#: Options that may change between a run and its continuation: they do not change what is learnt, up to rounding.
FREE_TO_CHANGE = (
    "run_name",
    "run_dir",
    "data.root",
    "data.input_root",
    "data.sources.*.root",
    "data.sources.*.input_root",
    "data.augment_on",
    "data.encoded_views",
    "data.max_bad_ratio",
    "data.num_workers",
    "data.loader_timeout_s",
    "model.path",
    "model.encoders",
    "model.base",
    "model.prompt_embeddings",
    "train.device",
    "train.cpu_threads",
    "train.batch_size",
    "train.max_steps",
    "train.max_minutes",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.save_in_background",
    "train.activation_checkpointing",
    "train.fused_norms",
    "train.selective_checkpointing",
    "train.compile",
    "train.compile_parts",
    "train.attention_backend",
    "train.resume",
    "train.tracker",
    "train.default_num_inference_steps",
    "train.default_guidance_scale",
    "train.default_timestep_spacing",
    "eval.*",
)


def run_identity(config: DictConfig, sources: Sequence[PairSource]) -> dict[str, Any]:
    """Collect what must be the same to resume a checkpoint: option -> value, the pairs, the starting weights."""
    bound = set()
    if not config.train.lr_scheduler.startswith("constant"):
        bound.add("train.max_steps")  # the rates of all steps depend on it
    if config.train.correspondence_final is not None:
        bound.add("train.max_steps")  # so do the weights of the correspondence loss
    if config.train.reference_drop == "first_quarter":
        bound.add("train.batch_size")
    chosen = {
        key: value
        for key, value in flatten_config(config).items()
        if key in bound or not any(fnmatchcase(key, free) for free in FREE_TO_CHANGE)
    }
    pairs = [f"{source.name} {len(source.pairs)} ({source.pairs.digest()[:16]})" for source in sources]
    return {**chosen, "pairs": ", ".join(pairs), "starting weights": _hash_starting_weights(config)}


def _hash_starting_weights(config: DictConfig) -> str:
    return fingerprint(list_weight_files(cast(FamilyOptions, OmegaConf.to_object(config.model))))


def list_weight_files(model: FamilyOptions) -> list[Path]:
    """List the files of all starting weights; none if these are random."""
    from mimicbrush.models.pretrained.requirements import inspect_starting_weights
    from mimicbrush.pipelines.find_pipeline import find_pipeline
    from mimicbrush.pipelines.folder import read_networks

    if isinstance(model, PretrainedModel):
        return [file for network in inspect_starting_weights(model).values() for file in network.files]
    if isinstance(model, PipelineModel):
        networks = read_networks(find_pipeline(model.path, fetch=False))
        return [file for _, network in networks.values() for file in network.files]
    if isinstance(model, Flux2KleinModel):
        from mimicbrush.models.flux2_klein.files import list_klein_files

        return list_klein_files(model)
    if isinstance(model, ToyModel) and model.encoders:
        return sorted(model_folder(model.encoders).glob("*/*.safetensors"))
    return []


def flatten_config(config: DictConfig) -> dict[str, Any]:
    """Flatten a config into option -> value for trackers, with dots in the names and lists as text."""
    flat: dict[str, Any] = {}
    for key, value in config.items_ex(resolve=True):
        if isinstance(value, DictConfig):
            flat |= {f"{key!s}.{name}": inner for name, inner in flatten_config(value).items()}
        else:
            flat[str(key)] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
