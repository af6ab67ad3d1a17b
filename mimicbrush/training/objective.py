"""The objective of MimicBrush: conditions of a batch, prediction of the trained networks, loss (paper Sec. 3.2).

In reading order: `FrozenEncoders` turns pixels into `Conditions`, `MimicBrushModel` predicts the noise (or v) from
them, `denoising_loss` compares.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import nn

from mimicbrush.models.components import Components
from mimicbrush.models.encoders import (
    encode_image_tokens,
    encode_latents,
    encode_no_image_tokens,
    encode_posteriors,
    estimate_depth,
    make_no_depth_map,
)
from mimicbrush.models.options import REFERENCE_ENCODERS, ModelOptions
from mimicbrush.models.projectors import DepthProjector, ImageProjector
from mimicbrush.models.reference_attention import join_references, join_tokens, set_reference_processors
from mimicbrush.models.unets import ReferenceUNet, find_reference_network, make_reference_input
from mimicbrush.ops.canvas import blank_mask
from mimicbrush.training.correspondence_loss import CorrespondenceLoss, correspondence_loss
from mimicbrush.training.noise import NoiseSample
from mimicbrush.types import EncodedViews, Matches, ReferenceStates, TrainBatch

#: The loss is also logged for this many equal bins of timesteps: its size depends strongly on the noise level.
NUM_BINS = 4


@dataclass(frozen=True)
class Conditions:
    """Conditions of a batch: what the frozen encoders compute from its pixels, float32.

    With R references of each sample, those of one sample follow each other.

    Attributes:
        source_latents: (B, 4, h, w) of the unmasked source: what is to be recovered.
        masked_source_latents: (B, 4, h, w) of the source with its masked pixels blanked.
        reference_latents: (B R, 4, h, w), clean.
        latent_mask: (B, 1, h, w), 1 = repaint.
        image_tokens: (B R, N, C) of the references, or of "no reference" where it is dropped.
        depth_map: (B, 1, any, any) of the source, or "no depth" where it is dropped.
    """

    source_latents: torch.Tensor
    masked_source_latents: torch.Tensor
    reference_latents: torch.Tensor
    latent_mask: torch.Tensor
    image_tokens: torch.Tensor
    depth_map: torch.Tensor


class FrozenEncoders:
    """VAE, image encoder and depth estimator, without gradients.

    Args:
        parts: supplies these three networks, which are frozen in place.
        options: its `reference_encoder` and conventions of depth are used.
    """

    def __init__(self, parts: Components, options: ModelOptions) -> None:
        self.vae, self.image_encoder = parts.vae, parts.image_encoder
        self.depth_estimator = parts.depth_estimator
        self.patches_only = not REFERENCE_ENCODERS[options.reference_encoder].has_network
        self.depth_convention, self.no_depth_convention = options.depth_convention, options.no_depth_convention
        for module in (self.vae, self.image_encoder, self.depth_estimator):
            module.requires_grad_(False).eval()
        self._unconditional: tuple[torch.Tensor, torch.Tensor] | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> FrozenEncoders:
        """Move the encoders to a device; in half precision they are copies, so that the originals can be exported."""
        moved = copy.copy(self)
        moved._unconditional = None
        for name in ("vae", "image_encoder", "depth_estimator"):
            module = getattr(self, name)
            if module.dtype != dtype:
                module = copy.deepcopy(module).to(dtype)
            setattr(moved, name, module.to(device))
        if device.type == "cuda":
            moved.vae.to(memory_format=torch.channels_last)
        return moved

    @torch.no_grad()
    def encode(self, batch: TrainBatch, noise_sample: NoiseSample) -> Conditions:
        """Encode a batch, with the drops applied. Dropped conditions are not encoded."""
        # One call of the VAE for source, masked source and references; each is a sample of its posterior.
        references = batch.references.unbind(1)  # R times (B, 3, H, W)
        images = torch.cat([batch.source, blank_mask(batch.source, batch.mask), *references])  # (2B + RB, 3, H, W)
        latents = encode_latents(self.vae, images, noise_sample.posteriors.flatten(0, 1)).float()
        source_latents, masked_source_latents, *of_references = latents.split(len(batch))
        reference_latents = of_references[0]
        if len(references) > 1:
            reference_latents = torch.stack(of_references, dim=1).flatten(0, 1)  # (B R, 4, h, w)

        # Dropped conditions (paper Sec. 4.1: reference 10 %, depth 50 %) make classifier-free guidance possible.
        no_tokens, no_depth_map = self.unconditional_inputs(latents.device)
        image_tokens = _encode_rows(
            batch.references.flatten(0, 1),
            list_reference_rows(noise_sample.reference_rows, len(references)),
            lambda pixels: encode_image_tokens(self.image_encoder, pixels, self.patches_only),
            no_tokens,
        )
        depth_map = _encode_rows(
            batch.source,
            noise_sample.depth_rows,
            lambda pixels: estimate_depth(self.depth_estimator, pixels, self.depth_convention),
            no_depth_map,
        )
        latent_mask = F.interpolate(batch.mask, size=source_latents.shape[-2:])  # nearest, as at inference
        return Conditions(
            source_latents, masked_source_latents, reference_latents, latent_mask, image_tokens, depth_map
        )

    @torch.no_grad()
    def encode_views(self, batch: TrainBatch) -> EncodedViews:
        """Encode a batch before noise and drops, float32.

        `StoredEncoders.encode` turns it into the same `Conditions` as `encode`.
        """
        images = torch.cat([batch.source, blank_mask(batch.source, batch.mask), batch.reference])  # (3B, 3, H, W)
        mean, std = (each.unflatten(0, (3, -1)).transpose(0, 1) for each in encode_posteriors(self.vae, images))
        return EncodedViews(
            mean=mean,
            std=std,
            latent_mask=F.interpolate(batch.mask, size=mean.shape[-2:]),
            image_tokens=encode_image_tokens(self.image_encoder, batch.reference, self.patches_only).float(),
            depth_map=estimate_depth(self.depth_estimator, batch.source, self.depth_convention).float(),
            key=batch.key,
            index=batch.index,
            faults=batch.faults,
            matches=batch.matches,
        )

    @torch.no_grad()
    def unconditional_inputs(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute once the constants of "no reference" and "no depth": (1, N, C) tokens, (1, 1, any, any) map."""
        if self._unconditional is None or self._unconditional[0].device != device:
            tokens = encode_no_image_tokens(self.image_encoder, 1, device, self.patches_only)
            depth_map = make_no_depth_map(self.depth_estimator, 1, self.no_depth_convention, device)
            self._unconditional = tokens.float(), depth_map.float()
        return self._unconditional


class StoredEncoders:
    """Replaces `FrozenEncoders` if a batch is already encoded: adds the noise of the latents, and the drops.

    Args:
        no_image_tokens, no_depth_map: (1, N, C) and (1, 1, any, any), the constants of "no reference" and "no depth",
            where the batches will be.
        scaling_factor: of the VAE.
    """

    def __init__(self, no_image_tokens: torch.Tensor, no_depth_map: torch.Tensor, scaling_factor: float) -> None:
        self.no_image_tokens, self.no_depth_map = no_image_tokens, no_depth_map
        self.scaling_factor = scaling_factor

    def encode(self, views: EncodedViews, noise_sample: NoiseSample) -> Conditions:
        """Compute the conditions of a batch, all float32 on one device, as `FrozenEncoders.encode` does."""
        posteriors = noise_sample.posteriors.transpose(0, 1).float()  # (B, 3, 4, h, w)
        latents = (views.mean + views.std * posteriors) * self.scaling_factor
        keep_reference, keep_depth = noise_sample.keep_reference, noise_sample.keep_depth
        source_latents, masked_source_latents, reference_latents = latents.unbind(1)
        return Conditions(
            source_latents,
            masked_source_latents,
            reference_latents,
            views.latent_mask,
            torch.where(keep_reference[:, None, None], views.image_tokens, self.no_image_tokens),
            torch.where(keep_depth[:, None, None, None], views.depth_map, self.no_depth_map),
        )


def list_reference_rows(samples: torch.Tensor, num_references: int) -> torch.Tensor:
    """List the rows of all references of some samples, (K,) int64 -> (K R,)."""
    place = torch.arange(num_references, device=samples.device)
    return (samples[:, None] * num_references + place).flatten()


def _encode_rows(
    pixels: torch.Tensor,
    rows: torch.Tensor,
    encode: Callable[[torch.Tensor], torch.Tensor],
    constant: torch.Tensor,
) -> torch.Tensor:
    """Encode some rows (B, ...) -> (B, ...) float32, and put the same constant (1, ...) into the others."""
    if len(rows) == len(pixels):
        return encode(pixels).float()
    result = constant.repeat(len(pixels), *[1] * (constant.ndim - 1))
    if len(rows):
        result.index_copy_(0, rows, encode(pixels[rows]).float())
    return result


class Prediction(NamedTuple):
    """Prediction of the trained networks for a batch.

    Attributes:
        sample: (B, 4, h, w), the noise or v.
        correspondence: the correspondence loss of its reference attention; None if there are no matches.
    """

    sample: torch.Tensor
    correspondence: CorrespondenceLoss | None = None


class MimicBrushModel(nn.Module):
    """Both U-Nets and both projectors as one module with one forward: what DDP, EMA and checkpoints see.

    Args:
        unet: the imitative U-Net, of 13 input channels; a `SharedUNet` reads the reference itself.
        reference_unet: the reference U-Net; None if there is none, and with any other U-Net the reference gives
            image tokens alone.
        image_projector, depth_projector: from image tokens to the context, from a depth map to latents.
        size_px: side of the canvas.
        reference_blend: how much the reference's attention counts, see `ReferenceReadProcessor`.
        reference_timestep: timestep of the pass that reads the reference: "current" is that of the noisy latents;
            otherwise 0.
        correspondence_heads: share of the heads that the correspondence loss teaches, above 0 and at most 1.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        reference_unet: ReferenceUNet | None,
        image_projector: ImageProjector,
        depth_projector: DepthProjector,
        *,
        size_px: int,
        reference_blend: float = 1.0,
        reference_timestep: str = "current",
        correspondence_heads: float = 0.5,
    ) -> None:
        super().__init__()
        self.unet, self.reference_unet = unet, reference_unet
        self.image_projector, self.depth_projector = image_projector, depth_projector
        self.size_px, self.reference_timestep = size_px, reference_timestep
        self.correspondence_heads = correspondence_heads
        set_reference_processors(unet, reference_blend)

    @property
    def reference_network(self) -> UNet2DConditionModel | None:
        """Network that reads the reference, perhaps the imitative U-Net; None where image tokens alone show it."""
        return find_reference_network(self.unet, self.reference_unet)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """List what is trained: name -> parameter, always in the same order."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def forward(
        self,
        noisy: torch.Tensor,
        timestep: torch.Tensor,
        conditions: Conditions,
        keep_reference: torch.Tensor,
        matches: Matches | None = None,
        states: ReferenceStates | None = None,
    ) -> Prediction:
        """Predict from noisy source latents (B, 4, h, w) at timestep (B,) -> (B, 4, h, w) (paper Sec. 3.2).

        With matches, the correspondence loss is computed here too, so that DDP and FSDP see one forward.

        Args:
            noisy: (B, 4, h, w).
            timestep: (B,) int64.
            conditions: of the batch.
            keep_reference: (B,) bool, False = dropped.
            matches: of the batch, or None.
            states: reference features that were computed before by `run_reference_network`, if the reference U-Net is
                frozen; None: it runs now.
        """
        tokens = self.image_projector(conditions.image_tokens)  # (B R, N, D)
        context = join_tokens(tokens, len(noisy))  # (B, R N, D)
        depth_latents = self.depth_projector(conditions.depth_map, self.size_px)  # (B, 4, h, w)
        # 4 + 1 + 4 + 4 channels: those of Stable Diffusion inpainting, then depth.
        unet_input = torch.cat(
            [noisy, conditions.latent_mask, conditions.masked_source_latents, depth_latents], dim=1
        )  # (B, 13, h, w)

        if self.reference_network is None or states is not None:  # image tokens alone, or features computed before
            attention_kwargs = {"reference_states": states}
            return Prediction(self.unet(unet_input, timestep, context, cross_attention_kwargs=attention_kwargs).sample)
        # The reference network writes its features into `states`; the imitative U-Net reads them in self-attention.
        states = ReferenceStates(keep=keep_reference, queries_and_keys=None if matches is None else {})
        times = timestep.repeat_interleave(len(tokens) // len(noisy))  # (B R,)
        reference_sample = self.run_reference_network(conditions.reference_latents, times, tokens, states)
        states = join_references(states, len(noisy))
        attention_kwargs = {"reference_states": states}
        sample = self.unet(unet_input, timestep, context, cross_attention_kwargs=attention_kwargs).sample
        # Adds zero. But FSDP gathers the weights of a block again only if its output gets a gradient, and the last
        # block of the reference network is used by its inner features alone.
        sample = sample + 0 * join_tokens(reference_sample, len(noisy)).mean(dim=(1, 2, 3), keepdim=True)
        if matches is None or states.queries_and_keys is None:
            return Prediction(sample)
        heads = self.correspondence_heads
        return Prediction(
            sample, correspondence_loss(states.queries_and_keys, matches, keep_reference, self.size_px, heads)
        )

    def run_reference_network(
        self, reference_latents: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, states: ReferenceStates
    ) -> torch.Tensor:
        """Let the reference network write into `states`; return what else it predicts, (B R, 4, h, w).

        Args:
            reference_latents: (B R, 4, h, w), clean.
            timestep: (B R,) int64, of the noisy source latents.
            context: (B R, N, D), the projected image tokens: each reference is read with its own.
            states: get the features.
        """
        assert self.reference_network is not None
        sample: torch.Tensor = self.reference_network(
            make_reference_input(self.reference_network, reference_latents),
            timestep if self.reference_timestep == "current" else torch.zeros_like(timestep),
            context,
            cross_attention_kwargs={"reference_states": states.for_writing()},
        ).sample
        return sample


@dataclass(frozen=True)
class TrainingLoss:
    """Loss of a batch, and the sums that are logged of it. Sums of several passes and processes add up.

    Attributes:
        total: () what is trained on: the mean over everything, perhaps weighted, and the weighted correspondence loss.
        parts: (4,) summed squared error inside the mask, latent positions inside, the same outside.
        bins: (2, NUM_BINS), for equal bins of timesteps: summed mean error of the samples, and their number.
        correspondence: (4,) summed correspondence loss of the samples that have matches, their number; matches that
            the attention found, their number. All 0 if it is not trained with.
    """

    total: torch.Tensor
    parts: torch.Tensor
    bins: torch.Tensor
    correspondence: torch.Tensor


def denoising_loss(
    model: nn.Module,
    noise_scheduler: DDIMScheduler,
    conditions: Conditions,
    noise_sample: NoiseSample,
    min_snr_gamma: float | None = None,
    matches: Matches | None = None,
    correspondence_weight: float = 0.0,
    channel_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
) -> TrainingLoss:
    """Noise the source latents, predict the noise (or v), compare.

    Args:
        model: a `MimicBrushModel`, as it is or wrapped.
        noise_scheduler: says how much noise a timestep has, and what is predicted.
        conditions, noise_sample: of the batch.
        min_snr_gamma: see `TrainOptions`; it weights only `total`, the logged sums stay unweighted.
        matches: of the batch, for the correspondence loss; None leaves it out.
        correspondence_weight: of the correspondence loss.
        channel_weights: relative weights of the latent channels in `total`.
    """
    latents, noise, timestep = conditions.source_latents, noise_sample.noise, noise_sample.timestep
    predicts_noise = noise_scheduler.config.prediction_type == "epsilon"

    # x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps, with a_t = alphas_cumprod[t] (DDPM, arXiv 2006.11239, Eq. 4).
    noisy = noise_scheduler.add_noise(latents, noise, timestep)
    # The target is eps (DDPM, Eq. 14), or v = sqrt(a_t) eps - sqrt(1 - a_t) x_0 (arXiv 2202.00512, Sec. 4).
    target = noise if predicts_noise else noise_scheduler.get_velocity(latents, noise, timestep)
    prediction, correspondence = model(noisy, timestep, conditions, noise_sample.keep_reference, matches)
    squares = (prediction.float() - target).square()  # (B, 4, h, w)
    error = squares.mean(dim=1, keepdim=True)  # (B, 1, h, w), what is logged

    weighted = error
    if len(set(channel_weights)) > 1:
        # Numbers, not a tensor: copying one to a GPU would make the CPU wait.
        weighted = sum(
            weight / sum(channel_weights) * of_channel
            for weight, of_channel in zip(channel_weights, squares.split(1, dim=1), strict=True)
        )
    total = weighted.mean()
    if min_snr_gamma is not None:
        # Min-SNR (arXiv 2303.09556), with SNR = a_t / (1 - a_t): the loss of a sample counts
        # min(SNR, gamma) / SNR where eps is predicted, min(SNR, gamma) / (SNR + 1) where v is.
        snr = compute_snr(noise_scheduler, timestep)  # (B,)
        weight = snr.clamp(max=min_snr_gamma) / (snr if predicts_noise else snr + 1)
        total = (weighted.mean(dim=(1, 2, 3)) * weight).mean()
    total, correspondence_sums = add_correspondence(total, correspondence, correspondence_weight)
    parts, bins = sum_errors(error.detach(), conditions.latent_mask, timestep, noise_scheduler)
    return TrainingLoss(total=total, parts=parts, bins=bins, correspondence=correspondence_sums)


def add_correspondence(
    total: torch.Tensor, correspondence: CorrespondenceLoss | None, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the correspondence loss, if there is one, to a loss: () -> () and its (4,) sums, see `TrainingLoss`."""
    correspondence_sums = torch.zeros(4, device=total.device)
    if correspondence is not None:
        per_sample = correspondence.per_sample
        total = total + weight * per_sample.mean()
        sums = torch.stack([per_sample.detach().sum(), correspondence.num_samples.to(total.dtype)])
        correspondence_sums = torch.cat([sums, correspondence.match_counts])
    return total, correspondence_sums


def sum_errors(
    error: torch.Tensor, mask: torch.Tensor, timestep: torch.Tensor, noise_scheduler: SchedulerMixin
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the squared error (B, 1, h, w) as `TrainingLoss` has it: (4,) by the mask, (2, NUM_BINS) by timestep."""
    parts = torch.stack([(error * mask).sum(), mask.sum(), (error * (1 - mask)).sum(), (1 - mask).sum()])
    bin_of = timestep * NUM_BINS // noise_scheduler.config.num_train_timesteps
    in_bin = (bin_of[:, None] == torch.arange(NUM_BINS, device=bin_of.device)).to(error.dtype)  # (B, NUM_BINS)
    return parts, torch.stack([error.mean(dim=(1, 2, 3)) @ in_bin, in_bin.sum(0)])
