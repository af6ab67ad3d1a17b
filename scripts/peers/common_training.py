"""The training loop that people write today for a U-Net that reads another one, on the same weights as ours.

Only to hold ours against, as the peer of `speed.py`. It is put together from what public training code of this family
does (MagicAnimate, its re-implementations, diffusers' examples), and it computes what ours computes:

* three calls of the VAE, one after another, in the same precision as ours;
* the CLIP encoder to its end and the depth estimator, for all rows; what is dropped is overwritten afterwards, and
  "no reference" is encoded again at every step;
* features of the reference in a bank of this module, filled by hooks and read by replaced attention processors;
* attention with and without the reference for all rows, and a choice per row (the released attention does both, too);
* activation checkpointing on both U-Nets, and memory laid out as it comes (NCHW);
* Adam with ``foreach``, an average of the weights made one tensor at a time, and `.item()` on the loss of every step.

Attention goes through PyTorch's fused kernels, the dead tail of the reference U-Net is left out, and mixed precision is
that of ours: what separates the two is the list above and no more.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.training_utils import EMAModel
from torch import nn

from mimicbrush.models.components import Components
from mimicbrush.models.encoders import encode_latents, estimate_depth
from mimicbrush.models.reference_attention import PlainAttentionProcessor, attention_paths, reference_paths
from mimicbrush.models.unets import ReferenceUNet
from mimicbrush.ops.canvas import blank_mask
from mimicbrush.ops.pillow_resize import resize_like_pillow
from mimicbrush.training.noise import NoiseSample
from mimicbrush.training.objective import Conditions, Prediction
from mimicbrush.types import TrainBatch

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

#: Module path -> what entered that self-attention of the reference U-Net; and which rows keep it, under "keep".
BANK: dict[str, torch.Tensor] = {}


class ReadBank:
    """Self-attention over [own ; bank] and over the own tokens, of which each row takes one."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        with_reference = _attend(attn, hidden_states, torch.cat([hidden_states, BANK[self.path]], dim=1))
        alone = _attend(attn, hidden_states, hidden_states)
        return attn.to_out[0](torch.where(BANK["keep"].view(-1, 1, 1), with_reference, alone))


def _attend(attn: Attention, own: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    query, key, value = (
        projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for projected in (attn.to_q(own), attn.to_k(tokens), attn.to_v(tokens))
    )
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class CommonModel(nn.Module):
    """Both U-Nets and both projectors.

    Args:
        parts: theirs become these, processors and hooks included.
        size_px: of the images.
        activation_checkpointing: of both U-Nets.
    """

    def __init__(self, parts: Components, size_px: int, activation_checkpointing: bool = True) -> None:
        super().__init__()
        assert parts.reference_unet is not None
        self.unet: UNet2DConditionModel = parts.unet
        self.reference_unet: ReferenceUNet = parts.reference_unet
        self.image_projector, self.depth_projector = parts.image_projector, parts.depth_projector
        self.size_px = size_px
        reading = reference_paths(self.unet)
        self.unet.set_attn_processor(
            {
                f"{path}.processor": ReadBank(path) if path in reading else PlainAttentionProcessor(path)
                for path in attention_paths(self.unet)
            }
        )
        for path in reading:
            self.reference_unet.get_submodule(path).register_forward_pre_hook(
                lambda _module, inputs, path=path: BANK.update({path: inputs[0]})
            )
        if activation_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.reference_unet.enable_gradient_checkpointing()

    def forward(
        self,
        noisy: torch.Tensor,
        timestep: torch.Tensor,
        conditions: Conditions,
        keep_reference: torch.Tensor,
        matches: None = None,
    ) -> Prediction:
        """As `MimicBrushModel.forward`."""
        context = self.image_projector(conditions.image_tokens)
        depth = self.depth_projector(conditions.depth_map, self.size_px)
        BANK.clear()
        BANK["keep"] = keep_reference
        self.reference_unet(conditions.reference_latents, timestep, context)
        stem = torch.cat([noisy, conditions.latent_mask, conditions.masked_source_latents, depth], dim=1)
        return Prediction(self.unet(stem, timestep, context).sample)


class CommonTraining:
    """Encoders, model, optimizer and average.

    Args:
        parts: frozen ones in the type that they run in.
        size_px: of the images.
        noise_scheduler: adds the noise.
        learning_rate, max_grad_norm, ema_decay: see `TrainOptions`.
        autocast: the type of mixed precision; None is float32.
    """

    def __init__(
        self,
        parts: Components,
        size_px: int,
        noise_scheduler: DDIMScheduler,
        *,
        learning_rate: float,
        max_grad_norm: float,
        ema_decay: float,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.vae, self.image_encoder, self.depth_estimator = parts.vae, parts.image_encoder, parts.depth_estimator
        self.noise_scheduler, self.max_grad_norm, self.autocast = noise_scheduler, max_grad_norm, autocast
        self.model = CommonModel(parts, size_px).train()
        self.optimizer: torch.optim.Optimizer | None = None
        if not next(self.model.parameters()).is_meta:
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=learning_rate, foreach=True)
            self.average = EMAModel(self.model.parameters(), decay=ema_decay)

    @torch.no_grad()
    def encode(self, batch: TrainBatch, noise_sample: NoiseSample) -> Conditions:
        """Pixels -> conditions, with drops by all-zero pixels and an all-zero depth map."""
        images = (batch.source, blank_mask(batch.source, batch.mask), batch.reference)
        source, hole, reference = (
            encode_latents(self.vae, pixels, noise).float()
            for pixels, noise in zip(images, noise_sample.posteriors, strict=True)
        )
        size = self.image_encoder.config.image_size
        pixels = resize_like_pillow(((batch.reference.double() + 1) * 127.5).round(), size).float() / 255
        mean, std = pixels.new_tensor(_CLIP_MEAN).view(3, 1, 1), pixels.new_tensor(_CLIP_STD).view(3, 1, 1)
        tokens = self._image_tokens((pixels - mean) / std)
        nothing = self._image_tokens(torch.zeros_like(pixels[:1]))
        tokens = torch.where(noise_sample.keep_reference.view(-1, 1, 1), tokens, nothing)
        depth_map = estimate_depth(self.depth_estimator, batch.source, "standard")
        depth_map = depth_map * noise_sample.keep_depth.view(-1, 1, 1, 1)
        mask = F.interpolate(batch.mask, size=source.shape[-2:])
        return Conditions(source, hole, reference, mask, tokens.float(), depth_map.float())

    def _image_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.image_encoder(pixels.to(self.image_encoder.dtype), output_hidden_states=True).hidden_states[-2]

    def loss_and_gradients(self, batch: TrainBatch, noise_sample: NoiseSample) -> torch.Tensor:
        """() loss; the gradients are where the optimizer looks for them."""
        conditions = self.encode(batch, noise_sample)
        device = batch.source.device.type
        with torch.autocast(device, self.autocast) if self.autocast else nullcontext():
            noisy = self.noise_scheduler.add_noise(conditions.source_latents, noise_sample.noise, noise_sample.timestep)
            prediction = self.model(noisy, noise_sample.timestep, conditions, noise_sample.keep_reference).sample
            loss = F.mse_loss(prediction.float(), noise_sample.noise)
        loss.backward()
        return loss.detach()

    def step(self, batch: TrainBatch, noise_sample: NoiseSample) -> tuple[float, torch.Tensor]:
        """A step: loss, and the norm of the gradients."""
        assert self.optimizer is not None
        loss = self.loss_and_gradients(batch, noise_sample)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.model.parameters())
        return loss.item(), norm
