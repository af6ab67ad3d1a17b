"""FLUX.2 klein as a `TrainingMethod`: imitation in one transformer, without a reference U-Net.

Beside `MimicBrushMethod` it differs in these steps, in reading order: `Flux2KleinMethod.encode` turns pixels into
latents of tokens, `KleinModel` puts noisy target, source with its hole and references into one sequence, and
`flow_loss` is that of rectified flow (arXiv 2209.03003), as diffusers trains this model (examples/dreambooth,
train_dreambooth_lora_flux2_klein_img2img.py)::

    x_s = (1 - s) x_0 + s eps,    v = eps - x_0,    loss = mean over tokens of w |v_model(x_s, s) - v|^2

with the noise level s of the scheduler, and w above 1 for tokens in the hole (*ours*). Batches, keys, drops, unrelated
references and the correspondence loss are those of MimicBrush.

A dropped reference is hidden by an attention mask: no other token sees its tokens, so the sample is that of a shorter
sequence, which the plain pipeline makes without a reference. One pass then serves a batch in which some are dropped,
and every process makes as many passes as the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from torch import nn

from mimicbrush.models.flux2_klein.attention import TAP, AttentionTap, set_tapped_processors
from mimicbrush.models.flux2_klein.sequence import encode_images, make_sequence, make_text_ids, unpack_tokens
from mimicbrush.ops.canvas import blank_mask
from mimicbrush.training.correspondence_loss import correspondence_loss
from mimicbrush.training.noise import NoiseSample, choose_timesteps
from mimicbrush.training.objective import Prediction, TrainingLoss, add_correspondence, sum_errors
from mimicbrush.training.options import TrainOptions
from mimicbrush.types import EncodedViews, Matches

if TYPE_CHECKING:
    from mimicbrush.data.batch import LoadedBatch
    from mimicbrush.training.export import ExportWeights
    from mimicbrush.training.methods.flux2_klein_export import KleinExporter


class KleinInputs(NamedTuple):
    """Inputs of a step for one batch, on the device; all latents are float32.

    Attributes:
        latents: (B, C, h, w) of the unmasked source, which is what is to be recovered; one cell is a token.
        conditions: of the source with its hole, then of each reference, like `latents`.
        mask: (B, 1, h, w), the part of each token that is to be repainted, 0 to 1.
        noise_sample: noise and drops, without posteriors, since latents here are modes.
        matches: of the batch, in the first reference; None if the correspondence loss is not trained with.
    """

    latents: torch.Tensor
    conditions: tuple[torch.Tensor, ...]
    mask: torch.Tensor
    noise_sample: NoiseSample
    matches: Matches | None


class KleinModel(nn.Module):
    """The transformer with one forward: what DDP, EMA and checkpoints see.

    Args:
        transformer: its processors are replaced by those that can pass on queries and keys.
        prompt_embeds: (1, L, D), of the one prompt.
        size_px: side of the canvas.
        correspondence_paths: layers that the correspondence loss teaches.
        correspondence_heads: part of their heads that it teaches, above 0 and at most 1.
    """

    prompt_embeds: torch.Tensor

    def __init__(
        self,
        transformer: Flux2Transformer2DModel,
        prompt_embeds: torch.Tensor,
        *,
        size_px: int,
        correspondence_paths: tuple[str, ...] = (),
        correspondence_heads: float = 0.5,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.register_buffer("prompt_embeds", prompt_embeds.float(), persistent=False)
        self.size_px = size_px
        self.correspondence_paths, self.correspondence_heads = correspondence_paths, correspondence_heads
        set_tapped_processors(transformer)

    def forward(
        self,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        conditions: tuple[torch.Tensor, ...],
        keep_reference: torch.Tensor | None = None,
        matches: Matches | None = None,
    ) -> Prediction:
        """Predict the velocity of the target.

        Args:
            noisy: (B, C, h, w), latents of the target with noise.
            sigma: (B,), its noise level, 0 to 1.
            conditions: of the source with its hole, then of each reference, like `noisy`.
            keep_reference: (B,) bool, False hides all references of a sample; None: all are seen.
            matches: of the batch, for the correspondence loss; None: it is left out.
        """
        text = self.prompt_embeds.expand(len(noisy), -1, -1)
        sequence = make_sequence(noisy, conditions, text.shape[1])
        layout = sequence.layout
        attention: dict[str, object] = {}
        if keep_reference is not None:
            is_seen = torch.ones(len(noisy), layout.num_tokens, dtype=torch.bool, device=noisy.device)
            is_seen[:, layout.references] = keep_reference[:, None]
            attention["attention_mask"] = is_seen[:, None, None, :]
        tap = None
        if matches is not None:
            tap = attention[TAP] = AttentionTap(layout, self.correspondence_paths, keys=layout.image(2))
        tokens = self.transformer(
            hidden_states=sequence.tokens,
            encoder_hidden_states=text,
            timestep=sigma,
            img_ids=sequence.ids,
            txt_ids=make_text_ids(text.shape[1], noisy.device),
            joint_attention_kwargs=attention,
            return_dict=False,
        )[0]
        sample = unpack_tokens(tokens[:, : layout.num_image], noisy.shape[-2])
        if matches is None or tap is None:
            return Prediction(sample)
        keep = torch.ones_like(sigma, dtype=torch.bool) if keep_reference is None else keep_reference
        heads = self.correspondence_heads
        return Prediction(sample, correspondence_loss(tap.queries_and_keys, matches, keep, self.size_px, heads))


class Flux2KleinMethod:
    """FLUX.2 klein that learns to imitate a reference.

    Args:
        model: the transformer.
        vae: frozen, on the device.
        scheduler: says how much noise a timestep has.
        exporter: saves what is learnt.
        options: of the run.
    """

    reads_ema = False

    def __init__(
        self,
        model: KleinModel,
        vae: AutoencoderKLFlux2,
        scheduler: FlowMatchEulerDiscreteScheduler,
        exporter: KleinExporter,
        options: TrainOptions,
    ) -> None:
        self.model, self.vae, self.exporter, self.options = model, vae.requires_grad_(False).eval(), exporter, options
        # A copy: sampling with the scheduler changes its noise levels.
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """List what is trained: name -> parameter, always in the same order."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def encode(self, batch: LoadedBatch, device: torch.device) -> KleinInputs:
        """Sample noise and drops from `batch.key`, and encode all images of the batch."""
        options = self.options
        on_device = batch.to(device)
        assert not isinstance(on_device, EncodedViews)  # refused before
        holed = blank_mask(on_device.source, on_device.mask)
        images = [on_device.source, holed, *on_device.references.unbind(1)]
        latents = encode_images(self.vae, torch.cat(images)).float()  # one call for all images
        target, *conditions = latents.chunk(len(images))
        _, channels, height, width = target.shape
        noise_sample = NoiseSample.for_keys(
            batch.key,
            (channels, height, width),
            num_timesteps=self.scheduler.config.num_train_timesteps,
            reference_drop=options.reference_drop,
            reference_drop_ratio=options.reference_drop_ratio,
            depth_drop_ratio=0.0,
            noise_device=device if options.noise_on == "device" else None,
            has_posteriors=False,
        ).to(device)
        mask = F.adaptive_avg_pool2d(on_device.mask, (height, width))
        return KleinInputs(target, tuple(conditions), mask, noise_sample, on_device.matches)

    def loss(
        self, model: nn.Module, inputs: KleinInputs, step: int, ema_weights: Mapping[str, torch.Tensor]
    ) -> TrainingLoss:
        """Compute the flow loss and, if it is on, the correspondence loss; see `flow_loss`."""
        return flow_loss(model, self.scheduler, inputs, self.options, self.options.correspondence_weight_at(step))

    def export(self, weights: ExportWeights, folder: Path) -> None:
        """Save a folder that edits with these weights, see `KleinExporter.export`."""
        self.exporter.export(weights, folder)


def flow_loss(
    model: nn.Module,
    scheduler: FlowMatchEulerDiscreteScheduler,
    inputs: KleinInputs,
    options: TrainOptions,
    correspondence_weight: float = 0.0,
) -> TrainingLoss:
    """Mix the latents with noise, predict the velocity, compare.

    Args:
        model: a `KleinModel`, as it is or wrapped.
        scheduler: as it was made, and sampled with by nobody else; its shift is in its noise levels, unless that
            depends on the size of the image.
        inputs: of the batch.
        options: how timesteps are chosen, and how much the hole counts.
        correspondence_weight: of the correspondence loss.
    """
    latents, sampled = inputs.latents, inputs.noise_sample
    timestep = choose_timesteps(sampled.chance, scheduler.config.num_train_timesteps, options)
    scheduler.sigmas = scheduler.sigmas.to(latents.device)  # once; diffusers lists them from the most noise on
    sigma = scheduler.sigmas[scheduler.config.num_train_timesteps - 1 - timestep]
    level = sigma.view(-1, 1, 1, 1)
    noisy = (1 - level) * latents + level * sampled.noise
    # Known without asking the device: the rows were counted on the CPU.
    is_any_dropped = len(sampled.reference_rows) < len(latents)
    keep_reference = sampled.keep_reference if is_any_dropped else None
    prediction, correspondence = model(noisy, sigma, inputs.conditions, keep_reference, inputs.matches)
    error = (prediction.float() - (sampled.noise - latents)).square().mean(dim=1, keepdim=True)  # (B, 1, h, w)

    weight = 1 + (options.hole_weight - 1) * inputs.mask
    dims = (1, 2, 3)
    total = ((error * weight).sum(dims) / weight.sum(dims)).mean()  # every sample counts alike, whatever its hole
    total, correspondence_sums = add_correspondence(total, correspondence, correspondence_weight)
    parts, bins = sum_errors(error.detach(), inputs.mask, timestep, scheduler)
    return TrainingLoss(total, parts, bins, correspondence_sums)
