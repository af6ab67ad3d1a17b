"""A training run from its options: plan it, build it, and run it. Also makes pipelines from checkpoints of a run."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mimicbrush.assembly.build import (
    build_evaluation,
    build_loader,
    find_training_data,
    list_origin_keys,
    make_accelerator,
    read_pair_sources,
    run_on_main_process,
)
from mimicbrush.assembly.command_line import escape_text, format_config
from mimicbrush.assembly.config import (
    TrainConfig,
    apply_pipeline_conventions,
    check_option_names,
    flatten_config,
    list_weight_files,
    run_identity,
)
from mimicbrush.assembly.encoding import check_encoded_views
from mimicbrush.assembly.families import BuiltFamily, build_exporter, build_family, check_family
from mimicbrush.assembly.prerequisites import check_prerequisites
from mimicbrush.assembly.run_folder import FINISHED_FILE, FinishedRun, find_finished_run, write_finished_run
from mimicbrush.data.training_data import TRAINING_DATA_FILE, read_training_data, write_training_data
from mimicbrush.errors import CheckpointError, InputError, WeightsError
from mimicbrush.io.atomic import write_aside
from mimicbrush.io.hashing import fingerprint
from mimicbrush.io.jsonl import read_steps
from mimicbrush.io.locks import hold_folder, hold_name
from mimicbrush.io.outputs import check_output_folder
from mimicbrush.io.text import make_storable
from mimicbrush.models.options import (
    FamilyOptions,
    Flux2KleinModel,
    PipelineModel,
    PretrainedModel,
    ToyFlux2KleinModel,
    ToyModel,
)
from mimicbrush.training.options import TrainOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mimicbrush.data.encoded_views import EncodedFolder
    from mimicbrush.data.pair_sources import PairSource
    from mimicbrush.training.export import ExportWeights
    from mimicbrush.training.metrics import TrainingHooks
    from mimicbrush.training.trainer import Trainer


#: The options of a run, in its folder.
CONFIG_FILE = "config.yaml"


def train(config: DictConfig, run_dir: Path, stay_connected: bool = False) -> int:
    """Train as configured, and leave everything in `run_dir`.

    Args:
        config: see `TrainConfig`.
        run_dir: takes the place of the one in `config`.
        stay_connected: leave several processes as they are connected, for another run: torch connects them but once.

    Returns:
        The exit status: 0, or that of a process which a signal ended (docs/training.md has all of them).
    """
    plan = _plan_run(config, run_dir)
    if plan is None:
        return 0
    with ExitStack() as held:
        return _run_and_report(plan, _build_run(plan, held), stay_connected)


@dataclass(frozen=True)
class RunPlan:
    """What will be run: the options, checked before anything heavy is loaded.

    Attributes:
        config: with all conventions filled in.
        options: the same as dataclasses.
        run_dir: of the run.
        pair_sources: to train on, without the pairs held out.
        notes: for the user.
        identity: what a checkpoint must agree on to be resumed, see `run_identity`.
        encoded: the folder of encoded views to train from, if any.
    """

    config: DictConfig
    options: TrainConfig
    run_dir: Path
    pair_sources: list[PairSource]
    notes: list[str]
    identity: dict[str, Any]
    encoded: EncodedFolder | None = None


@dataclass(frozen=True)
class BuiltRun:
    """A run that is ready to start: its trainer, and the step that it starts from."""

    trainer: Trainer
    first_step: int


def _plan_run(config: DictConfig, run_dir: Path) -> RunPlan | None:
    """1. Plan the run; None if it is already complete, which is printed.

    Raises:
        MimicBrushError: an option, the data or the run folder do not allow it.
    """
    check_option_names(config)
    config, changed = apply_pipeline_conventions(config)
    # With several processes, the main one checks it after they are connected.
    if os.environ.get("WORLD_SIZE", "1") == "1":
        check_output_folder(run_dir, "run_dir=")
    check_prerequisites(config)
    options = cast(TrainConfig, OmegaConf.to_object(config))

    check_family(options)
    if options.train.distill != "none":
        _check_distillation(options)

    from mimicbrush.data.manifest import check_outside_mined_folder
    from mimicbrush.training import checkpoints

    check_outside_mined_folder(run_dir, f"run_dir={run_dir}")
    pair_sources, notes = read_pair_sources(options.data)
    if options.train.never_warms_up():
        notes.append(
            "the run ends before the learning rate reaches train.learning_rate: "
            f"train.lr_warmup_steps={options.train.lr_warmup_steps}, train.max_steps={options.train.max_steps}"
        )
    identity = run_identity(config, pair_sources)
    finished = find_finished_run(run_dir, identity, options.train.max_steps, options.train.resume)
    if finished is not None:
        print(f"{run_dir} is complete ({finished.steps} steps): skipped. To continue, set a larger train.max_steps")
        return None
    encoded = check_encoded_views(config, pair_sources) if options.data.encoded_views else None
    # Another run's checkpoint is refused here, within seconds; the full check of the files comes later.
    for newest in checkpoints.list_checkpoints(run_dir / "checkpoints")[-1:]:
        if options.train.resume == "latest" and checkpoints.verify_checkpoint(newest, deep=False) is None:
            checkpoints.check_identity(newest, identity)
    return RunPlan(config, options, run_dir, pair_sources, notes + changed, identity, encoded)


def _check_distillation(options: TrainConfig) -> None:
    """Check the other options that distillation needs.

    Raises:
        InputError: there is no teacher, or evaluations would take more steps than are learnt.
    """
    if not isinstance(options.model, PipelineModel):
        raise InputError(
            f"train.distill={options.train.distill} needs a pipeline to learn from: model=pipeline model.path=FOLDER"
        )
    steps, most = options.eval.num_inference_steps, options.train.distill_ddim_steps
    if options.eval.every_steps and steps is not None and steps > most:
        raise InputError(
            f"eval.num_inference_steps={steps} is more than train.distill_ddim_steps={most}, the most steps that the "
            "model learns; with eval.num_inference_steps=null, evaluations use train.default_num_inference_steps"
        )


def _build_run(plan: RunPlan, held: ExitStack) -> BuiltRun:
    """2. Build it: devices, networks, run folder, evaluation, trainer.

    Args:
        plan: what will be run.
        held: gets the lock of the run folder, which the main process alone takes for all.

    Raises:
        MimicBrushError: the run folder, the checkpoint, the weights or the options do not allow it.
    """
    import torch
    from accelerate.utils import DistributedType, set_seed

    from mimicbrush.training import checkpoints
    from mimicbrush.training.guards import BadSamples
    from mimicbrush.training.metrics import TrainingMetrics, start_tracker
    from mimicbrush.training.performance import find_peak_flop_per_s
    from mimicbrush.training.trainer import Trainer

    options, run_dir = plan.options, plan.run_dir

    # The devices, and the checkpoint to continue from.
    accelerator = make_accelerator(options.train, run_dir)
    is_distilled = options.train.distill != "none"
    is_sharded = accelerator.distributed_type == DistributedType.FSDP
    for name, is_chosen in (("train.compile", options.train.compile), ("train.distill", is_distilled)):
        if is_sharded and is_chosen:
            raise InputError(f"{name} with sharded weights is not tested; leave out one of them")

    def take_run_dir() -> None:
        for folder in (run_dir, run_dir / "checkpoints", run_dir / "pipeline"):
            check_output_folder(folder, "run_dir=")
        held.enter_context(hold_folder(run_dir))

    run_on_main_process(accelerator, take_run_dir)
    checkpoint = run_on_main_process(
        accelerator, lambda: checkpoints.find_checkpoint(run_dir / "checkpoints", options.train.resume)
    )
    first_step = 0
    if checkpoint is not None:
        checkpoints.check_identity(checkpoint, plan.identity)
        first_step = checkpoints.read_state(checkpoint)["step"]

    # The networks: those that are trained, and the frozen ones in the type that they run in.
    if options.train.cpu_threads:
        torch.set_num_threads(options.train.cpu_threads)
    set_seed(options.seed % 2**32)  # it also sets the global seed of NumPy (32 bits), which nothing here uses
    training_data = find_training_data(options, plan.pair_sources)
    family = build_family(options, plan.encoded, training_data, accelerator)
    num_trained = sum(parameter.numel() for parameter in family.method.trained_parameters().values())
    needed_bytes = checkpoints.estimate_missing_bytes(
        run_dir / "checkpoints", num_trained, has_average=options.train.ema_decay > 0
    )
    run_on_main_process(accelerator, lambda: check_output_folder(run_dir, "run_dir=", needed_bytes=needed_bytes))
    set_seed(options.seed % 2**31, device_specific=True)  # for dropout, each process its own: its rank is added

    # The run folder, and the tracker.
    config = cast(DictConfig, OmegaConf.merge(plan.config, {"run_dir": escape_text(str(run_dir))}))
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / FINISHED_FILE).unlink(missing_ok=True)
        stored = format_config(OmegaConf.to_container(config, resolve=True))
        write_aside(run_dir / CONFIG_FILE, lambda aside: aside.write_text(stored, encoding="utf-8"))
        write_training_data(run_dir, training_data)
    start_tracker(accelerator, options.train.tracker, options.run_name, run_dir, flatten_config(config), checkpoint)

    # The evaluation, and the trainer that holds everything.
    trainer = Trainer(
        method=family.method,
        hooks=_build_hooks(plan, accelerator, family, first_step),
        loader=build_loader(plan.pair_sources, options, accelerator, plan.encoded),
        options=options.train,
        accelerator=accelerator,
        metrics=TrainingMetrics(
            accelerator.device,
            accelerator.gradient_accumulation_steps,
            family.num_timesteps,
            family.flop_per_sample,
            find_peak_flop_per_s(accelerator.device, options.train.mixed_precision),
        ),
        bad_samples=BadSamples(options.data.max_bad_ratio, run_dir / "bad_samples.txt"),
        run_dir=run_dir,
        identity=plan.identity,
        resume_from=checkpoint,
    )
    return BuiltRun(trainer, first_step)


def _build_hooks(plan: RunPlan, accelerator: Accelerator, family: BuiltFamily, first_step: int) -> TrainingHooks:
    """Build the evaluation on held-out pairs; hooks that do nothing where there is none."""
    from mimicbrush.evaluation.heldout.during_training import LOG_FILE, summarise_in_one_line
    from mimicbrush.training.guards import run_together
    from mimicbrush.training.metrics import TrainingHooks, log_image_table

    options, folder = plan.options, plan.run_dir / "heldout"
    hooks = TrainingHooks(evaluate_every=options.eval.every_steps)
    # The evaluation at the first step is repeated: the checkpoint was written before it.
    is_repeated = hooks.is_due(first_step, options.train.max_steps)
    evaluate = build_evaluation(options, plan.pair_sources, plan.run_dir, accelerator, first_step - is_repeated)
    if evaluate is None:
        return TrainingHooks()

    def evaluate_weights(
        weights: ExportWeights, step: int, must_stop: Callable[[bool], bool]
    ) -> dict[str, float] | None:
        # A second copy of the networks, for which the memory of one device may be too small.
        pipeline = run_together(lambda: family.build_pipeline(weights))
        result = evaluate(pipeline, step, must_stop)
        if result is None:
            return None
        accelerator.print(f"{summarise_in_one_line(step, result.figures)}; images in {folder}")
        log_image_table(accelerator, "heldout/pictures", [(row.caption, row.images) for row in result.table], step)
        return result.figures

    # The main process has just cut this log to the steps before. It reads it for all: they must agree on the best.
    lines = run_on_main_process(accelerator, lambda: read_steps(folder / LOG_FILE))
    values = [float(str(line[hooks.best_figure])) for line in lines if hooks.best_figure in line]
    return replace(hooks, evaluate=evaluate_weights, best_value=max(values, default=-math.inf))


def _run_and_report(plan: RunPlan, run: BuiltRun, stay_connected: bool) -> int:
    """3. Run it, and report the result; return the exit status.

    Raises:
        MimicBrushError: see `Trainer.train`.
    """
    from mimicbrush.training.guards import EXIT_STATUS
    from mimicbrush.training.metrics import finite_or_none, use_trackers

    options, run_dir, accelerator = plan.options, plan.run_dir, run.trainer.accelerator
    max_steps = options.train.max_steps
    for note in plan.notes:
        accelerator.print(f"note: {note}")
    accelerator.print(
        f"{sum(len(source.pairs) for source in plan.pair_sources)} pairs of {len(list_origin_keys(plan.pair_sources))} "
        f"source files to train on (data.heldout_ratio={options.data.heldout_ratio} keeps the others for evaluation); "
        f"{accelerator.num_processes} process(es) on {accelerator.device}, "
        f"{accelerator.gradient_accumulation_steps} pass(es) a step"
    )

    result = run.trainer.train()

    use_trackers(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers.clear()
    if result.failed_evaluations:
        accelerator.print(f"warning: {result.failed_evaluations} evaluation(s) on held-out pairs failed, see above")
    accelerator.wait_for_everyone()  # a launcher may end all processes as soon as one of them ends
    if not stay_connected:
        accelerator.end_training()
    if result.signal:
        accelerator.print(
            f"stopped by signal {result.signal} after step {result.step} of {max_steps}; saved. "
            "To continue, run with train.resume=latest. To make a pipeline of it: "
            f"mimicbrush export {shlex.quote(str(run_dir))}"
        )
        return EXIT_STATUS[result.signal]
    if accelerator.is_main_process and result.step >= max_steps:
        figures = finite_or_none(result.figures)
        write_finished_run(run_dir, FinishedRun(result.step, result.seconds, figures, plan.identity))
    is_done_before = result.step == run.first_step >= max_steps
    accelerator.print(
        f"{result.step} of {max_steps} steps done"
        + (" in an earlier run; to continue, set a larger train.max_steps" if is_done_before else "")
        + ("; to continue, run with train.resume=latest" if result.step < max_steps else "")
        + ". Edit with its pipeline:\n"
        f"  mimicbrush edit REF.jpg SRC.jpg MASK.png --model {shlex.quote(str(run_dir / 'pipeline'))}"
    )
    return 0


def export_run(run_dir: Path, checkpoint: str, output: Path, *, average: bool = True, half: bool = False) -> Path:
    """Make a pipeline from a checkpoint of a run, which may still be in progress.

    Args:
        run_dir: of the run.
        checkpoint: "latest" for the newest that verifies, or its folder.
        output: the pipeline folder; an older one is replaced when the new one is complete.
        average: the averaged weights, or those of the last step.
        half: all networks in half precision (float16).

    Returns:
        The checkpoint that was taken.

    Raises:
        InputError: `run_dir` is no folder of a run, or `output` holds something else.
        CheckpointError: there is no good checkpoint, or no average in it.
        WeightsError: the starting weights, whose frozen networks checkpoints do not hold, are missing or have changed.
    """
    for name in (CONFIG_FILE, TRAINING_DATA_FILE):
        if not (run_dir / name).is_file():
            raise InputError(f"{run_dir} is not the folder of a training run (it has no {name})")
    from mimicbrush.data.manifest import check_outside_mined_folder

    check_outside_mined_folder(output, f"--output {output}")
    if output.is_dir() and any(output.iterdir()) and not (output / "model_index.json").is_file():
        raise InputError(f"{output} exists and is not a pipeline folder; choose another folder")
    older = run_dir / "pipeline"
    size = sum(path.stat().st_size for path in older.rglob("*") if path.is_file())
    check_output_folder(output, "--output", is_replaced=True, needed_bytes=size // 2 if half else size)

    from mimicbrush.training import checkpoints

    if checkpoint == "latest":
        folder = checkpoints.find_checkpoint(run_dir / "checkpoints", "latest")
    else:
        folder = checkpoints.check_named_checkpoint(Path(checkpoint))
    if folder is None:
        raise CheckpointError(f"{run_dir} has no checkpoint yet")

    from mimicbrush.training.state import read_saved_weights

    seed, model_options, train_options, num_references = _read_stored_options(run_dir / CONFIG_FILE)
    before = checkpoints.read_state(folder)["identity"]["starting weights"]
    if before != fingerprint(list_weight_files(model_options)):  # frozen or adapted weights are not in the checkpoint
        raise WeightsError(f"the starting weights of {run_dir} have changed since the run began; restore them")
    training_data = read_training_data(run_dir)
    assert training_data is not None
    model, exporter = build_exporter(model_options, train_options, seed, num_references, training_data)
    with hold_name(output):
        exporter.export(read_saved_weights(folder, model, average=average), output, half=half)
    return folder


def _read_stored_options(path: Path) -> tuple[int, FamilyOptions, TrainOptions, int]:
    """Read the seed, the model and the training of a run from its config, and how many references a sample has.

    Raises:
        InputError: it was damaged, or edited by hand.
    """
    try:
        config = OmegaConf.load(path)
        model = OmegaConf.to_object(OmegaConf.merge(_model_schema(config.model), config.model))
        train = OmegaConf.to_object(OmegaConf.merge(TrainOptions, config.train))
        num_references = int(config.data.get("num_references", 1))  # older runs had one
        return int(config.seed), cast(FamilyOptions, model), cast(TrainOptions, train), num_references
    except (OmegaConfBaseException, YAMLError, OSError, RecursionError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({make_storable(str(error))}); restore the file as the run wrote it, or "
            "correct the error"
        ) from error


def _model_schema(model: DictConfig) -> type[FamilyOptions]:
    """Find the schema of a saved configuration: the one with all of its options, and possibly newer ones."""
    schemas = (ToyModel, PretrainedModel, PipelineModel, ToyFlux2KleinModel, Flux2KleinModel)
    found = [schema for schema in schemas if {each.name for each in fields(schema)} >= set(model)]
    if not found:
        raise ValueError(f"no kind of model has all of these options: {', '.join(map(str, model))}")
    return found[0]
