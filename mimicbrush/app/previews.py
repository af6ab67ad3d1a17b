"""What an edit looks like while it runs: small, rough, and cheap enough to be made at every step."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image

from mimicbrush.io.images import MASK_THRESHOLD
from mimicbrush.models.encoders import encode_latents
from mimicbrush.ops.canvas import crop_back, to_tensor, to_uint8
from mimicbrush.ops.crops import Placement
from mimicbrush.pipelines.image_inputs import full_box, letterbox_images, to_mask_array, to_rgb_array

if TYPE_CHECKING:
    from mimicbrush.pipelines import MimicBrushPipeline

_LONG_SIDE_PX, _JPEG_QUALITY = 384, 80


class Preview:
    """Preview of an edit.

    An autoencoder's latents are nearly a linear function of the colours below them. This function is fitted to source
    and reference, by least squares, so it serves every autoencoder and needs no decoder.

    Args:
        pipeline: that edits.
        source, mask, reference: "RGB", "L" of its size, and "RGB".
        crop: as the pipeline takes it.
    """

    @torch.no_grad()
    def __init__(
        self, pipeline: MimicBrushPipeline, source: Image.Image, mask: Image.Image, reference: Image.Image, crop: str
    ) -> None:
        self._pipeline = pipeline
        pixels, covered, other = to_rgb_array(source), to_mask_array(mask), to_rgb_array(reference)
        (placement,) = pipeline.place([pixels], [covered], crop)
        placements = [placement, Placement(full_box(other), pipeline.size_px)]
        squares = letterbox_images([pixels, other], placements, pipeline.size_px, pipeline.config.letterbox_order)
        canvases = to_tensor(squares).to(pipeline.vae.device)  # (2, 3, S, S)
        latents = encode_latents(pipeline.vae, canvases, None).float().cpu()  # (2, C, h, w)
        colours = F.interpolate(canvases.float().cpu(), latents.shape[-2:], mode="area")  # (2, 3, h, w)
        self._map = torch.linalg.lstsq(_with_one(latents), colours.permute(0, 2, 3, 1).reshape(-1, 3)).solution

        scale = min(1.0, _LONG_SIDE_PX / max(source.size))
        size = max(1, round(source.width * scale)), max(1, round(source.height * scale))
        self._source = np.asarray(Image.fromarray(pixels).resize(size, reducing_gap=2))
        self._is_hole = np.asarray(Image.fromarray(covered).resize(size, reducing_gap=2)) > MASK_THRESHOLD
        self._box = [round(side * scale) for side in placement.box]
        self._clean: torch.Tensor | None = None
        self._latents: torch.Tensor | None = None

    def follow(self, step: int, timestep: int, latents: torch.Tensor) -> None:
        """Store the latents of a step; call it from the callback of the pipeline.

        Args:
            step: its number; 0 begins another image.
            timestep: of the scheduler.
            latents: (1, C, h, w) after it.
        """
        before, self._latents = self._latents if step else None, latents.detach().float().cpu()
        self._clean = self._latents if before is None else self._remove_noise(before, self._latents, timestep)

    def render(self) -> str:
        """Render the source with the current content of its hole, as a data URL."""
        assert self._clean is not None
        _, _, height, width = self._clean.shape
        rough = (_with_one(self._clean) @ self._map).reshape(1, height, width, 3).permute(0, 3, 1, 2)  # (1, 3, h, w)
        x0, y0, x1, y1 = self._box
        painted = self._source.copy()
        if x1 > x0 and y1 > y0:
            region = slice(y0, y1), slice(x0, x1)
            square = crop_back(to_uint8(rough)[0], y1 - y0, x1 - x0)
            painted[region] = np.where(self._is_hole[region][..., None], square, painted[region])
        buffer = io.BytesIO()
        Image.fromarray(painted).save(buffer, "JPEG", quality=_JPEG_QUALITY)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

    def _remove_noise(self, before: torch.Tensor, after: torch.Tensor, timestep: int) -> torch.Tensor:
        """Compute the clean latents that a DDIM step predicted.

        Before and after it, the latents mix the same image with the same noise, in shares that the schedule tells.
        """
        scheduler = self._pipeline.scheduler
        if not isinstance(scheduler, DDIMScheduler):
            return after
        earlier = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        alphas = scheduler.alphas_cumprod
        share = float(alphas[timestep])
        share_after = float(alphas[earlier] if earlier >= 0 else scheduler.final_alpha_cumprod)
        noise, noise_after = (1 - share) ** 0.5, (1 - share_after) ** 0.5
        return (after * noise - before * noise_after) / (share_after**0.5 * noise - share**0.5 * noise_after)


def _with_one(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B h w, C + 1), for a linear map with an offset."""
    return F.pad(latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]), (0, 1), value=1.0)
