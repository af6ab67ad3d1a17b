"""A `MimicBrushPipeline` as an editor on the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from mimicbrush.errors import InputError
from mimicbrush.evaluation.benchmark.layout import Case
from mimicbrush.evaluation.editors.protocol import CaseEditor, CaseInputs, CaseResult
from mimicbrush.evaluation.heldout.report import package_versions
from mimicbrush.io.images import MASK_THRESHOLD, read_image
from mimicbrush.ops.canvas import crop_back
from mimicbrush.ops.crops import Box
from mimicbrush.ops.masks import mask_box
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.editing.auto_zoom import edit_zoomed
from mimicbrush.pipelines.editing.reference_part import CHOICES
from mimicbrush.pipelines.loading import open_pipeline, seeded_generator


def describe_editor(**facts: object) -> dict[str, str]:
    """Facts for the metric card, with the versions of what computed."""
    packages = ", ".join(f"{name} {number}" for name, number in package_versions().items() if number is not None)
    return {name: str(value) for name, value in facts.items()} | {"versions": packages}


def resize_to_source(square: Image.Image, source: Image.Image) -> Image.Image:
    """The model's square canvas without its padding, at the source's size."""
    return Image.fromarray(np.ascontiguousarray(crop_back(np.asarray(square), source.height, source.width)))


#: How a pipeline looks at a reference: at all of it; at the box around its mask; or twice, see `edit_zoomed`.
ReferenceView = Literal["whole", "boxed", "auto_zoom"]


def reference_box(case: Case, size: tuple[int, int]) -> Box:
    """The box around the reference's mask (paper Table 1, "with box").

    Args:
        case: whose.
        size: of the reference, (width, height) px.

    Raises:
        InputError: there is no such mask, or it does not fit.
    """
    if case.reference_mask is None:
        raise InputError(
            f"{case.reference.name} has no mask beside it ({case.number}_reference_mask.png), whose box is to be cut "
            "out; name an editor that takes the whole reference"
        )
    mask = np.asarray(read_image(case.reference_mask, "L")) > MASK_THRESHOLD
    if mask.shape[::-1] != size or not mask.any():
        sizes = f"{mask.shape[1]} x {mask.shape[0]} px, its reference {size[0]} x {size[1]} px"
        raise InputError(f"{case.reference_mask} must have its reference's size and not be empty; it is {sizes}")
    return mask_box(mask)


class PipelineCaseEditor:
    """A pipeline; see `CaseEditor`.

    Args:
        name: of the editor.
        pipeline: on its device.
        about: where the weights came from.
        look: how it looks at the reference.
        num_inference_steps, guidance_scale: None: the pipeline's own.
    """

    def __init__(
        self,
        name: str,
        pipeline: MimicBrushPipeline,
        about: dict[str, str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        look: ReferenceView = "whole",
    ) -> None:
        config = pipeline.config
        self.name, self.pipeline, self.look = name, pipeline, look
        self.num_inference_steps = num_inference_steps or config.default_num_inference_steps
        self.guidance_scale = config.default_guidance_scale if guidance_scale is None else guidance_scale
        self.about = describe_editor(
            editor="MimicBrushPipeline",
            steps=self.num_inference_steps,
            guidance=self.guidance_scale,
            size_px=pipeline.size_px,
            dtype=pipeline.unet.dtype,
            options=pipeline.options(),
            reference=f"auto_zoom {CHOICES}" if look == "auto_zoom" else look,
        ) | dict(about)

    def __call__(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """See `CaseEditor`; the same pixels as the pipeline called with the same seed."""
        can_tell = self.pipeline.reference_unet is not None
        images = inputs.source, inputs.mask, inputs.reference
        options: dict[str, Any] = {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "keep_shape": inputs.keep_shape,
            "paste_back": False,
            "return_correspondence": can_tell,
        }
        output: Any
        if self.look == "auto_zoom":
            output, _ = edit_zoomed(self.pipeline, *images, [inputs.seed], **options)
        else:
            box = reference_box(case, inputs.reference.size) if self.look == "boxed" else None
            output = self.pipeline(*images, reference_crop=box, generator=[seeded_generator(inputs.seed)], **options)
        return CaseResult(
            resize_to_source(output.images[0], inputs.source), output.correspondences[0] if can_tell else None
        )


def open_pipeline_editor(
    name: str,
    folder: Path,
    device: str,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    look: ReferenceView = "whole",
) -> CaseEditor:
    """Load a pipeline folder, see `editors.open_editor`."""
    pipeline = open_pipeline(folder, device)
    pipeline.set_progress_bar_config(disable=True)
    return PipelineCaseEditor(name, pipeline, {"weights": str(folder)}, num_inference_steps, guidance_scale, look)
