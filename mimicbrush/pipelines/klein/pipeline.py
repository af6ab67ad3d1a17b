"""FLUX.2 klein as an editor that imitates; it is called like a `MimicBrushPipeline`.

Each edit is a call of diffusers' `Flux2KleinPipeline(image=[holed source, reference 1, ...])`. So a LoRA that was
trained here also works without this project.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, Flux2KleinInpaintPipeline, Flux2KleinPipeline
from PIL import Image

from mimicbrush.errors import InputError, MimicBrushError
from mimicbrush.models.attention_recorder import CorrespondenceRecorder
from mimicbrush.models.flux2_klein.attention import TAP, set_tapped_processors
from mimicbrush.models.flux2_klein.prompt import PromptEmbeddings
from mimicbrush.models.flux2_klein.recording_tap import RecordingTap
from mimicbrush.models.flux2_klein.sequence import TokenLayout
from mimicbrush.ops.canvas import blank_mask, to_tensor, to_uint8
from mimicbrush.ops.crops import Box, Placement
from mimicbrush.pipelines.image_inputs import (
    ImageInput,
    References,
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
from mimicbrush.pipelines.klein.folder import KleinImitation
from mimicbrush.pipelines.pipeline_output import MimicBrushPipelineOutput
from mimicbrush.types import AttentionRecord

#: Default steps of the base model, as in diffusers' pipeline, and of a model that was distilled to few steps.
KLEIN_STEPS, DISTILLED_STEPS = 50, 4
#: Default guidance without training, as in diffusers' pipeline, and with training. A trained model has seen only one
#: prompt, so guidance away from the empty prompt would only double its time.
UNTRAINED_GUIDANCE, TRAINED_GUIDANCE = 4.0, 1.0

#: How images are put onto their canvases, see `ops.canvas.letterbox`; training samples are made in the same way.
_ORDER = "resize_then_pad"


class KleinPipeline:
    """FLUX.2 klein with the prompt and the canvas that it was trained for.

    Call it like a `MimicBrushPipeline`; unsupported options raise an error. A model that was not trained to imitate
    edits with diffusers' inpaint pipeline, which keeps everything outside the hole.

    Args:
        pipeline: pipeline of diffusers, on its device; it needs no text encoder.
        imitation: what the weights were trained for.
        prompt: the embeddings of that prompt.
        is_trained: whether the weights were trained to imitate, with a LoRA or fully.
        lora_scale: scale of the LoRA; 0 is the model without it.
    """

    #: Whether it can record where it looks in the reference.
    can_record_attention = True

    def __init__(
        self,
        pipeline: Flux2KleinPipeline,
        imitation: KleinImitation,
        prompt: PromptEmbeddings,
        is_trained: bool = True,
        lora_scale: float = 1.0,
    ) -> None:
        self._px_per_token = 2 * pipeline.vae_scale_factor
        if imitation.size_px % self._px_per_token:
            raise InputError(
                f"size_px must be a multiple of {self._px_per_token}, the pixels per token, got {imitation.size_px}"
            )
        self.imitation, self.prompt, self.is_trained, self.lora_scale = imitation, prompt, is_trained, lora_scale
        is_distilled = pipeline.config.is_distilled
        kind = Flux2KleinPipeline if is_trained else Flux2KleinInpaintPipeline
        self.pipeline = kind(**pipeline.components, is_distilled=is_distilled)
        self.default_num_inference_steps = DISTILLED_STEPS if is_distilled else KLEIN_STEPS
        self.default_guidance_scale = TRAINED_GUIDANCE if is_trained or is_distilled else UNTRAINED_GUIDANCE

    @property
    def size_px(self) -> int:
        """Side of the square canvas that the model paints on."""
        return self.imitation.size_px

    @property
    def token_side(self) -> int:
        """Number of tokens along a side of the canvas."""
        return self.size_px // self._px_per_token

    @property
    def scheduler(self) -> Any:
        """The scheduler of diffusers' pipeline."""
        return self.pipeline.scheduler

    @property
    def dtype(self) -> torch.dtype:
        """Type of the transformer."""
        return self.pipeline.transformer.dtype

    def set_progress_bar_config(self, **options: Any) -> None:
        """Configure the progress bar of the steps, as in diffusers."""
        self.pipeline.set_progress_bar_config(**options)

    def enable_cuda_graphs(self) -> None:
        """Refuse CUDA graphs, which work only with the U-Nets.

        Raises:
            InputError: always.
        """
        raise InputError("CUDA graphs work only with the U-Nets; do not enable them for FLUX.2 klein")

    @torch.no_grad()
    def __call__(
        self,
        source: ImageInput | Sequence[ImageInput],
        mask: ImageInput | Sequence[ImageInput],
        reference: References | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        keep_shape: bool = False,
        num_images_per_prompt: int = 1,
        crop: Literal["full", "auto"] = "full",
        reference_crop: Box | list[Box | None] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        paste_back: bool = True,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_correspondence: bool = False,
        attention_record: AttentionRecord | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> MimicBrushPipelineOutput:
        """Edit one image or a batch; the arguments are those of `MimicBrushPipeline.__call__`.

        Args:
            source, mask: one of each, or B of each.
            reference: for one source: one image or several; for B sources: one for all, one per source, or a list for
                each source; None: the model sees only the source with its hole.
            num_inference_steps, guidance_scale: None: `default_num_inference_steps`, `default_guidance_scale`. Guidance
                points away from the empty prompt.
            keep_shape: must be False, because there is no depth estimator.
            num_images_per_prompt: number of results per source, n.
            crop: "full" or "auto".
            reference_crop: one for all references, or a list with one for each of them, in order.
            generator: one for all, or B * n.
            paste_back: paste the repainted region into the source at full size; pixels outside the mask stay exact.
            output_type: "latent" gives (B n, C, h, w), as the autoencoder decodes them.
            return_correspondence, attention_record: see `MimicBrushPipeline.__call__`.
            callback_on_step_end: see `MimicBrushPipeline.__call__`; it gets diffusers' pipeline, and its latents.

        Raises:
            InputError: images, masks, references or options are not valid, not supported or do not fit together.
            MimicBrushError: the result contains NaN or infinite values.
        """
        # 1. Check the inputs.
        steps = self.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = self.default_guidance_scale if guidance_scale is None else guidance_scale
        check_numbers(guidance_scale=guidance, num_inference_steps=steps, num_images_per_prompt=num_images_per_prompt)
        if keep_shape:
            raise InputError("keep_shape needs a depth estimator, but FLUX.2 klein has none; edit without keep_shape")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise InputError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        check_recording(reference is not None, True, return_correspondence, attention_record)
        source = list_images(source)
        sources = [to_rgb_array(image) for image in source]
        masks = [to_mask_array(image) for image in list_images(mask)]
        check_masks(sources, masks)
        check_generators(len(sources), num_images_per_prompt, generator)

        # 2. Letterbox all images onto square canvases, and blank the hole, as for the U-Nets.
        placements = place_sources(sources, masks, crop, self.size_px)
        squares = to_tensor(letterbox_images(sources, placements, self.size_px, _ORDER))  # (B, 3, S, S)
        mask_squares = letterbox_masks(masks, placements, self.size_px, _ORDER, px_per_latent=1)  # (B, S, S)
        mask_px = torch.from_numpy(mask_squares)[:, None].float()  # (B, 1, S, S)
        holed = to_uint8(blank_mask(squares, mask_px))  # (B, S, S, 3)
        references = self._place_references(reference, len(sources), reference_crop)  # B lists

        # 3. Edit one source after the other, because the pipeline shows the same images to all rows of a batch.
        results, correspondences = [], []
        options: dict[str, Any] = {
            "num_inference_steps": steps, "guidance_scale": guidance, "callback_on_step_end": callback_on_step_end
        }  # fmt: skip
        with _encode_once(self.pipeline.vae):
            for number, shown in enumerate(references):
                rows = slice(number * num_images_per_prompt, (number + 1) * num_images_per_prompt)
                images = [Image.fromarray(each) for each in (holed[number], *(square for square, _ in shown))]
                own = generator[rows] if isinstance(generator, list) else [generator] * num_images_per_prompt
                for each in own:  # one after the other, so that each result is that of a separate call
                    recorder = CorrespondenceRecorder(mask_px[number : number + 1].to(self.pipeline.device))
                    record = recorder if return_correspondence else attention_record
                    results.append(self._paint(images, mask_px[number, 0], record, generator=each, **options))
                    if return_correspondence:
                        shown_at = [placement for _, placement in shown]
                        correspondences += list_correspondences(recorder, [placements[number]], shown_at, len(shown))
        latents = torch.cat(results)  # (B n, C, h, w)

        # 4. Decode, and paste what was painted into the sources.
        found = correspondences if return_correspondence else None
        if output_type == "latent":
            return MimicBrushPipelineOutput(images=latents, correspondences=found)
        pixels = torch.cat([self.pipeline.vae.decode(each[None], return_dict=False)[0].float() for each in latents])
        if not pixels.isfinite().all():
            raise MimicBrushError(
                f"the result contains NaN or infinite values: numbers overflowed in {self.dtype}; use bfloat16 or "
                "float32"
            )
        painted: Any
        if output_type == "pt":
            painted = to_unit_range(pixels)
        elif not paste_back:
            painted = to_square_images(pixels, output_type)
        else:
            stored = [find_stored_colors(each) for each in source]
            painted = paste_into_sources(pixels, sources, masks, placements, output_type, stored)
        return MimicBrushPipelineOutput(images=painted, correspondences=found)

    def _paint(
        self,
        images: list[Image.Image],
        mask: torch.Tensor,
        record: AttentionRecord | None,
        *,
        guidance_scale: float,
        **sampling: Any,
    ) -> torch.Tensor:
        """Call diffusers' pipeline once; return the latents of one result, (1, C, h, w).

        Args:
            images: the source with its hole, then its references.
            mask: (S, S), 1 = repaint.
            record: the record of attention to fill; None: none.
            guidance_scale, sampling: arguments of the pipeline.
        """
        embeds, empty_embeds = (
            each.to(self.pipeline.device, self.dtype) for each in (self.prompt.embeds, self.prompt.empty_embeds)
        )
        attention: dict[str, Any] = {"scale": self.lora_scale}
        if record is not None:
            set_tapped_processors(self.pipeline.transformer)
            layout = TokenLayout(embeds.shape[1], self.token_side**2, len(images) - 1)
            is_guided = guidance_scale > 1 and not self.pipeline.config.is_distilled
            attention[TAP] = RecordingTap(layout, record, passes=2 if is_guided else 1)
        options: dict[str, Any] = {
            "prompt_embeds": embeds,
            "negative_prompt_embeds": empty_embeds,
            "height": self.size_px,
            "width": self.size_px,
            "guidance_scale": guidance_scale,
            "attention_kwargs": attention,
            "output_type": "latent",
            **sampling,
        }
        if self.is_trained:
            options["image"] = images
        else:
            # A token that the hole only touches is painted, too; otherwise, a part of it would stay black.
            touched = F.adaptive_max_pool2d(mask[None, None], self.token_side)
            tokens = F.interpolate(touched, self.size_px)[0, 0].numpy()
            mask_image = Image.fromarray((tokens * 255).astype(np.uint8))
            shown = {"image": images[0], "mask_image": mask_image, "image_reference": images[1:] or None}
            options |= {**shown, "strength": 1.0}
        latents: torch.Tensor = self.pipeline(**options).images
        return latents

    def _place_references(
        self, reference: References | None, num_sources: int, crops: Box | list[Box | None] | None
    ) -> list[list[tuple[np.ndarray, Placement]]]:
        """Letterbox the references of each source: squares (S, S, 3) uint8, with their placements."""
        lists = [[to_rgb_array(image) for image in each] for each in _list_references(reference, num_sources)]
        flat = [array for each in lists for array in each]
        boxes = iter(list_boxes(flat, crops))
        placed = []
        for each in lists:
            placements = [Placement(next(boxes), self.size_px) for _ in each]
            squares = list(letterbox_images(each, placements, self.size_px, _ORDER)) if each else []
            placed.append(list(zip(squares, placements, strict=True)))
        return placed * num_sources if len(placed) == 1 else placed


@contextmanager
def _encode_once(vae: AutoencoderKLFlux2) -> Iterator[None]:
    """Encode each image only once: diffusers' pipeline would encode all images again for each result.

    The pipeline takes the mode of the latents, without noise, so the latents of an image are always the same.
    """
    encode, encoded = vae.encode, dict[bytes, Any]()

    def encode_new(image: torch.Tensor, *options: Any, **named: Any) -> Any:
        key = hashlib.sha256(image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).digest()
        if key not in encoded:
            encoded[key] = encode(image, *options, **named)
        return encoded[key]

    vae.encode = encode_new
    try:
        yield
    finally:
        del vae.encode  # this restores the method of the class


def _list_references(reference: References | None, num_sources: int) -> list[list[ImageInput]]:
    """List the references of each source, or one list for all sources; see `KleinPipeline.__call__`."""
    if reference is None:
        return [[]]
    lists = group_references(reference, num_sources)
    if len(lists) not in (1, num_sources):
        raise InputError(
            f"expected one reference, or one (or a list) for each of {num_sources} sources, got {len(lists)}"
        )
    return lists
