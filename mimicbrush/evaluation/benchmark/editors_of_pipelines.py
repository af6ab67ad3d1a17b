"""A `MimicBrushPipeline` as an editor on the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mimicbrush.evaluation.benchmark.editor_types import CaseEditor, CaseInputs, CaseResult
from mimicbrush.evaluation.benchmark.layout import Case
from mimicbrush.evaluation.report import versions
from mimicbrush.ops.images import crop_back
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.load import load_pipeline, on_device, seeded


def computing_dtype(device: str) -> torch.dtype:
    """Half precision on a GPU, as scripts/infer.py has it."""
    return torch.float16 if device != "cpu" and torch.cuda.is_available() else torch.float32


def stated(**facts: object) -> dict[str, str]:
    """Facts for the metric card, with the versions of what computed."""
    packages = ", ".join(f"{name} {number}" for name, number in versions().items() if number is not None)
    return {name: str(value) for name, value in facts.items()} | {"versions": packages}


def back_to_source(square: Image.Image, source: Image.Image) -> Image.Image:
    """The model's square canvas without its padding, at the source's size."""
    return Image.fromarray(np.ascontiguousarray(crop_back(np.asarray(square), source.height, source.width)))


class PipelineCaseEditor:
    """A pipeline; see `CaseEditor`.

    Args:
        name: of the editor.
        pipeline: on its device.
        about: where the weights came from.
        num_inference_steps, guidance_scale: None: the pipeline's own.
    """

    def __init__(
        self,
        name: str,
        pipeline: MimicBrushPipeline,
        about: dict[str, str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        config = pipeline.config
        self.name, self.pipeline = name, pipeline
        self.num_inference_steps = num_inference_steps or config.default_num_inference_steps
        self.guidance_scale = config.default_guidance_scale if guidance_scale is None else guidance_scale
        self.about = stated(
            editor="MimicBrushPipeline",
            steps=self.num_inference_steps,
            guidance=self.guidance_scale,
            size_px=pipeline.size_px,
            dtype=pipeline.unet.dtype,
            options=pipeline.options(),
        ) | dict(about)

    def __call__(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """See `CaseEditor`; the same pixels as the pipeline called with the same seed."""
        can_tell = self.pipeline.reference_unet is not None
        output: Any = self.pipeline(
            inputs.source,
            inputs.mask,
            inputs.reference,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            keep_shape=inputs.keep_shape,
            generator=[seeded(inputs.seed)],
            paste_back=False,
            return_correspondence=can_tell,
        )
        return CaseResult(
            back_to_source(output.images[0], inputs.source), output.correspondences[0] if can_tell else None
        )


def open_pipeline_editor(
    name: str, folder: Path, device: str, num_inference_steps: int | None, guidance_scale: float | None
) -> CaseEditor:
    """Load a pipeline folder, see `editors.open_editor`."""
    pipeline = on_device(load_pipeline(folder, computing_dtype(device)), device)
    pipeline.set_progress_bar_config(disable=True)
    return PipelineCaseEditor(name, pipeline, {"weights": str(folder)}, num_inference_steps, guidance_scale)
