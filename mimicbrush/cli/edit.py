"""Edit an image: repaint the masked part by imitating a reference image.

mimicbrush edit REF.jpg SRC.jpg MASK.png
mimicbrush edit --reference REF.jpg --source SRC.jpg --mask MASK.png
mimicbrush edit --batch LIST.jsonl --output-dir OUT

The result is SRC_edited.png in the current folder; -o FILE changes this. By
name, --reference takes up to 4 images of the same thing, which are imitated
together. --mask-box replaces a mask file. --batch makes many edits. See
docs/editing.md for more.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mimicbrush.errors import OutputError, speak_as
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
from mimicbrush.pipelines.editing.editor import EditSettings, LazyEditor, describe_part
from mimicbrush.pipelines.editing.requests import (
    TEXTURE_FOLDER,
    Edit,
    check_box,
    collect_edits,
    number_outputs,
)
from mimicbrush.ranges import (
    BATCH_RANGE,
    GUIDANCE_RANGE,
    MAX_REFERENCES,
    SEED_RANGE,
    STEPS_RANGE,
    CommandParser,
    NumberRange,
    one_of,
)

if TYPE_CHECKING:
    from mimicbrush.ops.crops import Box


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; None reads that of the process."""
    parser = CommandParser(description=__doc__, usage="%(prog)s [REF SRC MASK] [OPTION ...]")
    _add_images(parser)
    _add_outputs(parser)
    add = parser.add_argument_group("editing").add_argument
    add(
        "--model",
        metavar="DIR|released|small",
        help="folder of a pipeline or of a training run, or a LoRA file of FLUX.2 klein; released: the weights of the "
        "paper's authors; small (default): the small model that comes with the project",
    )
    add("--steps", type=STEPS_RANGE.read, help="number of denoising steps (default: as stored with the model)")
    add(
        "--guidance",
        type=GUIDANCE_RANGE.read,
        help="guidance scale: how strongly to follow the reference; 1 or less turns guidance off (default: as stored "
        "with the model)",
    )
    add(
        "--seed",
        type=SEED_RANGE.read,
        default=1,
        help="seed of the noise; another seed gives another result (default: 1)",
    )
    add(
        "--num-images",
        type=NumberRange(at_least=1, at_most=1000, whole=True).read,
        default=1,
        metavar="N",
        help="make N results, with the seeds SEED, SEED + 1, ... (default: 1)",
    )
    add(
        "--keep-shape",
        action=argparse.BooleanOptionalAction,
        help="texture transfer: keep the shape of the source, and take only the texture from the reference (default: "
        f"only for the edits of a batch in {TEXTURE_FOLDER}/)",
    )
    add(
        "--crop",
        **one_of("full", "auto"),
        default="full",
        help="full: edit the whole image (default); auto: edit a square around the mask, at a higher resolution",
    )
    add(
        "--reference-crop",
        type=_box,
        metavar="X0,Y0,X1,Y1",
        help="use only this box of the reference, in pixels",
    )
    add(
        "--auto-zoom",
        action="store_true",
        help="edit twice: the second edit uses only the part of the reference that the first one looked at",
    )
    add(
        "--paste-back",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="copy the repainted part into the source (default), or write the whole square that the model painted",
    )
    add("--device", **one_of("auto", "cpu", "cuda"), default="auto", help="device to run on (default: auto)")
    dtypes = one_of("auto", "float32", "float16", "bfloat16")
    add("--dtype", **dtypes, default="auto", help="data type of the weights (default: auto, which is float16 on a GPU)")
    add(
        "--cuda-graphs",
        action="store_true",
        help="on a GPU, use CUDA graphs: faster for many edits, or for many steps",
    )
    add = parser.add_argument_group("mask").add_argument
    add(
        "--resize-mask",
        action="store_true",
        help="resize the mask to the size of the source; both must have the same aspect ratio",
    )
    add("--allow-full-mask", action="store_true", help="allow a mask that covers the whole source")
    add = parser.add_argument_group("batches").add_argument
    add(
        "--batch",
        type=Path,
        metavar="FOLDER|LIST.jsonl",
        help="folder with the layout of the benchmark, or a list with one JSON object per line",
    )
    add("--output-dir", type=Path, metavar="OUT", help="folder for the results of --batch; finished edits are skipped")
    add(
        "--batch-size",
        type=BATCH_RANGE.read,
        default=1,
        metavar="N",
        help="number of edits per call of the model (default: 1)",
    )
    arguments = parser.parse_args(argv)
    _name_images(parser, arguments)
    _check_usage(parser, arguments)
    return arguments


def _add_images(parser: CommandParser) -> None:
    add = parser.add_argument
    add("first", type=Path, nargs="?", metavar="REF", help="image to imitate")
    add("second", type=Path, nargs="?", metavar="SRC", help="image to edit")
    add(
        "third", type=Path, nargs="?", metavar="MASK", help="image of the same size as SRC; white: repaint, black: keep"
    )
    add = parser.add_argument_group("images by name").add_argument
    add("--source", type=Path, metavar="SRC", help="image to edit")
    add("--mask", type=Path, metavar="MASK", help="image of the same size as SRC; white: repaint, black: keep")
    add(
        "--mask-box",
        type=_box,
        metavar="X0,Y0,X1,Y1",
        help="repaint this box of the source, in pixels, instead of using a mask; column X1 and row Y1 are outside",
    )
    add(
        "--reference",
        type=Path,
        nargs="+",
        action="extend",
        metavar="REF",
        help=f"image to imitate, or up to {MAX_REFERENCES} images of the same thing",
    )


def _add_outputs(parser: CommandParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", type=Path, help="file for the result (default: SRC_edited.png in the current folder)")
    add(
        "--save-correspondence",
        type=Path,
        metavar="MAP.png",
        help="also write an image that shows which part of the reference filled which part of the mask, and its "
        "numbers as MAP.npz",
    )
    add(
        "--contact-sheet",
        type=Path,
        metavar="SHEET.png",
        help="also write one image with source, mask, reference and results",
    )
    add("--force", action="store_true", help="overwrite existing files; in a batch, repeat finished edits")


def _name_images(parser: CommandParser, arguments: argparse.Namespace) -> None:
    """Name the images given in order, and refuse images that are missing or given twice."""
    ordered = [each for each in (arguments.first, arguments.second, arguments.third) if each is not None]
    named = {"--source": arguments.source, "--mask": arguments.mask, "--reference": arguments.reference}
    given = [name for name, value in named.items() if value is not None]
    if ordered and given:
        parser.error(f"{given[0]}: give the images either by name or in the order REF SRC MASK, not both")
    if arguments.batch is not None:
        if ordered or given or arguments.mask_box is not None:
            parser.error("give either images or --batch, not both")
        return
    if ordered:
        arguments.reference, arguments.source, arguments.mask = [arguments.first], arguments.second, arguments.third
    if arguments.mask is not None and arguments.mask_box is not None:
        parser.error("give either a mask or --mask-box, not both")
    named = {"--reference": arguments.reference, "--source": arguments.source}
    named["--mask (or --mask-box)"] = arguments.mask if arguments.mask_box is None else arguments.mask_box
    missing = [name for name, value in named.items() if value is None]
    if missing and not given:
        parser.error("expected three images: REF SRC MASK, or --reference, --source and --mask (or --batch)")
    if missing:
        parser.error(f"{' and '.join(missing)} must also be given")
    if len(arguments.reference) > MAX_REFERENCES:
        parser.error(f"--reference: expected 1 to {MAX_REFERENCES} images, got {len(arguments.reference)}")
    for option in ("reference_crop", "auto_zoom"):
        if len(arguments.reference) > 1 and getattr(arguments, option):
            parser.error(
                f"--{option.replace('_', '-')} works with one reference only; crop the reference files instead"
            )


def _check_usage(parser: CommandParser, arguments: argparse.Namespace) -> None:
    if fault := SEED_RANGE.find_fault(arguments.seed + arguments.num_images - 1):
        parser.error(
            f"--seed {arguments.seed} --num-images {arguments.num_images}: the last seed is too large: {fault}"
        )
    if arguments.batch is None:
        if arguments.output_dir is not None:
            parser.error("--output-dir needs --batch; for a single edit, use -o")
        if arguments.batch_size > 1:
            parser.error("--batch-size needs --batch; for a single edit, use --num-images")
        return
    if arguments.output_dir is None:
        parser.error("--batch needs --output-dir")
    if arguments.batch_size > 1 and arguments.auto_zoom:
        parser.error("--batch-size and --auto-zoom cannot be combined: --auto-zoom makes one edit at a time")
    for option in ("output", "save_correspondence", "reference_crop"):
        if getattr(arguments, option) is not None:
            parser.error(f"--{option.replace('_', '-')} is for a single edit and cannot be combined with --batch")


def _box(text: str) -> Box:
    try:
        return check_box([int(side) for side in text.split(",")])
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected four whole numbers X0,Y0,X1,Y1 (pixels), got {text!r}") from None


def prepare_editor(arguments: argparse.Namespace) -> LazyEditor:
    """Prepare the editor for the options of the command line; its model is loaded later.

    Raises:
        InputError: there is no such model.
    """
    named = {each.name for each in fields(EditSettings)} & vars(arguments).keys()
    settings = EditSettings(
        **{name: getattr(arguments, name) for name in named},
        return_correspondence=arguments.save_correspondence is not None,
        shows_steps=arguments.batch is None,
    )
    return LazyEditor(settings)


class _Once(logging.Filter):
    """Filter that lets a message through once: a contact sheet reads the images again."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the message is new."""
        message = record.getMessage()
        is_new = message not in self.seen
        self.seen.add(message)
        return is_new


def main(argv: Sequence[str] | None = None) -> None:
    """Edit one image, or a batch of them."""
    with speak_as("command"):
        run(parse_arguments(argv))


def run(arguments: argparse.Namespace) -> None:
    """Edit as the command line says."""
    notes = logging.StreamHandler()
    notes.addFilter(_Once())
    logging.basicConfig(format="note: %(message)s", handlers=[notes])
    editor = prepare_editor(arguments)
    if arguments.batch is not None:
        edit_all(arguments, editor)
        return
    try:
        with convert_memory_errors():
            edit_one(arguments, editor)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def edit_one(arguments: argparse.Namespace, editor: LazyEditor) -> None:
    """Edit one image, and write the results, maps and contact sheet."""
    edit = Edit(
        source=arguments.source,
        mask=arguments.mask,
        reference=arguments.reference[0],
        output=arguments.output or Path(f"{arguments.source.stem}_edited.png"),
        seed=arguments.seed,
        keep_shape=bool(arguments.keep_shape),
        reference_crop=arguments.reference_crop,
        mask_box=arguments.mask_box,
        other_references=tuple(arguments.reference[1:]),
    )
    # 1. Find errors before the model is loaded.
    outputs = number_outputs(edit.output, arguments.num_images)
    maps = number_outputs(arguments.save_correspondence, len(outputs)) if arguments.save_correspondence else []
    sheets = [arguments.contact_sheet] if arguments.contact_sheet else []
    check_new([*outputs, *maps, *(path.with_suffix(".npz") for path in maps), *sheets], arguments.force)
    inputs = editor.read(edit)
    for path in outputs:
        check_writable(path, inputs.source.size if editor.pastes_back else None, is_tried=False)

    # 2. Edit.
    seeds = range(edit.seed, edit.seed + len(outputs))
    result = editor.call_pipeline(edit, inputs, seeds)

    # 3. Write. A result that cannot be written to its path is saved elsewhere, and the others are still written.
    lost = []
    for image, path, seed in zip(result.images, outputs, seeds, strict=True):
        kept = write_or_keep(path, partial(write_image, image, like=inputs.encoding), f"{path.stem}.png")
        lost += [path] if kept != path else []
        if kept:
            print(f"{kept}: {image.width} x {image.height} px, repainted at {editor.pipeline.size_px} px, seed {seed}")
    for path, part in zip(outputs, editor.parts, strict=False):
        print(f"{path}: {describe_part(part)}")
    if maps:
        from mimicbrush.ops.correspondence import plot_correspondence

        reference: Any = inputs.reference_argument()
        for found, path in zip(result.correspondences or [], maps, strict=True):
            plot = plot_correspondence(inputs.source, inputs.mask, reference, found)
            numbers = write_or_keep(path.with_suffix(".npz"), found.save)
            kept = write_or_keep(path, partial(write_image, plot), f"{path.stem}.png")
            lost += [each for each in (path.with_suffix(".npz"), path) if each not in (numbers, kept)]
            if kept and numbers:
                print(f"{kept} and {numbers.name}: which part of the reference filled which part of the mask")
    for path in sheets:
        write_sheet(path, [edit], editor, len(outputs))
    if lost:
        raise OutputError(f"{', '.join(map(str, lost))} could not be written (see above)")


def edit_all(arguments: argparse.Namespace, editor: LazyEditor) -> None:
    """Edit all images of a folder or list; finished edits are skipped."""
    # 1. List the edits and their outputs.
    edits = collect_edits(
        arguments.batch, arguments.output_dir, arguments.seed, arguments.keep_shape, arguments.num_images
    )
    prepare_outputs(edits)
    sheets = [arguments.contact_sheet] if arguments.contact_sheet else []
    for path in sheets:
        check_sheet_apart(path, edits, arguments.num_images)
    check_new(sheets, force=True)  # an older sheet may be replaced: the new one shows the same results
    kept = sum(edit.keep_shape for edit in edits)
    if arguments.keep_shape is None and arguments.batch.is_dir() and kept:
        print(f"{kept} of {len(edits)} edits are texture transfers ({TEXTURE_FOLDER}/): they use --keep-shape")

    # 2. Edit one by one or in groups; each result is written at once.
    from tqdm import tqdm

    tally = BatchCounts()
    try:
        groups = EditGroups(editor, tally, arguments.num_images, arguments.force, arguments.batch_size)
        for edit in tqdm(edits, unit="edit", disable=None):
            groups.add(edit)
        groups.finish()
        for path in sheets:
            write_sheet(path, edits, editor, arguments.num_images)
    except KeyboardInterrupt:
        again = "the same command again, without --force," if arguments.force else "the same command again"
        print(f"interrupted. Run {again} to continue", file=sys.stderr)
        raise SystemExit(130) from None
    finally:  # also after an error
        report(tally, len(edits))
    if tally.failures:
        raise SystemExit(1)


def report(tally: BatchCounts, wanted: int) -> None:
    """Print how many edits of a batch were made, and why others failed."""
    if tally.total == wanted:
        print(tally)
    else:
        print(f"ended early; of {wanted} edits so far: {tally}", file=sys.stderr)
    for edit, reason in tally.failures:
        print(f"failed: {edit.source}: {reason}", file=sys.stderr)


def write_sheet(path: Path, edits: Sequence[Edit], editor: LazyEditor, num_images: int) -> None:
    """Write a contact sheet of finished edits."""
    from mimicbrush.pipelines.editing.contact_sheet import edit_sheet

    write_image(Image.fromarray(edit_sheet(edits, editor.read, num_images)), path)
    print(f"{path}: contact sheet")
