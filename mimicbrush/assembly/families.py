"""The families of models: how each becomes a method for the trainer, a folder, and an editor for evaluation.

A family is chosen by the class of its options (`models.options`). Everything else in `assembly` is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from mimicbrush.assembly.build import build_components, build_model, choose_frozen_dtype
from mimicbrush.assembly.config import TrainConfig
from mimicbrush.assembly.encoding import check_encoders_of
from mimicbrush.errors import InputError
from mimicbrush.models.options import (
    FamilyOptions,
    Flux2KleinModel,
    KleinOptions,
    ModelOptions,
    ToyFlux2KleinModel,
)
from mimicbrush.training.options import KLEIN_ONLY, MIMICBRUSH_ONLY, TrainOptions

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

    from mimicbrush.data.encoded_views import EncodedFolder
    from mimicbrush.data.training_data import TrainingData
    from mimicbrush.models.flux2_klein.components import KleinComponents
    from mimicbrush.models.flux2_klein.prompt import PromptEmbeddings
    from mimicbrush.pipelines import MimicBrushPipeline
    from mimicbrush.pipelines.flux2_klein import KleinImitation, KleinPipeline
    from mimicbrush.training.export import ExportWeights, PipelineExporter
    from mimicbrush.training.method import TrainingMethod
    from mimicbrush.training.methods.flux2_klein import KleinModel
    from mimicbrush.training.methods.flux2_klein_export import KleinExporter
    from mimicbrush.training.objective import FrozenEncoders, StoredEncoders

#: Tokens of the prompt of a toy model (bytes): few, because each costs as much as a token of an image.
TOY_PROMPT_TOKENS = 8


class BuiltFamily(NamedTuple):
    """Everything that a run needs from its family of models.

    Attributes:
        method: for the trainer.
        build_pipeline: from weights to what evaluations while training edit with, on the device.
        num_timesteps: of the noise schedule.
        flop_per_sample: FLOP of a training step over its samples; None where they were not counted.
    """

    method: TrainingMethod[Any]
    build_pipeline: Callable[[ExportWeights], MimicBrushPipeline | KleinPipeline]
    num_timesteps: int
    flop_per_sample: float | None = None


def check_family(options: TrainConfig) -> None:
    """Check that no option of another family is chosen.

    Raises:
        InputError: names all such options.
    """
    is_klein = isinstance(options.model, KleinOptions)
    others, given, defaults = MIMICBRUSH_ONLY if is_klein else KLEIN_ONLY, vars(options.train), vars(TrainOptions())
    chosen = [f"train.{name}" for name in others if _plain(given[name]) != _plain(defaults[name])]
    if is_klein and options.data.encoded_views:
        chosen.append("data.encoded_views")
    if chosen:
        family, other = ("FLUX.2 klein", "the U-Nets") if is_klein else ("the U-Nets", "FLUX.2 klein")
        are, them = ("is", "it") if len(chosen) == 1 else ("are", "them")
        raise InputError(
            f"{', '.join(chosen)} {are} only for {other}, and this model uses {family}; leave {them} at the default"
        )


def _plain(value: object) -> object:
    """Make a list of a tuple: what YAML gives is a list."""
    return list(value) if isinstance(value, tuple) else value


def build_family(
    options: TrainConfig, encoded: EncodedFolder | None, training_data: TrainingData, accelerator: Accelerator
) -> BuiltFamily:
    """Build the networks of a run, and the method that trains them.

    Args:
        options: of the run.
        encoded: the folder of encoded views to train from, if any.
        training_data: to be saved beside the weights.
        accelerator: says on what the run trains.

    Raises:
        MimicBrushError: the weights or the options do not allow it.
    """
    kind = _build_klein if isinstance(options.model, KleinOptions) else _build_mimicbrush
    return kind(options, encoded, training_data, accelerator)


def build_exporter(
    model_options: FamilyOptions, train_options: TrainOptions, seed: int, num_references: int, data: TrainingData
) -> tuple[nn.Module, PipelineExporter | KleinExporter]:
    """Build the model of a run as it was before the first step, and the exporter of its weights.

    Args:
        model_options, train_options, seed: of the run.
        num_references: of each sample.
        data: what the weights have been trained on.
    """
    if isinstance(model_options, KleinOptions):
        _, klein, klein_exporter = _build_klein_networks(model_options, train_options, seed, num_references, data)
        return klein, klein_exporter
    from mimicbrush.training.export import PipelineExporter
    from mimicbrush.training.lora import freeze_and_adapt

    model_options = cast(ModelOptions, model_options)
    components = build_components(model_options, seed)
    model = build_model(components, model_options, train_options)
    exporter = PipelineExporter(model, components, model_options, train_options, data)
    freeze_and_adapt(dict(model.named_children()), train_options)
    return model, exporter


# ---- MimicBrush: two U-Nets


def _build_mimicbrush(
    options: TrainConfig, encoded: EncodedFolder | None, training_data: TrainingData, accelerator: Accelerator
) -> BuiltFamily:
    from accelerate.utils import DistributedType

    from mimicbrush.models.schedule import noise_scheduler
    from mimicbrush.training.export import PipelineExporter
    from mimicbrush.training.lora import freeze_and_adapt
    from mimicbrush.training.method import MimicBrushMethod
    from mimicbrush.training.methods.consistency_distillation import ConsistencyDistillation
    from mimicbrush.training.objective import FrozenEncoders
    from mimicbrush.training.performance import apply_speedups, count_training_flop

    model_options = cast(ModelOptions, options.model)
    is_distilled = options.train.distill != "none"
    is_on_gpu = accelerator.device.type == "cuda"
    components = build_components(model_options, options.seed)
    encoders = FrozenEncoders(components, model_options)
    stored_encoders = _read_stored_encoders(encoded, encoders, accelerator.device)
    model = build_model(components, model_options, options.train)
    freeze_and_adapt(dict(model.named_children()), options.train)
    exporter = PipelineExporter(model, components, model_options, options.train, training_data)
    # Counted while all networks are on the CPU. It takes seconds, and is of no use for training on a CPU.
    flop_per_sample = None
    if is_on_gpu and not is_distilled:
        flop_per_sample = count_training_flop(model, encoders, encoded is not None, options.data.num_references)
    is_sharded = accelerator.distributed_type == DistributedType.FSDP
    apply_speedups(model, options.train, channels_last=is_on_gpu and not is_sharded)
    # With encoded views, only evaluation needs the frozen networks, and distillation their "no reference".
    if encoded is None or options.eval.every_steps or is_distilled:
        encoders = encoders.to(accelerator.device, choose_frozen_dtype(options.train.mixed_precision))
    scheduler = noise_scheduler(
        options.train.prediction_type, rescale_betas_zero_snr=options.train.rescale_betas_zero_snr
    )
    kind = ConsistencyDistillation if is_distilled else MimicBrushMethod
    method = kind(model, encoders, scheduler, exporter, options.train, stored_encoders)
    return BuiltFamily(
        method,
        lambda weights: exporter.build_pipeline(weights, encoders=encoders),
        scheduler.config.num_train_timesteps,
        flop_per_sample,
    )


def _read_stored_encoders(
    encoded: EncodedFolder | None, encoders: FrozenEncoders, device: torch.device
) -> StoredEncoders | None:
    """Read what takes the place of the frozen networks where the views are encoded already; None where they are not."""
    from mimicbrush.training.objective import StoredEncoders

    if encoded is None:
        return None
    check_encoders_of(encoded, encoders)
    constants = {name: each.to(device) for name, each in encoded.read_constants().items()}
    return StoredEncoders(**constants, scaling_factor=encoders.vae.config.scaling_factor)


# ---- FLUX.2 klein: one transformer


def _build_klein(
    options: TrainConfig, encoded: EncodedFolder | None, training_data: TrainingData, accelerator: Accelerator
) -> BuiltFamily:
    from accelerate.utils import DistributedType

    from mimicbrush.training.methods.flux2_klein import Flux2KleinMethod

    assert encoded is None  # see `check_family`
    if accelerator.distributed_type == DistributedType.FSDP:
        raise InputError(
            "FLUX.2 klein with sharded weights (FSDP) is not tested; use DDP (configs/launch/eight_gpus.yaml) and "
            "adapters (train.transformer=lora), which need little memory"
        )
    parts, model, exporter = _build_klein_networks(
        cast(KleinOptions, options.model), options.train, options.seed, options.data.num_references, training_data
    )
    vae = parts.vae.to(accelerator.device)
    method = Flux2KleinMethod(model, vae, parts.scheduler, exporter, options.train)
    return BuiltFamily(
        method,
        lambda weights: exporter.build_pipeline(weights, vae),
        parts.scheduler.config.num_train_timesteps,
    )


def _build_klein_networks(
    model_options: KleinOptions,
    train_options: TrainOptions,
    seed: int,
    num_references: int,
    training_data: TrainingData,
) -> tuple[KleinComponents, KleinModel, KleinExporter]:
    from mimicbrush.training.lora import freeze_and_adapt
    from mimicbrush.training.methods.flux2_klein import KleinModel
    from mimicbrush.training.methods.flux2_klein_export import KleinExporter

    dtype = choose_frozen_dtype(train_options.mixed_precision)
    parts, prompt = _load_klein_parts(model_options, seed, dtype)
    transformer = parts.transformer
    if train_options.transformer == "trained":
        transformer.float()
    if train_options.attention_backend is not None:
        transformer.set_attention_backend(train_options.attention_backend)
    if train_options.activation_checkpointing:
        transformer.enable_gradient_checkpointing()
    model = KleinModel(
        transformer,
        prompt.embeds,
        size_px=model_options.size_px,
        correspondence_paths=_choose_taught_layers(parts, model_options.size_px, train_options),
        correspondence_heads=train_options.correspondence_heads,
    )
    freeze_and_adapt({"transformer": transformer}, train_options)
    imitation = _state_imitation(model_options, train_options, prompt, num_references)
    return parts, model, KleinExporter(parts, prompt, imitation, train_options, training_data)


def _load_klein_parts(options: KleinOptions, seed: int, dtype: torch.dtype) -> tuple[KleinComponents, PromptEmbeddings]:
    from mimicbrush.models.flux2_klein.components import load_klein, toy_klein
    from mimicbrush.models.flux2_klein.files import locate_klein
    from mimicbrush.models.flux2_klein.prompt import encode_prompt, read_prompt
    from mimicbrush.models.library_logs import silence_diffusers

    if isinstance(options, ToyFlux2KleinModel):
        parts = toy_klein(options, seed=seed)
        assert parts.text_encoder is not None and parts.tokenizer is not None
        prompt = encode_prompt(
            options.prompt, parts.text_encoder, parts.tokenizer, encoder="toy", max_tokens=TOY_PROMPT_TOKENS
        )
        with silence_diffusers():  # it warns of modules to be kept in float32, of which there are none
            parts = replace(parts, transformer=parts.transformer.to(dtype), vae=parts.vae.to(dtype))
        return parts, prompt
    options = cast(Flux2KleinModel, options)
    parts = load_klein(locate_klein(options.base), dtype=dtype)
    width = parts.transformer.config.joint_attention_dim
    return parts, read_prompt(Path(options.prompt_embeddings), prompt=options.prompt, width=width)


def _choose_taught_layers(parts: KleinComponents, size_px: int, options: TrainOptions) -> tuple[str, ...]:
    """Choose the layers that the correspondence loss teaches.

    Raises:
        InputError: a name is of no layer, or tokens are too large to name a place.
    """
    from mimicbrush.models.flux2_klein.attention import klein_attention_paths
    from mimicbrush.training.correspondence_loss import MIN_SIDE

    paths, patterns = klein_attention_paths(parts.transformer), options.correspondence_layers
    if absent := [pattern for pattern in patterns if not any(fnmatchcase(path, pattern) for path in paths)]:
        raise InputError(
            f"train.correspondence_layers={list(absent)}: no such layer; expected layers from {paths[0]} to {paths[-1]}"
        )
    side = size_px // 2 ** len(parts.vae.config.block_out_channels)
    if options.correspondence_weight and side < MIN_SIDE:
        raise InputError(
            f"train.correspondence_weight needs at least {MIN_SIDE} x {MIN_SIDE} tokens, and model.size_px={size_px} "
            f"gives {side} x {side}; increase model.size_px, or set train.correspondence_weight=0"
        )
    return tuple(path for path in paths if not patterns or any(fnmatchcase(path, each) for each in patterns))


def _state_imitation(
    model: KleinOptions, train: TrainOptions, prompt: PromptEmbeddings, num_references: int
) -> KleinImitation:
    """State what the weights are trained for, and where their base is: beside them where it is a toy, or trained."""
    from mimicbrush.models.flux2_klein.files import fingerprint_klein, locate_klein
    from mimicbrush.models.pretrained.weights import split_revision
    from mimicbrush.pipelines.flux2_klein import KleinImitation
    from mimicbrush.pipelines.klein.folder import BASE_FOLDER

    base, revision, base_fingerprint = BASE_FOLDER, None, None
    if isinstance(model, Flux2KleinModel) and train.transformer == "lora":
        base, revision = split_revision(model.base)
        base_fingerprint = fingerprint_klein(locate_klein(model.base))
        if Path(model.base).is_dir():
            base, revision = str(Path(model.base).resolve()), None
    return KleinImitation(
        base,
        revision,
        model.size_px,
        prompt.facts.prompt,
        prompt.checksum,
        num_references,
        base_fingerprint=base_fingerprint,
    )
