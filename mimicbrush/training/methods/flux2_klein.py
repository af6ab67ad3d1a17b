"""FLUX.2 klein as a `TrainingMethod`: imitation in one transformer, without a reference U-Net.

Differences from `MimicBrushMethod`, in reading order: `Flux2KleinMethod.encode` turns pixels into latents of tokens;
`KleinModel` puts noisy target, source with its hole and references into one sequence; `flow_loss` is the loss of
rectified flow (arXiv 2209.03003), as diffusers trains this model (examples/dreambooth,
train_dreambooth_lora_flux2_klein_img2img.py)::

    x_s = (1 - s) x_0 + s eps,    v = eps - x_0,    loss = mean over tokens of w |v_model(x_s, s) - v|^2

with the noise level s of the scheduler, and the weight w, above 1 for tokens in the hole (*ours*). Batches, keys,
drops, unrelated references and the correspondence loss are those of MimicBrush.

A dropped reference is hidden by an attention mask: no other token attends to its tokens, so the result is that of the
shorter sequence without a reference. So a batch needs only one pass if some references are dropped, and all processes
make the same number of passes.
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
        latents: (B, C, h, w) of the unmasked source, the target of the training; one cell is a token.
        conditions: latents of the source with its hole, then of each reference, with the shape of `latents`.
        mask: (B, 1, h, w), share of each token that is repainted, 0 to 1.
        noise_sample: noise and drops, without posteriors, because latents are the modes here.
        matches: matches between source and first reference; None if there is no correspondence loss.
    """

    latents: torch.Tensor
    conditions: tuple[torch.Tensor, ...]
    mask: torch.Tensor
    noise_sample: NoiseSample
    matches: Matches | None


class KleinModel(nn.Module):
    """The transformer with one forward, as one module for DDP, EMA and checkpoints.

    Args:
        transformer: the transformer; its attention processors are replaced by those that can return queries and keys.
        prompt_embeds: (1, L, D), the encoded prompt.
        size_px: side of the canvas.
        correspondence_paths: layers that the correspondence loss teaches.
        correspondence_heads: share of their heads that it teaches, above 0 and at most 1.
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
            sigma: (B,), noise levels, 0 to 1.
            conditions: latents of the source with its hole, then of each reference, with the shape of `noisy`.
            keep_reference: (B,) bool, False hides all references of a sample; None: no reference is hidden.
            matches: matches for the correspondence loss; None: it is not computed.
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
    """FLUX.2 klein as a `TrainingMethod`: it learns to imitate a reference.

    Args:
        model: the transformer.
        vae: the frozen VAE, on the device.
        scheduler: has the noise level of each timestep.
        exporter: saves the trained weights.
        options: options of the run.
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
        """Return the trained parameters: name -> parameter, always in the same order."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def encode(self, batch: LoadedBatch, device: torch.device) -> KleinInputs:
        """Sample noise and drops from `batch.key`, and encode all images of the batch."""
        options = self.options
        on_device = batch.to(device)
        assert not isinstance(on_device, EncodedViews)  # refused when a run starts
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
        """Compute the flow loss and, if it has a weight, the correspondence loss; see `flow_loss`."""
        return flow_loss(model, self.scheduler, inputs, self.options, self.options.correspondence_weight_at(step))

    def export(self, weights: ExportWeights, folder: Path) -> None:
        """Save a folder to edit with these weights, see `KleinExporter.export`."""
        self.exporter.export(weights, folder)


def flow_loss(
    model: nn.Module,
    scheduler: FlowMatchEulerDiscreteScheduler,
    inputs: KleinInputs,
    options: TrainOptions,
    correspondence_weight: float = 0.0,
) -> TrainingLoss:
    """Compute the flow loss: mix the latents with noise, predict the velocity, and compare.

    Args:
        model: a `KleinModel` or its wrapper.
        scheduler: a new scheduler that is not used for sampling, which would change its noise levels. They include its
            shift, unless this depends on the size of the image.
        inputs: inputs of the batch.
        options: the distribution of timesteps, and the weight of the hole.
        correspondence_weight: weight of the correspondence loss.
    """
    latents, sampled = inputs.latents, inputs.noise_sample
    timestep = choose_timesteps(sampled.chance, scheduler.config.num_train_timesteps, options)
    scheduler.sigmas = scheduler.sigmas.to(latents.device)  # copied only once; sorted from most to least noise
    sigma = scheduler.sigmas[scheduler.config.num_train_timesteps - 1 - timestep]
    level = sigma.view(-1, 1, 1, 1)
    noisy = (1 - level) * latents + level * sampled.noise
    # The rows were counted on the CPU, so this does not wait for the device.
    is_any_dropped = len(sampled.reference_rows) < len(latents)
    keep_reference = sampled.keep_reference if is_any_dropped else None
    prediction, correspondence = model(noisy, sigma, inputs.conditions, keep_reference, inputs.matches)
    error = (prediction.float() - (sampled.noise - latents)).square().mean(dim=1, keepdim=True)  # (B, 1, h, w)

    weight = 1 + (options.hole_weight - 1) * inputs.mask
    dims = (1, 2, 3)
    total = ((error * weight).sum(dims) / weight.sum(dims)).mean()  # all samples count the same, whatever their holes
    total, correspondence_sums = add_correspondence(total, correspondence, correspondence_weight)
    parts, bins = sum_errors(error.detach(), inputs.mask, timestep, scheduler)
    return TrainingLoss(total, parts, bins, correspondence_sums)
