"""Edit an image by imitating another: mimicbrush edit REF.jpg SRC.jpg MASK.png --model DIR.

Many edits: mimicbrush edit --batch FOLDER_OR_LIST.jsonl --output-dir OUT --model DIR (docs/editing.md).
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from mimicbrush.errors import InputError, OutputError, speak_as
from mimicbrush.io.images import check_writable, write_image
from mimicbrush.io.outputs import write_or_keep
from mimicbrush.pipelines.editing.batch import (
    BatchCounts,
    EditGroups,
    check_new,
    check_sheet_apart,
    convert_memory_errors,
    prepare_outputs,
)
from mimicbrush.pipelines.editing.inputs import EditInputs, read_inputs
from mimicbrush.pipelines.editing.requests import (
    TEXTURE_FOLDER,
    Edit,
    check_box,
    collect_edits,
    number_outputs,
)
from mimicbrush.pipelines.folder import resolve_pipeline_folder
from mimicbrush.pipelines.small_model import SHIPPED_NAME, is_shipped, shipped_size_px
from mimicbrush.ranges import BATCH_RANGE, GUIDANCE_RANGE, SEED_RANGE, STEPS_RANGE, NumberRange, one_of

if TYPE_CHECKING:
    from mimicbrush.ops.crops import Box
    from mimicbrush.pipelines import MimicBrushPipeline, MimicBrushPipelineOutput
    from mimicbrush.pipelines.editing.reference_part import ReferencePart
    from mimicbrush.pipelines.klein.pipeline import KleinPipeline

MODELS = """no model was named, and none comes with this version. --model takes:
  DIR       a pipeline folder: `mimicbrush train +experiment=smoke data.root=MINED` leaves one in
            runs/smoke/pipeline (a toy); a full training run leaves one in its run_dir
  released  the released weights: fetched from the Hugging Face hub and converted once"""
NO_MODEL = """note: no model was named, so the small one that comes with the project edits, at {size_px} px. It shows
how imitating works, not what a full model paints. --model takes:
  DIR       a pipeline folder, or the folder of a training run that left one
  released  the released weights: fetched from the Hugging Face hub and converted once"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; None takes that of the process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("reference", type=Path, nargs="?", metavar="REF", help="image to imitate")
    parser.add_argument("source", type=Path, nargs="?", metavar="SRC", help="image to edit")
    parser.add_argument("mask", type=Path, nargs="?", metavar="MASK", help="of the source's size; white = repaint")
    parser.add_argument(
        "--model",
        default=None,
        metavar="DIR|released|small",
        help="pipeline or run folder, the released weights, or the small model that comes with the project (default)",
    )
    parser.add_argument("-o", "--output", type=Path, help="default: SRC_edited.png in this folder")
    add = parser.add_argument_group("how to edit").add_argument
    add("--steps", type=STEPS_RANGE.read, help="of the scheduler (default: the pipeline's)")
    add("--guidance", type=GUIDANCE_RANGE.read, help="classifier-free guidance (default: the pipeline's)")
    add("--seed", type=SEED_RANGE.read, default=1, help="of the noise (default: 1)")
    add(
        "--num-images",
        type=NumberRange(at_least=1, at_most=1000, whole=True).read,
        default=1,
        metavar="N",
        help="results, of seeds SEED, SEED + 1, ... (default: 1)",
    )
    add(
        "--keep-shape",
        action=argparse.BooleanOptionalAction,
        help=f"texture transfer: keep the source's shape (default: only in a batch, under {TEXTURE_FOLDER}/)",
    )
    add(
        "--crop",
        **one_of("full", "auto"),
        default="full",
        help="auto: edit a square around the mask, at full resolution",
    )
    add("--reference-crop", type=_box, metavar="X0,Y0,X1,Y1", help="imitate only this part of the reference (pixels)")
    add(
        "--auto-zoom",
        action="store_true",
        help="edit twice, the second time with the part of the reference that the first looked at",
    )
    add("--paste-back", action=argparse.BooleanOptionalAction, default=True, help="no: the model's whole square canvas")
    add("--device", **one_of("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--dtype", **one_of("auto", "float32", "float16", "bfloat16"), default="auto", help="default: auto")
    add(
        "--cuda-graphs",
        action="store_true",
        help="on a GPU: record a step once and replay it; meant for many edits, or for many steps",
    )
    add = parser.add_argument_group("masks that do not fit").add_argument
    add(
        "--resize-mask",
        action="store_true",
        help="resize the mask to the source's size; both must have the same aspect ratio",
    )
    add("--allow-full-mask", action="store_true", help="repaint everything, if the mask says so")
    add = parser.add_argument_group("what to write").add_argument
    add(
        "--save-correspondence",
        type=Path,
        metavar="MAP.png",
        help="which place of the reference filled which (and .npz)",
    )
    add("--contact-sheet", type=Path, metavar="SHEET.png", help="source, mask, reference and results side by side")
    add("--force", action="store_true", help="overwrite outputs; in a batch, edit again what is finished")
    add = parser.add_argument_group("many edits").add_argument
    add("--batch", type=Path, metavar="FOLDER|LIST.jsonl", help="benchmark layout, or one JSON object a line")
    add("--output-dir", type=Path, metavar="OUT", help="where a batch goes; finished outputs are skipped")
    add(
        "--batch-size",
        type=BATCH_RANGE.read,
        default=1,
        metavar="N",
        help="number of edits of a batch that the model makes in one call (default: 1)",
    )
    arguments = parser.parse_args(argv)
    _check_usage(parser, arguments)
    return arguments


def _check_usage(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    images = [arguments.reference, arguments.source, arguments.mask]
    if fault := SEED_RANGE.find_fault(arguments.seed + arguments.num_images - 1):
        parser.error(f"--seed {arguments.seed} --num-images {arguments.num_images}: the last seed {fault}")
    if arguments.batch is None:
        if None in images:
            parser.error("three images are needed: REF SRC MASK (or --batch)")
        if arguments.output_dir is not None:
            parser.error("--output-dir is for --batch; a single edit takes -o")
        if arguments.batch_size > 1:
            parser.error("--batch-size is for --batch; a single edit takes --num-images")
        return
    if any(image is not None for image in images):
        parser.error("either REF SRC MASK or --batch, not both")
    if arguments.output_dir is None:
        parser.error("--batch needs --output-dir")
    if arguments.batch_size > 1 and arguments.auto_zoom:
        parser.error("--batch-size is not for --auto-zoom, which makes one edit after the other")
    for option in ("output", "save_correspondence", "reference_crop"):
        if getattr(arguments, option) is not None:
            parser.error(f"--{option.replace('_', '-')} is for a single edit, not for --batch")


def _box(text: str) -> Box:
    try:
        return check_box([int(side) for side in text.split(",")])
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be four whole numbers X0,Y0,X1,Y1 (pixels), got {text!r}") from None


class LoadedEditor:
    """The model, loaded when the first edit needs it, and how it is to edit.

    Attributes:
        parts: with --auto-zoom, of the last edit: for each result the part of the reference that it imitates.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.parts: Sequence[ReferencePart | None] = ()
        if arguments.model is None and not is_shipped():
            raise InputError(MODELS)
        self._is_unnamed = arguments.model is None
        arguments.model = arguments.model or SHIPPED_NAME
        resolve_pipeline_folder(arguments.model)  # an error comes before the images are read

    def read(self, edit: Edit) -> EditInputs:
        """Read and check the images of an edit; this needs no model."""
        return read_inputs(edit, resize_mask=self.arguments.resize_mask, allow_full_mask=self.arguments.allow_full_mask)

    @property
    def pastes_back(self) -> bool:
        """Whether a result has the size of its source, and not that of the canvas."""
        return bool(self.arguments.paste_back)

    @cached_property
    def pipeline(self) -> MimicBrushPipeline | KleinPipeline:
        """The pipeline on its device."""
        if self._is_unnamed:  # said only once it edits, and not before every error of the images
            print(NO_MODEL.format(size_px=shipped_size_px()), file=sys.stderr)
        from mimicbrush.pipelines.open_pipeline import open_any_pipeline

        pipeline = open_any_pipeline(self.arguments.model, self.arguments.device, self.arguments.dtype)
        if self.arguments.auto_zoom:
            from mimicbrush.pipelines.editing.auto_zoom import check_can_zoom

            check_can_zoom(pipeline.can_record_attention)
        scheduler = pipeline.scheduler.config
        limit = scheduler.get("original_inference_steps")  # of a distilled model
        why = f"was distilled to {limit} or fewer steps"
        if limit is None:
            limit = scheduler.num_train_timesteps
            why = f"was trained with {limit} timesteps, no more"
        if (self.arguments.steps or 0) > limit:
            raise InputError(f"--steps {self.arguments.steps}: this model {why}")
        if self.arguments.cuda_graphs:
            pipeline.enable_cuda_graphs()
        pipeline.set_progress_bar_config(disable=None if self.arguments.batch is None else True)
        return pipeline

    def load(self) -> MimicBrushPipeline | KleinPipeline:
        """Load the pipeline, the first time."""
        return self.pipeline

    def edit(self, edit: Edit, inputs: EditInputs, seeds: Sequence[int]) -> Sequence[Image.Image]:
        """Edit once per seed; say which part auto-zoom chose."""
        images = cast("list[Image.Image]", self.run(edit, inputs, seeds).images)  # as the output type "pil" has it
        from tqdm import tqdm

        for seed, part in zip(seeds, self.parts, strict=False):
            tqdm.write(f"{edit.output}, seed {seed}: {_told(part)}")
        return images

    def edit_together(
        self, edits: Sequence[Edit], inputs: Sequence[EditInputs], seeds: Sequence[Sequence[int]]
    ) -> Sequence[Sequence[Image.Image]]:
        """Make several edits in one call of the pipeline; all or none keep the shape, and all have as many seeds."""
        from mimicbrush.pipelines.open_pipeline import seeded_generator

        count = len(seeds[0])
        output: Any = self.pipeline(
            [each.source for each in inputs],
            [each.mask for each in inputs],
            [each.reference for each in inputs],
            reference_crop=[
                edit.reference_crop or (0, 0, *each.reference.size) for edit, each in zip(edits, inputs, strict=True)
            ],
            num_images_per_prompt=count,
            generator=[seeded_generator(seed) for of_one in seeds for seed in of_one],
            **self._options(edits[0].keep_shape),
        )
        images = cast("list[Image.Image]", output.images)  # as the output type "pil" has it
        return [images[first : first + count] for first in range(0, len(images), count)]

    def run(self, edit: Edit, inputs: EditInputs, seeds: Sequence[int]) -> MimicBrushPipelineOutput:
        """Edit once per seed, with the correspondences if they are asked for."""
        options = {**self._options(edit.keep_shape), "reference_crop": edit.reference_crop}
        images = inputs.source, inputs.mask, inputs.reference
        if self.arguments.auto_zoom:
            from mimicbrush.pipelines.editing.auto_zoom import edit_zoomed

            result, self.parts = edit_zoomed(self.pipeline, *images, seeds, **options)
            return result
        from mimicbrush.pipelines.open_pipeline import seeded_generator

        generators = [seeded_generator(seed) for seed in seeds]  # one each: every image can be repeated alone
        output = self.pipeline(*images, num_images_per_prompt=len(seeds), generator=generators, **options)
        return cast("MimicBrushPipelineOutput", output)

    def _options(self, keep_shape: bool) -> dict[str, Any]:
        return {
            "num_inference_steps": self.arguments.steps,
            "guidance_scale": self.arguments.guidance,
            "keep_shape": keep_shape,
            "crop": self.arguments.crop,
            "paste_back": self.arguments.paste_back,
            "return_correspondence": self.arguments.save_correspondence is not None,
        }


class _Once(logging.Filter):
    """Filter that lets a message through once: a contact sheet reads the images again."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the message is new."""
        message = record.getMessage()
        is_new = message not in self.seen
        self.seen.add(message)
        return is_new


def main(argv: Sequence[str] | None = None) -> None:
    """Edit one image, or a batch of them."""
    with speak_as("command"):
        run(parse_arguments(argv))


def run(arguments: argparse.Namespace) -> None:
    """Edit what the command line asks for."""
    notes = logging.StreamHandler()
    notes.addFilter(_Once())
    logging.basicConfig(format="note: %(message)s", handlers=[notes])
    editor = LoadedEditor(arguments)
    if arguments.batch is not None:
        edit_all(arguments, editor)
        return
    try:
        with convert_memory_errors():
            edit_one(arguments, editor)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def edit_one(arguments: argparse.Namespace, editor: LoadedEditor) -> None:
    """Edit one image, and write the results, maps and contact sheet."""
    edit = Edit(
        source=arguments.source,
        mask=arguments.mask,
        reference=arguments.reference,
        output=arguments.output or Path(f"{arguments.source.stem}_edited.png"),
        seed=arguments.seed,
        keep_shape=bool(arguments.keep_shape),
        reference_crop=arguments.reference_crop,
    )
    # 1. All that can go wrong before the model is loaded.
    outputs = number_outputs(edit.output, arguments.num_images)
    maps = number_outputs(arguments.save_correspondence, len(outputs)) if arguments.save_correspondence else []
    sheets = [arguments.contact_sheet] if arguments.contact_sheet else []
    check_new([*outputs, *maps, *(path.with_suffix(".npz") for path in maps), *sheets], arguments.force)
    inputs = editor.read(edit)
    for path in outputs:
        check_writable(path, inputs.source.size if editor.pastes_back else None, is_tried=False)

    # 2. Edit.
    seeds = range(edit.seed, edit.seed + len(outputs))
    result = editor.run(edit, inputs, seeds)

    # 3. Write. What cannot be written where it is wanted is kept elsewhere, and the rest goes on.
    lost = []
    for image, path, seed in zip(result.images, outputs, seeds, strict=True):
        kept = write_or_keep(path, partial(write_image, image, like=inputs.encoding), f"{path.stem}.png")
        lost += [path] if kept != path else []
        if kept:
            print(f"{kept}: {image.width} x {image.height} px, repainted at {editor.pipeline.size_px} px, seed {seed}")
    for path, part in zip(outputs, editor.parts, strict=False):
        print(f"{path}: {_told(part)}")
    if maps:
        from mimicbrush.ops.correspondence import plot_correspondence

        for found, path in zip(result.correspondences or [], maps, strict=True):
            plot = plot_correspondence(inputs.source, inputs.mask, inputs.reference, found)
            numbers = write_or_keep(path.with_suffix(".npz"), found.save)
            kept = write_or_keep(path, partial(write_image, plot), f"{path.stem}.png")
            lost += [each for each in (path.with_suffix(".npz"), path) if each not in (numbers, kept)]
            if kept and numbers:
                print(f"{kept} and {numbers.name}: which place of the reference filled which of the hole")
    for path in sheets:
        write_sheet(path, [edit], editor)
    if lost:
        raise OutputError(f"{', '.join(map(str, lost))} could not be written, see above")


def _told(part: ReferencePart | None) -> str:
    if part is None:
        return "auto-zoom found no part of the reference that is worth a closer look, so this is the first edit"
    box = ",".join(str(side) for side in part.box)
    of = "one place" if part.places == 1 else f"the strongest of {part.places} places"
    return f"auto-zoom: only {box} of the reference, {of}, at which {part.share:.0%} of the attention peaked"


def edit_all(arguments: argparse.Namespace, editor: LoadedEditor) -> None:
    """Edit all images of a folder or list; what is finished is skipped."""
    # 1. What is asked for, and where it goes.
    edits = collect_edits(
        arguments.batch, arguments.output_dir, arguments.seed, arguments.keep_shape, arguments.num_images
    )
    prepare_outputs(edits)
    sheets = [arguments.contact_sheet] if arguments.contact_sheet else []
    for path in sheets:
        check_sheet_apart(path, edits, arguments.num_images)
    check_new(sheets, force=True)  # an older sheet may go: the new one shows the same results
    kept = sum(edit.keep_shape for edit in edits)
    if arguments.keep_shape is None and arguments.batch.is_dir() and kept:
        print(f"{kept} of {len(edits)} edits are texture tracks ({TEXTURE_FOLDER}/): --keep-shape is on for them")

    # 2. One after the other, or group by group; each result is written as soon as it is there.
    from tqdm import tqdm

    tally = BatchCounts()
    try:
        groups = EditGroups(editor, tally, arguments.num_images, arguments.force, arguments.batch_size)
        for edit in tqdm(edits, unit="edit", disable=None):
            groups.add(edit)
        groups.finish()
        for path in sheets:
            write_sheet(path, edits, editor)
    except KeyboardInterrupt:
        again = "the same command without --force" if arguments.force else "the same command"
        print(f"interrupted; {again} goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    finally:  # however it ends
        report(tally, len(edits))
    if tally.failures:
        raise SystemExit(1)


def report(tally: BatchCounts, wanted: int) -> None:
    """Print how many edits of a batch were made, and why others failed."""
    if tally.total == wanted:
        print(tally)
    else:
        print(f"ended early, of {wanted} edits so far: {tally}", file=sys.stderr)
    for edit, reason in tally.failures:
        print(f"failed: {edit.source}: {reason}", file=sys.stderr)


def write_sheet(path: Path, edits: Sequence[Edit], editor: LoadedEditor) -> None:
    """Write a contact sheet of finished edits."""
    from mimicbrush.pipelines.editing.contact_sheet import edit_sheet

    write_image(Image.fromarray(edit_sheet(edits, editor.read, editor.arguments.num_images)), path)
    print(f"{path}: contact sheet")
