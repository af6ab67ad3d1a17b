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
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf

from mimicbrush.data.options import DataOptions
from mimicbrush.errors import CheckpointError, DataError, InputError, MimicBrushError, WeightsError
from mimicbrush.evaluation.options import DuringTrainingOptions
from mimicbrush.models.options import ModelOptions, PipelineModel, PretrainedModel, ToyModel
from mimicbrush.models.weight_facts import examine
from mimicbrush.training.options import TrainOptions

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from mimicbrush.data.batch import UndrawnBatch
    from mimicbrush.data.pair import Pair
    from mimicbrush.data.sources import Source
    from mimicbrush.evaluation.during_training import HeldOutResult
    from mimicbrush.models.parts import Parts
    from mimicbrush.models.weight_facts import PartReport
    from mimicbrush.pipelines import MimicBrushPipeline
    from mimicbrush.training.method import Trainee
    from mimicbrush.training.publisher import Weights
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
    eval: DuringTrainingOptions = field(default_factory=DuringTrainingOptions)


def register_schemas() -> None:
    """Let Hydra check every group of the training config against its dataclass."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(group="data", name="schema", node=DataOptions)
    store.store(group="model", name="pretrained_schema", node=PretrainedModel)
    store.store(group="model", name="pipeline_schema", node=PipelineModel)
    store.store(group="model", name="toy_schema", node=ToyModel)
    store.store(group="train", name="schema", node=TrainOptions)
    store.store(group="eval", name="schema", node=DuringTrainingOptions)


def train(config: DictConfig, run_dir: Path, stay_connected: bool = False) -> int:
    """Train as configured, and leave everything in `run_dir`.

    Args:
        config: see `TrainConfig`.
        run_dir: takes the place of the one in `config`.
        stay_connected: leave several processes as they are connected, for another run: torch connects them but once.

    Returns:
        The exit status: 0, or that of a process which a signal ended.
    """
    # 1. What can be checked before anything heavy is loaded.
    check_known(config)
    config, changed = with_conventions_of_pipeline(config)
    check_prerequisites(config)
    options = cast(TrainConfig, OmegaConf.to_object(config))

    from mimicbrush.training import checkpoints
    from mimicbrush.training.finished import FINISHED_FILE, Finished, find_finished, write_finished

    sources, notes = read_sources(options.data)
    notes += changed
    identity = run_identity(config, sources)
    finished = find_finished(run_dir, identity, options.train.max_steps, options.train.resume)
    if finished is not None:
        print(f"{run_dir} is complete ({finished.steps} steps): skipped. train.max_steps=MORE goes on")
        return 0
    folder = run_dir / "checkpoints"
    for newest in checkpoints.list_checkpoints(folder)[-1:]:
        if options.train.resume == "latest" and checkpoints.find_damage(newest, deep=False) is None:
            checkpoints.check_identity(newest, identity)

    import torch
    from accelerate.utils import set_seed

    from mimicbrush.models.schedule import noise_scheduler
    from mimicbrush.training.bad_samples import BadSamples
    from mimicbrush.training.guards import EXIT_STATUS
    from mimicbrush.training.loop import Outside
    from mimicbrush.training.loop import train as run_training
    from mimicbrush.training.meters import Meters, finite_or_none
    from mimicbrush.training.method import FrozenEncoders
    from mimicbrush.training.publisher import Publisher
    from mimicbrush.training.speedups import apply_speedups, peak_flop_per_s, training_flop
    from mimicbrush.training.trackers import log_pictures, start_tracker
    from mimicbrush.training.trained_parts import choose_trained

    # 2. Where it goes on.
    accelerator = make_accelerator(options.train, run_dir)
    found = on_main_process(accelerator, lambda: checkpoints.find_checkpoint(folder, options.train.resume))
    if found is not None:
        checkpoints.check_identity(found, identity)

    # 3. The networks.
    if options.train.cpu_threads:
        torch.set_num_threads(options.train.cpu_threads)
    set_seed(options.seed)
    parts = build_parts(options.model, options.seed)
    half = half_precision(options.train.mixed_precision)
    encoders = FrozenEncoders(parts, options.model).to(accelerator.device, half)
    trainee = build_trainee(parts, options.model)
    choose_trained(dict(trainee.named_children()), options.train)
    training_data = {"heldout_ratio": options.data.heldout_ratio, "source_hashes": seen_sources(options, sources)}
    publisher = Publisher(trainee, parts, options.model, options.train, training_data)
    flop = training_flop(trainee, encoders)
    apply_speedups(trainee, options.train, accelerator.device)
    as_run = cast(DictConfig, OmegaConf.merge(config, {"run_dir": str(run_dir)}))
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / FINISHED_FILE).unlink(missing_ok=True)
        (run_dir / CONFIG_FILE).write_text(OmegaConf.to_yaml(as_run, resolve=True))
        (run_dir / TRAINING_DATA_FILE).write_text(json.dumps(training_data, indent=1))
    start_tracker(accelerator, options.train.tracker, options.run_name, run_dir, flattened(as_run), found)

    # 4. The evaluation on the way.
    first_step = 0 if found is None else checkpoints.read_state(found)["step"]
    evaluate = build_evaluation(options, sources, run_dir, accelerator, first_step)

    def evaluate_weights(weights: Weights, step: int) -> dict[str, float]:
        assert evaluate is not None
        result = evaluate(publisher.pipeline(weights, encoders=encoders), step)
        log_pictures(accelerator, "heldout/pictures", [(row.caption, row.pictures) for row in result.table], step)
        return result.figures

    # 5. The run.
    passes = accelerator.gradient_accumulation_steps
    for note in notes:
        accelerator.print(f"note: {note}")
    accelerator.print(
        f"{sum(len(source.pairs) for source in sources)} pairs of {len(source_keys(sources))} source files to train on "
        f"(data.heldout_ratio={options.data.heldout_ratio} keeps the others for evaluation); "
        f"{accelerator.num_processes} process(es) on {accelerator.device}, {passes} pass(es) a step"
    )
    outcome = run_training(
        trainee=trainee,
        encoders=encoders,
        noise_scheduler=noise_scheduler(options.train.prediction_type),
        loader=build_loader(sources, options, accelerator),
        outside=Outside(publisher.export, evaluate_weights if evaluate else None, options.eval.every_steps),
        options=options.train,
        meters=Meters(
            accelerator.device,
            passes,
            noise_scheduler().config.num_train_timesteps,
            flop,
            peak_flop_per_s(accelerator.device, options.train.mixed_precision),
        ),
        bad_samples=BadSamples(options.data.max_bad_ratio, run_dir / "bad_samples.txt"),
        accelerator=accelerator,
        run_dir=run_dir,
        identity=identity,
        resume_from=found,
    )
    if stay_connected:
        for tracker in accelerator.trackers:
            tracker.finish()
    else:
        accelerator.end_training()
    if outcome.signal:
        accelerator.print(
            f"stopped by signal {outcome.signal} after step {outcome.step} of {options.train.max_steps}; saved. "
            f"train.resume=latest goes on; python scripts/export_run.py {run_dir} makes a pipeline of it"
        )
        return EXIT_STATUS[outcome.signal]
    if accelerator.is_main_process and outcome.step >= options.train.max_steps:
        write_finished(run_dir, Finished(outcome.step, outcome.seconds, finite_or_none(outcome.figures), identity))
    accelerator.print(
        f"{outcome.step} of {options.train.max_steps} steps done"
        + (" before; train.max_steps=MORE goes on" if not outcome.figures else "")
        + ". Edit with it:\n"
        f"  python scripts/infer.py REF.jpg SRC.jpg MASK.png --model {run_dir / 'pipeline'}"
    )
    return 0


#: What a run leaves in its folder for whoever exports it.
CONFIG_FILE, TRAINING_DATA_FILE = "config.yaml", "training_data.json"


def export_run(run_dir: Path, checkpoint: str, output: Path, *, average: bool = True) -> Path:
    """A pipeline of a checkpoint of a run, whether the run is over or goes on.

    Args:
        run_dir: of the run.
        checkpoint: "latest" for the newest that verifies, or its folder.
        output: the pipeline folder; an older one is replaced when the new one is whole.
        average: the averaged weights, or those of the last step.

    Returns:
        The checkpoint that was taken.

    Raises:
        InputError: the folder is none of a run, or `output` holds something else.
        CheckpointError: there is no good checkpoint, or no average in it.
        WeightsError: the frozen networks, which checkpoints do not hold, are absent.
    """
    for name in (CONFIG_FILE, TRAINING_DATA_FILE):
        if not (run_dir / name).is_file():
            raise InputError(f"{run_dir} is no folder of a training run (it has no {name})")
    if output.exists() and not (output / "model_index.json").is_file():
        raise InputError(f"{output} exists and is no pipeline folder; name another")

    from mimicbrush.training import checkpoints

    if checkpoint == "latest":
        found = checkpoints.find_checkpoint(run_dir / "checkpoints", "latest")
    else:
        found = checkpoints.checked(Path(checkpoint))
    if found is None:
        raise CheckpointError(f"{run_dir} has no checkpoint yet")

    from mimicbrush.training.publisher import Publisher
    from mimicbrush.training.state import saved_weights
    from mimicbrush.training.trained_parts import choose_trained

    config = OmegaConf.load(run_dir / CONFIG_FILE)
    model = cast(ModelOptions, OmegaConf.to_object(OmegaConf.merge(_model_schema(config.model), config.model)))
    train = cast(TrainOptions, OmegaConf.to_object(OmegaConf.merge(TrainOptions, config.train)))
    parts = build_parts(model, config.seed)
    trainee = build_trainee(parts, model)
    training_data = json.loads((run_dir / TRAINING_DATA_FILE).read_text())
    publisher = Publisher(trainee, parts, model, train, training_data)
    choose_trained(dict(trainee.named_children()), train)
    publisher.export(saved_weights(found, trainee, average=average), output)
    return found


def _model_schema(model: DictConfig) -> type[ModelOptions]:
    """Which of the schemas a saved configuration was made of: the one that has all of its options."""
    schemas = (ToyModel, PretrainedModel, PipelineModel)
    return next(schema for schema in schemas if {each.name for each in fields(schema)} == set(model))


def build_trainee(parts: Parts, model: ModelOptions) -> Trainee:
    """The networks that are trained, as one."""
    from mimicbrush.training.method import Trainee

    return Trainee(
        parts.unet,
        parts.reference_unet,
        parts.image_projector,
        parts.depth_projector,
        size_px=model.size_px,
        reference_blend=model.reference_blend,
        reference_timestep=model.reference_timestep,
    )


def make_accelerator(options: TrainOptions, run_dir: Path) -> Accelerator:
    """What runs the training on one or many devices; it hears what `accelerate launch` or torchrun say."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    accelerator = Accelerator(
        # Gradients live in the buckets that travel, and not a second time beside them.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        cpu=options.device == "cpu",
        mixed_precision=options.mixed_precision,
        log_with=None if options.tracker == "none" else options.tracker,
        project_dir=str(run_dir),
    )
    accelerator.gradient_accumulation_steps = options.split_batch(accelerator.num_processes)[1]
    return accelerator


def half_precision(mixed_precision: str) -> torch.dtype:
    """The type of what is not trained."""
    import torch

    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]


T = TypeVar("T")


def on_main_process(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do something once, and give all processes what came out, an error of ours too."""
    from accelerate.utils import broadcast_object_list

    result: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = work()
        except MimicBrushError as error:
            result[1] = error
    broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return cast(T, result[0])


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


def with_conventions_of_pipeline(config: DictConfig) -> tuple[DictConfig, list[str]]:
    """Fill in what ``model=pipeline`` leaves open: what the pipeline was made for.

    Returns:
        The config, and where it differs from the pipeline.

    Raises:
        InputError: the pipeline is absent, damaged, or its weights do not allow what was chosen.
    """
    model = config.model
    if OmegaConf.get_type(model) is not PipelineModel:
        return config, []
    from mimicbrush.pipelines.conventions import find_pipeline, read_conventions, read_networks

    if not model.path:
        raise InputError("model=pipeline needs model.path: the folder of a pipeline, or released")
    try:
        folder = find_pipeline(model.path, fetch=False)
        read_networks(folder)
        made_for = read_conventions(folder)
    except MimicBrushError as error:
        raise InputError(
            f"model.path={model.path} cannot be used: {error}\n  Fetch the released weights with "
            "`python scripts/fetch_weights.py model=pipeline model.path=released`"
        ) from error
    chosen = [each.name for each in fields(PipelineModel) if model[each.name] != each.default and each.name != "path"]
    options, changed = made_for.with_choices({name: model[name] for name in chosen}, config.train.prediction_type)
    return cast(DictConfig, OmegaConf.merge(config, {"model": options})), changed


def provide_weights(overrides: Sequence[str], configs: Path, *, fetching: bool, deep: bool) -> list[PartReport]:
    """The weights that a training run with these options would begin from: fetched, where that is wanted, and checked.

    Args:
        overrides: of ``configs/train.yaml``.
        configs: the folder of that.
        fetching: False only looks at what is on this machine.
        deep: read every byte.

    Returns:
        A report for each network; none where a model begins from random weights.

    Raises:
        InputError: the options are no good, or a pipeline cannot be had.
    """
    from mimicbrush.models.weight_fetching import provide_weights

    register_schemas()
    try:
        with initialize_config_dir(str(configs.resolve()), version_base="1.3"):
            config = compose("train", list(overrides))
    except HydraException as error:
        raise InputError(f"these options cannot be used: {error}") from error
    check_known(config)
    if OmegaConf.get_type(config.model) is PipelineModel:
        from mimicbrush.pipelines.conventions import find_pipeline
        from mimicbrush.pipelines.load import look_at_networks

        if not config.model.path:
            raise InputError("model=pipeline needs model.path: the folder of a pipeline, or released")
        return look_at_networks(find_pipeline(config.model.path, fetch=fetching), deep)
    model = OmegaConf.to_object(config.model)
    return provide_weights(model, fetching=fetching, deep=deep) if isinstance(model, PretrainedModel) else []


def check_prerequisites(config: DictConfig) -> None:
    """Stop within seconds where data, weights or GPUs are absent, and name all that is.

    Raises:
        InputError: says what is missing, which option points to it and how to get it.
    """
    missing: list[str] = []
    missing += _absent_folders(config.data)
    if config.eval.every_steps and config.eval.pairs and not Path(config.eval.pairs).is_dir():
        missing.append(f"eval.pairs is no folder: {config.eval.pairs}. It names a folder of mined pairs to evaluate on")
    model = OmegaConf.to_object(config.model)
    if isinstance(model, PretrainedModel):
        try:
            examine(model)
        except WeightsError as error:
            missing.append(str(error))
    if config.train.tracker != "none" and importlib.util.find_spec(config.train.tracker) is None:
        missing.append(
            f"train.tracker={config.train.tracker}, but that package is not installed. "
            f"Install it (pip install {config.train.tracker}), or use train.tracker=none"
        )
    if "lora" in (config.train.unet, config.train.reference_unet) and importlib.util.find_spec("peft") is None:
        missing.append("adapters (lora) need the package peft. Install it: pip install 'mimicbrush[lora]'")
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
    "train.save_in_background",
    "train.activation_checkpointing",
    "train.compile",
    "train.attention_backend",
    "train.resume",
    "train.tracker",
    "train.default_num_inference_steps",
    "train.default_guidance_scale",
    "eval.*",
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


def seen_sources(options: TrainConfig, sources: Sequence[Source]) -> list[str]:
    """Hashes of the source files that the weights have seen in the end, in this run or before it."""
    from mimicbrush.evaluation.heldout import read_training_data
    from mimicbrush.pipelines.conventions import find_pipeline

    seen = {f"{key:016x}" for key in source_keys(sources)}
    if isinstance(options.model, PipelineModel):
        before = read_training_data(find_pipeline(options.model.path, fetch=False))
        seen |= before.source_hashes if before else frozenset()
    return sorted(seen)


def build_parts(options: ModelOptions, seed: int) -> Parts:
    """All networks, with starting weights."""
    from mimicbrush.models.parts import pretrained_parts, toy_parts

    if isinstance(options, ToyModel):
        return toy_parts(options, seed=seed)
    if isinstance(options, PipelineModel):
        from mimicbrush.pipelines.conventions import find_pipeline
        from mimicbrush.pipelines.load import pipeline_parts

        return pipeline_parts(find_pipeline(options.path, fetch=False), options.size_px)
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


def build_evaluation(
    options: TrainConfig, sources: Sequence[Source], run_dir: Path, accelerator: Accelerator, first_step: int = 0
) -> Callable[[MimicBrushPipeline, int], HeldOutResult] | None:
    """(pipeline with the weights at a step, step) -> what it does on pairs that are not trained on.

    Every process must call it, each with the same weights on its own device. The files come to `run_dir`/heldout.

    Args:
        options: of the run.
        sources: what is trained on.
        run_dir: of the run.
        accelerator: says how many processes share the pairs.
        first_step: of which the run goes on.

    Returns:
        None where nothing is to be evaluated, or nothing can be, which is said.

    Raises:
        DataError: `eval.pairs` was trained on, or has too few pairs.
    """
    if not options.eval.every_steps:
        return None

    from accelerate.utils import gather_object

    from mimicbrush.evaluation.during_training import HeldOutEvaluation, alone
    from mimicbrush.evaluation.editors import PipelineEditor

    pairs, notes = evaluated_pairs(options, sources)
    for note in notes:
        accelerator.print(f"note: {note}")
    if not len(pairs):
        return None
    evaluation = HeldOutEvaluation(
        pairs,
        options.model.size_px,
        options.eval.evaluation(),
        run_dir / "heldout",
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        gather=gather_object if accelerator.num_processes > 1 else alone,
        first_step=first_step,
    )

    def evaluate(pipeline: MimicBrushPipeline, step: int) -> HeldOutResult:
        pipeline.set_progress_bar_config(disable=True)
        editor = PipelineEditor(pipeline, options.eval.num_inference_steps, options.eval.guidance_scale)
        result = evaluation(editor, step)
        for note in result.notes:
            accelerator.print(f"note: {note}")
        return result

    return evaluate


def evaluated_pairs(options: TrainConfig, sources: Sequence[Source]) -> tuple[Sequence[Pair], list[str]]:
    """The pairs to evaluate on while training, none where there are too few, and what there is to say about them."""
    from mimicbrush.data.manifest import read_manifest
    from mimicbrush.evaluation.heldout import TrainingData, heldout_pairs, select_pairs

    training = TrainingData(options.data.heldout_ratio, frozenset(seen_sources(options, sources)))
    if options.eval.pairs is not None:
        try:
            selection = select_pairs(read_manifest(Path(options.eval.pairs)), "heldout", training)
        except DataError as error:
            raise DataError(f"eval.pairs={options.eval.pairs} cannot be evaluated on: {error}") from error
        return selection.pairs, selection.messages
    named = [(source.root, source.input_root) for source in options.data.sources.values()]
    roots = dict(named or [(options.data.root, options.data.input_root)])
    tables = [read_manifest(Path(root), Path(inputs) if inputs else None) for root, inputs in roots.items()]
    pairs, notes = heldout_pairs(tables, training)
    count = len(set(pairs.column("source_hash")))
    if count < 2:
        notes.append(
            f"nothing is evaluated while training: it takes two videos or more that are not trained on, and "
            f"data.heldout_ratio={options.data.heldout_ratio} holds {count} out; mine more, or name a mined folder "
            "with eval.pairs=DIR (eval=none says nothing)"
        )
        return [], notes
    return pairs, notes
