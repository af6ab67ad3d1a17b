"""Exports the weights of a run as a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from mimicbrush.data.training_data import TrainingData, write_training_data
from mimicbrush.io.atomic import apply_umask, replace_folder
from mimicbrush.models.components import Components
from mimicbrush.models.library_logs import quiet_libraries
from mimicbrush.models.options import ModelOptions
from mimicbrush.models.schedule import few_step_scheduler, noise_scheduler
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.training.lora import freeze_and_adapt, merge_adapters
from mimicbrush.training.objective import FrozenEncoders, MimicBrushModel
from mimicbrush.training.options import TrainOptions

#: Name in `MimicBrushModel` -> weight, one at a time.
ExportWeights = Iterable[tuple[str, torch.Tensor]]


class PipelineExporter:
    """Makes pipelines from weights, with the conventions of a run and a record of its training data.

    Args:
        model: the trained networks, before they are sharded; only their classes and configs are kept.
        components: all networks; the frozen ones are saved as they are.
        model_options, train_options: options of the run.
        training_data: saved with each pipeline, for evaluations.
    """

    def __init__(
        self,
        model: MimicBrushModel,
        components: Components,
        model_options: ModelOptions,
        train_options: TrainOptions,
        training_data: TrainingData,
    ) -> None:
        self.components, self.training_data = components, training_data
        self.model_options, self.train_options = model_options, train_options
        self.networks: dict[str, tuple[Any, Any]] = {
            name: (type(module), module.config) for name, module in model.named_children()
        }

    def build_pipeline(
        self,
        weights: ExportWeights,
        *,
        encoders: FrozenEncoders | None = None,
        adapters: Path | None = None,
    ) -> MimicBrushPipeline:
        """Build a pipeline with copies of these weights, adapters merged.

        The iterator of weights is always consumed to its end, also after an error, because all processes gather sharded
        weights together.

        Args:
            weights: name in `MimicBrushModel` -> tensor, all of them.
            encoders: frozen networks to share; the copies get their device and type. None: use those of `components`,
                and make copies in float32 on the CPU.
            adapters: a folder to also write the adapters into, if there are any.
        """
        with take_all(weights) as rest:
            return self._build_pipeline(rest, encoders, adapters)

    def _build_pipeline(
        self, weights: ExportWeights, encoders: FrozenEncoders | None, adapters: Path | None
    ) -> MimicBrushPipeline:
        device = torch.device("cpu") if encoders is None else encoders.vae.device
        with torch.device("meta"):
            modules = {name: kind.from_config(config) for name, (kind, config) in self.networks.items()}
            freeze_and_adapt(modules, self.train_options)
        for name, module in modules.items():
            modules[name] = module.to_empty(device=device)
        for name, tensor in weights:
            part, _, rest = name.partition(".")
            modules[part].get_parameter(rest).data.copy_(tensor)
        merge_adapters(modules, adapters)
        frozen: dict[str, nn.Module] = {}
        if encoders is not None:
            frozen = {name: getattr(encoders, name) for name in ("vae", "image_encoder", "depth_estimator")}
            dtype = encoders.vae.dtype
            modules = {name: module if module.dtype == dtype else module.to(dtype) for name, module in modules.items()}
        model, train = self.model_options, self.train_options
        if train.distill == "lcm":
            scheduler = few_step_scheduler(
                train.prediction_type, train.distill_ddim_steps, train.rescale_betas_zero_snr
            )
        else:
            scheduler = noise_scheduler(
                train.prediction_type, train.default_timestep_spacing, train.rescale_betas_zero_snr
            )
        return MimicBrushPipeline(
            **{**vars(self.components), **frozen, **modules},
            scheduler=scheduler,
            reference_blend=model.reference_blend,
            reference_timestep=model.reference_timestep,
            depth_convention=model.depth_convention,
            no_depth_convention=model.no_depth_convention,
            letterbox_order=model.letterbox_order,
            default_num_inference_steps=train.default_num_inference_steps,
            default_guidance_scale=train.default_guidance_scale,
        )

    def export(self, weights: ExportWeights, folder: Path, *, half: bool = False) -> None:
        """Save a pipeline with these weights. Every process must call this; the main process writes.

        After an error there, such as a full disk, the other processes do not wait for the rest of the weights.

        Args:
            weights: name in `MimicBrushModel` -> tensor, all of them.
            folder: folder of the pipeline; an existing one is replaced when the new one is complete.
            half: save all networks in half precision (float16).
        """
        quiet_libraries()

        def write(aside: Path) -> None:
            pipeline = self.build_pipeline(rest, adapters=aside / "adapters")
            if half:  # network by network, because the pipeline would warn that float16 does not work on a CPU
                for network in pipeline.components.values():
                    if isinstance(network, nn.Module):
                        network.half()
            aside.mkdir(parents=True, exist_ok=True)
            write_training_data(aside, self.training_data)
            pipeline.save_pretrained(aside)  # after the training data, which its checksums include
            apply_umask(aside)

        with take_all(weights) as rest:
            if PartialState().is_main_process:
                replace_folder(folder, write)


@contextmanager
def take_all(weights: ExportWeights) -> Iterator[ExportWeights]:
    """Yield an iterator of the weights, and consume the rest of it at the end, also after an error."""
    rest = iter(weights)
    try:
        yield rest
    finally:
        for _ in rest:
            pass
