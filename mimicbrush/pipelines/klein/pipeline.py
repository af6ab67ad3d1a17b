"""FLUX.2 klein as an imitating editor, called as a `MimicBrushPipeline` is.

The sequence is that of diffusers' `Flux2KleinPipeline(image=[holed source, reference 1, ...])`, and it is that pipeline
which edits. So a LoRA that was trained here works without this project, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from mimicbrush.errors import InputError, MimicBrushError
from mimicbrush.models.flux2_klein.prompt import PromptEmbeddings
from mimicbrush.ops.canvas import blank_mask, to_tensor, to_uint8
from mimicbrush.ops.crops import Box, Placement
from mimicbrush.pipelines.image_inputs import (
    ImageInput,
    check_generators,
    check_masks,
    check_numbers,
    find_stored_colors,
    letterbox_images,
    letterbox_masks,
    list_boxes,
    list_images,
    place_sources,
    to_mask_array,
    to_rgb_array,
)
from mimicbrush.pipelines.image_outputs import paste_into_sources, to_square_images, to_unit_range
from mimicbrush.pipelines.klein.folder import REFERENCES_RANGE, KleinImitation
from mimicbrush.pipelines.pipeline_output import MimicBrushPipelineOutput

#: Of the base model, as diffusers' pipeline has it; and of a model that was distilled to few steps.
KLEIN_STEPS, DISTILLED_STEPS = 50, 4
#: Without training, as diffusers' pipeline has it. A trained model has seen one prompt alone, so guidance away from the
#: empty one would only double its time.
UNTRAINED_GUIDANCE, TRAINED_GUIDANCE = 4.0, 1.0

#: How images come onto their canvases, see `ops.canvas.letterbox`: training samples are made alike.
_ORDER = "resize_then_pad"

References = ImageInput | Sequence[ImageInput] | Sequence[Sequence[ImageInput]]


class KleinPipeline:
    """FLUX.2 klein with the prompt and the canvas that it was trained for.

    It is called as a `MimicBrushPipeline` is, so that commands serve both; what it cannot do is refused.

    Args:
        pipeline: of diffusers, on its device; it needs no text encoder.
        imitation: what the weights were trained for.
        prompt: the embeddings of that prompt.
        is_trained: whether the weights were trained to imitate, by a LoRA or fully.
    """

    #: As of a `MimicBrushPipeline` without one: one transformer reads and paints.
    reference_unet = None

    def __init__(
        self, pipeline: Flux2KleinPipeline, imitation: KleinImitation, prompt: PromptEmbeddings, is_trained: bool = True
    ) -> None:
        step_px = 2 * pipeline.vae_scale_factor
        if imitation.size_px % step_px:
            raise InputError(f"size_px={imitation.size_px}: must be a multiple of {step_px}, the pixels of a token")
        self.pipeline, self.imitation, self.prompt, self.is_trained = pipeline, imitation, prompt, is_trained

    @property
    def size_px(self) -> int:
        """Side of the square canvas that the model paints on."""
        return self.imitation.size_px

    @property
    def scheduler(self) -> Any:
        """The scheduler of diffusers' pipeline."""
        return self.pipeline.scheduler

    @property
    def dtype(self) -> torch.dtype:
        """Type of the transformer."""
        return self.pipeline.transformer.dtype

    @property
    def default_num_inference_steps(self) -> int:
        """Steps of a call that names none."""
        return DISTILLED_STEPS if self.pipeline.config.is_distilled else KLEIN_STEPS

    @property
    def default_guidance_scale(self) -> float:
        """Guidance of a call that names none; a distilled model ignores it."""
        return TRAINED_GUIDANCE if self.is_trained or self.pipeline.config.is_distilled else UNTRAINED_GUIDANCE

    def set_progress_bar_config(self, **options: Any) -> None:
        """Configure the progress bar of the steps, as in diffusers."""
        self.pipeline.set_progress_bar_config(**options)

    def enable_cuda_graphs(self) -> None:
        """Refuse CUDA graphs, which are for the U-Nets.

        Raises:
            InputError: always.
        """
        raise InputError("CUDA graphs are for the U-Nets; leave them off for FLUX.2 klein")

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
        reference_crop: Box | list[Box] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        paste_back: bool = True,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_correspondence: bool = False,
    ) -> MimicBrushPipelineOutput:
        """Edit one image or a batch; see `MimicBrushPipeline.__call__` for what is not said here.

        Args:
            source, mask: B of each.
            reference: of one source: one image or several. Of B sources: one for all, one each, or a list for each.
                None: the source with its hole is the only image.
            num_inference_steps, guidance_scale: None: see `default_num_inference_steps`, `default_guidance_scale`.
                Guidance is away from the empty prompt.
            keep_shape: refused.
            num_images_per_prompt: results per source, n.
            crop: "full" or "auto".
            reference_crop: one for all references, or a list with one each, in their order.
            generator: one for all, or B * n.
            paste_back: put the repainted region into the source at its full size, exact outside of the mask.
            output_type: "latent": (B n, C, h, w), as the autoencoder takes them.
            return_correspondence: refused.

        Raises:
            InputError: images, masks, references and options that do not fit together, or that it cannot do.
            MimicBrushError: the numbers overflowed.
        """
        # 1. Check the inputs.
        steps = self.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = self.default_guidance_scale if guidance_scale is None else guidance_scale
        check_numbers(guidance_scale=guidance, num_inference_steps=steps, num_images_per_prompt=num_images_per_prompt)
        if keep_shape:
            raise InputError("keep_shape needs a depth estimator, which FLUX.2 klein has none of; leave it out")
        if return_correspondence:
            raise InputError("return_correspondence: the attention of FLUX.2 klein is not recorded; leave it out")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise InputError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        source = list_images(source)
        sources = [to_rgb_array(image) for image in source]
        masks = [to_mask_array(image) for image in list_images(mask)]
        check_masks(sources, masks)
        check_generators(len(sources), num_images_per_prompt, generator)

        # 2. Letterbox all images onto square canvases, and blank the hole.
        placements = place_sources(sources, masks, crop, self.size_px)
        holed = self._hole(sources, masks, placements)  # B images
        references = self._place_references(reference, len(sources), reference_crop)  # B lists of images

        # 3. Edit one source after the other: the pipeline shows the same images to all of its rows.
        results = []
        for number, (image, shown) in enumerate(zip(holed, references, strict=True)):
            first = number * num_images_per_prompt
            own = generator[first : first + num_images_per_prompt] if isinstance(generator, list) else generator
            results.append(
                self.pipeline(
                    image=[image, *shown],
                    prompt_embeds=self.prompt.embeds.to(self.pipeline.device, self.dtype),
                    negative_prompt_embeds=self.prompt.empty_embeds.to(self.pipeline.device, self.dtype),
                    height=self.size_px,
                    width=self.size_px,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    num_images_per_prompt=num_images_per_prompt,
                    generator=own,
                    output_type="latent" if output_type == "latent" else "pt",
                ).images
            )
        pixels = torch.cat(results).float()  # (B n, 3, S, S) in 0..1; "latent": (B n, C, h, w)

        # 4. Paste what was painted into the sources.
        if output_type == "latent":
            return MimicBrushPipelineOutput(images=pixels)
        if not pixels.isfinite().all():
            raise MimicBrushError(
                f"the result is no image: numbers overflowed in {self.dtype}; use bfloat16 or float32"
            )
        pixels = pixels * 2 - 1
        images: Any
        if output_type == "pt":
            images = to_unit_range(pixels)
        elif not paste_back:
            images = to_square_images(pixels, output_type)
        else:
            stored = [find_stored_colors(each) for each in source]
            images = paste_into_sources(pixels, sources, masks, placements, output_type, stored)
        return MimicBrushPipelineOutput(images=images)

    def _hole(
        self, sources: list[np.ndarray], masks: list[np.ndarray], placements: list[Placement]
    ) -> list[Image.Image]:
        """Letterbox sources, and blank what is to be repainted, as for the U-Nets."""
        squares = to_tensor(letterbox_images(sources, placements, self.size_px, _ORDER))  # (B, 3, S, S)
        covered = letterbox_masks(masks, placements, self.size_px, _ORDER, px_per_latent=1)  # (B, S, S)
        return [Image.fromarray(each) for each in to_uint8(blank_mask(squares, torch.from_numpy(covered)[:, None]))]

    def _place_references(
        self, reference: References | None, num_sources: int, crops: Box | list[Box] | None
    ) -> list[list[Image.Image]]:
        """Letterbox the references of each source."""
        lists = _list_references(reference, num_sources)
        arrays = [[to_rgb_array(image) for image in each] for each in lists]
        flat = [array for each in arrays for array in each]
        boxes = iter(list_boxes(flat, crops if isinstance(crops, list) else [crops] * len(flat) if crops else None))
        placed = []
        for each in arrays:
            placements = [Placement(next(boxes), self.size_px) for _ in each]
            squares = list(letterbox_images(each, placements, self.size_px, _ORDER)) if each else []
            placed.append([Image.fromarray(square) for square in squares])
        return placed


def _list_references(reference: References | None, num_sources: int) -> list[list[ImageInput]]:
    """List the references of each source; see `KleinPipeline.__call__`."""
    if reference is None:
        return [[] for _ in range(num_sources)]
    given = [reference] if isinstance(reference, Image.Image | np.ndarray) else list(reference)
    if any(isinstance(each, list | tuple) for each in given):
        lists = [list_images(each) for each in given]
    elif num_sources == 1:
        lists = [list_images(given)]  # type: ignore[arg-type]  # no list is in it
    else:
        lists = [[image] for image in list_images(given)]  # type: ignore[arg-type]  # likewise
    lists = lists * num_sources if len(lists) == 1 else lists
    if len(lists) != num_sources:
        raise InputError(f"{len(lists)} references for {num_sources} sources; give one, or one or a list for each")
    for each in lists:
        REFERENCES_RANGE.check("the number of references", len(each))
    return lists
