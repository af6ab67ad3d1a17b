"""What an edit is conditioned on: the reference, the masked source, the depth, and nothing instead of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from mimicbrush.errors import InputError
from mimicbrush.models.encoders import (
    encode_image_tokens,
    encode_latents,
    encode_no_image_tokens,
    estimate_depth,
    make_no_depth_map,
)
from mimicbrush.models.options import ModelOptions
from mimicbrush.models.reference_attention import project_context, project_references
from mimicbrush.models.token_encoders import token_encoder_name
from mimicbrush.models.unets import KeyValueReferenceUNet
from mimicbrush.ops.canvas import IMAGE_FILL, blank_mask, letterbox, letterbox_mask, to_tensor
from mimicbrush.ops.crops import Box, Placement, crop_box
from mimicbrush.pipelines.cache import WeightDependentCache
from mimicbrush.pipelines.hub import HubPipeline
from mimicbrush.pipelines.image_inputs import ImageInput, list_boxes, list_images, to_rgb_array
from mimicbrush.pipelines.prepared import PreparedReference, Projected, repeat_rows
from mimicbrush.types import ReferenceStates

Generator = torch.Generator | list[torch.Generator] | None


class ConditionedPipeline(HubPipeline):
    """The steps of `MimicBrushPipeline` up to the denoising, each of which can be called by itself."""

    _constants: WeightDependentCache

    def options(self) -> ModelOptions:
        """What this pipeline does where paper and released code differ."""
        shares_keys_values = isinstance(self.reference_unet, KeyValueReferenceUNet)
        tokens_of = token_encoder_name(self.image_encoder)
        return ModelOptions(
            size_px=self.size_px,
            letterbox_order=self.config.letterbox_order,
            reference_encoder=tokens_of if self.reference_unet is None else "unet",
            reference_sharing="keys_values" if shares_keys_values else "hidden_states",
            reference_blend=self.config.reference_blend,
            reference_timestep=self.config.reference_timestep,
            depth_channels=self.depth_projector.config.depth_channels,
            depth_convention=self.config.depth_convention,
            no_depth_convention=self.config.no_depth_convention,
        )

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size_px(self) -> int:
        """Side of the square canvas that the model paints on."""
        return self.unet.config.sample_size * self.vae_scale_factor

    @torch.no_grad()
    def prepare_reference(
        self,
        reference: ImageInput | Sequence[ImageInput],
        *,
        reference_crop: Box | list[Box] | None = None,
        generator: Generator = None,
        num_inference_steps: int | None = None,
        reference_batch_size: int = 4,
    ) -> PreparedReference:
        """Make references ready for many edits; `PreparedReference` says when reusing them is exact.

        Args:
            reference: R images.
            reference_crop: the part to imitate, (x0, y0, x1, y1) px; one for all, or a list.
            generator: draws from the VAE's posterior; a list draws len(list) / R times for each.
            num_inference_steps: with ``reference_timestep="current"``: hold the features for this number of steps,
                too. Some 28 MB a step at 512 px in half precision; "zero" always holds its one.
            reference_batch_size: timesteps that the reference U-Net reads in one pass.
        """
        images = [to_rgb_array(image) for image in list_images(reference)]
        if not images or (isinstance(generator, list) and len(generator) % len(images)):
            draws = len(generator) if isinstance(generator, list) else 1
            raise InputError(f"{len(images)} references cannot serve {draws} results; give one, or one per source")
        placements = [Placement(box, self.size_px) for box in list_boxes(images, reference_crop)]
        prepared = self.encode_references(self._canvas(images, placements), placements, generator)
        if self.reference_unet is None:
            return prepared
        if self.config.reference_timestep == "zero":
            seen = [0.0]
        elif num_inference_steps is not None:
            self.scheduler.set_timesteps(num_inference_steps)
            seen = [float(timestep) for timestep in self.scheduler.timesteps.tolist()]
        else:
            return prepared
        features = dict(zip(seen, self._read(prepared, seen, reference_batch_size), strict=True))
        return replace(prepared, features=features)

    def encode_references(
        self, pixels: torch.Tensor, placements: list[Placement], generator: Generator
    ) -> PreparedReference:
        """References (R, 3, S, S) in [-1, 1] -> clean latents and image tokens, without features."""
        tokens = encode_image_tokens(self.image_encoder, pixels, patches_only=self.reference_unet is None)
        context = self.image_projector(tokens.to(self.image_projector.dtype)).to(self.unet.dtype)
        latents = encode_latents(self.vae, pixels, self._posterior_noise(len(pixels), generator)).to(self.unet.dtype)
        context = context.repeat_interleave(len(latents) // len(context), 0)
        return PreparedReference(latents, context, placements, self._settings())

    def prepare_stem(
        self,
        source: torch.Tensor,
        mask: torch.Tensor,
        keep_shape: bool,
        depth_map: torch.Tensor | None,
        generator: Generator,
    ) -> torch.Tensor:
        """The nine channels beside the noisy latent: mask 1, masked source 4, depth 4 -> (B or B n, 9, h, w)."""
        hole = encode_latents(self.vae, blank_mask(source, mask), self._posterior_noise(len(source), generator))
        times = len(hole) // len(source)  # several draws, where each result has a generator of its own
        small_mask = torch.nn.functional.interpolate(mask, size=hole.shape[-2:])  # nearest, as in SD inpainting
        if depth_map is not None:
            if depth_map.ndim != 4 or depth_map.shape[:2] != (len(source), 1):
                raise InputError(
                    f"depth_map has shape {tuple(depth_map.shape)}, expected ({len(source)}, 1, height, width)"
                )
            depth_latent = self._project_depth(depth_map.to(source.device))
        elif keep_shape:
            depth_latent = self._project_depth(
                estimate_depth(self.depth_estimator, source, self.config.depth_convention)
            )
        else:
            depth_latent = self.no_depth_latent().expand(len(source), -1, -1, -1)
        small_mask, depth_latent = (part.repeat_interleave(times, 0) for part in (small_mask, depth_latent))
        return torch.cat([small_mask.to(hole), hole, depth_latent.to(hole)], dim=1).to(self.unet.dtype)

    def no_depth_latent(self) -> torch.Tensor:
        """(1, 4, h, w) depth latent of "no depth", the same for all edits."""
        return self._constants.get(
            f"no_depth_latent, {self.config.no_depth_convention}, {self.size_px} px",
            self.depth_estimator,
            self.depth_projector,
            lambda: self._project_depth(
                make_no_depth_map(self.depth_estimator, 1, self.config.no_depth_convention, self._execution_device)
            ),
        )

    def no_reference_context(self) -> torch.Tensor:
        """(1, N, D) context of "no reference", the same for all edits."""
        context = self._constants.get(
            "no_reference_context",
            self.image_encoder,
            self.image_projector,
            lambda: self.image_projector(
                encode_no_image_tokens(
                    self.image_encoder, 1, self._execution_device, patches_only=self.reference_unet is None
                ).to(self.image_projector.dtype)
            ),
        )
        return context.to(self.unet.dtype)

    def read_references(
        self, prepared: PreparedReference | None, timesteps: torch.Tensor, batch_size: int
    ) -> Iterator[Projected]:
        """For each timestep in turn, keys and values of the references, R rows by module path; none without one."""
        if prepared is None or self.reference_unet is None:
            yield from ({} for _ in timesteps)
            return
        current = self.config.reference_timestep == "current"
        seen = [float(timestep) if current else 0.0 for timestep in timesteps.tolist()]
        if all(timestep in prepared.features for timestep in seen):
            yield from (prepared.features[timestep] for timestep in seen)
        elif current:
            yield from self._read(prepared, seen, batch_size)
        else:
            once = next(self._read(prepared, seen[:1], 1))
            yield from (once for _ in seen)

    def _read(self, prepared: PreparedReference, seen: list[float], batch_size: int) -> Iterator[Projected]:
        """Passes of the reference U-Net over clean latents, several timesteps in one batch."""
        rows, dtype = len(prepared), self.reference_unet.dtype  # which may differ from the other U-Net's
        latents, context = prepared.latents.to(dtype), prepared.context.to(dtype)
        at_hand = project_context(self.reference_unet, context)  # the same at every timestep
        for start in range(0, len(seen), max(1, batch_size)):
            chunk = torch.tensor(seen[start : start + max(1, batch_size)], device=prepared.latents.device)
            times = len(chunk)
            states = ReferenceStates(projected=repeat_rows(at_hand, rows * times))
            self.reference_unet(
                latents.repeat_interleave(times, 0),
                chunk.repeat(rows),
                context.repeat_interleave(times, 0),
                cross_attention_kwargs={"reference_states": states},
                return_dict=False,
            )
            dtype = self.unet.dtype
            keys_values = {
                path: (key.to(dtype), value.to(dtype))
                for path, (key, value) in states.projected.items()
                if path not in at_hand
            }
            features = {path: feature.to(dtype) for path, feature in states.features.items()}
            keys_values |= project_references(self.unet, features)
            for one in range(times):
                yield {path: (key[one::times], value[one::times]) for path, (key, value) in keys_values.items()}

    def _settings(self) -> tuple[object, ...]:
        options = self.options()
        read_by = (options.reference_encoder, options.reference_sharing, options.reference_timestep)
        return (options.size_px, *read_by, options.letterbox_order, self.unet.dtype, self._execution_device)

    def _canvas(self, images: list[np.ndarray], placements: list[Placement]) -> torch.Tensor:
        order = self.config.letterbox_order
        squares = [
            letterbox(crop_box(image, placement.box, "picture"), self.size_px, IMAGE_FILL, order)
            for image, placement in zip(images, placements, strict=True)
        ]
        return to_tensor(np.stack(squares)).to(self._execution_device)

    def _mask_canvas(self, masks: list[np.ndarray], placements: list[Placement]) -> torch.Tensor:
        holes = [
            letterbox_mask(crop_box(mask, placement.box, "mask"), self.size_px, self.config.letterbox_order)
            for mask, placement in zip(masks, placements, strict=True)
        ]
        for number, hole in enumerate(holes):
            # Its latents are an eighth of that, and take every eighth pixel of the mask.
            if not hole[:: self.vae_scale_factor, :: self.vae_scale_factor].any():
                raise InputError(
                    f"mask {number} is too thin: nothing is left of it at the {self.size_px} px that the model "
                    f"paints at, {self.vae_scale_factor} px to a latent; make it wider, or edit a square around it "
                    '(crop="auto")'
                )
        return torch.from_numpy(np.stack(holes))[:, None].float().to(self._execution_device)

    def _posterior_noise(self, images: int, generator: Generator) -> torch.Tensor | None:
        """One draw per image, or per generator; None for the posterior's mean."""
        if self.config.posterior == "mean":
            return None
        rows = len(generator) if isinstance(generator, list) else images
        shape = (rows, self.vae.config.latent_channels, *[self.unet.config.sample_size] * 2)
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.vae.dtype)

    def _project_depth(self, depth_map: torch.Tensor) -> torch.Tensor:
        return self.depth_projector(depth_map.to(self.depth_projector.dtype), self.size_px)
