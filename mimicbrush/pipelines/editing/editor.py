"""The editor of `mimicbrush edit`: its settings, and a pipeline that is loaded for the first edit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from mimicbrush.errors import InputError
from mimicbrush.pipelines.editing.inputs import EditInputs, read_inputs
from mimicbrush.pipelines.editing.requests import Edit, check_one_reference
from mimicbrush.pipelines.find_pipeline import check_model
from mimicbrush.pipelines.klein.folder import find_klein_folder, is_lora_file
from mimicbrush.pipelines.small_model import SHIPPED_NAME, is_shipped, shipped_size_px

if TYPE_CHECKING:
    from mimicbrush.ops.crops import Box
    from mimicbrush.pipelines import MimicBrushPipeline, MimicBrushPipelineOutput
    from mimicbrush.pipelines.editing.reference_part import ReferencePart
    from mimicbrush.pipelines.klein.pipeline import KleinPipeline

NO_MODEL_ERROR = """no model was given, and this version comes without a model. --model takes:
  DIR       a pipeline folder. `mimicbrush train +experiment=smoke data.root=MINED` writes a toy to
            runs/smoke/pipeline; a full training run writes a pipeline to its run_dir
  released  the released weights. They are downloaded from the Hugging Face hub and converted once"""
SMALL_MODEL_NOTE = """note: no model was given, so the small model that comes with the project is used, at {size_px} px.
It shows how imitation works, but it cannot paint as well as a full-size model. --model takes:
  DIR       a pipeline folder, or the folder of a training run that has one
  released  the released weights. They are downloaded from the Hugging Face hub and converted once"""

LORA_FILE_NOTE = """note: {file} does not say how it was trained. It edits at {size_px} px, with this prompt:
  {prompt}
To edit as in the training, give the folder that the training run wrote."""


@dataclass(frozen=True)
class EditSettings:
    """Settings for all edits of a command. The command line has checked the values.

    Attributes:
        model: a folder, a LoRA file of FLUX.2 klein, "released" or "small"; None: the small model, with a note.
        device, dtype: as `open_any_pipeline` takes them.
        steps, guidance: `num_inference_steps` and `guidance_scale` of the pipeline; None: its own defaults.
        crop, paste_back: as the pipeline takes them.
        auto_zoom: edit twice; the second edit uses only the part of the reference that the first attended to.
        cuda_graphs: record the passes of the U-Nets once, and replay them.
        resize_mask, allow_full_mask: as `read_inputs` takes them.
        return_correspondence: also return which place of the reference filled each place of the mask.
        shows_steps: show a progress bar of the steps for each edit.
    """

    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    steps: int | None = None
    guidance: float | None = None
    crop: str = "full"
    paste_back: bool = True
    auto_zoom: bool = False
    cuda_graphs: bool = False
    resize_mask: bool = False
    allow_full_mask: bool = False
    return_correspondence: bool = False
    shows_steps: bool = True


class LazyEditor:
    """Makes edits with a pipeline that is loaded when the first edit needs it.

    Attributes:
        parts: with auto-zoom: for each result of the last edit, the part of the reference that was used.

    Raises:
        InputError: the model does not exist.
    """

    def __init__(self, settings: EditSettings) -> None:
        self.settings = settings
        self.parts: Sequence[ReferencePart | None] = ()
        if settings.model is None and not is_shipped():
            raise InputError(NO_MODEL_ERROR)
        self._model_name = settings.model or SHIPPED_NAME
        check_model(self._model_name)  # to report a wrong model before the images are read

    def read(self, edit: Edit) -> EditInputs:
        """Read and check the images of an edit; this needs no model.

        Raises:
            InputError: see `read_inputs`; or the edit has several references, and auto-zoom takes one.
        """
        if self.settings.auto_zoom:
            check_one_reference(len(edit.references))
        return read_inputs(edit, resize_mask=self.settings.resize_mask, allow_full_mask=self.settings.allow_full_mask)

    @property
    def pastes_back(self) -> bool:
        """Whether a result has the size of its source instead of the size of the canvas."""
        return self.settings.paste_back

    @cached_property
    def pipeline(self) -> MimicBrushPipeline | KleinPipeline:
        """The pipeline on its device."""
        if self.settings.model is None:  # printed only when editing starts, not before errors about the images
            print(SMALL_MODEL_NOTE.format(size_px=shipped_size_px()), file=sys.stderr)
        from mimicbrush.pipelines.open_pipeline import open_any_pipeline

        pipeline = open_any_pipeline(self._model_name, self.settings.device, self.settings.dtype)
        path = Path(self._model_name)
        if is_lora_file(path) and find_klein_folder(path) is None:
            prompt = cast("KleinPipeline", pipeline).prompt.facts.prompt
            print(LORA_FILE_NOTE.format(file=path, size_px=pipeline.size_px, prompt=prompt), file=sys.stderr)
        if self.settings.auto_zoom:
            from mimicbrush.pipelines.editing.auto_zoom import check_can_zoom

            check_can_zoom(pipeline.can_record_attention)
        scheduler = pipeline.scheduler.config
        limit = scheduler.get("original_inference_steps")  # of a distilled model
        why = f"was distilled for at most {limit} steps"
        if limit is None:
            limit = scheduler.num_train_timesteps
            why = f"was trained with {limit} timesteps, so it can take at most {limit} steps"
        if (self.settings.steps or 0) > limit:
            raise InputError(f"--steps {self.settings.steps}: this model {why}")
        if self.settings.cuda_graphs:
            pipeline.enable_cuda_graphs()
        pipeline.set_progress_bar_config(disable=None if self.settings.shows_steps else True)
        return pipeline

    def load(self) -> MimicBrushPipeline | KleinPipeline:
        """Load the pipeline if it is not loaded yet."""
        return self.pipeline

    def edit(self, edit: Edit, inputs: EditInputs, seeds: Sequence[int]) -> Sequence[Image.Image]:
        """Edit once per seed, and print which part of the reference auto-zoom chose."""
        images = cast("list[Image.Image]", self.call_pipeline(edit, inputs, seeds).images)  # output_type is "pil"
        from tqdm import tqdm

        for seed, part in zip(seeds, self.parts, strict=False):
            tqdm.write(f"{edit.output}, seed {seed}: {describe_part(part)}")
        return images

    def edit_together(
        self, edits: Sequence[Edit], inputs: Sequence[EditInputs], seeds: Sequence[Sequence[int]]
    ) -> Sequence[Sequence[Image.Image]]:
        """Make several edits in one call of the pipeline.

        All edits have the same `keep_shape`, the same number of seeds and the same number of references.
        """
        from mimicbrush.pipelines.open_pipeline import seeded_generator

        count = len(seeds[0])
        boxes: list[Box | None] = [
            (edit.reference_crop if number == 0 else None) or (0, 0, *image.size)
            for edit, each in zip(edits, inputs, strict=True)
            for number, image in enumerate(each.references)
        ]
        references: list[Any] = [each.reference_argument() for each in inputs]
        output: Any = self.pipeline(
            [each.source for each in inputs],
            [each.mask for each in inputs],
            references,
            reference_crop=boxes,
            num_images_per_prompt=count,
            generator=[seeded_generator(seed) for of_one in seeds for seed in of_one],
            **self._options(edits[0].keep_shape),
        )
        images = cast("list[Image.Image]", output.images)  # output_type is "pil"
        return [images[first : first + count] for first in range(0, len(images), count)]

    def call_pipeline(self, edit: Edit, inputs: EditInputs, seeds: Sequence[int]) -> MimicBrushPipelineOutput:
        """Edit once per seed, and return the output of the pipeline, with correspondences if requested."""
        options = {**self._options(edit.keep_shape), "reference_crop": edit.reference_crop}
        if self.settings.auto_zoom:
            from mimicbrush.pipelines.editing.auto_zoom import edit_zoomed

            images = inputs.source, inputs.mask, inputs.reference
            result, self.parts = edit_zoomed(self.pipeline, *images, seeds, **options)
            return result
        from mimicbrush.pipelines.open_pipeline import seeded_generator

        generators = [seeded_generator(seed) for seed in seeds]  # one per result, so that each can be reproduced alone
        reference: Any = inputs.reference_argument()
        output = self.pipeline(
            inputs.source, inputs.mask, reference, num_images_per_prompt=len(seeds), generator=generators, **options
        )
        return cast("MimicBrushPipelineOutput", output)

    def _options(self, keep_shape: bool) -> dict[str, Any]:
        return {
            "num_inference_steps": self.settings.steps,
            "guidance_scale": self.settings.guidance,
            "keep_shape": keep_shape,
            "crop": self.settings.crop,
            "paste_back": self.settings.paste_back,
            "return_correspondence": self.settings.return_correspondence,
        }


def describe_part(part: ReferencePart | None) -> str:
    """Describe which part of the reference auto-zoom chose, as text for people."""
    if part is None:
        return "auto-zoom found no part of the reference that needs a closer look, so this is the first edit"
    box = ",".join(str(side) for side in part.box)
    of = "one place" if part.places == 1 else f"the strongest of {part.places} places"
    return f"auto-zoom used only the box {box} of the reference, {of}, with {part.share:.0%} of the attention peaks"
