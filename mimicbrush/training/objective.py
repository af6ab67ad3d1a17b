"""The method: what the frozen encoders make of a batch, what the trained networks make of that, the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import nn

from mimicbrush.models.components import Components
from mimicbrush.models.encoders import (
    encode_image_tokens,
    encode_latents,
    encode_no_image_tokens,
    estimate_depth,
    make_no_depth_map,
)
from mimicbrush.models.options import ModelOptions
from mimicbrush.models.projectors import DepthProjector, ImageProjector
from mimicbrush.models.reference_attention import set_reference_processors
from mimicbrush.models.unets import ReferenceUNet
from mimicbrush.ops.canvas import blank_mask
from mimicbrush.training.correspondence import CorrespondenceLoss, correspondence_loss
from mimicbrush.training.noise import NoiseSample
from mimicbrush.types import Matches, ReferenceStates, TrainBatch

#: The loss is also told for so many equal bands of timesteps: small ones are easy and always were.
NUM_BANDS = 4


@dataclass(frozen=True)
class Conditions:
    """A batch as the frozen encoders see it.

    Attributes:
        source: (B, 4, h, w) latents of the unmasked source: what is to be recovered.
        hole: (B, 4, h, w) latents of the masked source.
        reference: (B, 4, h, w) latents, clean.
        mask: (B, 1, h, w), 1 = repaint.
        image_tokens: (B, N, C) of the reference, or of "no reference" where it is dropped.
        depth_map: (B, 1, any, any), or "no depth" where it is dropped.
    """

    source: torch.Tensor
    hole: torch.Tensor
    reference: torch.Tensor
    mask: torch.Tensor
    image_tokens: torch.Tensor
    depth_map: torch.Tensor


class FrozenEncoders:
    """VAE, CLIP encoder and depth estimator, without gradients."""

    def __init__(self, parts: Components, options: ModelOptions) -> None:
        self.vae, self.image_encoder = parts.vae, parts.image_encoder
        self.depth_estimator = parts.depth_estimator
        self.patches_only = options.reference_encoder != "unet"
        self.depth_convention, self.no_depth_convention = options.depth_convention, options.no_depth_convention
        for module in (self.vae, self.image_encoder, self.depth_estimator):
            module.requires_grad_(False).eval()
        self._nothing: tuple[torch.Tensor, torch.Tensor] | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> FrozenEncoders:
        """The encoders on a device; in half precision they are copies, so that the originals can be exported."""
        moved = copy.copy(self)
        moved._nothing = None
        for name in ("vae", "image_encoder", "depth_estimator"):
            module = getattr(self, name)
            if module.dtype != dtype:
                module = copy.deepcopy(module).to(dtype)
            setattr(moved, name, module.to(device))
        if device.type == "cuda":
            moved.vae.to(memory_format=torch.channels_last)
        return moved

    @torch.no_grad()
    def encode(self, batch: TrainBatch, draws: NoiseSample) -> Conditions:
        """Pixels -> `Conditions`, float32, with the drops applied. What is dropped is not computed."""
        three = torch.cat([batch.source, blank_mask(batch.source, batch.mask), batch.reference])  # (3B, 3, H, W)
        latents = encode_latents(self.vae, three, draws.posteriors.flatten(0, 1)).float()
        source, hole, reference = latents.chunk(3)

        no_tokens, no_depth_map = self._of_nothing(latents.device)
        tokens = _in_rows(
            batch.reference,
            draws.reference_rows,
            lambda pixels: encode_image_tokens(self.image_encoder, pixels, self.patches_only),
            no_tokens,
        )
        depth_map = _in_rows(
            batch.source,
            draws.depth_rows,
            lambda pixels: estimate_depth(self.depth_estimator, pixels, self.depth_convention),
            no_depth_map,
        )
        mask = F.interpolate(batch.mask, size=source.shape[-2:])  # nearest, as at inference
        return Conditions(source, hole, reference, mask, tokens, depth_map)

    def _of_nothing(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, N, C) tokens and (1, 1, any, any) map of "no reference" and "no depth": constants, computed once."""
        if self._nothing is None or self._nothing[0].device != device:
            tokens = encode_no_image_tokens(self.image_encoder, 1, device, self.patches_only)
            depth_map = make_no_depth_map(self.depth_estimator, 1, self.no_depth_convention, device)
            self._nothing = tokens.float(), depth_map.float()
        return self._nothing


def _in_rows(
    pixels: torch.Tensor,
    rows: torch.Tensor,
    encode: Callable[[torch.Tensor], torch.Tensor],
    otherwise: torch.Tensor,
) -> torch.Tensor:
    """Encode some rows (B, ...) -> (B, ...) float32, and put the same constant (1, ...) into the others."""
    if len(rows) == len(pixels):
        return encode(pixels).float()
    result = otherwise.repeat(len(pixels), *[1] * (otherwise.ndim - 1))
    if len(rows):
        result.index_copy_(0, rows, encode(pixels[rows]).float())
    return result


class Prediction(NamedTuple):
    """What the trained networks make of a batch.

    Attributes:
        sample: (B, 4, h, w), the noise or v.
        correspondence: what its reference attention does at the matches, where there are any; otherwise None.
    """

    sample: torch.Tensor
    correspondence: CorrespondenceLoss | None = None


class MimicBrushModel(nn.Module):
    """The trained networks as one module with one forward: what DDP, EMA and checkpoints see."""

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

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter that is trained, always in the same order."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def forward(
        self,
        noisy: torch.Tensor,
        timestep: torch.Tensor,
        conditions: Conditions,
        keep_reference: torch.Tensor,
        matches: Matches | None = None,
    ) -> Prediction:
        """Noisy source latents (B, 4, h, w) at timestep (B,) -> prediction (B, 4, h, w) (paper Sec. 3.2).

        With matches, the correspondence loss comes with it: computed here, so that DDP and FSDP see one forward.
        """
        context = self.image_projector(conditions.image_tokens)  # (B, N, D)
        depth = self.depth_projector(conditions.depth_map, self.size_px)  # (B, 4, h, w)
        stem = torch.cat([noisy, conditions.mask, conditions.hole, depth], dim=1)  # (B, 13, h, w)

        if self.reference_unet is None:  # all that is seen of the reference is its tokens
            return Prediction(self.unet(stem, timestep, context).sample)
        states = ReferenceStates(keep=keep_reference, attended=None if matches is None else {})
        seen = timestep if self.reference_timestep == "current" else torch.zeros_like(timestep)
        travelling = {"reference_states": states}
        unread = self.reference_unet(conditions.reference, seen, context, cross_attention_kwargs=travelling).sample
        sample = self.unet(stem, timestep, context, cross_attention_kwargs=travelling).sample
        # Adds nothing. But FSDP gathers the weights of a block again when its output gets a gradient, and that of the
        # last block of the reference U-Net, whose features are read on the way, would get none.
        sample = sample + 0 * unread.mean(dim=(1, 2, 3), keepdim=True)
        if matches is None or states.attended is None:
            return Prediction(sample)
        heads = self.correspondence_heads
        return Prediction(sample, correspondence_loss(states.attended, matches, keep_reference, self.size_px, heads))


@dataclass(frozen=True)
class TrainingLoss:
    """The mean squared error, and what it is made of.

    Attributes:
        total: what is trained on: the mean over everything, perhaps weighed, and the weighed correspondence loss.
        parts: (4,) summed error inside the hole, cells inside, summed error outside, cells outside. Sums, so
            that batches of several processes and passes add up.
        bands: (2, NUM_BANDS), for equal bands of timesteps: summed mean error of the samples, and their number.
        correspondence: (4,) summed correspondence loss of the samples that have matches, their number; found matches,
            their number. All 0 where it is not trained with.
    """

    total: torch.Tensor
    parts: torch.Tensor
    bands: torch.Tensor
    correspondence: torch.Tensor


def denoising_loss(
    trainee: nn.Module,
    noise_scheduler: DDIMScheduler,
    conditions: Conditions,
    draws: NoiseSample,
    min_snr_gamma: float | None = None,
    matches: Matches | None = None,
    correspondence_weight: float = 0.0,
) -> TrainingLoss:
    """Noise the source latents, predict the noise (or v), compare.

    Args:
        trainee: a `MimicBrushModel`, as it is or wrapped.
        noise_scheduler: says how much noise a timestep has, and what is predicted.
        conditions, draws: of the batch.
        min_snr_gamma: see `TrainOptions`; it weighs what is trained on, the parts of the loss are told as they are.
        matches: of the batch, for the correspondence loss; None leaves it out.
        correspondence_weight: of the correspondence loss.
    """
    noisy = noise_scheduler.add_noise(conditions.source, draws.noise, draws.timestep)
    if noise_scheduler.config.prediction_type == "epsilon":
        target = draws.noise
    else:
        target = noise_scheduler.get_velocity(conditions.source, draws.noise, draws.timestep)
    prediction, correspondence = trainee(noisy, draws.timestep, conditions, draws.keep_reference, matches)
    error = (prediction.float() - target).square().mean(dim=1, keepdim=True)  # (B, 1, h, w)
    mask = conditions.mask
    known = error.detach()
    parts = [(known * mask).sum(), mask.sum(), (known * (1 - mask)).sum(), (1 - mask).sum()]
    band = draws.timestep * NUM_BANDS // noise_scheduler.config.num_train_timesteps
    in_band = (band[:, None] == torch.arange(NUM_BANDS, device=band.device)).to(known.dtype)  # (B, NUM_BANDS)
    bands = torch.stack([known.mean(dim=(1, 2, 3)) @ in_band, in_band.sum(0)])
    total = error.mean()
    if min_snr_gamma is not None:
        snr = compute_snr(noise_scheduler, draws.timestep)  # (B,)
        predicts_noise = noise_scheduler.config.prediction_type == "epsilon"
        weight = snr.clamp(max=min_snr_gamma) / (snr if predicts_noise else snr + 1)
        total = (error.mean(dim=(1, 2, 3)) * weight).mean()
    supervised = torch.zeros(4, device=total.device)
    if correspondence is not None:
        per_sample = correspondence.per_sample
        total = total + correspondence_weight * per_sample.mean()
        sums = torch.stack([per_sample.detach().sum(), correspondence.num_samples.to(total.dtype)])
        supervised = torch.cat([sums, correspondence.found])
    return TrainingLoss(total=total, parts=torch.stack(parts), bands=bands, correspondence=supervised)
