"""Edit an image by imitating another (paper Sec. 3; inference as in ali-vilab/MimicBrush)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import DepthAnythingForDepthEstimation, PreTrainedModel

from mimicbrush.errors import InputError, MimicBrushError
from mimicbrush.models.attention_recorder import CorrespondenceRecorder
from mimicbrush.models.encoders import decode_latents
from mimicbrush.models.patch_autoencoder import PatchAutoencoder
from mimicbrush.models.projectors import DepthProjector, ImageProjector
from mimicbrush.models.reference_attention import (
    check_references_are_read,
    project_context,
    set_reference_processors,
)
from mimicbrush.models.unets import ReferenceUNet
from mimicbrush.ops.canvas import SOFT_EDGE_PX, crop_back, paste_back, to_uint8
from mimicbrush.ops.correspondence import Correspondence
from mimicbrush.ops.crops import Box, Placement, grow_box, square_around
from mimicbrush.ops.masks import mask_box
from mimicbrush.pipelines.cache import WeightDependentCache
from mimicbrush.pipelines.conditioning import ConditionedPipeline, Generator
from mimicbrush.pipelines.image_inputs import (
    ImageInput,
    check_masks,
    full_box,
    list_images,
    to_mask_array,
    to_rgb_array,
)
from mimicbrush.pipelines.pipeline_output import MimicBrushPipelineOutput
from mimicbrush.pipelines.prepared import PreparedReference, repeat_rows
from mimicbrush.types import AttentionRecord, ReferenceStates

#: A mask above this (of 255) is seen when it is pasted back: the crop around it must hold it.
_BLENDED = 8


class MimicBrushPipeline(ConditionedPipeline):
    """Repaint the masked region of a source so that it imitates the matching part of a reference.

    Args:
        vae, unet, reference_unet, image_encoder, image_projector, depth_estimator, depth_projector,
        scheduler: the networks (see `mimicbrush.models.components`) and a scheduler, DDIM in the paper.
        reference_blend: 1.0 attends over [own ; reference] (paper), 0.5 averages that with attention over
            the own tokens (released code). Weights work only with the blend they were trained for.
        reference_timestep: which t the reference U-Net sees: the "current" one, again at every step
            (released code), or "zero", once (ours; weights must be trained for it).
        depth_convention, no_depth_convention: see `mimicbrush.models.encoders`.
        letterbox_order: see `mimicbrush.ops.canvas.letterbox`.
        posterior: "sample" draws from the VAE's posterior (released code), "mean" takes its mean, which makes
            encodings independent of seeds.
        default_num_inference_steps, default_guidance_scale: used where a call names none (paper Sec. 4.1:
            50 and 5).

    Without a reference U-Net, patch tokens of the reference in the cross-attention are all that is seen of it, of CLIP
    or DINOv2, whichever `image_encoder` is (the ablation of the paper's Table 3).

    What the reference U-Net shares (`ModelOptions.reference_sharing`) and how many channels the depth projector
    takes are told by those networks themselves.
    """

    model_cpu_offload_seq = (
        "image_encoder->depth_estimator->image_projector->depth_projector->reference_unet->unet->vae"
    )
    _optional_components: ClassVar[list[str]] = ["reference_unet"]
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        vae: AutoencoderKL | PatchAutoencoder,
        unet: UNet2DConditionModel,
        reference_unet: ReferenceUNet | None,
        image_encoder: PreTrainedModel,
        image_projector: ImageProjector,
        depth_estimator: DepthAnythingForDepthEstimation,
        depth_projector: DepthProjector,
        scheduler: DDIMScheduler,
        reference_blend: float = 1.0,
        reference_timestep: str = "current",
        depth_convention: str = "standard",
        no_depth_convention: str = "zero_map",
        letterbox_order: str = "resize_then_pad",
        posterior: str = "sample",
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
            letterbox_order=letterbox_order,
            posterior=posterior,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
        )
        self.options()  # checks what was chosen
        if posterior not in ("sample", "mean"):
            raise InputError(f"posterior must be sample or mean, got {posterior!r}")
        set_reference_processors(unet, reference_blend)
        self._constants = WeightDependentCache()
        self._interrupt, self._num_timesteps, self._guidance_scale = False, 0, default_guidance_scale

    @property
    def guidance_scale(self) -> float:
        """Of the present or last call, for callbacks: one that sets `_guidance_scale` changes it for the next steps.

        As everywhere, 1 or less is no guidance; a call that began without any goes on without.
        """
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Of the present or last call, for callbacks."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """A callback that sets `_interrupt` ends the call after this step, with the image as it is then."""
        return self._interrupt

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Refused: diffusers' sliced attention knows no reference.

        Raises:
            InputError: always, except for None, which is how diffusers turns slicing off.
        """
        if slice_size is None:
            return
        raise InputError(
            "attention slicing would leave the reference out; PyTorch's attention needs little memory as it is, and "
            "enable_model_cpu_offload() or pipe.vae.enable_slicing() save more"
        )

    def enable_xformers_memory_efficient_attention(self, attention_op: Callable[..., Any] | None = None) -> None:
        """Refused: xFormers' processors know no reference.

        Raises:
            InputError: always; names what does the same.
        """
        raise InputError(
            "xFormers' processors would leave the reference out; "
            'pipe.unet.set_attention_backend("xformers") chooses it '
            "as a back end"
        )

    @torch.no_grad()
    def __call__(
        self,
        source: ImageInput | Sequence[ImageInput],
        mask: ImageInput | Sequence[ImageInput],
        reference: ImageInput | Sequence[ImageInput] | PreparedReference | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        keep_shape: bool = False,
        depth_map: torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        crop: Literal["full", "auto"] = "full",
        reference_crop: Box | list[Box] | None = None,
        eta: float = 0.0,
        generator: Generator = None,
        latents: torch.Tensor | None = None,
        paste_back: bool = True,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        return_correspondence: bool = False,
        attention_record: AttentionRecord | None = None,
        reference_batch_size: int = 4,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> MimicBrushPipelineOutput | tuple[Any, ...]:
        """Edit one image or a batch.

        Args:
            source: B images to edit, any size; PIL (turned as its EXIF says) or (H, W, 3) uint8.
            mask: one per source, of the same size; PIL or (H, W) uint8, above 128 = repaint; or (H, W) bool.
            reference: one for all sources or one each, any size, no mask; or what `prepare_reference` made of them;
                None repaints without any reference.
            num_inference_steps: of the scheduler; None = the pipeline's default.
            guidance_scale: of classifier-free guidance; 1 or less turns it off; None = the pipeline's default.
            keep_shape: texture transfer: give the depth map of the unmasked source (paper Sec. 3.4).
            depth_map: (B, 1, any, any), relative inverse depth on the canvas, instead of an estimated one.
            num_images_per_prompt: results per source, n; one after the other in the output.
            crop: "auto" edits a square around the hole at full resolution (see `ops.crops.square_around`), for small
                regions in large images; "full" the whole image.
            reference_crop: the part of the reference to imitate, (x0, y0, x1, y1) px; one for all, or a list.
            eta: of DDIM; schedulers without it ignore it.
            generator: one for all, or a list of B * n. With a list each result is what a call of its own would give;
                with one, the n results of a source share the VAE's draw of the reference, and so its features.
            latents: (B * n, 4, h, w) standard normal start, instead of drawing it.
            paste_back: put the repainted region into the source at its full size; otherwise return the
                model's square canvas. Only for "pil" and "np".
            output_type: see `MimicBrushPipelineOutput`.
            return_dict: False returns a plain tuple (images, and correspondences if asked for).
            return_correspondence: also tell which place of the reference filled which place of the hole.
            attention_record: gets every reference attention on the way, to measure what
                `return_correspondence` does not; not both at once.
            reference_batch_size: timesteps that the reference U-Net reads in one pass, where it reads several.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step; "latents" that it
                returns replace them.
            callback_on_step_end_tensor_inputs: names of the tensors that it gets: "latents" is all there is.

        Raises:
            InputError: images, masks, references and options that do not fit together.
            WeightsError: something replaced the attention that reads the reference.
        """
        # 1. What is asked for.
        steps = self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        sources, masks = self.check_inputs(source, mask, num_images_per_prompt, steps, generator, output_type)
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise InputError(f"callback tensors may be {self._callback_tensor_inputs}, got {sorted(unknown)}")
        recording = "return_correspondence" if return_correspondence else "attention_record"
        if (return_correspondence or attention_record is not None) and reference is None:
            raise InputError(f"{recording} needs a reference")
        if (return_correspondence or attention_record is not None) and self.reference_unet is None:
            raise InputError(f"{recording} needs a reference U-Net, which this pipeline was trained without")
        if return_correspondence and attention_record is not None:
            raise InputError("return_correspondence is a record of attention, too: ask for it or give attention_record")
        rows, device = len(sources) * num_images_per_prompt, self._execution_device
        guided = reference is not None and guidance > 1
        self._interrupt, self._guidance_scale = False, guidance

        # 2. Images onto square canvases.
        placements = self.place(sources, masks, crop)
        source_px = self._canvas(sources, placements)  # (B, 3, S, S)
        mask_px = self._mask_canvas(masks, placements)  # (B, 1, S, S)

        # 3. Everything that is random, in the released order: reference posterior, noise, source posterior.
        prepared: PreparedReference | None = None
        if isinstance(reference, PreparedReference):
            if reference_crop is not None:
                raise InputError("reference_crop must be given to prepare_reference, for this reference is prepared")
            prepared = reference
        elif reference is not None:
            prepared = self.prepare_reference(reference, reference_crop=reference_crop, generator=generator)
        if prepared is not None:
            prepared.check_serves(self._settings(), len(sources))
        shape = (rows, self.vae.config.latent_channels, *[self.unet.config.sample_size] * 2)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise InputError(f"latents have shape {tuple(latents.shape)}, expected {shape}")
        stem_rest = self.prepare_stem(source_px, mask_px, keep_shape, depth_map, generator)  # (B or B n, 9, h, w)
        stem_rest = stem_rest.repeat_interleave(rows // len(stem_rest), 0)  # (B n, 9, h, w)

        # 4. The context, [unconditional, conditional], and its keys and values in every cross-attention.
        context = self.no_reference_context().expand(rows, -1, -1)  # (B n, N, D)
        if prepared is not None:
            known = prepared.context.repeat_interleave(rows // len(prepared), 0)
            context = torch.cat([context, known]) if guided else known
        if guided:
            stem_rest = torch.cat([stem_rest] * 2)
        context_at_hand = project_context(self.unet, context)
        hole = torch.nn.functional.interpolate(mask_px, size=shape[-2:]).repeat_interleave(num_images_per_prompt, 0)
        record = CorrespondenceRecorder(hole) if return_correspondence else None

        # 5. Denoise.
        self.scheduler.set_timesteps(steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        latents = latents.to(device, self.unet.dtype) * self.scheduler.init_noise_sigma
        features = self.read_references(prepared, timesteps, reference_batch_size)
        step_options = self._step_options(generator, eta)
        with self.progress_bar(total=len(timesteps)) as progress:
            for number, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                reference_at_hand = repeat_rows(next(features), rows)
                states = ReferenceStates(
                    projected={**context_at_hand, **reference_at_hand},
                    blend=self.config.reference_blend,
                    record=attention_record if record is None else record,
                )
                scale = max(self.guidance_scale, 1.0) if guided else None  # a callback may have changed it
                noise = self.denoise(latents, stem_rest, timestep, context, states, scale)
                latents = self.scheduler.step(noise, timestep, latents, **step_options, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    changed = callback_on_step_end(self, number, int(timestep), tensors) or {}
                    latents = changed.pop("latents", latents)
                progress.update()

        # 6. Back to images.
        images = self.decode(latents, sources, masks, placements, paste_back, output_type)
        correspondences = None
        if record is not None and prepared is not None:
            correspondences = self._correspondences(record, placements, prepared.placements)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, correspondences) if return_correspondence else (images,)
        return MimicBrushPipelineOutput(images=images, correspondences=correspondences)

    def check_inputs(
        self,
        source: ImageInput | Sequence[ImageInput],
        mask: ImageInput | Sequence[ImageInput],
        num_images_per_prompt: int,
        num_inference_steps: int,
        generator: Generator,
        output_type: str,
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Sources and masks as lists of arrays, (H, W, 3) and (H, W) uint8; errors say what does not fit."""
        if self.reference_unet is not None:
            check_references_are_read(self.unet, self.reference_unet)
        sources, masks = (
            [to_rgb_array(image) for image in list_images(source)],
            [to_mask_array(image) for image in list_images(mask)],
        )
        check_masks(sources, masks)
        if num_inference_steps < 1 or num_images_per_prompt < 1:
            raise InputError(
                "num_inference_steps and num_images_per_prompt must be 1 or more, "
                f"got {num_inference_steps} and {num_images_per_prompt}"
            )
        rows = len(sources) * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != rows:
            raise InputError(
                f"{len(generator)} generators for {len(sources)} sources x {num_images_per_prompt} images; "
                f"give one, or {rows}"
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise InputError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        return sources, masks

    def place(self, sources: list[np.ndarray], masks: list[np.ndarray], how: str) -> list[Placement]:
        """Which part of each source is edited: all of it ("full"), or a square around the hole ("auto")."""
        if how not in ("full", "auto"):
            raise InputError(f"crop must be full or auto, got {how!r}")
        boxes = [
            square_around(mask > _BLENDED, self.size_px) if how == "auto" else full_box(source)
            for source, mask in zip(sources, masks, strict=True)
        ]
        return [Placement(box, self.size_px) for box in boxes]

    def denoise(
        self,
        latents: torch.Tensor,
        stem_rest: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        states: ReferenceStates,
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
        placements: list[Placement],
        paste: bool,
        output_type: str,
    ) -> list[Image.Image] | list[np.ndarray] | np.ndarray | torch.Tensor:
        """Latents (B n, 4, h, w) -> images, pasted back into their sources if asked for."""
        if output_type == "latent":
            return latents
        pixels = decode_latents(self.vae, latents)  # (B n, 3, S, S)
        if not pixels.isfinite().all():
            raise MimicBrushError(
                f"the result is no image: numbers overflowed in {self.unet.dtype} (U-Net) or {self.vae.dtype} (VAE); "
                "use bfloat16 or float32"
            )
        if output_type == "pt":
            return (pixels.float() / 2 + 0.5).clamp(0, 1)
        squares = to_uint8(pixels)
        if not paste:
            if output_type == "np":
                return (pixels.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
            return [Image.fromarray(square) for square in squares]
        each = len(squares) // len(sources)
        composites = []
        for row, square in enumerate(squares):
            source, mask, placement = sources[row // each], masks[row // each], placements[row // each]
            x0, y0, x1, y1 = placement.box
            result = crop_back(square, y1 - y0, x1 - x0)
            mask = mask[y0:y1, x0:x1]
            # Only where the paste-back changes anything: a large image in floats takes much memory.
            x2, y2, x3, y3 = grow_box(mask_box(mask), SOFT_EDGE_PX + 1, x1 - x0, y1 - y0)
            part = slice(y0 + y2, y0 + y3), slice(x0 + x2, x0 + x3)
            pasted = paste_back(result[y2:y3, x2:x3], source[part], mask[y2:y3, x2:x3])
            composite = source / np.float32(255) if output_type == "np" else source.copy()
            composite[part] = pasted / 255 if output_type == "np" else pasted.round()
            composites.append(composite)
        return composites if output_type == "np" else [Image.fromarray(composite) for composite in composites]

    def _step_options(self, generator: Generator, eta: float) -> dict[str, object]:
        """The arguments that only some schedulers take."""
        known = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in known}

    def _correspondences(
        self, record: CorrespondenceRecorder, sources: list[Placement], references: list[Placement]
    ) -> list[Correspondence]:
        found = record.attention()
        return [
            Correspondence.from_attention(
                tokens.cpu().numpy(),
                attention.cpu().numpy(),
                sources[row * len(sources) // len(found)],
                references[row * len(references) // len(found)],
            )
            for row, (tokens, attention) in enumerate(found)
        ]
