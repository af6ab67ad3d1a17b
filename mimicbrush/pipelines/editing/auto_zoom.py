"""Auto-zoom: edits, finds the part of the reference with the attention, and edits again with only this part.

The paper reports (limitations) that the method fails if the region to imitate is small in the reference, or if there
are several candidates, and advises to crop the reference. Here, the attention of a first edit chooses the crop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from mimicbrush.errors import InputError
from mimicbrush.pipelines.editing.reference_part import ReferencePart, find_attended_part
from mimicbrush.pipelines.editing.requests import check_one_reference
from mimicbrush.pipelines.image_inputs import full_box, list_images, to_rgb_array
from mimicbrush.pipelines.open_pipeline import seeded_generator
from mimicbrush.pipelines.pipeline_output import MimicBrushPipelineOutput

if TYPE_CHECKING:
    from mimicbrush.ops.crops import Box
    from mimicbrush.pipelines import MimicBrushPipeline
    from mimicbrush.pipelines.image_inputs import ImageInput
    from mimicbrush.pipelines.klein.pipeline import KleinPipeline


def edit_zoomed(
    pipeline: MimicBrushPipeline | KleinPipeline,
    source: ImageInput,
    mask: ImageInput,
    reference: ImageInput | Sequence[ImageInput],
    seeds: Sequence[int],
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    keep_shape: bool = False,
    crop: Literal["full", "auto"] = "full",
    reference_crop: Box | None = None,
    paste_back: bool = True,
    return_correspondence: bool = False,
    callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
) -> tuple[MimicBrushPipelineOutput, list[ReferencePart | None]]:
    """Edit one image for each seed: first with the whole reference, then with the part that was attended to.

    Args:
        pipeline: a pipeline with a reference U-Net, or of FLUX.2 klein.
        source, mask, reference: one of each, as the pipeline takes them. The reference may be a list of one image.
        seeds: one for each result; both edits begin with the same noise.
        reference_crop: use only this part of the reference in the first edit.
        num_inference_steps, guidance_scale, keep_shape, crop, paste_back, return_correspondence, callback_on_step_end:
            as the pipeline takes them, for both edits.

    Returns:
        The results, as from ``pipeline(..., reference_crop=part.box)``, and the parts. If a part is None, no part was
        found, and the result is that of the first edit.

    Raises:
        InputError: the pipeline has no reference U-Net, so its attention cannot be used; there are several references;
            or see the pipeline.
    """
    check_can_zoom(pipeline.can_record_attention)
    references = list_images(reference)
    check_one_reference(len(references))
    (reference,) = references
    images: list[Any] = []
    correspondences, parts = [], []
    for seed in seeds:

        def edit(part: Box | None, tells: bool, seed: int = seed) -> MimicBrushPipelineOutput:
            output = pipeline(
                source,
                mask,
                reference,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                keep_shape=keep_shape,
                crop=crop,
                reference_crop=part,
                generator=seeded_generator(seed),
                paste_back=paste_back,
                return_correspondence=tells,
                callback_on_step_end=callback_on_step_end,
            )
            return cast("MimicBrushPipelineOutput", output)

        output = edit(reference_crop, True)
        assert output.correspondences is not None
        part = find_attended_part(output.correspondences[0], reference_crop or full_box(to_rgb_array(reference)))
        if part is not None:
            output = edit(part.box, return_correspondence)
        images.append(output.images[0])
        correspondences += output.correspondences or []
        parts.append(part)
    result = MimicBrushPipelineOutput(images=images, correspondences=correspondences if return_correspondence else None)
    return result, parts


def check_can_zoom(has_reference_unet: bool) -> None:
    """Check that a pipeline has a reference U-Net, so that its attention to the reference can be recorded.

    Raises:
        InputError: it has none.
    """
    if not has_reference_unet:
        raise InputError("auto-zoom needs a pipeline with a reference U-Net, but this pipeline has none")
