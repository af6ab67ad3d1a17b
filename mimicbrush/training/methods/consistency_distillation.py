"""Consistency distillation (`train.distill=lcm`): a model learns to edit in few steps from one that needs many.

The method is that of latent consistency models (LCM, arXiv 2310.04378, Algorithm 1), with adapters as in LCM-LoRA
(arXiv 2311.05556), for our conditions. The *teacher* is the pipeline that the run starts from. The *student* starts
with the same weights, and only the student is trained. The *target* is the running average of the student.

A noisy latent x_t is on a path along which the teacher's sampler goes to an image x_0. The student f(x_t, t) learns to
predict the same image from every point of this path. For this, the teacher makes one step of DDIM, with guidance::

    v   = v_no_reference + w (v_reference - v_no_reference)             (classifier-free guidance; v, or the noise)
    x_s = sqrt(a_s) x_0(v) + sqrt(1 - a_s) eps(v)                       (DDIM, arXiv 2010.02502, Eq. 12; s < t)
    loss = d(f_student(x_t, t), f_target(x_s, s))                       (d: pseudo-Huber, arXiv 2310.14189, Sec. 3.3)
    f(x, t) = c_skip(t) x + c_out(t) x_0(x, t)                          (f(x, 0) = x; consistency models, Eq. 5)

So the student learns the effect of the guidance scale w. It edits without guidance, and each of its steps needs one
pass instead of two.

Only the imitative U-Net is trained, all weights or adapters. The reference U-Net and both projectors are not changed.
Their outputs are the same for teacher, student and target and are computed once, and only the weights of the imitative
U-Net need a second copy. The reference U-Net needs no distillation, because it gets clean latents. If one U-Net both
reads and denoises, teacher, student and target each read the reference with their own weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.func import functional_call

from mimicbrush.models.reference_attention import join_references
from mimicbrush.training.export import PipelineExporter
from mimicbrush.training.method import EncodedBatch, MimicBrushMethod
from mimicbrush.training.noise import NoiseSample
from mimicbrush.training.objective import (
    Conditions,
    FrozenEncoders,
    MimicBrushModel,
    StoredEncoders,
    TrainingLoss,
    sum_errors,
)
from mimicbrush.training.options import TrainOptions
from mimicbrush.types import ReferenceStates

#: Constants of `LCMScheduler`, with which the student is sampled.
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0


class ConsistencyDistillation(MimicBrushMethod):
    """MimicBrush that learns to edit in few steps; data, conditions and drops are those of `MimicBrushMethod`.

    Args:
        model: the networks with the weights of the teacher, and new adapters if they are trained.
        encoders, noise_scheduler, exporter, options, stored: see `MimicBrushMethod`.
    """

    reads_ema = True

    def __init__(
        self,
        model: MimicBrushModel,
        encoders: FrozenEncoders,
        noise_scheduler: DDIMScheduler,
        exporter: PipelineExporter,
        options: TrainOptions,
        stored: StoredEncoders | None = None,
    ) -> None:
        super().__init__(model, encoders, noise_scheduler, exporter, options, stored)
        # A new adapter adds zero, so the first values of the trained parameters give the teacher, also with adapters.
        device, dtype = encoders.vae.device, encoders.vae.dtype
        trained = self.trained_parameters()
        self.teacher_weights = {name: each.detach().to(device, dtype, copy=True) for name, each in trained.items()}

    def loss(
        self, model: nn.Module, inputs: EncodedBatch, step: int, ema_weights: Mapping[str, torch.Tensor]
    ) -> TrainingLoss:
        """Compute the distance of the student's image and the target's image one step of the teacher later.

        Args:
            model: the student, or its DDP or FSDP wrapper.
            inputs: see `MimicBrushMethod.encode`.
            step: not used.
            ema_weights: the weights of the target; if it is empty, those of the student are used, without gradients.
        """
        conditions, sampled = inputs.conditions, inputs.noise_sample
        start, end = self._choose_timesteps(sampled.timestep)  # t and s
        noisy = self.noise_scheduler.add_noise(conditions.source_latents, sampled.noise, start)  # x_t
        levels = self.noise_scheduler.alphas_cumprod  # a; `add_noise` has moved it to the device
        at_start, at_end = (Level.at(timestep, levels, self._predicts_noise) for timestep in (start, end))

        with torch.no_grad():
            states = self._run_reference_network_at(conditions, start, sampled.keep_reference)
            guided = self._predict_with_guidance(noisy, start, inputs, states)
            next_noisy = at_end.mix(at_start.image(noisy, guided), at_start.noise(noisy, guided))  # x_s
            target_weights = ema_weights or {name: each.detach() for name, each in self.trained_parameters().items()}
            next_states = states
            if self.model.reference_timestep == "current":
                next_states = self._run_reference_network_at(conditions, end, sampled.keep_reference)
            next_inputs = (next_noisy, end, conditions, sampled.keep_reference, None, next_states)
            target_output = functional_call(self.model, dict(target_weights), next_inputs).sample.float()
            target = at_end.consistent_image(next_noisy, target_output)

        output = model(noisy, start, conditions, sampled.keep_reference, None, states).sample.float()
        error = at_start.consistent_image(noisy, output) - target  # (B, 4, h, w)
        c = self.options.distill_huber_c
        total = ((error.square() + c**2).sqrt() - c).mean()

        squared = error.detach().square().mean(dim=1, keepdim=True)
        parts, bins = sum_errors(squared, conditions.latent_mask, start, self.noise_scheduler)
        return TrainingLoss(total, parts, bins, correspondence=torch.zeros(4, device=total.device))

    @property
    def _predicts_noise(self) -> bool:
        return bool(self.noise_scheduler.config.prediction_type == "epsilon")

    def _choose_timesteps(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Round (B,) timesteps to those of the teacher's sampler: return (B,) t, and (B,) s one step later."""
        num_timesteps, steps = self.noise_scheduler.config.num_train_timesteps, self.options.distill_ddim_steps
        length = num_timesteps // steps
        start = (timestep * steps // num_timesteps + 1) * length - 1  # as `LCMScheduler` chooses them
        return start, (start - length).clamp(min=0)

    def _run_reference_network_at(
        self, conditions: Conditions, timestep: torch.Tensor, keep: torch.Tensor
    ) -> ReferenceStates | None:
        if self.model.reference_unet is None:
            return None
        states, rows = ReferenceStates(keep=keep), len(timestep)
        context = self.model.image_projector(conditions.image_tokens)  # (B R, N, D)
        times = timestep.repeat_interleave(len(context) // rows)  # (B R,)
        self.model.run_reference_network(conditions.reference_latents, times, context, states)
        return join_references(states, rows)

    def _predict_with_guidance(
        self, noisy: torch.Tensor, timestep: torch.Tensor, inputs: EncodedBatch, states: ReferenceStates | None
    ) -> torch.Tensor:
        """Predict with guidance, as the teacher's pipeline does: (B, 4, h, w) -> (B, 4, h, w), float32."""
        conditions, sampled = inputs.conditions, inputs.noise_sample
        no_image_tokens, _ = self.encoders.unconditional_inputs(noisy.device)
        no_reference = replace(conditions, image_tokens=no_image_tokens.expand_as(conditions.image_tokens))
        # The rows are [no reference ; reference], as in a pipeline: the states have references for the second half.
        both = Conditions(*(torch.cat(pair) for pair in zip(_values(no_reference), _values(conditions), strict=True)))
        keep = torch.cat([torch.zeros_like(sampled.keep_reference), sampled.keep_reference])
        pairs = (torch.cat([noisy] * 2), torch.cat([timestep] * 2), both, keep, None, states)
        output = functional_call(self.model, self.teacher_weights, pairs).sample.float()
        without, with_reference = output.chunk(2)
        return without + self._guidance(sampled) * (with_reference - without)

    def _guidance(self, sampled: NoiseSample) -> torch.Tensor:
        """Choose the guidance scale of each sample, (B, 1, 1, 1), uniformly between the limits."""
        lowest, highest = self.options.distill_guidance
        return (lowest + (highest - lowest) * sampled.chance).view(-1, 1, 1, 1)


class Level(NamedTuple):
    """Noise level of a batch; it computes image and noise from predictions at this level.

    Attributes:
        timestep: (B, 1, 1, 1).
        alpha, sigma: (B, 1, 1, 1), x_t = alpha x_0 + sigma eps.
        predicts_noise: True: networks predict eps; False: they predict v = alpha eps - sigma x_0.
    """

    timestep: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor
    predicts_noise: bool

    @classmethod
    def at(cls, timestep: torch.Tensor, alphas_cumprod: torch.Tensor, predicts_noise: bool) -> Level:
        """Look up the noise level at (B,) timesteps."""
        timestep = timestep.view(-1, 1, 1, 1)
        squared = alphas_cumprod[timestep]
        return cls(timestep, squared.sqrt(), (1 - squared).sqrt(), predicts_noise)

    def mix(self, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Add noise to an image, both (B, 4, h, w)."""
        return self.alpha * image + self.sigma * noise

    def image(self, noisy: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Compute x_0 from noisy latents and the output of a network, both (B, 4, h, w)."""
        if self.predicts_noise:
            return (noisy - self.sigma * output) / self.alpha
        return self.alpha * noisy - self.sigma * output

    def noise(self, noisy: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Compute eps from noisy latents and the output of a network, both (B, 4, h, w)."""
        return output if self.predicts_noise else self.alpha * output + self.sigma * noisy

    def consistent_image(self, noisy: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Compute f(x, t) from noisy latents and the output of a network; at t = 0, it is x itself."""
        scaled = self.timestep * TIMESTEP_SCALING
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5
        return skip * noisy + out * self.image(noisy, output)


def _values(conditions: Conditions) -> tuple[torch.Tensor, ...]:
    return tuple(vars(conditions).values())
