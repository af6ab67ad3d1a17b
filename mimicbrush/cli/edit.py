"""Edit an image by imitating another: mimicbrush edit REF.jpg SRC.jpg MASK.png --model DIR.

The images can be named, too: mimicbrush edit --source SRC.jpg --mask MASK.png --reference REF.jpg. Then 2 to 4
references are imitated together (--reference A.jpg B.jpg). --mask-box repaints a box, without a mask file.
Many edits: mimicbrush edit --batch FOLDER_OR_LIST.jsonl --output-dir OUT --model DIR (docs/editing.md).
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
from mimicbrush.pipelines.editing.editor import EditSettings, LoadedEditor, describe_part
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
    """Read the command line; None takes that of the process."""
    parser = CommandParser(description=__doc__, usage="%(prog)s [REF SRC MASK] [OPTION ...]")
    _add_images(parser)
    add = parser.add_argument_group("how to edit").add_argument
    add(
        "--model",
        metavar="DIR|released|small",
        help="folder of a pipeline or of a training run, or a LoRA file of FLUX.2 klein; released: the authors' "
        "weights; small: the small model that comes with the project (default)",
    )
    add("--steps", type=STEPS_RANGE.read, help="denoising steps; more take longer (default: those of the model)")
    add(
        "--guidance",
        type=GUIDANCE_RANGE.read,
        help="how strongly to follow the reference; 1 or less turns this off (default: that of the model)",
    )
    add("--seed", type=SEED_RANGE.read, default=1, help="number that chooses the noise: another result (default: 1)")
    add(
        "--num-images",
        type=NumberRange(at_least=1, at_most=1000, whole=True).read,
        default=1,
        metavar="N",
        help="make N results, of the seeds SEED, SEED + 1, ... (default: 1)",
    )
    add(
        "--keep-shape",
        action=argparse.BooleanOptionalAction,
        help="take only the texture from the reference, and keep the shape of the source (default: only in a batch, "
        f"under {TEXTURE_FOLDER}/)",
    )
    add(
        "--crop",
        **one_of("full", "auto"),
        default="full",
        help="auto: edit a square around the mask at full resolution; full: the whole image (default)",
    )
    add(
        "--reference-crop",
        type=_box,
        metavar="X0,Y0,X1,Y1",
        help="imitate only this box of the reference, in its pixels",
    )
    add(
        "--auto-zoom",
        action="store_true",
        help="edit twice, the second time with the part of the reference that the first looked at",
    )
    add(
        "--paste-back",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put the result into the source (default); no: write the square that the model painted",
    )
    add("--device", **one_of("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)")
    dtypes = one_of("auto", "float32", "float16", "bfloat16")
    add("--dtype", **dtypes, default="auto", help="type of the numbers (default: auto, on a GPU float16)")
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
    add("--allow-full-mask", action="store_true", help="accept a mask that covers the whole source")
    add = parser.add_argument_group("what to write").add_argument
    add("-o", "--output", type=Path, help="file for the result (default: SRC_edited.png in this folder)")
    add(
        "--save-correspondence",
        type=Path,
        metavar="MAP.png",
        help="also show which place of the reference filled which place of the hole (as numbers: MAP.npz)",
    )
    add("--contact-sheet", type=Path, metavar="SHEET.png", help="also write source, mask, reference, results in a row")
    add("--force", action="store_true", help="overwrite outputs; in a batch, edit again what is finished")
    add = parser.add_argument_group("many edits").add_argument
    add(
        "--batch",
        type=Path,
        metavar="FOLDER|LIST.jsonl",
        help="a folder in the layout of the benchmark, or a list with one JSON object a line",
    )
    add("--output-dir", type=Path, metavar="OUT", help="folder for the results of a batch; finished ones are skipped")
    add(
        "--batch-size",
        type=BATCH_RANGE.read,
        default=1,
        metavar="N",
        help="make N edits of a batch in one call of the model (default: 1)",
    )
    arguments = parser.parse_args(argv)
    _name_images(parser, arguments)
    _check_usage(parser, arguments)
    return arguments


def _add_images(parser: CommandParser) -> None:
    add = parser.add_argument
    add("first", type=Path, nargs="?", metavar="REF", help="image to imitate")
    add("second", type=Path, nargs="?", metavar="SRC", help="image to edit")
    add("third", type=Path, nargs="?", metavar="MASK", help="image of the source's size; white = repaint")
    add = parser.add_argument_group("the same images by name").add_argument
    add("--source", type=Path, metavar="SRC", help="image to edit")
    add("--mask", type=Path, metavar="MASK", help="image of the source's size; white = repaint")
    add(
        "--mask-box",
        type=_box,
        metavar="X0,Y0,X1,Y1",
        help="repaint this box of the source, in its pixels, instead of a mask; column X1 and row Y1 are outside",
    )
    add(
        "--reference",
        type=Path,
        nargs="+",
        action="extend",
        metavar="REF",
        help=f"image to imitate, or up to {MAX_REFERENCES} images of the same thing",
    )


def _name_images(parser: CommandParser, arguments: argparse.Namespace) -> None:
    """Give the images of the fixed order their names, and refuse what is there twice or missing."""
    ordered = [each for each in (arguments.first, arguments.second, arguments.third) if each is not None]
    named = {"--source": arguments.source, "--mask": arguments.mask, "--reference": arguments.reference}
    given = [name for name, value in named.items() if value is not None]
    if ordered and given:
        parser.error(f"{given[0]}: give the images by name, or in the order REF SRC MASK, and not both")
    if arguments.batch is not None:
        if ordered or given or arguments.mask_box is not None:
            parser.error("either REF SRC MASK or --batch, not both")
        return
    if ordered:
        arguments.reference, arguments.source, arguments.mask = [arguments.first], arguments.second, arguments.third
    if arguments.mask is not None and arguments.mask_box is not None:
        parser.error("either a mask or --mask-box, not both")
    named = {"--reference": arguments.reference, "--source": arguments.source}
    named["--mask (or --mask-box)"] = arguments.mask if arguments.mask_box is None else arguments.mask_box
    missing = [name for name, value in named.items() if value is None]
    if missing and not given:
        parser.error("three images are needed: REF SRC MASK, or by name --reference, --source, --mask (or --batch)")
    if missing:
        parser.error(f"{' and '.join(missing)}: must be given, too")
    if len(arguments.reference) > MAX_REFERENCES:
        parser.error(f"--reference: takes 1 to {MAX_REFERENCES} images, got {len(arguments.reference)}")
    for option in ("reference_crop", "auto_zoom"):
        if len(arguments.reference) > 1 and getattr(arguments, option):
            parser.error(f"--{option.replace('_', '-')} is for one reference; crop the files of several")


def _check_usage(parser: CommandParser, arguments: argparse.Namespace) -> None:
    if fault := SEED_RANGE.find_fault(arguments.seed + arguments.num_images - 1):
        parser.error(f"--seed {arguments.seed} --num-images {arguments.num_images}: the last seed {fault}")
    if arguments.batch is None:
        if arguments.output_dir is not None:
            parser.error("--output-dir is for --batch; a single edit takes -o")
        if arguments.batch_size > 1:
            parser.error("--batch-size is for --batch; a single edit takes --num-images")
        return
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


def prepare_editor(arguments: argparse.Namespace) -> LoadedEditor:
    """Prepare the editor that the command line asks for; its model is loaded later.

    Raises:
        InputError: there is no such model.
    """
    named = {each.name for each in fields(EditSettings)} & vars(arguments).keys()
    settings = EditSettings(
        **{name: getattr(arguments, name) for name in named},
        tells_places=arguments.save_correspondence is not None,
        shows_steps=arguments.batch is None,
    )
    return LoadedEditor(settings)


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


def edit_one(arguments: argparse.Namespace, editor: LoadedEditor) -> None:
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
                print(f"{kept} and {numbers.name}: which place of the reference filled which place of the hole")
    for path in sheets:
        write_sheet(path, [edit], editor, len(outputs))
    if lost:
        raise OutputError(f"{', '.join(map(str, lost))} could not be written, see above")


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
            write_sheet(path, edits, editor, arguments.num_images)
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


def write_sheet(path: Path, edits: Sequence[Edit], editor: LoadedEditor, num_images: int) -> None:
    """Write a contact sheet of finished edits."""
    from mimicbrush.pipelines.editing.contact_sheet import edit_sheet

    write_image(Image.fromarray(edit_sheet(edits, editor.read, num_images)), path)
    print(f"{path}: contact sheet")
