"""A training run from its options, in reading order, and a pipeline from what it left."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from omegaconf import DictConfig, OmegaConf

from mimicbrush.assembly.build import (
    build_components,
    build_evaluation,
    build_loader,
    build_model,
    find_training_data,
    half_precision,
    make_accelerator,
    on_main_process,
    origin_keys,
    read_pair_sources,
)
from mimicbrush.assembly.config import (
    TrainConfig,
    apply_pipeline_conventions,
    check_option_names,
    flatten_config,
    list_weight_files,
    run_identity,
)
from mimicbrush.assembly.prerequisites import check_prerequisites
from mimicbrush.data.training_data import TRAINING_DATA_FILE, read_training_data, write_training_data
from mimicbrush.errors import CheckpointError, InputError, WeightsError
from mimicbrush.io.hashing import fingerprint
from mimicbrush.io.jsonl import read_steps
from mimicbrush.models.options import ModelOptions, PipelineModel, PretrainedModel, ToyModel
from mimicbrush.training.options import TrainOptions

if TYPE_CHECKING:
    from mimicbrush.training.export import ExportWeights


#: What a run leaves in its folder for whoever exports it.
CONFIG_FILE = "config.yaml"


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
    check_option_names(config)
    config, changed = apply_pipeline_conventions(config)
    check_prerequisites(config)
    options = cast(TrainConfig, OmegaConf.to_object(config))

    from mimicbrush.training import checkpoints
    from mimicbrush.training.run_folder import FINISHED_FILE, FinishedRun, find_finished, write_finished

    sources, notes = read_pair_sources(options.data)
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
    from accelerate.utils import DistributedType, set_seed

    from mimicbrush.evaluation.heldout.during_training import LOG_FILE, summarise_in_one_line
    from mimicbrush.models.schedule import noise_scheduler
    from mimicbrush.training import trainer
    from mimicbrush.training.export import PipelineExporter
    from mimicbrush.training.guards import EXIT_STATUS, BadSamples
    from mimicbrush.training.lora import freeze_and_adapt
    from mimicbrush.training.metrics import TrainingMetrics, finite_or_none, log_image_table, start_tracker
    from mimicbrush.training.objective import FrozenEncoders
    from mimicbrush.training.performance import apply_speedups, peak_flop_per_s, training_flop

    # 2. Where it goes on.
    accelerator = make_accelerator(options.train, run_dir)
    found = on_main_process(accelerator, lambda: checkpoints.find_checkpoint(folder, options.train.resume))
    if found is not None:
        checkpoints.check_identity(found, identity)

    # 3. The networks.
    if options.train.cpu_threads:
        torch.set_num_threads(options.train.cpu_threads)
    set_seed(options.seed)
    parts = build_components(options.model, options.seed)
    frozen = FrozenEncoders(parts, options.model)
    trainee = build_model(parts, options.model, options.train)
    freeze_and_adapt(dict(trainee.named_children()), options.train)
    set_seed(options.seed, device_specific=True)  # of dropout, on each process its own
    training_data = find_training_data(options, sources)
    publisher = PipelineExporter(trainee, parts, options.model, options.train, training_data)
    # Counted while all are on the CPU; it takes seconds, and tells nothing of a CPU.
    flop = training_flop(trainee, frozen) if accelerator.device.type == "cuda" else None
    is_sharded = accelerator.distributed_type == DistributedType.FSDP
    if is_sharded and options.train.compile:
        raise InputError("train.compile with sharded weights was never tried; leave out one of them")
    apply_speedups(trainee, options.train, channels_last=accelerator.device.type == "cuda" and not is_sharded)
    encoders = frozen.to(accelerator.device, half_precision(options.train.mixed_precision))
    as_run = cast(DictConfig, OmegaConf.merge(config, {"run_dir": str(run_dir)}))
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / FINISHED_FILE).unlink(missing_ok=True)
        (run_dir / CONFIG_FILE).write_text(OmegaConf.to_yaml(as_run, resolve=True))
        write_training_data(run_dir, training_data)
    start_tracker(accelerator, options.train.tracker, options.run_name, run_dir, flatten_config(as_run), found)

    # 4. The evaluation on the way.
    first_step = 0 if found is None else checkpoints.read_state(found)["step"]
    outside = trainer.TrainingHooks(publisher.export, evaluate_every=options.eval.every_steps)
    # That of the step from which the run goes on is made again: its checkpoint was written before it.
    is_again = outside.is_due(first_step, options.train.max_steps)
    evaluate = build_evaluation(options, sources, run_dir, accelerator, first_step - is_again)

    def evaluate_weights(weights: ExportWeights, step: int) -> dict[str, float]:
        assert evaluate is not None
        result = evaluate(publisher.pipeline(weights, encoders=encoders), step)
        accelerator.print(f"{summarise_in_one_line(step, result.figures)}; images in {run_dir / 'heldout'}")
        log_image_table(accelerator, "heldout/pictures", [(row.caption, row.images) for row in result.table], step)
        return result.figures

    if evaluate is None:
        outside = trainer.TrainingHooks(publisher.export)
    else:
        # Of what the main process has just cut to the steps before: all must agree on which weights are the best.
        lines = on_main_process(accelerator, lambda: read_steps(run_dir / "heldout" / LOG_FILE))
        known = (line[outside.measure] for line in lines if outside.measure in line)
        best = max((float(str(value)) for value in known), default=-math.inf)
        outside = replace(outside, evaluate=evaluate_weights, best=best)

    # 5. The run.
    passes = accelerator.gradient_accumulation_steps
    for note in notes:
        accelerator.print(f"note: {note}")
    accelerator.print(
        f"{sum(len(source.pairs) for source in sources)} pairs of {len(origin_keys(sources))} source files to train on "
        f"(data.heldout_ratio={options.data.heldout_ratio} keeps the others for evaluation); "
        f"{accelerator.num_processes} process(es) on {accelerator.device}, {passes} pass(es) a step"
    )
    outcome = trainer.train(
        trainee=trainee,
        encoders=encoders,
        noise_scheduler=noise_scheduler(options.train.prediction_type),
        loader=build_loader(sources, options, accelerator),
        outside=outside,
        options=options.train,
        meters=TrainingMetrics(
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
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()
    accelerator.wait_for_everyone()  # a launcher may end all processes as soon as one of them is gone
    if not stay_connected:
        accelerator.end_training()
    if outcome.signal:
        accelerator.print(
            f"stopped by signal {outcome.signal} after step {outcome.step} of {options.train.max_steps}; saved. "
            f"train.resume=latest goes on; python scripts/export_run.py {run_dir} makes a pipeline of it"
        )
        return EXIT_STATUS[outcome.signal]
    if accelerator.is_main_process and outcome.step >= options.train.max_steps:
        write_finished(run_dir, FinishedRun(outcome.step, outcome.seconds, finite_or_none(outcome.figures), identity))
    accelerator.print(
        f"{outcome.step} of {options.train.max_steps} steps done"
        + (" before; train.max_steps=MORE goes on" if outcome.step == first_step else "")
        + ". Edit with it:\n"
        f"  python scripts/infer.py REF.jpg SRC.jpg MASK.png --model {run_dir / 'pipeline'}"
    )
    return 0


def export_run(run_dir: Path, checkpoint: str, output: Path, *, average: bool = True, half: bool = False) -> Path:
    """A pipeline of a checkpoint of a run, whether the run is over or goes on.

    Args:
        run_dir: of the run.
        checkpoint: "latest" for the newest that verifies, or its folder.
        output: the pipeline folder; an older one is replaced when the new one is whole.
        average: the averaged weights, or those of the last step.
        half: all networks in half precision (float16).

    Returns:
        The checkpoint that was taken.

    Raises:
        InputError: the folder is none of a run, or `output` holds something else.
        CheckpointError: there is no good checkpoint, or no average in it.
        WeightsError: the starting weights, whose frozen networks checkpoints do not hold, are absent or others.
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
        found = checkpoints.check_named_checkpoint(Path(checkpoint))
    if found is None:
        raise CheckpointError(f"{run_dir} has no checkpoint yet")

    from mimicbrush.training.export import PipelineExporter
    from mimicbrush.training.lora import freeze_and_adapt
    from mimicbrush.training.state import saved_weights

    config = OmegaConf.load(run_dir / CONFIG_FILE)
    model = cast(ModelOptions, OmegaConf.to_object(OmegaConf.merge(_model_schema(config.model), config.model)))
    train = cast(TrainOptions, OmegaConf.to_object(OmegaConf.merge(TrainOptions, config.train)))
    there, now = checkpoints.read_state(found)["identity"]["starting weights"], fingerprint(list_weight_files(model))
    if there != now:  # what was frozen, or adapted, is not in the checkpoint
        raise WeightsError(f"the starting weights of {run_dir} are not what they were when it began; put them back")
    parts = build_components(model, config.seed)
    trainee = build_model(parts, model, train)
    training_data = read_training_data(run_dir)
    assert training_data is not None
    publisher = PipelineExporter(trainee, parts, model, train, training_data)
    freeze_and_adapt(dict(trainee.named_children()), train)
    publisher.export(saved_weights(found, trainee, average=average), output, half=half)
    return found


def _model_schema(model: DictConfig) -> type[ModelOptions]:
    """Which of the schemas a saved configuration was made of: that with all of its options, and perhaps newer ones."""
    schemas = (ToyModel, PretrainedModel, PipelineModel)
    return next(schema for schema in schemas if {each.name for each in fields(schema)} >= set(model))
