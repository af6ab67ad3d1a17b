"""The released inference algorithm (ali-vilab/MimicBrush) as it is written there, on the weights of a pipeline.

Only to hold ours against: as the oracle of tests and as the peer of `speed.py`. What it does that ours does not:
the reference U-Net reads two rows at every step, of which one is thrown away; each reading layer attends three
times, once with the queries of the reference, too, whose results are cut off; the CLIP encoder runs to its end; and
"no reference" and "no depth" are encoded for every edit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from PIL import Image

from mimicbrush.models.encoders import estimate_depth, make_no_depth_map
from mimicbrush.models.reference_attention import PlainAttentionProcessor, attention_paths, reference_paths
from mimicbrush.ops.canvas import to_uint8
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.types import ReferenceStates

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ThreeAttentions:
    """Self-attention of a reading layer: over [own ; reference], over the own tokens, and for the first half again."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        reference_states: ReferenceStates | None = None,
    ) -> torch.Tensor:
        """(2B, N, C), rows [unconditional, conditional] -> (2B, N, C)."""
        assert reference_states is not None
        both = torch.cat([hidden_states, reference_states.features[self.path]], dim=1)  # (2B, 2N, C)
        attended = _attend(attn, both)[:, : hidden_states.shape[1]] * 0.5 + _attend(attn, hidden_states) * 0.5
        half = len(hidden_states) // 2
        attended[:half] = _attend(attn, hidden_states[:half])
        return attended


def _attend(attn: Attention, tokens: torch.Tensor) -> torch.Tensor:
    query, key, value = (
        projection(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for projection in (attn.to_q, attn.to_k, attn.to_v)
    )
    return attn.to_out[0](F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class ReleasedAlgorithm:
    """One guided edit of one square image of the model's size, with the VAE's posteriors at their means.

    Args:
        pipe: its weights are shared, not copied.
        reference_timestep: "current" is the released loop; "zero" shows the reference U-Net t = 0 at every step,
            as a line does that is commented out there.
    """

    def __init__(self, pipe: MimicBrushPipeline, reference_timestep: str = "current") -> None:
        self.pipe, self.reference_timestep = pipe, reference_timestep
        self.unet = _twin(pipe.unet)
        reading = reference_paths(self.unet)
        self.unet.set_attn_processor(
            {
                f"{path}.processor": ThreeAttentions(path) if path in reading else PlainAttentionProcessor(path)
                for path in attention_paths(self.unet)
            }
        )

    @torch.no_grad()
    def __call__(
        self,
        source: torch.Tensor,
        mask: torch.Tensor,
        reference: torch.Tensor,
        latents: torch.Tensor,
        *,
        steps: int,
        guidance_scale: float,
        keep_shape: bool = False,
    ) -> torch.Tensor:
        """Edit.

        Args:
            source, reference: (1, 3, S, S) in [-1, 1], of 8-bit images.
            mask: (1, 1, S, S), 1 = repaint.
            latents: (1, 4, h, w), the noise to start from.
            steps: of the scheduler.
            guidance_scale: of classifier-free guidance.
            keep_shape: give the depth of the source.

        Returns:
            (1, 4, h, w) latents; see `decode`.
        """
        conditions = self.encode(source, mask, reference, keep_shape)
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(steps, device=latents.device)
        latents = latents * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            noise = self.step(latents, timestep, conditions, guidance_scale)
            latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
        return latents

    def encode(
        self, source: torch.Tensor, mask: torch.Tensor, reference: torch.Tensor, keep_shape: bool
    ) -> dict[str, torch.Tensor]:
        """All that the loop needs beside the latents."""
        pipe = self.pipe
        size = pipe.image_encoder.config.image_size
        if reference.is_meta:
            pixels = reference.new_empty(1, 3, size, size)
        else:
            image = Image.fromarray(to_uint8(reference)[0]).resize((size, size), Image.Resampling.BICUBIC)
            pixels = torch.tensor(bytearray(image.tobytes()), dtype=torch.float32).view(1, size, size, 3)
            pixels = pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(_CLIP_MEAN).view(3, 1, 1)
            pixels = (pixels / torch.tensor(_CLIP_STD).view(3, 1, 1)).to(reference)
        context = torch.cat([self._image_tokens(torch.zeros_like(pixels)), self._image_tokens(pixels)])
        if keep_shape:
            depth = estimate_depth(pipe.depth_estimator, source, pipe.config.depth_convention)
        else:
            depth = make_no_depth_map(pipe.depth_estimator, 1, pipe.config.no_depth_convention, source.device)
        return {
            "context": context,  # (2, N, D)
            "depth": pipe.depth_projector(depth, pipe.size_px).repeat(2, 1, 1, 1),
            "reference": self._latents(reference).repeat(2, 1, 1, 1),
            "hole": self._latents(source * (1 - mask) - mask).repeat(2, 1, 1, 1),
            "mask": F.interpolate(mask, scale_factor=1 / pipe.vae_scale_factor).repeat(2, 1, 1, 1),
        }

    def step(
        self, latents: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, torch.Tensor], guidance_scale: float
    ) -> torch.Tensor:
        """Both U-Nets once: the predicted noise (1, 4, h, w)."""
        states = ReferenceStates()
        travelling: dict[str, Any] = {"cross_attention_kwargs": {"reference_states": states}, "return_dict": False}
        seen = timestep if self.reference_timestep == "current" else torch.zeros_like(timestep)
        self.pipe.reference_unet(conditions["reference"], seen, conditions["context"], **travelling)
        sample = self.pipe.scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        stem = torch.cat([sample, conditions["mask"], conditions["hole"], conditions["depth"]], dim=1)
        without, with_reference = self.unet(stem, timestep, conditions["context"], **travelling)[0].chunk(2)
        return without + guidance_scale * (with_reference - without)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (1, 4, h, w) -> pixels (1, 3, S, S) in 0..1."""
        vae = self.pipe.vae
        return (vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    def _image_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = self.pipe.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]
        return self.pipe.image_projector(hidden)

    def _latents(self, pixels: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        return vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor


def _twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Another U-Net with the same weights in memory."""
    with torch.device("meta"):
        twin = UNet2DConditionModel.from_config(unet.config)
    twin.load_state_dict(unet.state_dict(), assign=True)
    return twin.eval()
