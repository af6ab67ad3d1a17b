"""Auto-zoom: edit, see which part of the reference was looked at, and edit again with that part alone.

The paper's stated failure (limitations) is a region that is small in the reference, or one of several candidates; its
advice is to crop the reference. This does so from the attention of a first pass. It costs a second edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from mimicbrush.ops.reference_part import ReferencePart, looked_at
from mimicbrush.pipelines.load import seeded
from mimicbrush.pipelines.pictures import rgb, whole
from mimicbrush.pipelines.pipeline_output import MimicBrushPipelineOutput

if TYPE_CHECKING:
    from mimicbrush.ops.crops import Box
    from mimicbrush.pipelines import MimicBrushPipeline
    from mimicbrush.pipelines.pictures import Picture


def edit_zoomed(
    pipeline: MimicBrushPipeline,
    source: Picture,
    mask: Picture,
    reference: Picture,
    seeds: Sequence[int],
    *,
    reference_crop: Box | None = None,
    **options: Any,
) -> tuple[MimicBrushPipelineOutput, list[ReferencePart | None]]:
    """Edit one picture once for each seed, each with a closer look of its own.

    Args:
        pipeline: with a reference U-Net.
        source, mask, reference: one of each, as the pipeline takes them.
        seeds: one for each result; both passes draw the same noise.
        reference_crop: look only within this part.
        options: of the pipeline's call, but for generators and the number of images.

    Returns:
        The results, those of ``pipeline(..., reference_crop=part.box)``; and the parts. None: attention was spread, and
        the first pass is the result.

    Raises:
        InputError: see the pipeline.
    """
    images: list[Any] = []
    correspondences, parts = [], []
    tells = options.pop("return_correspondence", False)
    for seed in seeds:

        def edit(crop: Box | None, tells: bool, seed: int = seed) -> MimicBrushPipelineOutput:
            output = pipeline(
                source, mask, reference, reference_crop=crop, generator=seeded(seed), return_correspondence=tells,
                **options,
            )  # fmt: skip
            return cast("MimicBrushPipelineOutput", output)

        output = edit(reference_crop, True)
        assert output.correspondences is not None
        part = looked_at(output.correspondences[0], reference_crop or whole(rgb(reference)))
        if part is not None:
            output = edit(part.box, tells)
        images.append(output.images[0])
        correspondences += output.correspondences or []
        parts.append(part)
    result = MimicBrushPipelineOutput(images=images, correspondences=correspondences if tells else None)
    return result, parts
