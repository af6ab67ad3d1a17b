"""FLUX.2 klein as an editor: with a LoRA, after full training, or untrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mimicbrush.evaluation.benchmark.layout import Case
from mimicbrush.evaluation.editors.mimicbrush import describe_editor, list_references, resize_to_source
from mimicbrush.evaluation.editors.protocol import (
    CaseInputs,
    CaseResult,
    EditorOptions,
    PairBatch,
    PairResults,
)
from mimicbrush.pipelines.flux2_klein import KleinPipeline, open_klein
from mimicbrush.pipelines.open_pipeline import seeded_generator
from mimicbrush.ranges import MAX_REFERENCES


class Flux2KleinEditor:
    """FLUX.2 klein; see `Editor`.

    Args:
        pipeline: on its device.
        num_inference_steps, guidance_scale: None: the pipeline's own.
        name: of the editor.
        about: further facts for the metric card, such as where the weights came from.
    """

    most_references = MAX_REFERENCES

    def __init__(
        self,
        pipeline: KleinPipeline,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        name: str = "flux2_klein",
        about: dict[str, str] | None = None,
    ) -> None:
        self.name, self.pipeline = name, pipeline
        self.num_inference_steps = num_inference_steps or pipeline.default_num_inference_steps
        self.guidance_scale = pipeline.default_guidance_scale if guidance_scale is None else guidance_scale
        self.about = describe_editor(
            editor=f"FLUX.2 klein (diffusers {type(pipeline.pipeline).__name__})",
            trained=pipeline.is_trained,
            prompt=pipeline.prompt.facts.prompt,
            images="source with its hole and reference, letterboxed onto white squares; result cropped back",
            depth="none: the shape is not kept",
            steps=self.num_inference_steps,
            guidance=self.guidance_scale,
            size_px=pipeline.size_px,
            scheduler=type(pipeline.scheduler).__name__,
            dtype=pipeline.dtype,
        ) | (about or {})

    @property
    def size_px(self) -> int:
        """Side of its square canvas."""
        return self.pipeline.size_px

    def edit_pairs(self, batch: PairBatch, *, with_correspondences: bool = False) -> PairResults:
        """Edit a batch of held-out pairs, see `Editor`.

        The noise is the same with and without a reference, and so are the pixels with and without correspondences.

        Raises:
            MimicBrushError: the result is not finite.
        """
        has_reference = batch.references is not None
        output: Any = self.pipeline(
            source=list(batch.sources),
            mask=[mask * np.uint8(255) for mask in batch.masks],
            reference=list_references(batch),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            generator=[seeded_generator(seed) for seed in batch.seeds],
            paste_back=False,
            return_correspondence=with_correspondences and has_reference,
        )
        return PairResults(np.stack([np.asarray(image) for image in output.images]), output.correspondences)

    def edit_case(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """Edit one benchmark case, see `Editor`; without a depth estimator it never keeps the shape of the source."""
        output: Any = self.pipeline(
            inputs.source,
            inputs.mask,
            inputs.reference,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            generator=[seeded_generator(inputs.seed)],
            paste_back=False,
            return_correspondence=True,
        )
        return CaseResult(resize_to_source(output.images[0], inputs.source), output.correspondences[0])


def open_flux2_klein(name: str, weights: Path, options: EditorOptions) -> Flux2KleinEditor:
    """Load FLUX.2 klein as an editor, see `registry.open_editor`.

    Args:
        name: of the editor.
        weights: what a run left, a LoRA file, or the folder of an untrained model.
        options: of every editor.
    """
    pipeline = open_klein(weights, options.device, options.dtype)
    pipeline.set_progress_bar_config(disable=True)
    return Flux2KleinEditor(
        pipeline, options.num_inference_steps, options.guidance_scale, name=name, about={"weights": str(weights)}
    )
