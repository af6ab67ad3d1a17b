"""The protocol between the trainer and a method, and the method of MimicBrush. Its loss is in `objective`.

To train a second family (another backbone, another loss), write a class that implements `TrainingMethod`. The loop,
the checkpoints, the metrics and the guards then work without changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from diffusers import DDIMScheduler
from torch import nn

from mimicbrush.data.batch import LoadedBatch
from mimicbrush.training.export import ExportWeights, PipelineExporter
from mimicbrush.training.noise import NoiseSample, choose_timesteps
from mimicbrush.training.objective import (
    Conditions,
    FrozenEncoders,
    MimicBrushModel,
    StoredEncoders,
    TrainingLoss,
    denoising_loss,
)
from mimicbrush.training.options import TrainOptions
from mimicbrush.types import EncodedViews, Matches

#: A batch encoded by a method, before the trained networks use it. The trainer only passes it on.
InputsT = TypeVar("InputsT")


class TrainingMethod(Protocol[InputsT]):
    """Everything that the `Trainer` needs from a family of models.

    A step calls `encode`, then `loss`, for each micro-batch. `encode` runs outside autocast, `loss` inside.
    """

    @property
    def model(self) -> nn.Module:
        """All trained networks as one module, which DDP or FSDP wrap.

        The norms of gradients are logged for each child.
        """

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters: name in `model` -> parameter, always in the same order.

        This is called again after sharding, which replaces the parameters.
        """

    def encode(self, batch: LoadedBatch, device: torch.device) -> InputsT:
        """Compute everything about a batch that needs no gradients: its random numbers and its conditions.

        Args:
            batch: a batch from the loader, on the CPU.
            device: device for the inputs of the trained networks.
        """

    @property
    def reads_ema(self) -> bool:
        """Whether `loss` reads the averaged weights: then a GPU waits at each step until the average is complete."""

    def loss(
        self, model: nn.Module, inputs: InputsT, step: int, ema_weights: Mapping[str, torch.Tensor]
    ) -> TrainingLoss:
        """Compute the loss of a batch.

        Args:
            model: `model` or its DDP or FSDP wrapper, whose forward must be called.
            inputs: from `encode`.
            step: number of steps done; a weight in the loss may depend on it.
            ema_weights: averaged weights after these steps, name in `model` -> tensor; empty if there is no average.
                Use them only if `reads_ema` is True.
        """

    def export(self, weights: ExportWeights, folder: Path) -> None:
        """Save a usable model with these weights. Every process calls this; the main process writes.

        Args:
            weights: name in `model` -> tensor, all of them, one at a time.
            folder: folder of the model; an existing one is replaced when the new one is complete.
        """


class EncodedBatch(NamedTuple):
    """Inputs of `MimicBrushModel` for one batch, on the device.

    Attributes:
        conditions: outputs of the frozen encoders.
        noise_sample: timesteps, noise and drops.
        matches: matches for the correspondence loss; None if there is no such loss.
    """

    conditions: Conditions
    noise_sample: NoiseSample
    matches: Matches | None


class MimicBrushMethod:
    """MimicBrush as a `TrainingMethod`: an imitative U-Net that reads the features of a reference U-Net.

    Args:
        model: the trained networks.
        encoders: the frozen networks, on the device.
        noise_scheduler: adds the noise; its `prediction_type` says what is predicted.
        exporter: makes pipelines.
        options: options of the run.
        stored: makes the conditions of batches of encoded views.
    """

    reads_ema = False

    def __init__(
        self,
        model: MimicBrushModel,
        encoders: FrozenEncoders,
        noise_scheduler: DDIMScheduler,
        exporter: PipelineExporter,
        options: TrainOptions,
        stored: StoredEncoders | None = None,
    ) -> None:
        self.model, self.encoders, self.noise_scheduler = model, encoders, noise_scheduler
        self.exporter, self.options, self.stored = exporter, options, stored
        latent_side = model.unet.config.sample_size
        self.latent_shape = (encoders.vae.config.latent_channels, latent_side, latent_side)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters, see `MimicBrushModel.trained_parameters`."""
        return self.model.trained_parameters()

    def encode(self, batch: LoadedBatch, device: torch.device) -> EncodedBatch:
        """Sample timesteps, noise and drops from `batch.key`, and run the frozen encoders."""
        options = self.options
        noise_sample = NoiseSample.for_keys(
            batch.key,
            self.latent_shape,
            num_timesteps=self.noise_scheduler.config.num_train_timesteps,
            reference_drop=options.reference_drop,
            reference_drop_ratio=options.reference_drop_ratio,
            depth_drop_ratio=options.depth_drop_ratio,
            noise_device=device if options.noise_on == "device" else None,
            num_references=batch.num_references,
        )
        if options.timestep_sampling != "uniform":
            num_timesteps = self.noise_scheduler.config.num_train_timesteps
            timestep = choose_timesteps(noise_sample.chance, num_timesteps, options)
            noise_sample = replace(noise_sample, timestep=timestep)
        noise_sample = noise_sample.to(device)
        on_device = batch.to(device)
        if isinstance(on_device, EncodedViews):
            assert self.stored is not None
            conditions = self.stored.encode(on_device, noise_sample)
        else:
            conditions = self.encoders.encode(on_device, noise_sample)
        return EncodedBatch(conditions, noise_sample, on_device.matches)

    def loss(
        self, model: nn.Module, inputs: EncodedBatch, step: int, ema_weights: Mapping[str, torch.Tensor]
    ) -> TrainingLoss:
        """Compute the denoising loss and, if it has a weight, the correspondence loss; see `denoising_loss`."""
        return denoising_loss(
            model,
            self.noise_scheduler,
            inputs.conditions,
            inputs.noise_sample,
            self.options.min_snr_gamma,
            inputs.matches,
            self.options.correspondence_weight_at(step),
            self.options.latent_channel_weights,
        )

    def export(self, weights: ExportWeights, folder: Path) -> None:
        """Save a pipeline with these weights, see `PipelineExporter.export`."""
        self.exporter.export(weights, folder)
