"""Verify or export a folder of mined pairs, or write its report again.

mimicbrush pairs verify DIR
    read all files again; the exit status is 1 if something is wrong
mimicbrush pairs export DIR -o FILE.jsonl
    write all rows of the manifest as JSON lines
mimicbrush pairs export DIR --format diffusers -o OUT
    write a dataset for another trainer (docs/other_trainers.md)
mimicbrush pairs report DIR
    write DIR/report.html again

verify also reads datasets written by export --format.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimicbrush.errors import InputError
from mimicbrush.io.outputs import check_output_file, check_output_folder
from mimicbrush.mining.exports.formats.registry import FORMATS
from mimicbrush.mining.exports.options import DATA_OPTIONS, DEFAULT_CAPTIONS, ExportOptions
from mimicbrush.ranges import WORKERS_RANGE, CommandParser, NumberRange, one_of, range_of

if TYPE_CHECKING:
    from mimicbrush.data.options import DataOptions

_GIB = 2**30
#: The options of `ExportOptions` that are numbers, and their help.
_NUMBERS = {
    "views": "samples per pair, each with another augmentation and mask",
    "size_px": "side of the square images, in pixels",
    "seed": "seed of augmentations, masks and order; with 0, the samples are those of data.fixed_views",
}
_JPEG_RANGE = NumberRange(at_least=1, at_most=100, whole=True)
_GIB_RANGE = NumberRange(above=0, at_most=10**9)
#: Options that only an export with --format reads.
_OF_FORMATS = (
    *("views", "size_px", "seed", "augmentation", "mask_strategy", "set", "jpeg_quality", "side_by_side", "caption"),
    *("captions", "caption_column", "max_gib", "workers", "input_root"),
)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(description=__doc__)
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    verifying, exporting, reporting = (
        commands.add_parser(name, help=meaning, description=f"{meaning[0].upper()}{meaning[1:]}.")
        for name, meaning in (
            ("verify", "read all files again, and list what is wrong"),
            ("export", "write all rows as JSON lines, or a dataset for another trainer"),
            ("report", "write report.html again"),
        )
    )
    for command in (verifying, exporting, reporting):
        command.add_argument("folder", type=Path, metavar="DIR", help="folder of mined pairs")
    for command in (verifying, reporting, exporting):
        command.add_argument(
            "--input-root", type=Path, metavar="FOLDER", help="folder of the photographs, if they were moved"
        )
    for command in (verifying, exporting):
        command.add_argument(
            "--workers", type=WORKERS_RANGE.read, metavar="N", help="processes (default: one per core)"
        )
        command.add_argument("--no-progress", action="store_true", help="show no progress bar")
    exporting.add_argument(
        "-o", "--output", type=Path, metavar="PATH", help="file (default: standard output); with --format, a folder"
    )
    exporting.add_argument("--format", **one_of(*FORMATS), help="write a dataset for this trainer")
    add_format_arguments(exporting.add_argument_group("options for --format"))
    return parser.parse_args()


def add_format_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the options that only an export with --format reads."""
    for name, meaning in _NUMBERS.items():
        default = getattr(ExportOptions, name)
        option = "--" + name.removesuffix("_px")
        values = range_of(ExportOptions, name)
        group.add_argument(option, dest=name, type=values.read, metavar="N", help=f"{meaning} (default: {default})")
    strengths = one_of("strong", "mild", "weak", "views")
    group.add_argument(
        "--augmentation", **strengths, help="augmentation, as data/augmentation in training (default: strong)"
    )
    group.add_argument(
        "--mask-strategy", metavar="NAME", help="mask strategy, as data.mask.strategy in training (default: sift_grid)"
    )
    group.add_argument("--set", nargs="+", metavar="OPTION=VALUE", help="further training options, such as data.mask.*")
    group.add_argument(
        "--caption", metavar="TEXT", help=f'caption of all samples (default: "{DEFAULT_CAPTIONS[False]}")'
    )
    group.add_argument(
        "--captions",
        type=Path,
        metavar="LIST",
        help="CSV or Parquet list with captions, such as the list that was mined",
    )
    group.add_argument("--caption-column", metavar="NAME", help="column of LIST with the captions (default: caption)")
    group.add_argument(
        "--side-by-side",
        action="store_true",
        default=None,
        help="write the reference to the left of target, source and mask in one image",
    )
    group.add_argument(
        "--jpeg-quality", type=_JPEG_RANGE.read, metavar="Q", help="write JPEG images of this quality instead of PNG"
    )
    group.add_argument(
        "--max-gib", type=_GIB_RANGE.read, metavar="G", help="stop before the samples need more than G GiB"
    )


def main() -> None:
    """Verify, export or report a mined folder."""
    arguments = parse_arguments()
    if arguments.command == "verify":
        sys.exit(verify(arguments))
    if arguments.command == "report":
        report(arguments)
    elif arguments.format is None:
        given = [
            f"--{name.removesuffix('_px').replace('_', '-')}"
            for name in _OF_FORMATS
            if vars(arguments)[name] is not None
        ]
        if given:
            raise InputError(f"{', '.join(given)} can only be used with --format (one of {', '.join(FORMATS)})")
        export(arguments)
    else:
        export_for_trainer(arguments)


def verify(arguments: argparse.Namespace) -> int:
    """Check every file of a mined folder or of an export; the exit status is 1 if something is wrong."""
    from mimicbrush.mining.exports.parts import read_export_folder
    from mimicbrush.mining.verify.folder import verify_folder

    workers = arguments.workers or os.cpu_count() or 1
    if read_export_folder(arguments.folder) is not None:
        return verify_exported(arguments.folder, workers, not arguments.no_progress)
    found = verify_folder(
        arguments.folder,
        input_root=arguments.input_root,
        workers=workers,
        progress=not arguments.no_progress,
    )
    for fault in found.faults:
        print(fault)
    read = f"{found.shards} shards, {found.pairs} pairs, {found.images} images, {found.bytes_read / 1e6:.1f} MB read"
    if found.faults:
        print(f"{read}: {len(found.faults)} faults were found (see above)")
        return 1
    print(f"{read}: everything is as in the manifest")
    return 0


def verify_exported(folder: Path, workers: int, progress: bool) -> int:
    """Check every file of an export; the exit status is 1 if something is wrong."""
    from mimicbrush.mining.exports.verify import verify_export

    faults, summary = verify_export(folder, workers=workers, progress=progress)
    for fault in faults:
        print(fault)
    read = describe_export(summary)
    print(
        f"{read}: {len(faults)} faults were found (see above)" if faults else f"{read}: everything is as it was written"
    )
    return 1 if faults else 0


def export(arguments: argparse.Namespace) -> None:
    """Write all rows of the manifest as JSON lines."""
    from mimicbrush.io.atomic import write_aside
    from mimicbrush.mining.export import export_rows

    if arguments.output is None:
        try:
            if isinstance(sys.stdout, io.TextIOWrapper):  # JSON is UTF-8, whatever the terminal's encoding is
                sys.stdout.reconfigure(encoding="utf-8", errors="strict")
            export_rows(arguments.folder, sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has closed the pipe; Python would report it again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            print(f"{export_rows(arguments.folder, file)} rows in {arguments.output}")

    check_output_file(arguments.output, "-o")
    write_aside(arguments.output, write)


def export_for_trainer(arguments: argparse.Namespace) -> None:
    """Write pairs as a dataset for another trainer."""
    if arguments.output is None:
        raise InputError("--format needs -o OUT, the folder for the dataset")
    check_output_folder(arguments.output, "--output")
    options = read_export_options(arguments)
    from mimicbrush.mining.exports.lists import REFUSED_FILE
    from mimicbrush.mining.exports.run import export_pairs
    from mimicbrush.mining.exports.samples import UNREADABLE_PAIR

    summary = export_pairs(
        arguments.folder,
        arguments.output,
        options,
        max_bytes=round(arguments.max_gib * _GIB) if arguments.max_gib else None,
        workers=arguments.workers or os.cpu_count() or 1,
        progress=not arguments.no_progress,
    )
    print(f"{arguments.output}: {describe_export(summary)}")
    if summary["refused"]:
        again = (
            ". Run the same command again to retry the unreadable ones" if UNREADABLE_PAIR in summary["refused"] else ""
        )
        print(f"{arguments.output / REFUSED_FILE} says why pairs were refused{again}")
    if left := summary["not_written_yet"]:
        is_empty = not sum(summary["samples"].values())
        print(
            f"stopped: more samples would need more than --max-gib {arguments.max_gib:g}; {left} pairs are not "
            f"written. {'There are no samples yet' if is_empty else 'The dataset can already be used'}. To continue, "
            "run the same command with a larger --max-gib, or without it"
        )


def read_export_options(arguments: argparse.Namespace) -> ExportOptions:
    """Read the options that decide the content of an export.

    Raises:
        InputError: an option cannot be used.
    """
    from mimicbrush.mining.input_list import read_list_column

    given = {name: vars(arguments)[name] for name in (*_NUMBERS, "jpeg_quality", "side_by_side")}
    options = {name: value for name, value in given.items() if value is not None}
    captions = None
    if arguments.captions is None and arguments.caption_column is not None:
        raise InputError(f"--caption-column {arguments.caption_column}: give the list, too, with --captions LIST")
    if arguments.captions is not None:
        captions = read_list_column(arguments.captions, arguments.caption_column or "caption")
        # Then a file without a caption of its own has none, unless there is one for all.
        options["caption"] = ""
    if arguments.caption is not None:
        options["caption"] = arguments.caption
    return ExportOptions(format=arguments.format, data=read_data_options(arguments), captions=captions, **options)


def read_data_options(arguments: argparse.Namespace) -> DataOptions:
    """Read how pairs are drawn, with the options of training.

    Raises:
        InputError: an option cannot be used, or none of an export.
    """
    from mimicbrush.assembly.prerequisites import compose_data_options
    from mimicbrush.cli.project_files import CONFIGS

    overrides = [f"data.root={arguments.folder}"]
    if arguments.input_root is not None:
        overrides.append(f"data.input_root={arguments.input_root}")
    if arguments.augmentation is not None:
        overrides.append(f"data/augmentation={arguments.augmentation}")
    if arguments.mask_strategy is not None:
        overrides.append(f"data.mask.strategy={arguments.mask_strategy}")
    for override in arguments.set or ():
        if not any(override.startswith((f"data.{name}=", f"data.{name}.")) for name in DATA_OPTIONS):
            known = ", ".join(f"data.{name}" for name in DATA_OPTIONS)
            raise InputError(f"--set {override}: expected OPTION=VALUE with one of {known}")
        overrides.append(override)
    return compose_data_options(overrides, CONFIGS)


def describe_export(summary: dict[str, Any]) -> str:
    """Describe an export in one line."""
    written, samples = summary["written"], summary["samples"]
    parts = [f"{written[split]} pairs as {samples[split]} samples in {split}/" for split in written]
    parts += [f"{count} pairs refused ({reason})" for reason, count in summary["refused"].items()]
    if summary["not_written_yet"]:
        parts.append(f"{summary['not_written_yet']} not written yet")
    return f"of {summary['pairs']} pairs, {', '.join(parts)}; {summary['bytes'] / _GIB:.3g} GiB"


def report(arguments: argparse.Namespace) -> None:
    """Write the report of a mined folder again."""
    from mimicbrush.mining.report.page import write_mining_report

    if arguments.folder.is_dir():
        check_output_folder(arguments.folder)
    write_mining_report(arguments.folder, input_root=arguments.input_root)
    print(f"wrote {arguments.folder / 'report.html'}")
