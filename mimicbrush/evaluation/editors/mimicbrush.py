"""A `MimicBrushPipeline` as an editor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from mimicbrush.errors import InputError, WeightsError
from mimicbrush.evaluation.benchmark.layout import Case
from mimicbrush.evaluation.editors.protocol import (
    CaseInputs,
    CaseResult,
    EditorOptions,
    NotApplicableError,
    PairBatch,
    PairResults,
)
from mimicbrush.evaluation.heldout.report import find_package_versions
from mimicbrush.io.images import MASK_THRESHOLD, read_image
from mimicbrush.ops.canvas import crop_back
from mimicbrush.ops.counter_rng import mix
from mimicbrush.ops.crops import Box
from mimicbrush.ops.masks import mask_box
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.editing.auto_zoom import edit_zoomed
from mimicbrush.pipelines.editing.reference_part import CHOICES
from mimicbrush.pipelines.open_pipeline import open_pipeline, seeded_generator
from mimicbrush.ranges import MAX_REFERENCES

#: How a pipeline looks at a reference: at all of it; at the box around its mask; or twice, see `edit_zoomed`.
ReferenceView = Literal["whole", "boxed", "auto_zoom"]


class MimicBrushEditor:
    """A pipeline; see `Editor`.

    Args:
        pipeline: on its device.
        num_inference_steps, guidance_scale: None: the pipeline's own.
        name: of the editor.
        reference_view: how it looks at the reference.
        about: further facts for the metric card, such as where the weights came from.
    """

    most_references = MAX_REFERENCES

    def __init__(
        self,
        pipeline: MimicBrushPipeline,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        name: str = "mimicbrush",
        reference_view: ReferenceView = "whole",
        about: dict[str, str] | None = None,
    ) -> None:
        config = pipeline.config
        self.name, self.pipeline, self.reference_view = name, pipeline, reference_view
        self.num_inference_steps = num_inference_steps or config.default_num_inference_steps
        self.guidance_scale = config.default_guidance_scale if guidance_scale is None else guidance_scale
        self.about = describe_editor(
            editor="MimicBrushPipeline",
            steps=self.num_inference_steps,
            guidance=self.guidance_scale,
            size_px=pipeline.size_px,
            dtype=pipeline.unet.dtype,
            options=pipeline.options(),
            reference=f"auto_zoom {CHOICES}" if reference_view == "auto_zoom" else reference_view,
        ) | (about or {})

    @property
    def size_px(self) -> int:
        """Side of its square canvas."""
        return self.pipeline.size_px

    def edit_pairs(self, batch: PairBatch, *, with_correspondences: bool = False) -> PairResults:
        """Edit a batch of held-out pairs, see `Editor`.

        Correspondences need a reference U-Net; a pipeline without one gives none. The pixels are the same with and
        without them.

        Raises:
            NotApplicableError: it looks at the reference in another way than at all of it.
            WeightsError: the pipeline returned values that are not finite.
        """
        if self.reference_view != "whole":
            raise NotApplicableError(f"{self.name} can edit benchmark cases, but not held-out pairs")
        output: Any = self.pipeline(
            source=[Image.fromarray(source) for source in batch.sources],
            mask=[Image.fromarray(mask * np.uint8(255)) for mask in batch.masks],
            reference=list_references(batch),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            generator=[seeded_generator(seed) for seed in batch.seeds],
            latents=self._sample_latents(batch.seeds),
            paste_back=False,
            output_type="np",
            return_correspondence=with_correspondences and self.pipeline.can_record_attention,
        )
        pixels = np.asarray(output.images, np.float32)
        if not np.isfinite(pixels).all():
            raise WeightsError("the pipeline returned NaN or infinite values; its weights are not usable")
        return PairResults((pixels.clip(0, 1) * 255).round().astype(np.uint8), output.correspondences)

    def edit_case(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """Edit one benchmark case, see `Editor`; the same pixels as the pipeline called with the same seed."""
        has_correspondence = self.pipeline.can_record_attention
        images = inputs.source, inputs.mask, inputs.reference
        options: dict[str, Any] = {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "keep_shape": inputs.keep_shape,
            "paste_back": False,
            "return_correspondence": has_correspondence,
        }
        output: Any
        if self.reference_view == "auto_zoom":
            output, _ = edit_zoomed(self.pipeline, *images, [inputs.seed], **options)
        else:
            box = reference_box(case, inputs.reference.size) if self.reference_view == "boxed" else None
            output = self.pipeline(*images, reference_crop=box, generator=[seeded_generator(inputs.seed)], **options)
        return CaseResult(
            resize_to_source(output.images[0], inputs.source), output.correspondences[0] if has_correspondence else None
        )

    def _sample_latents(self, seeds: Sequence[int]) -> torch.Tensor:
        """The start of the sampler, (n, 4, h, w), the same with and without a reference.

        The pipeline itself samples it after the reference's posterior, of which there is none without a reference.
        """
        side = self.pipeline.unet.config.sample_size
        shape = (self.pipeline.vae.config.latent_channels, side, side)
        return torch.stack([torch.randn(shape, generator=seeded_generator(mix(seed, 1))) for seed in seeds])


def list_references(batch: PairBatch) -> list[list[Image.Image]] | None:
    """List the references of each pair of a batch, as a pipeline takes them; None: there are none."""
    if batch.references is None:
        return None
    images = batch.references[:, None]
    if batch.other_references is not None:
        images = np.concatenate([images, batch.other_references], axis=1)  # (n, R, S, S, 3)
    return [[Image.fromarray(image) for image in of_pair] for of_pair in images]


def open_mimicbrush(
    name: str, folder: Path, options: EditorOptions, reference_view: ReferenceView = "whole"
) -> MimicBrushEditor:
    """Load a pipeline folder as an editor, see `registry.open_editor`."""
    return MimicBrushEditor(
        load_for_editor(folder, options),
        options.num_inference_steps,
        options.guidance_scale,
        name=name,
        reference_view=reference_view,
        about={"weights": str(folder)},
    )


def load_for_editor(folder: Path, options: EditorOptions) -> MimicBrushPipeline:
    """Load a pipeline folder onto its device, without progress bars."""
    pipeline = open_pipeline(folder, options.device, options.dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def describe_editor(**facts: object) -> dict[str, str]:
    """Collect facts for the metric card, with the versions of the packages that computed."""
    packages = ", ".join(f"{name} {number}" for name, number in find_package_versions().items() if number is not None)
    return {name: str(value) for name, value in facts.items()} | {"versions": packages}


def resize_to_source(square: Image.Image, source: Image.Image) -> Image.Image:
    """Cut the padding off a square canvas, and resize the rest to the source's size."""
    return Image.fromarray(np.ascontiguousarray(crop_back(np.asarray(square), source.height, source.width)))


def reference_box(case: Case, size: tuple[int, int]) -> Box:
    """Find the box around the reference's mask (paper Table 1, "with box").

    Args:
        case: whose.
        size: of the reference, (width, height) px.

    Raises:
        InputError: there is no such mask, or it does not fit.
    """
    if case.reference_mask is None:
        raise InputError(
            f"{case.reference.name} has no mask ({case.number}_reference_mask.png), but this editor needs one for "
            "its box; use an editor that takes the whole reference"
        )
    mask = np.asarray(read_image(case.reference_mask, "L")) > MASK_THRESHOLD
    if mask.shape[::-1] != size or not mask.any():
        sizes = f"it is {mask.shape[1]} x {mask.shape[0]} px, and the reference is {size[0]} x {size[1]} px"
        raise InputError(f"{case.reference_mask} must have the size of its reference and must not be empty; {sizes}")
    return mask_box(mask)
