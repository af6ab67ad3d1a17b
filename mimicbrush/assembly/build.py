"""Builders: from options to the objects of a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from mimicbrush.assembly.config import TrainConfig
from mimicbrush.data.options import DataOptions
from mimicbrush.errors import DataError, MimicBrushError
from mimicbrush.evaluation.heldout.options import DuringTrainingOptions
from mimicbrush.models.options import ModelOptions, PipelineModel, PretrainedModel, ToyModel
from mimicbrush.pipelines.small_model import model_folder
from mimicbrush.training.options import TrainOptions

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from mimicbrush.data.batch import LoadedBatch
    from mimicbrush.data.encoded_views import EncodedFolder
    from mimicbrush.data.pair import Pair
    from mimicbrush.data.pair_sources import PairSource
    from mimicbrush.data.training_data import TrainingData
    from mimicbrush.evaluation.editors.protocol import Editor
    from mimicbrush.evaluation.heldout.during_training import HeldOutResult
    from mimicbrush.models.components import Components
    from mimicbrush.pipelines import MimicBrushPipeline
    from mimicbrush.pipelines.flux2_klein import KleinPipeline
    from mimicbrush.training.objective import MimicBrushModel


def read_pair_sources(options: DataOptions) -> tuple[list[PairSource], list[str]]:
    """Read the pair sources to train on, without held-out pairs, and notes about them for the user."""
    from mimicbrush.data.pair_sources import load_pair_sources

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sources = load_pair_sources(options)
    return sources, [str(warning.message) for warning in caught]


def list_origin_keys(sources: Sequence[PairSource]) -> list[int]:
    """List the first 64 bits of the hashes of all source files, sorted, each once."""
    keys = [source.pairs.column("source_key") for source in sources]
    return [int(key) for key in np.unique(np.concatenate(keys))]


def find_training_data(options: TrainConfig, sources: Sequence[PairSource]) -> TrainingData:
    """List everything that the weights will have been trained on, in this run and before it."""
    from mimicbrush.data.training_data import TrainingData, read_training_data
    from mimicbrush.pipelines.find_pipeline import find_pipeline

    hashes = frozenset(f"{key:016x}" for key in list_origin_keys(sources))
    if isinstance(options.model, PipelineModel):
        before = read_training_data(find_pipeline(options.model.path, fetch=False))
        hashes |= before.source_hashes if before else frozenset()
    return TrainingData(options.data.heldout_ratio, hashes)


def build_components(options: ModelOptions, seed: int) -> Components:
    """Build all networks, with their starting weights."""
    from mimicbrush.models.components import pretrained_components, toy_components

    if isinstance(options, ToyModel):
        if options.encoders:
            options = replace(options, encoders=str(model_folder(options.encoders)))
        return toy_components(options, seed=seed)
    if isinstance(options, PipelineModel):
        from mimicbrush.pipelines.find_pipeline import find_pipeline
        from mimicbrush.pipelines.open_pipeline import load_components

        return load_components(find_pipeline(options.path, fetch=False), options.size_px)
    return pretrained_components(cast(PretrainedModel, options), seed=seed)


def build_model(components: Components, model_options: ModelOptions, train_options: TrainOptions) -> MimicBrushModel:
    """Build the model to train from all networks.

    Args:
        components: all networks.
        model_options, train_options: of the run.

    Raises:
        InputError: the correspondence loss is chosen, and no layer reads a reference on a grid that is fine enough.
    """
    if train_options.correspondence_weight:
        from mimicbrush.models.unets import find_reference_network
        from mimicbrush.training.correspondence_loss import check_reading_layers

        has_reference_network = find_reference_network(components.unet, components.reference_unet) is not None
        check_reading_layers(components.unet if has_reference_network else None)
    from mimicbrush.training.objective import MimicBrushModel

    return MimicBrushModel(
        components.unet,
        components.reference_unet,
        components.image_projector,
        components.depth_projector,
        size_px=model_options.size_px,
        reference_blend=model_options.reference_blend,
        reference_timestep=model_options.reference_timestep,
        correspondence_heads=train_options.correspondence_heads,
    )


def build_loader(
    sources: Sequence[PairSource],
    options: TrainConfig,
    accelerator: Accelerator,
    encoded: EncodedFolder | None = None,
) -> Callable[[int, int], Iterable[LoadedBatch | None]]:
    """Build the loader: (first step, last step) -> this rank's micro-batches, see `poll_batches`."""
    from mimicbrush.data.dataset import PairDataset
    from mimicbrush.data.loader import poll_batches
    from mimicbrush.data.sampler import RankBatches

    dataset = PairDataset(
        sources,
        options.model.size_px,
        options.data,
        seed=options.seed,
        num_matches=options.data.num_matches if options.train.correspondence_weight else 0,
        unrelated_ratio=options.train.unrelated_reference_ratio,
        encoded=encoded,
    )

    def load(first_step: int, last_step: int) -> Iterable[LoadedBatch | None]:
        batches = RankBatches(
            first_step,
            last_step,
            *options.train.split_batch(accelerator.num_processes),
            accelerator.process_index,
            accelerator.num_processes,
        )
        return poll_batches(
            dataset,
            batches,
            num_workers=options.data.num_workers,
            pin_memory=accelerator.device.type == "cuda",
            timeout_s=options.data.loader_timeout_s,
        )

    return load


def build_evaluation(
    options: TrainConfig, sources: Sequence[PairSource], run_dir: Path, accelerator: Accelerator, first_step: int = 0
) -> Callable[..., HeldOutResult | None] | None:
    """Build the evaluation: (pipeline with the weights at a step, step) -> its result on pairs that are not trained on.

    A third argument may stop it, see `HeldOutEvaluation`; then there is no result.

    Every process must call it, each with the same weights on its own device. It writes into `run_dir`/heldout.

    Args:
        options: of the run.
        sources: of the pairs to train on.
        run_dir: of the run.
        accelerator: says how many processes share the pairs.
        first_step: at which the run goes on.

    Returns:
        None where evaluation is off, or where there are no pairs for it, which is printed.

    Raises:
        DataError: `eval.pairs` was trained on, or has too few pairs.
    """
    if not options.eval.every_steps:
        return None

    from accelerate.utils import gather_object

    from mimicbrush.evaluation.heldout.during_training import HeldOutEvaluation, fails_alone, gather_alone

    pairs, notes = find_evaluated_pairs(options, sources)
    for note in notes:
        accelerator.print(f"note: {note}")
    if not len(pairs):
        return None

    def build(num_references: int) -> HeldOutEvaluation:
        return HeldOutEvaluation(
            pairs,
            options.model.size_px,
            options.eval.evaluation(num_references),
            run_dir / "heldout",
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            gather=gather_object if accelerator.num_processes > 1 else gather_alone,
            first_step=first_step,
        )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            evaluation = build(options.data.num_references)
        except DataError:
            if options.data.num_references == 1:
                raise
            warnings.warn(
                f"pairs are evaluated with one reference while training, and not with {options.data.num_references}: "
                "the shots of the held-out pairs have too few frames",
                stacklevel=2,
            )
            evaluation = build(1)
    for each in caught:
        accelerator.print(f"note: {each.message}")

    def evaluate(
        pipeline: MimicBrushPipeline | KleinPipeline, step: int, must_stop: Callable[[bool], bool] = fails_alone
    ) -> HeldOutResult | None:
        pipeline.set_progress_bar_config(disable=True)
        result = evaluation(_make_editor(pipeline, options.eval), step, must_stop)
        for note in result.notes if result is not None else []:
            accelerator.print(f"note: {note}")
        return result

    return evaluate


def _make_editor(pipeline: MimicBrushPipeline | KleinPipeline, options: DuringTrainingOptions) -> Editor:
    """Make an editor from the current weights of a run, by its family."""
    from mimicbrush.pipelines import MimicBrushPipeline

    if isinstance(pipeline, MimicBrushPipeline):
        from mimicbrush.evaluation.editors.mimicbrush import MimicBrushEditor

        return MimicBrushEditor(pipeline, options.num_inference_steps, options.guidance_scale)
    from mimicbrush.evaluation.editors.flux2_klein import Flux2KleinEditor

    return Flux2KleinEditor(pipeline, options.num_inference_steps, options.guidance_scale)


def find_evaluated_pairs(options: TrainConfig, sources: Sequence[PairSource]) -> tuple[Sequence[Pair], list[str]]:
    """Find the pairs to evaluate on during training (none if there are too few), and notes for the user."""
    from mimicbrush.data.manifest import read_manifest
    from mimicbrush.evaluation.heldout.selection import find_heldout_pairs, select_heldout_pairs

    training = find_training_data(options, sources)
    if options.eval.pairs is not None:
        try:
            selection = select_heldout_pairs(read_manifest(Path(options.eval.pairs)), "heldout", training)
        except DataError as error:
            raise DataError(f"eval.pairs={options.eval.pairs} cannot be used for evaluation: {error}") from error
        if len({pair.source_hash for pair in selection.pairs}) < 2:
            raise DataError(
                f"eval.pairs={options.eval.pairs} has one video that was not trained on; at least two are needed. "
                + " ".join(selection.messages)
            )
        return selection.pairs, selection.messages
    named = [(source.root, source.input_root) for source in options.data.sources.values()]
    roots = dict(named or [(options.data.root, options.data.input_root)])
    tables = [read_manifest(Path(root), Path(inputs) if inputs else None) for root, inputs in roots.items()]
    pairs, notes = find_heldout_pairs(tables, training)
    count = len(set(pairs.column("source_hash")))
    if count < 2:
        notes.append(
            "there will be no evaluation during training: it needs at least two videos that are not trained on, and "
            f"data.heldout_ratio={options.data.heldout_ratio} keeps {count}. Mine more videos, or give a mined folder "
            "with eval.pairs=DIR (eval=none turns evaluation and this note off)"
        )
        return [], notes
    return pairs, notes


def make_accelerator(options: TrainOptions, run_dir: Path) -> Accelerator:
    """Make the accelerator, which trains on one or many devices as set by `accelerate launch` or torchrun."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    accelerator = Accelerator(
        kwargs_handlers=[
            # Gradients are views of the buckets that DDP sends, and not a second copy.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            # One process hashes, writes and exports tens of gigabytes while the others wait for it.
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),
        ],
        cpu=options.device == "cpu",
        mixed_precision=options.mixed_precision,
        log_with=None if options.tracker == "none" else options.tracker,
        project_dir=str(run_dir),
    )
    accelerator.gradient_accumulation_steps = options.split_batch(accelerator.num_processes)[1]
    return accelerator


def choose_frozen_dtype(mixed_precision: str) -> torch.dtype:
    """Choose the type of the frozen networks."""
    import torch

    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]


T = TypeVar("T")


def run_on_main_process(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run something on the main process, and give all processes its result or its error."""
    from accelerate.utils import broadcast_object_list

    result: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = work()
        except MimicBrushError as error:
            result[1] = error
        except OSError as error:
            result[1] = MimicBrushError(str(error))
    broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return cast(T, result[0])
