"""The editing pipeline, in diffusers' manners.

The pipeline is imported when it is first asked for: what a script can check without a model (`edit_list`,
`edit_inputs`) lives in this room, too, and must not wait ten seconds for torch and diffusers.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mimicbrush.pipelines.pipeline_mimicbrush import MimicBrushPipeline
    from mimicbrush.pipelines.pipeline_output import MimicBrushPipelineOutput

__all__ = ["MimicBrushPipeline", "MimicBrushPipelineOutput"]


def __getattr__(name: str) -> object:
    if name == "MimicBrushPipeline":
        from mimicbrush.pipelines.pipeline_mimicbrush import MimicBrushPipeline

        return MimicBrushPipeline
    if name == "MimicBrushPipelineOutput":
        from mimicbrush.pipelines.pipeline_output import MimicBrushPipelineOutput

        return MimicBrushPipelineOutput
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
