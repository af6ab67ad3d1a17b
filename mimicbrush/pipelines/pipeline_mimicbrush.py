"""Edit an image by imitating another (paper Sec. 3; inference as in ali-vilab/MimicBrush).

`MimicBrushPipeline.__call__` is the whole edit in numbered steps. Each step names the network that it calls. The
methods behind it are in the same order, and each can be called by itself.

Shapes: ``B`` sources, ``n`` results of each, ``R`` references (1 or B; with r for each source, r times as many), ``S``
side of the canvas in pixels, ``h w`` of the latents, ``N`` image tokens, ``D`` context width. Pixels on the canvas are
in [-1, 1].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import DepthAnythingForDepthEstimation, PreTrainedModel

from mimicbrush.errors import InputError, MimicBrushError
from mimicbrush.models.attention_recorder import CorrespondenceRecorder
from mimicbrush.models.encoders import (
    decode_latents,
    encode_image_tokens,
    encode_latents,
    encode_no_image_tokens,
    estimate_depth,
    make_no_depth_map,
)
from mimicbrush.models.options import ModelOptions, vae_scale_factor
from mimicbrush.models.patch_autoencoder import PatchAutoencoder
from mimicbrush.models.projectors import DepthProjector, ImageProjector
from mimicbrush.models.reference_attention import (
    check_references_are_read,
    is_shared,
    project_context,
    project_references,
    set_reference_processors,
)
from mimicbrush.models.token_encoders import token_encoder_name
from mimicbrush.models.unets import KeyValueReferenceUNet, ReferenceUNet, find_reference_network, make_reference_input
from mimicbrush.ops.canvas import blank_mask, to_tensor
from mimicbrush.ops.crops import Box, Placement
from mimicbrush.pipelines.cache import WeightDependentCache
from mimicbrush.pipelines.cuda_graphs import GraphedPasses
from mimicbrush.pipelines.hub import HubPipeline, OldName
from mimicbrush.pipelines.image_inputs import (
    ImageInput,
    References,
    StoredColors,
    check_generators,
    check_masks,
    check_numbers,
    check_recording,
    find_stored_colors,
    group_references,
    letterbox_images,
    letterbox_masks,
    list_boxes,
    list_images,
    place_sources,
    to_mask_array,
    to_rgb_array,
)
from mimicbrush.pipelines.image_outputs import list_correspondences, paste_into_sources, to_square_images, to_unit_range
from mimicbrush.pipelines.pipeline_output import MimicBrushPipelineOutput
from mimicbrush.pipelines.prepared import KeysValuesByPath, PreparedReference, repeat_rows
from mimicbrush.types import AttentionRecord, ReferenceStates

Generator = torch.Generator | list[torch.Generator] | None


class MimicBrushPipeline(HubPipeline):
    """Pipeline that repaints the masked region of a source so that it imitates the matching part of a reference.

    Args:
        vae, unet, reference_unet, image_encoder, image_projector, depth_estimator, depth_projector,
        scheduler: the networks (see `mimicbrush.models.components`) and a scheduler, DDIM in the paper, LCM for a
            model that was distilled to few steps.
        reference_blend: 1.0 attends over [own ; reference] (paper), 0.5 averages that with attention over
            the own tokens (released code). Weights work only with the blend they were trained for.
        reference_timestep: which t the reference U-Net sees: the "current" one, again at every step
            (released code), or "zero", once (ours; weights must be trained for it).
        depth_convention, no_depth_convention: see `mimicbrush.models.encoders`.
        letterbox_order: see `mimicbrush.ops.canvas.letterbox`.
        posterior: "sample" samples the VAE's posterior (released code), "mean" takes its mean, which makes
            encodings independent of seeds.
        default_num_inference_steps, default_guidance_scale: used if a call gives none (paper Sec. 4.1:
            50 and 5).

    Without a reference U-Net, a `SharedUNet` reads the reference itself. Any other U-Net sees the reference only
    through cross-attention to its patch tokens (the ablation of the paper's Table 3). The tokens come from CLIP or
    DINOv2, as `image_encoder` does.

    These networks also determine what the reference U-Net shares (`ModelOptions.reference_sharing`) and how many
    channels the depth projector takes.
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
        self._cache = WeightDependentCache()
        self._graphs: GraphedPasses | None = None
        self._interrupt, self._num_timesteps, self._guidance_scale = False, 0, default_guidance_scale

    def enable_cuda_graphs(self, max_graphs: int = 8) -> None:
        """Use CUDA graphs: each pass of a U-Net is then one launch instead of about a thousand kernel launches.

        The results are the same. The first edit of a kind (number of images and references, with or without guidance)
        captures its graphs. This takes about as long as four steps per graph. Later edits replay them. If graphs cannot
        repeat an edit, for example with `return_correspondence`, it runs without them, and a warning says why, once.

        Changes of weights, adapters, processors and devices are noticed between edits. Disable graphs if a callback
        changes networks during an edit. Enable them again after a change of global settings such as TF32.

        Args:
            max_graphs: the largest number to keep. Each keeps its inputs and outputs; all other memory is shared.
        """
        check_numbers(max_graphs=max_graphs)
        self.disable_cuda_graphs()
        self._graphs = GraphedPasses(max_graphs)

    def disable_cuda_graphs(self) -> None:
        """Run without CUDA graphs again, and free the memory of all graphs."""
        if self._graphs is not None:
            self._graphs.free()
        self._graphs = None

    def options(self) -> ModelOptions:
        """Return the options of this pipeline where paper and released code differ."""
        shares_keys_values = isinstance(self.reference_unet, KeyValueReferenceUNet)
        reference_encoder = token_encoder_name(self.image_encoder)
        if self.reference_network is not None:
            reference_encoder = "shared" if is_shared(self.reference_network) else "unet"
        return ModelOptions(
            size_px=self.size_px,
            letterbox_order=self.config.letterbox_order,
            reference_encoder=reference_encoder,
            reference_sharing="keys_values" if shares_keys_values else "hidden_states",
            reference_blend=self.config.reference_blend,
            reference_timestep=self.config.reference_timestep,
            depth_channels=self.depth_projector.config.depth_channels,
            depth_convention=self.config.depth_convention,
            no_depth_convention=self.config.no_depth_convention,
        )

    @property
    def reference_network(self) -> Any:
        """Network that reads the reference: `reference_unet` or `unet`; None if only image tokens are used."""
        return find_reference_network(self.unet, self.reference_unet)

    @property
    def vae_scale_factor(self) -> int:
        """Number of pixels per latent along one side."""
        return vae_scale_factor(self.vae.config)

    @property
    def size_px(self) -> int:
        """Side of the square canvas that the model paints on."""
        return self.unet.config.sample_size * self.vae_scale_factor

    @property
    def can_record_attention(self) -> bool:
        """Whether it can record where it looks in the reference; this needs a U-Net that reads the reference."""
        return self.reference_network is not None

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current or last call; a callback can set `_guidance_scale` for the next steps.

        1 or less means no guidance. A call that started without guidance continues without it.
        """
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps of the current or last call, for callbacks."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call should stop after this step and return the current image; a callback sets `_interrupt`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        source: ImageInput | Sequence[ImageInput],
        mask: ImageInput | Sequence[ImageInput],
        reference: References | PreparedReference | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        keep_shape: bool = False,
        depth_map: torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        crop: Literal["full", "auto"] = "full",
        reference_crop: Box | list[Box | None] | None = None,
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
            source: B images to edit, of any size; PIL images (rotated by their EXIF data, converted from the colour
                profile in their ``info``) or (H, W, 3) uint8 in sRGB.
            mask: one per source, of the same size; PIL or (H, W) uint8, above 128 = repaint; or (H, W) bool.
            reference: one for all sources or one per source, of any size, without a mask; or a prepared reference (see
                `prepare_reference`); None repaints without a reference. A single source may also have 2 to 4
                references, and several sources a list of such lists.
            num_inference_steps: number of denoising steps; None: the pipeline's default.
            guidance_scale: scale of classifier-free guidance; 1 or less turns it off; None: the pipeline's default.
            keep_shape: texture transfer: use the depth map of the unmasked source (paper Sec. 3.4).
            depth_map: (B, 1, any, any), relative inverse depth on the canvas, used instead of the estimated one.
            num_images_per_prompt: number of results per source, n. The results of a source follow each other.
            crop: "auto" edits a square around the mask at full resolution (see `ops.crops.square_around`), which suits
                small regions in large images; "full" edits the whole image.
            reference_crop: the part of the reference to imitate, (x0, y0, x1, y1) px; one for all, or a list with one
                for each image, where None means the whole image.
            eta: of DDIM; other schedulers ignore it.
            generator: one for all, or a list of B * n. With a list, each result is the same as in a separate call. With
                one generator, the n results of a source share the sample of the reference's posterior.
            latents: (B * n, 4, h, w), standard normal start noise; None: it is sampled.
            paste_back: paste the repainted region into the source at full size; otherwise return the model's square
                canvas. Only for "pil" and "np".
            output_type: see `MimicBrushPipelineOutput`.
            return_dict: False returns a plain tuple (images, and correspondences if they were requested).
            return_correspondence: also return which place of the reference filled which place of the masked region.
            attention_record: receives all reference attention, for other measurements. It cannot be combined with
                `return_correspondence`.
            reference_batch_size: number of timesteps that the reference U-Net reads in one pass.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step; if it returns
                "latents", they replace the current ones.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets; only "latents" exists.

        Raises:
            InputError: images, masks, references or options are not valid or do not fit together.
            WeightsError: the attention processors that read the reference were replaced.
        """
        # 1. Check the inputs.
        steps = self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        check_numbers(guidance_scale=guidance, eta=eta, reference_batch_size=reference_batch_size)
        source = list_images(source)
        sources, masks = self.check_inputs(source, mask, num_images_per_prompt, steps, generator, output_type)
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise InputError(f"callback tensors may be {self._callback_tensor_inputs}, got {sorted(unknown)}")
        check_recording(reference is not None, self.can_record_attention, return_correspondence, attention_record)
        rows = len(sources) * num_images_per_prompt  # rows = B n
        device = self._execution_device  # once: diffusers looks for it in every module of all networks
        guided = reference is not None and guidance > 1
        self._interrupt, self._guidance_scale = False, guidance

        # 2. Letterbox source and mask onto square canvases. No network.
        placements = self.place(sources, masks, crop)
        source_px = self._to_canvas(sources, placements, device)  # (B, 3, S, S)
        mask_px = self._to_mask_canvas(masks, placements, device)  # (B, 1, S, S), 1 = repaint

        # 3. Encode the reference: `vae` -> clean latents, `image_encoder` and `image_projector` -> context.
        #    Random numbers are sampled as in the released code: reference posterior, start noise, source posterior.
        prepared: PreparedReference | None = None  # latents (R, 4, h, w), context (R, N, D)
        if isinstance(reference, PreparedReference):
            if reference_crop is not None:
                raise InputError("this reference is already prepared; give reference_crop to prepare_reference instead")
            prepared = reference
        elif reference is not None:
            groups = group_references(reference, len(sources))
            prepared = self.prepare_reference(groups, reference_crop=reference_crop, generator=generator)
        if prepared is not None:
            prepared.check_serves(self._settings(source_px.device), len(sources))

        # 4. Sample the start noise. No network.
        shape = (rows, self.vae.config.latent_channels, *[self.unet.config.sample_size] * 2)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)  # (B n, 4, h, w)
        elif tuple(latents.shape) != shape:
            raise InputError(f"latents have shape {tuple(latents.shape)}, expected {shape}")

        # 5. Encode the source: `vae` -> masked source, `depth_estimator` and `depth_projector` -> depth. (B n, 9, h, w)
        cond_latents = self.prepare_cond_latents(source_px, mask_px, keep_shape, depth_map, generator)
        cond_latents = cond_latents.repeat_interleave(rows // len(cond_latents), 0)  # (B n, 9, h, w)

        # 6. Prepare guidance, rows [unconditional ; conditional]: "no reference" has a context, too (`image_encoder`,
        #    `image_projector`). Project the context for each cross-attention of `unet`: it is the same at every step.
        context = self.no_reference_context().expand(rows, -1, -1)  # (B n, N, D)
        if prepared is not None:
            # With r references, the context has r N tokens. "No reference" is repeated r times, which changes nothing.
            reference_context = prepared.join_context().repeat_interleave(rows // len(prepared), 0)  # (B n, N, D)
            context = context.repeat(1, prepared.num_references, 1)
            context = torch.cat([context, reference_context]) if guided else reference_context  # (B n or 2 B n, N, D)
        if guided:
            cond_latents = torch.cat([cond_latents] * 2)  # (2 B n, 9, h, w)
        cached_kv = project_context(self.unet, context)  # by path, (B n or 2 B n, N, heads, d) each
        latent_mask = F.interpolate(mask_px, size=shape[-2:])  # (B, 1, h, w)
        latent_mask = latent_mask.repeat_interleave(num_images_per_prompt, 0)  # (B n, 1, h, w)
        recorder = CorrespondenceRecorder(latent_mask) if return_correspondence else None

        # 7. Denoise: `reference_unet` writes its features, `unet` reads them and predicts, `scheduler` steps.
        #    The timesteps stay on the CPU: `scheduler.step` computes there, and would wait if it read them from a GPU.
        self.scheduler.set_timesteps(steps, device="cpu")
        timesteps = self.scheduler.timesteps  # (steps,)
        timesteps_on_device = timesteps.to(device)
        self._num_timesteps = len(timesteps)
        latents = latents.to(device, self.unet.dtype) * self.scheduler.init_noise_sigma  # (B n, 4, h, w)
        references: Iterator[KeysValuesByPath] = self.compute_reference_kv(prepared, timesteps, reference_batch_size)
        if prepared is not None:
            references = map(prepared.join_tokens, references)
        record = attention_record if recorder is None else recorder
        obstacle = None if record is None else "attention is recorded at each step"
        predict = self._replayed(self._predict_noise_for_graph, [self.unet], obstacle)
        step_options = self._step_options(generator, eta)
        with self.progress_bar(total=len(timesteps)) as progress:
            for number, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                noise = predict(
                    latents=self.scheduler.scale_model_input(latents, timestep),  # (B n, 4, h, w)
                    cond_latents=cond_latents,
                    timestep=timesteps_on_device[number],
                    context=context,
                    context_kv=cached_kv,
                    reference_kv=next(references),  # by path, (R, M, heads, d) each
                    guidance_scale=max(self.guidance_scale, 1.0) if guided else None,  # a callback may have changed it
                    record=record,
                )  # (B n, 4, h, w)
                latents = self.scheduler.step(noise, timestep, latents, **step_options, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    changed = callback_on_step_end(self, number, int(timestep), tensors) or {}
                    latents = changed.pop("latents", latents)
                progress.update()

        # 8. Decode with `vae`, and paste the repainted region into the source.
        stored = [find_stored_colors(image) for image in source]
        images = self.decode(latents, sources, masks, placements, paste_back, output_type, stored)
        correspondences = None
        if recorder is not None and prepared is not None:
            correspondences = list_correspondences(recorder, placements, prepared.placements, prepared.num_references)
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
        """Check the inputs, and convert sources and masks to lists of arrays, (H, W, 3) and (H, W) uint8.

        Raises:
            InputError: says what does not fit.
            WeightsError: see `check_references_are_read`.
        """
        check_numbers(num_images_per_prompt=num_images_per_prompt, num_inference_steps=num_inference_steps)
        most_steps = self.scheduler.config.get("original_inference_steps")  # of a distilled model (LCM)
        if most_steps is not None and num_inference_steps > most_steps:
            raise InputError(
                f"num_inference_steps={num_inference_steps}: this model was distilled for at most {most_steps} steps"
            )
        if self.reference_network is not None:
            check_references_are_read(self.unet, self.reference_network)
        sources, masks = (
            [to_rgb_array(image) for image in list_images(source)],
            [to_mask_array(image) for image in list_images(mask)],
        )
        check_masks(sources, masks)
        check_generators(len(sources), num_images_per_prompt, generator)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise InputError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        return sources, masks

    def place(self, sources: list[np.ndarray], masks: list[np.ndarray], how: str) -> list[Placement]:
        """Choose the part of each source to edit: the full image ("full") or a square around the mask ("auto")."""
        return place_sources(sources, masks, how, self.size_px)

    def _to_canvas(self, images: list[np.ndarray], placements: list[Placement], device: torch.device) -> torch.Tensor:
        """Letterbox B images -> (B, 3, S, S) in [-1, 1]."""
        squares = letterbox_images(images, placements, self.size_px, self.config.letterbox_order)  # (B, S, S, 3)
        return to_tensor(squares).to(device)

    def _to_mask_canvas(
        self, masks: list[np.ndarray], placements: list[Placement], device: torch.device
    ) -> torch.Tensor:
        """Letterbox B masks -> (B, 1, S, S), 0 or 1."""
        order, px_per_latent = self.config.letterbox_order, self.vae_scale_factor
        squares = letterbox_masks(masks, placements, self.size_px, order, px_per_latent)  # (B, S, S)
        return torch.from_numpy(squares)[:, None].float().to(device)

    @torch.no_grad()
    def prepare_reference(
        self,
        reference: References,
        *,
        reference_crop: Box | list[Box | None] | None = None,
        generator: Generator = None,
        num_inference_steps: int | None = None,
        reference_batch_size: int = 4,
    ) -> PreparedReference:
        """Encode references once for many edits; see `PreparedReference` for when the results are exactly the same.

        Args:
            reference: an image; a list with one image per source; or a list of lists with several images per source.
            reference_crop: the part to imitate, (x0, y0, x1, y1) px; one for all, or a list with one for each image.
            generator: samples the VAE's posterior; a list has the same number of generators for each source.
            num_inference_steps: with ``reference_timestep="current"``: also store the features for this number of
                steps (about 28 MB per step at 512 px in half precision). "zero" always stores those of its one step.
            reference_batch_size: number of timesteps that the reference U-Net reads in one pass.
        """
        check_numbers(reference_batch_size=reference_batch_size)
        if num_inference_steps is not None:
            check_numbers(num_inference_steps=num_inference_steps)
        groups = group_references(reference)
        if not groups or (isinstance(generator, list) and len(generator) % len(groups)):
            results = len(generator) if isinstance(generator, list) else 1
            raise InputError(
                f"expected one reference, or one per source, got {len(groups)} references for {results} results"
            )
        images, count = [to_rgb_array(image) for group in groups for image in group], len(groups[0])
        placements = [Placement(box, self.size_px) for box in list_boxes(images, reference_crop)]
        pixels = self._to_canvas(images, placements, self._execution_device)  # (R, 3, S, S)
        # All first references, all second ones, and so on: a generator samples the posteriors of its source in turn.
        parts = [self.encode_references(pixels[n::count], placements[n::count], generator) for n in range(count)]
        prepared = parts[0]
        if count > 1:
            latents, context = (
                torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)
                for name in ("latents", "context")
            )
            prepared = replace(prepared, latents=latents, context=context, placements=placements, num_references=count)
        if self.reference_network is None:
            return prepared
        if self.config.reference_timestep == "zero":
            timesteps = [0.0]
        elif num_inference_steps is not None:
            self.scheduler.set_timesteps(num_inference_steps)
            timesteps = [float(timestep) for timestep in self.scheduler.timesteps.tolist()]
        else:
            return prepared
        features = dict(
            zip(timesteps, self._run_reference_network(prepared, timesteps, reference_batch_size), strict=True)
        )
        return replace(prepared, features=features)

    def encode_references(
        self, pixels: torch.Tensor, placements: list[Placement], generator: Generator
    ) -> PreparedReference:
        """Encode references (R, 3, S, S) in [-1, 1] into clean latents and context, without features."""
        tokens = encode_image_tokens(
            self.image_encoder, pixels, patches_only=self.reference_network is None
        )  # (R, N, C)
        context = self.image_projector(tokens.to(self.image_projector.dtype)).to(self.unet.dtype)  # (R, N, D)
        noise = self._posterior_noise(pixels, generator)
        latents = encode_latents(self.vae, pixels, noise).to(self.unet.dtype)  # (R or more, 4, h, w)
        context = context.repeat_interleave(len(latents) // len(context), 0)
        return PreparedReference(latents, context, placements, self._settings(pixels.device))

    def prepare_cond_latents(
        self,
        source: torch.Tensor,
        mask: torch.Tensor,
        keep_shape: bool,
        depth_map: torch.Tensor | None,
        generator: Generator,
    ) -> torch.Tensor:
        """Encode the nine channels that are concatenated with the noisy latents: mask 1, masked source 4, depth 4.

        Args:
            source: (B, 3, S, S) in [-1, 1].
            mask: (B, 1, S, S), 1 = repaint.
            keep_shape, depth_map, generator: see `__call__`.

        Returns:
            (B, 9, h, w); or (B n, 9, h, w) for a list of B n generators if the posterior is sampled.
        """
        noise = self._posterior_noise(source, generator)
        masked_source_latents = encode_latents(self.vae, blank_mask(source, mask), noise)  # (B or B n, 4, h, w)
        times = len(masked_source_latents) // len(source)  # n samples, where each result has a generator of its own
        latent_mask = F.interpolate(mask, size=masked_source_latents.shape[-2:])  # (B, 1, h, w), nearest, as in SD
        if depth_map is not None:
            if depth_map.ndim != 4 or depth_map.shape[:2] != (len(source), 1):
                raise InputError(
                    f"depth_map has shape {tuple(depth_map.shape)}, expected ({len(source)}, 1, height, width)"
                )
            depth_latents = self._project_depth(depth_map.to(source.device))  # (B, 4, h, w)
        elif keep_shape:
            depth_map = estimate_depth(self.depth_estimator, source, self.config.depth_convention)  # (B, 1, any, any)
            depth_latents = self._project_depth(depth_map)
        else:
            depth_latents = self.no_depth_latent().expand(len(source), -1, -1, -1)
        latent_mask, depth_latents = (each.repeat_interleave(times, 0) for each in (latent_mask, depth_latents))
        channels = [
            latent_mask.to(masked_source_latents),
            masked_source_latents,
            depth_latents.to(masked_source_latents),
        ]
        return torch.cat(channels, dim=1).to(self.unet.dtype)

    def no_depth_latent(self) -> torch.Tensor:
        """Compute the depth latent for "no depth", (1, 4, h, w); it is the same for all edits."""
        return self._cache.get(
            f"no_depth_latent, {self.config.no_depth_convention}, {self.size_px} px",
            self.depth_estimator,
            self.depth_projector,
            lambda: self._project_depth(
                make_no_depth_map(self.depth_estimator, 1, self.config.no_depth_convention, self._execution_device)
            ),
        )

    def no_reference_context(self) -> torch.Tensor:
        """Compute the context for "no reference", (1, N, D); it is the same for all edits."""
        context = self._cache.get(
            "no_reference_context",
            self.image_encoder,
            self.image_projector,
            lambda: self.image_projector(
                encode_no_image_tokens(
                    self.image_encoder, 1, self._execution_device, patches_only=self.reference_network is None
                ).to(self.image_projector.dtype)
            ),
        )
        return context.to(self.unet.dtype)

    def compute_reference_kv(
        self, prepared: PreparedReference | None, timesteps: torch.Tensor, batch_size: int
    ) -> Iterator[KeysValuesByPath]:
        """Yield the references' keys and values for each timestep in turn.

        Args:
            prepared: R references; None yields empty dictionaries.
            timesteps: (steps,).
            batch_size: number of timesteps in one pass of the reference network.

        Yields:
            Module path -> keys and values, (R, M, heads, d) each.
        """
        if prepared is None or self.reference_network is None:
            yield from ({} for _ in timesteps)
            return
        current = self.config.reference_timestep == "current"
        read_at = [
            float(timestep) if current else 0.0 for timestep in timesteps.tolist()
        ]  # what the reference network gets
        if all(timestep in prepared.features for timestep in read_at):
            yield from (prepared.features[timestep] for timestep in read_at)
        elif current:
            yield from self._run_reference_network(prepared, read_at, batch_size)
        else:
            once = next(self._run_reference_network(prepared, read_at[:1], 1))
            yield from (once for _ in read_at)

    def _run_reference_network(
        self, prepared: PreparedReference, timesteps: list[float], batch_size: int
    ) -> Iterator[KeysValuesByPath]:
        """Run the reference network over clean latents, T timesteps in one batch, and project what it wrote."""
        rows, dtype = len(prepared.latents), self.reference_network.dtype  # which may differ from the other U-Net's
        latents, context = prepared.latents.to(dtype), prepared.context.to(dtype)  # (R, 4, h, w), (R, N, D)
        context_kv = project_context(self.reference_network, context)  # the same at every timestep
        read = self._replayed(self._read_timesteps, [self.reference_network, self.unet])
        times, read_at = min(max(1, batch_size), len(timesteps)), timesteps
        if self._graphs is not None:  # pad the last pass with its last timestep: all have one size, and one graph
            read_at = timesteps + timesteps[-1:] * (-len(timesteps) % times)
        chunks = torch.tensor(read_at, device=latents.device).split(times)  # (T,) each
        for first, chunk in zip(range(0, len(timesteps), times), chunks, strict=True):
            keys_values = read(latents=latents, context=context, context_kv=context_kv, timesteps=chunk)
            for number in range(min(times, len(timesteps) - first)):
                one = slice(number * rows, (number + 1) * rows)
                yield {path: (key[one], value[one]) for path, (key, value) in keys_values.items()}

    def _read_timesteps(
        self, latents: torch.Tensor, context: torch.Tensor, context_kv: KeysValuesByPath, timesteps: torch.Tensor
    ) -> KeysValuesByPath:
        """Read R references at T timesteps: keys and values of T R rows, those of the first timestep first."""
        rows, times = len(latents), len(timesteps)
        repeated = {path: (k.repeat(times, 1, 1, 1), v.repeat(times, 1, 1, 1)) for path, (k, v) in context_kv.items()}
        states = ReferenceStates(keys_values=repeated, is_writing=True)
        self.reference_network(
            make_reference_input(self.reference_network, latents.repeat(times, 1, 1, 1)),  # (T R, 4 or 13, h, w)
            timesteps.repeat_interleave(rows),  # (T R,)
            context.repeat(times, 1, 1),  # (T R, N, D)
            cross_attention_kwargs={"reference_states": states},
            return_dict=False,
        )
        dtype = self.unet.dtype
        keys_values = {
            path: (key.to(dtype), value.to(dtype))
            for path, (key, value) in states.keys_values.items()
            if path not in context_kv
        }
        features = {path: feature.to(dtype) for path, feature in states.features.items()}  # (T R, M, C) each
        return keys_values | project_references(self.unet, features)  # (T R, M, heads, d) each

    def _predict_noise_for_graph(
        self,
        latents: torch.Tensor,
        cond_latents: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        context_kv: KeysValuesByPath,
        reference_kv: KeysValuesByPath,
        guidance_scale: float | torch.Tensor | None,
        record: AttentionRecord | None,
    ) -> torch.Tensor:
        """Predict the noise from tensors alone, as a CUDA graph repeats it; see `predict_noise`."""
        keys_values = {**context_kv, **repeat_rows(reference_kv, len(latents))}  # by path, (B n, M, heads, d) each
        states = ReferenceStates(keys_values=keys_values, blend=self.config.reference_blend, record=record)
        return self.predict_noise(latents, cond_latents, timestep, context, states, guidance_scale)

    def predict_noise(
        self,
        latents: torch.Tensor,
        cond_latents: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        states: ReferenceStates,
        guidance_scale: float | torch.Tensor | None,
    ) -> torch.Tensor:
        """Predict the noise of latents, (B, 4, h, w) -> (B, 4, h, w).

        With guidance, `cond_latents` and `context` have 2 B rows, [unconditional ; conditional]. The reference states
        have only the B conditional rows, so the unconditional half attends only to itself.

        Args:
            latents: (B, 4, h, w), scaled for this step (`scale_model_input` of the scheduler).
            cond_latents: (B or 2 B, 9, h, w), see `prepare_cond_latents`.
            timestep: a scalar.
            context: (B or 2 B, N, D).
            states: the references' keys and values.
            guidance_scale: a number, or a tensor, (), float64; None: no guidance.
        """
        sample = latents if guidance_scale is None else torch.cat([latents] * 2)  # (B or 2 B, 4, h, w)
        unet_input = torch.cat([sample, cond_latents], dim=1)  # (B or 2 B, 13, h, w)
        noise = self.unet(
            unet_input, timestep, context, cross_attention_kwargs={"reference_states": states}, return_dict=False
        )[0]  # (B or 2 B, 4, h, w)
        if guidance_scale is None:
            return noise
        # Classifier-free guidance (paper Sec. 4.1): from "no reference" towards the reference, and beyond.
        unconditional, conditional = noise.chunk(2)  # (B, 4, h, w) each
        difference = conditional - unconditional
        # PyTorch multiplies a half-precision tensor by a Python float in float32. A tensor scale must do the same.
        wide = difference.to(torch.promote_types(difference.dtype, torch.float32))
        return unconditional + (guidance_scale * wide).to(difference.dtype)

    prepare_stem, reader = OldName("prepare_cond_latents"), OldName("reference_network")
    read_references, denoise = OldName("compute_reference_kv"), OldName("predict_noise")

    def decode(
        self,
        latents: torch.Tensor,
        sources: list[np.ndarray],
        masks: list[np.ndarray],
        placements: list[Placement],
        paste: bool,
        output_type: str,
        stored: Sequence[StoredColors | None] | None = None,
    ) -> list[Image.Image] | list[np.ndarray] | np.ndarray | torch.Tensor:
        """Decode latents (B n, 4, h, w) into images, and paste them back into their sources if `paste` is set.

        Raises:
            MimicBrushError: the result contains NaN or infinite values.
        """
        if output_type == "latent":
            return latents
        pixels = decode_latents(self.vae, latents)  # (B n, 3, S, S)
        if not pixels.isfinite().all():
            raise MimicBrushError(
                f"the result contains NaN or infinite values: numbers overflowed in {self.unet.dtype} (U-Net) "
                f"or {self.vae.dtype} (VAE); use bfloat16 or float32"
            )
        if output_type == "pt":
            return to_unit_range(pixels)
        if not paste:
            return to_square_images(pixels, output_type)
        return paste_into_sources(pixels, sources, masks, placements, output_type, stored or [None] * len(sources))

    def _replayed(
        self, function: Callable[..., Any], networks: list[torch.nn.Module], obstacle: str | None = None
    ) -> Callable[..., Any]:
        """Return the function, or CUDA graphs of it if they are on and nothing keeps them from repeating it."""
        if self._graphs is None:
            return function
        return self._graphs.replay(function, networks, self.config.reference_blend, obstacle)

    def _settings(self, device: torch.device) -> tuple[object, ...]:
        """Return the options, type and device that a prepared reference depends on."""
        options = self.options()
        read_by = (options.reference_encoder, options.reference_sharing, options.reference_timestep)
        return (options.size_px, *read_by, options.letterbox_order, self.unet.dtype, device)

    def _posterior_noise(self, images: torch.Tensor, generator: Generator) -> torch.Tensor | None:
        """Sample noise for the posterior of images (B, 3, S, S), (B or B n, 4, h, w); None for its mean.

        There is one sample for each image, or for each generator of a list.
        """
        if self.config.posterior == "mean":
            return None
        rows = len(generator) if isinstance(generator, list) else len(images)
        shape = (rows, self.vae.config.latent_channels, *[self.unet.config.sample_size] * 2)
        return randn_tensor(shape, generator=generator, device=images.device, dtype=self.vae.dtype)

    def _project_depth(self, depth_map: torch.Tensor) -> torch.Tensor:
        """Project depth maps, (B, 1, any, any) -> (B, 4, h, w)."""
        return self.depth_projector(depth_map.to(self.depth_projector.dtype), self.size_px)

    def _step_options(self, generator: Generator, eta: float) -> dict[str, object]:
        """Return those arguments of a step that this scheduler takes."""
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted}
