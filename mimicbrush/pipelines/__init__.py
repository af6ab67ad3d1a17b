"""The editing pipeline, as diffusers has pipelines.

In reading order:

* ``pipeline_mimicbrush`` - `MimicBrushPipeline`: the whole edit, in numbered steps
* ``prepared`` - references that are encoded once for many edits
* ``image_inputs`` - what users hand in: images and masks, checked, on square canvases
* ``image_outputs`` - what the networks painted, pasted back into the sources
* ``pipeline_output`` - `MimicBrushPipelineOutput`
* ``cache`` - values that depend on weights alone
* ``cuda_graphs`` - passes of the U-Nets recorded as CUDA graphs, and replayed
* ``hub`` - loading, saving and uploading: safetensors only, with a model card
* ``flux2_klein`` - FLUX.2 klein as an editor that imitates: opened, and written
* ``open_pipeline`` - the function by which every command opens its pipeline
* ``find_pipeline`` - the folder of a pipeline by its name, also of the released one
* ``folder`` - pipeline folders, found and read without loading them; no torch
* ``checksums`` - the files that such a folder must hold, as they were saved; no torch
* ``small_model`` - the small model that comes with the project
* ``editing/`` - edits from files: one, many, and with a second look at the reference
* ``klein/`` - what a run of FLUX.2 klein leaves, and how it edits
* ``conversion/`` - the released weights, to and from a pipeline folder

The two classes are imported when they are first asked for: what a command can check without a model also lives in this
package, and must not wait ten seconds for torch and diffusers.
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
