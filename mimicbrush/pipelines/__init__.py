"""The editing pipeline, in diffusers' manners."""

from mimicbrush.pipelines.pipeline_mimicbrush import MimicBrushPipeline
from mimicbrush.pipelines.pipeline_output import MimicBrushPipelineOutput

__all__ = ["MimicBrushPipeline", "MimicBrushPipelineOutput"]
