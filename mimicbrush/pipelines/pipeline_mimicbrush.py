"""Edit a picture by imitating another (paper Sec. 3; inference as in ali-vilab/MimicBrush)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import CLIPVisionModelWithProjection, DepthAnythingForDepthEstimation

from mimicbrush.errors import InputError
from mimicbrush.models.encoders import (
    decode_latents,
    encode_image_tokens,
    encode_latents,
    encode_no_image_tokens,
    estimate_depth,
    no_depth,
)
from mimicbrush.models.options import ModelOptions
from mimicbrush.models.patch_autoencoder import PatchAutoencoder
from mimicbrush.models.projectors import DepthProjector, ImageProjector
from mimicbrush.models.reference_attention import read_references
from mimicbrush.models.unets import ReferenceUNet
from mimicbrush.ops.files import upright
from mimicbrush.ops.images import (
    IMAGE_FILL,
    MASK_THRESHOLD,
    blank,
    crop_back,
    letterbox,
    letterbox_mask,
    paste_back,
    to_tensor,
    to_uint8,
)
from mimicbrush.pipelines.pipeline_output import MimicBrushPipelineOutput
from mimicbrush.types import ReferenceStates

Picture = Image.Image | np.ndarray


@dataclass(frozen=True)
class PreparedReference:
    """What is known of the references before any step: it depends on nothing but them.

    Attributes:
        latents: (B, 4, h, w), clean.
        context: (B, N, D), projected image tokens.
    """

    latents: torch.Tensor
    context: torch.Tensor


class MimicBrushPipeline(DiffusionPipeline):
    """Repaint the masked region of a source so that it imitates the matching part of a reference.

    Args:
        vae, unet, reference_unet, image_encoder, image_projector, depth_estimator, depth_projector,
        scheduler: the networks (see `mimicbrush.models.parts`) and a DDIM scheduler.
        reference_blend: 1.0 attends over [own ; reference] (paper), 0.5 averages that with attention over
            the own tokens (released code). Weights work only with the blend they were trained for.
        reference_timestep: which t the reference U-Net sees: the "current" one, again at every step
            (released code), or "zero", once (ours; weights must be trained for it).
        depth_convention, no_depth_convention: see `mimicbrush.models.encoders`.
        default_num_inference_steps, default_guidance_scale: used where a call names none (paper Sec. 4.1:
            50 and 5).
    """

    model_cpu_offload_seq = (
        "image_encoder->depth_estimator->image_projector->depth_projector->reference_unet->unet->vae"
    )
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        vae: AutoencoderKL | PatchAutoencoder,
        unet: UNet2DConditionModel,
        reference_unet: ReferenceUNet,
        image_encoder: CLIPVisionModelWithProjection,
        image_projector: ImageProjector,
        depth_estimator: DepthAnythingForDepthEstimation,
        depth_projector: DepthProjector,
        scheduler: DDIMScheduler,
        reference_blend: float = 1.0,
        reference_timestep: str = "current",
        depth_convention: str = "standard",
        no_depth_convention: str = "zero_map",
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 5.0,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            unet=unet,
            reference_unet=reference_unet,
            image_encoder=image_encoder,
            image_projector=image_projector,
            depth_estimator=depth_estimator,
            depth_projector=depth_projector,
            scheduler=scheduler,
        )
        self.register_to_config(
            reference_blend=reference_blend,
            reference_timestep=reference_timestep,
            depth_convention=depth_convention,
            no_depth_convention=no_depth_convention,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
        )
        ModelOptions(self.size_px, reference_blend, reference_timestep, depth_convention, no_depth_convention)
        read_references(unet, reference_blend)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size_px(self) -> int:
        """Side of the square canvas that the model paints on."""
        return self.unet.config.sample_size * self.vae_scale_factor

    @torch.no_grad()
    def __call__(
        self,
        source: Picture | Sequence[Picture],
        mask: Picture | Sequence[Picture],
        reference: Picture | Sequence[Picture] | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        keep_shape: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        paste_back: bool = True,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> MimicBrushPipelineOutput | tuple[Any]:
        """Edit one picture or a batch.

        Args:
            source: B pictures to edit, any size; PIL (turned as its EXIF says) or (H, W, 3) uint8.
            mask: one per source, of the same size; PIL or (H, W) uint8; above 128 = repaint.
            reference: one per source, any size, no mask; None repaints without any reference.
            num_inference_steps: DDIM steps; None = the pipeline's default.
            guidance_scale: of classifier-free guidance; 1 or less turns it off; None = the pipeline's default.
            keep_shape: texture transfer: give the depth map of the unmasked source (paper Sec. 3.4).
            generator: one for all, or one per source.
            latents: (B, 4, h, w) standard normal start, instead of drawing it.
            paste_back: put the repainted region into the source at its full size; otherwise return the
                model's square canvas. Only for "pil" and "np".
            output_type: see `MimicBrushPipelineOutput`.
            return_dict: False returns a plain tuple.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after each step; a
                returned "latents" replaces them.

        Raises:
            InputError: pictures, masks and references that do not fit together.
        """
        steps = self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = self.config.default_guidance_scale if guidance_scale is None else guidance_scale

        # 1. Pictures onto square canvases.
        if output_type not in ("pil", "np", "pt", "latent"):
            raise InputError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        sources, masks, references = self.check_inputs(source, mask, reference, steps, generator)
        batch, device = len(sources), self._execution_device
        source_px = self._canvas(sources)  # (B, 3, S, S)
        mask_px = self._mask_canvas(masks)  # (B, 1, S, S)
        guided = references is not None and guidance > 1

        # 2. Everything that is random, in the released order: reference posterior, noise, source posterior.
        prepared = None if references is None else self.prepare_reference(self._canvas(references), generator)
        shape = (batch, self.vae.config.latent_channels, *[self.unet.config.sample_size] * 2)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise InputError(f"latents have shape {tuple(latents.shape)}, expected {shape}")
        stem_rest = self.prepare_stem(source_px, mask_px, keep_shape, generator)  # (B, 9, h, w)

        # 3. The context of the unconditional half, and of the conditional one.
        nothing = self.image_projector(encode_no_image_tokens(self.image_encoder, batch).to(self.unet.dtype))
        context = nothing if prepared is None else prepared.context  # (B, N, D)
        if guided:
            context = torch.cat([nothing, context])  # (2B, N, D)
            stem_rest = torch.cat([stem_rest] * 2)

        # 4. Denoise.
        self.scheduler.set_timesteps(steps, device=device)
        latents = latents.to(device, self.unet.dtype) * self.scheduler.init_noise_sigma
        states: ReferenceStates | None = None
        with self.progress_bar(total=steps) as progress:
            for number, timestep in enumerate(self.scheduler.timesteps):
                if prepared is not None and (states is None or self.config.reference_timestep == "current"):
                    states = self.read_reference(prepared, timestep)
                noise = self.denoise(latents, stem_rest, timestep, context, states, guidance if guided else None)
                latents = self.scheduler.step(noise, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, number, int(timestep), {"latents": latents})
                    latents = changed.pop("latents", latents)
                progress.update()

        # 5. Back to pictures.
        images = self.decode(latents, sources, masks, paste_back, output_type)
        self.maybe_free_model_hooks()
        return MimicBrushPipelineOutput(images=images) if return_dict else (images,)

    def check_inputs(
        self,
        source: Picture | Sequence[Picture],
        mask: Picture | Sequence[Picture],
        reference: Picture | Sequence[Picture] | None,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray] | None]:
        """Pictures as lists of arrays: (H, W, 3), (H, W), (H, W, 3) uint8; errors say what does not fit."""
        sources = [_rgb(picture) for picture in _as_list(source)]
        masks = [_grey(picture) for picture in _as_list(mask)]
        references = None if reference is None else [_rgb(picture) for picture in _as_list(reference)]
        if len(masks) != len(sources) or (references is not None and len(references) != len(sources)):
            counts = f"{len(sources)} sources, {len(masks)} masks"
            counts += "" if references is None else f", {len(references)} references"
            raise InputError(f"one mask and one reference per source are needed, got {counts}")
        for number, (picture, region) in enumerate(zip(sources, masks, strict=True)):
            if picture.shape[:2] != region.shape:
                raise InputError(
                    f"mask {number} is {region.shape[1]} x {region.shape[0]} px, "
                    f"its source {picture.shape[1]} x {picture.shape[0]} px; they must be of one size"
                )
            if not (region > MASK_THRESHOLD).any():
                raise InputError(f"mask {number} is empty: nothing in it is above 128, so there is nothing to repaint")
            if not letterbox_mask(region, self.size_px).any():
                raise InputError(
                    f"mask {number} is too thin: nothing is left of it at the {self.size_px} px that the model "
                    "paints at; make it wider, or crop source and mask around it"
                )
        if num_inference_steps < 1:
            raise InputError(f"num_inference_steps must be 1 or more, got {num_inference_steps}")
        if isinstance(generator, list) and len(generator) != len(sources):
            raise InputError(f"{len(generator)} generators for {len(sources)} sources; give one, or one each")
        return sources, masks, references

    def prepare_reference(
        self, pixels: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> PreparedReference:
        """References (B, 3, S, S) in [-1, 1] -> their clean latents and projected image tokens."""
        tokens = encode_image_tokens(self.image_encoder, pixels)
        context = self.image_projector(tokens.to(self.image_projector.dtype))
        latents = encode_latents(self.vae, pixels, self._posterior_noise(len(pixels), generator))
        return PreparedReference(latents.to(self.unet.dtype), context.to(self.unet.dtype))

    def prepare_stem(
        self,
        source: torch.Tensor,
        mask: torch.Tensor,
        keep_shape: bool,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """The nine channels beside the noisy latent: mask 1, masked source 4, depth 4 -> (B, 9, h, w)."""
        hole = encode_latents(self.vae, blank(source, mask), self._posterior_noise(len(source), generator))
        small_mask = torch.nn.functional.interpolate(mask, size=hole.shape[-2:])  # nearest, as in SD inpainting
        if keep_shape:
            depth = estimate_depth(self.depth_estimator, source, self.config.depth_convention)
        else:
            depth = no_depth(self.depth_estimator, len(source), self.config.no_depth_convention)
        depth_latent = self.depth_projector(depth.to(self.depth_projector.dtype), self.size_px)
        return torch.cat([small_mask.to(hole), hole, depth_latent.to(hole)], dim=1).to(self.unet.dtype)

    def read_reference(self, prepared: PreparedReference, timestep: torch.Tensor) -> ReferenceStates:
        """One pass of the reference U-Net over the clean latents: features of the mid and up blocks."""
        states = ReferenceStates()
        seen = timestep if self.config.reference_timestep == "current" else torch.zeros_like(timestep)
        self.reference_unet(
            prepared.latents,
            seen,
            prepared.context,
            cross_attention_kwargs={"reference_states": states},
            return_dict=False,
        )
        return states

    def denoise(
        self,
        latents: torch.Tensor,
        stem_rest: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        states: ReferenceStates | None,
        guidance_scale: float | None,
    ) -> torch.Tensor:
        """Predicted noise (B, 4, h, w).

        With guidance, `stem_rest` and `context` hold 2B rows, [unconditional, conditional]; the reference
        states hold the B conditional ones, so the unconditional half attends to itself alone.
        """
        sample = latents if guidance_scale is None else torch.cat([latents] * 2)
        sample = self.scheduler.scale_model_input(sample, timestep)
        stem = torch.cat([sample, stem_rest], dim=1)  # (B or 2B, 13, h, w)
        noise = self.unet(
            stem, timestep, context, cross_attention_kwargs={"reference_states": states}, return_dict=False
        )[0]
        if guidance_scale is None:
            return noise
        without, with_reference = noise.chunk(2)
        return without + guidance_scale * (with_reference - without)

    def decode(
        self,
        latents: torch.Tensor,
        sources: list[np.ndarray],
        masks: list[np.ndarray],
        paste: bool,
        output_type: Literal["pil", "np", "pt", "latent"],
    ) -> list[Image.Image] | list[np.ndarray] | np.ndarray | torch.Tensor:
        """Latents (B, 4, h, w) -> pictures, pasted back into their sources if asked for."""
        if output_type == "latent":
            return latents
        pixels = decode_latents(self.vae, latents)  # (B, 3, S, S)
        if output_type == "pt":
            return (pixels.float() / 2 + 0.5).clamp(0, 1)
        squares = to_uint8(pixels)
        if not paste:
            if output_type == "np":
                return (pixels.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
            return [Image.fromarray(square) for square in squares]
        composites = [
            paste_back(crop_back(square, *source.shape[:2]), source, mask)
            for square, source, mask in zip(squares, sources, masks, strict=True)
        ]
        if output_type == "np":
            return [(composite / 255).astype(np.float32) for composite in composites]
        return [Image.fromarray(composite.round().astype(np.uint8)) for composite in composites]

    def _canvas(self, pictures: list[np.ndarray]) -> torch.Tensor:
        squares = np.stack([letterbox(picture, self.size_px, IMAGE_FILL) for picture in pictures])
        return to_tensor(squares).to(self._execution_device)

    def _mask_canvas(self, masks: list[np.ndarray]) -> torch.Tensor:
        squares = np.stack([letterbox_mask(mask, self.size_px) for mask in masks])
        return torch.from_numpy(squares[:, None]).float().to(self._execution_device)

    def _posterior_noise(self, batch: int, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
        side = self.unet.config.sample_size
        shape = (batch, self.vae.config.latent_channels, side, side)
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.vae.dtype)


def _as_list(pictures: Picture | Sequence[Picture]) -> list[Picture]:
    return [pictures] if isinstance(pictures, Image.Image | np.ndarray) else list(pictures)


def _rgb(picture: Picture) -> np.ndarray:
    array = np.asarray(upright(picture, "RGB")) if isinstance(picture, Image.Image) else picture
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise InputError(f"a picture must be (H, W, 3) uint8, got {array.shape} {array.dtype}")
    return array


def _grey(picture: Picture) -> np.ndarray:
    array = np.asarray(upright(picture, "L")) if isinstance(picture, Image.Image) else picture
    if array.ndim != 2 or array.dtype != np.uint8:
        raise InputError(f"a mask must be (H, W) uint8 in 0..255, got {array.shape} {array.dtype}")
    return array
