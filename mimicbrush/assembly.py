"""Config -> objects, in reading order. The only module that knows hydra and omegaconf.

Every group of ``configs/train.yaml`` is a dataclass, registered here as its schema: defaults and meanings are
stated once, in Python; YAML chooses; a misspelt key or a value of the wrong type is an error.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from mimicbrush.data.options import DataOptions
from mimicbrush.errors import InputError, WeightsError
from mimicbrush.models.options import ModelOptions, PretrainedModel, ToyModel
from mimicbrush.models.weights import find_weights
from mimicbrush.training.options import TrainOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mimicbrush.data.batch import UndrawnBatch
    from mimicbrush.data.sources import Source
    from mimicbrush.models.parts import Parts
    from mimicbrush.types import TrainBatch


@dataclass
class TrainConfig:
    """All of ``configs/train.yaml``.

    Attributes:
        run_name: names the run's folder under runs/ and the run in a tracker.
        run_dir: everything that the run leaves behind.
        seed: of weights (toy size), data, noise and drops.
    """

    run_name: str = MISSING
    run_dir: str = MISSING
    seed: int = 0
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = MISSING
    train: TrainOptions = field(default_factory=TrainOptions)


def register_schemas() -> None:
    """Let Hydra check every group of the training config against its dataclass."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(group="data", name="schema", node=DataOptions)
    store.store(group="model", name="pretrained_schema", node=PretrainedModel)
    store.store(group="model", name="toy_schema", node=ToyModel)
    store.store(group="train", name="schema", node=TrainOptions)


def train(config: DictConfig, run_dir: Path) -> None:
    """Train as configured, and leave everything in `run_dir`."""
    # 1. What can be checked before anything heavy is loaded.
    check_known(config)
    check_prerequisites(config)
    options = cast(TrainConfig, OmegaConf.to_object(config))

    from mimicbrush.models.schedule import noise_scheduler
    from mimicbrush.training import checkpoints

    sources, notes = read_sources(options.data)
    identity = run_identity(config, sources)
    found = checkpoints.find_checkpoint(run_dir / "checkpoints", options.train.resume)
    if found is not None:
        checkpoints.read_state(found, identity)

    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from mimicbrush.training.loop import train as run_training
    from mimicbrush.training.method import FrozenEncoders, Trainee

    # 2. The networks.
    if options.train.cpu_threads:
        torch.set_num_threads(options.train.cpu_threads)
    parts = build_parts(options.model, options.seed)
    accelerator = Accelerator(
        cpu=options.train.device == "cpu",
        mixed_precision=options.train.mixed_precision,
        log_with=None if options.train.tracker == "none" else options.train.tracker,
        project_dir=str(run_dir),
    )
    accelerator.gradient_accumulation_steps = options.train.split_batch(accelerator.num_processes)[1]
    set_seed(options.seed)
    as_run = cast(DictConfig, OmegaConf.merge(config, {"run_dir": str(run_dir)}))
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(as_run, resolve=True))
    if options.train.tracker != "none":
        accelerator.init_trackers(
            "mimicbrush",
            config=flattened(as_run),
            init_kwargs={"wandb": {"name": options.run_name, "dir": str(run_dir)}},
        )

    # 3. The run.
    already = found is not None and found == checkpoints.checkpoint_path(found.parent, options.train.max_steps)
    passes = accelerator.gradient_accumulation_steps
    for note in notes:
        accelerator.print(f"note: {note}")
    accelerator.print(
        f"{sum(len(source.pairs) for source in sources)} pairs of {len(source_keys(sources))} source files to train on "
        f"(data.heldout_ratio={options.data.heldout_ratio} keeps the others for evaluation); "
        f"{accelerator.num_processes} process(es) on {accelerator.device}, {passes} pass(es) a step"
    )
    steps = run_training(
        trainee=Trainee(
            parts.unet,
            parts.reference_unet,
            parts.image_projector,
            parts.depth_projector,
            size_px=options.model.size_px,
            reference_blend=options.model.reference_blend,
            reference_timestep=options.model.reference_timestep,
        ),
        encoders=FrozenEncoders(parts, options.model),
        noise_scheduler=noise_scheduler(options.train.prediction_type),
        loader=build_loader(sources, options, accelerator),
        export_pipeline=lambda folder: export_pipeline(folder, parts, sources, options),
        options=options.train,
        max_bad_ratio=options.data.max_bad_ratio,
        accelerator=accelerator,
        run_dir=run_dir,
        identity=identity,
        resume_from=found,
    )
    accelerator.end_training()
    accelerator.print(
        f"{steps} of {options.train.max_steps} steps done"
        + (" before; train.max_steps=MORE goes on" if already else "")
        + ". Edit with it:\n"
        f"  python scripts/infer.py REF.jpg SRC.jpg MASK.png --model {run_dir / 'pipeline'}"
    )


def check_known(config: DictConfig) -> None:
    """Refuse options that do not exist: Hydra lets ``+train.max_step=20`` pass, and nothing would read it.

    Raises:
        InputError: names them, and what may have been meant.
    """
    unknown = _unknown(config, TrainConfig)
    if unknown:
        raise InputError("there is no such option:\n" + "\n".join(f"  {line}" for line in unknown))


def _unknown(config: DictConfig, schema: Any, prefix: str = "") -> list[str]:
    # The entries of a plain dict, such as data.sources, have names of the user's own.
    known = [str(key) for key in config] if schema is dict else [each.name for each in fields(schema)]
    lines: list[str] = []
    for key in map(str, config):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            lines.append(f"{prefix}{key}" + (f" (did you mean {prefix}{close[0]}?)" if close else ""))
        elif not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            lines += _unknown(config[key], OmegaConf.get_type(config[key]), f"{prefix}{key}.")
    return lines


def check_prerequisites(config: DictConfig) -> None:
    """Stop within seconds where data, weights or GPUs are absent, and name all that is.

    Raises:
        InputError: says what is missing, which option points to it and how to get it.
    """
    missing: list[str] = []
    missing += _absent_folders(config.data)
    model = OmegaConf.to_object(config.model)
    if isinstance(model, PretrainedModel):
        try:
            find_weights(model)
        except WeightsError as error:
            missing.append(str(error))
    if config.train.tracker != "none" and importlib.util.find_spec(config.train.tracker) is None:
        missing.append(
            f"train.tracker={config.train.tracker}, but that package is not installed. "
            f"Install it (pip install {config.train.tracker}), or use train.tracker=none"
        )
    if config.train.device == "cuda" and not _has_gpu():
        missing.append(
            "train.device=cuda, but PyTorch sees no CUDA GPU. The paper's setting needs 8 GPUs of the A100 "
            "class (or one, and patience: gradients are accumulated);\n  train.device=cpu insists on a CPU."
        )
    if missing:
        toy = "To try everything on a CPU, without weights: python scripts/train.py +experiment=smoke data.root=DIR"
        raise InputError("\n".join(["this run cannot start:", *[f"- {item}" for item in missing], toy]))


def _absent_folders(data: DictConfig) -> list[str]:
    """Which folders of mined pairs are not given, or not there."""
    named = {f"data.sources.{name}.root": source.root for name, source in data.sources.items()}
    if data.root or not named:
        named["data.root"] = data.root
    how = "python scripts/mine_pairs.py input=FOLDER_OF_VIDEOS output=DIR"
    return [
        f"{option} {f'is no folder: {root}' if root else 'is not set'}. It names a folder of mined pairs; make one "
        f"with\n  {how}"
        for option, root in named.items()
        if not root or not Path(root).is_dir()
    ]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


#: What may change between a run and its continuation without changing what is learnt, but for rounding.
FREE_TO_CHANGE = (
    "run_name",
    "run_dir",
    "data.root",
    "data.input_root",
    "data.sources.*.root",
    "data.sources.*.input_root",
    "data.augment_on",
    "data.max_bad_ratio",
    "data.num_workers",
    "train.device",
    "train.cpu_threads",
    "train.batch_size",
    "train.max_steps",
    "train.max_minutes",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.resume",
    "train.tracker",
    "train.default_num_inference_steps",
    "train.default_guidance_scale",
)


def run_identity(config: DictConfig, sources: Sequence[Source]) -> dict[str, Any]:
    """What a checkpoint must agree on to be resumed: option -> value, and which pairs there are."""
    chosen = {
        key: value
        for key, value in flattened(config).items()
        if not any(fnmatchcase(key, free) for free in FREE_TO_CHANGE)
    }
    pairs = [f"{source.name} {len(source.pairs)} ({source.pairs.digest()[:16]})" for source in sources]
    return {**chosen, "pairs": ", ".join(pairs)}


def flattened(config: DictConfig) -> dict[str, Any]:
    """A config as option -> value, with dots in the names; lists as text, as trackers want it."""
    flat: dict[str, Any] = {}
    for key, value in config.items_ex(resolve=True):
        if isinstance(value, DictConfig):
            flat |= {f"{key!s}.{name}": inner for name, inner in flattened(value).items()}
        else:
            flat[str(key)] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def read_sources(options: DataOptions) -> tuple[list[Source], list[str]]:
    """The sources to train on, without the pairs held out, and what there is to say about them."""
    from mimicbrush.data.sources import load_sources

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sources = load_sources(options)
    return sources, [str(warning.message) for warning in caught]


def source_keys(sources: Sequence[Source]) -> list[int]:
    """The first 64 bits of the hashes of all source files, sorted, each once."""
    keys = [source.pairs.column("source_key") for source in sources]
    return [int(key) for key in np.unique(np.concatenate(keys))]


def build_parts(options: ModelOptions, seed: int) -> Parts:
    """All networks, with starting weights."""
    from mimicbrush.models.parts import pretrained_parts, toy_parts

    if isinstance(options, ToyModel):
        return toy_parts(options, seed=seed)
    return pretrained_parts(cast(PretrainedModel, options), seed=seed)


def build_loader(
    sources: Sequence[Source], options: TrainConfig, accelerator: Accelerator
) -> Callable[[int, int], Iterable[TrainBatch | UndrawnBatch]]:
    """(first step, last step) -> this rank's micro-batches."""
    from mimicbrush.data.dataset import PairDataset
    from mimicbrush.data.loader import load_batches
    from mimicbrush.data.sampler import RankBatches

    dataset = PairDataset(sources, options.model.size_px, options.data, seed=options.seed)

    def load(first_step: int, last_step: int) -> Iterable[TrainBatch | UndrawnBatch]:
        batches = RankBatches(
            first_step,
            last_step,
            *options.train.split_batch(accelerator.num_processes),
            accelerator.process_index,
            accelerator.num_processes,
        )
        return load_batches(
            dataset, batches, num_workers=options.data.num_workers, pin_memory=accelerator.device.type == "cuda"
        )

    return load


def export_pipeline(folder: Path, parts: Parts, sources: Sequence[Source], options: TrainConfig) -> None:
    """Save the pipeline that was trained, with its conventions and the sources that it has seen."""
    from mimicbrush.models.schedule import noise_scheduler
    from mimicbrush.pipelines import MimicBrushPipeline
    from mimicbrush.pipelines.load import quiet_libraries

    quiet_libraries()
    pipeline = MimicBrushPipeline(
        **vars(parts),
        scheduler=noise_scheduler(options.train.prediction_type),
        reference_blend=options.model.reference_blend,
        reference_timestep=options.model.reference_timestep,
        depth_convention=options.model.depth_convention,
        no_depth_convention=options.model.no_depth_convention,
        letterbox_order=options.model.letterbox_order,
        default_num_inference_steps=options.train.default_num_inference_steps,
        default_guidance_scale=options.train.default_guidance_scale,
    )
    pipeline.save_pretrained(folder)
    seen = [f"{key:016x}" for key in source_keys(sources)]
    training_data = {"heldout_ratio": options.data.heldout_ratio, "source_hashes": seen}
    (folder / "training_data.json").write_text(json.dumps(training_data, indent=1))
