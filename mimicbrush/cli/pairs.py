"""Look after a mined folder: check it, export it, write its report.

mimicbrush pairs verify DIR                  read everything again; exit status 1 if anything is wrong
mimicbrush pairs export DIR [-o FILE.jsonl]  all rows of the manifest as JSON lines
mimicbrush pairs export DIR --format diffusers -o OUT
                                             pairs as a data set of another trainer (docs/other_trainers.md)
mimicbrush pairs report DIR                  write DIR/report.html again

verify also reads what export has written with --format.
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
#: The options of `ExportOptions` that are numbers, and what they mean.
_NUMBERS = {
    "views": "how often each pair is drawn, each time with another augmentation and mask",
    "size_px": "side of the square images",
    "seed": "chooses augmentations, masks and order; 0: the views of data.fixed_views",
}
_JPEG_RANGE = NumberRange(at_least=1, at_most=100, whole=True)
_GIB_RANGE = NumberRange(above=0, at_most=10**9)
#: What only an export with --format reads; as the command line has them.
_OF_FORMATS = (
    *("views", "size_px", "seed", "augmentation", "mask_strategy", "set", "jpeg_quality", "side_by_side", "caption"),
    *("captions", "caption_column", "max_gib", "workers", "input_root"),
)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    verifying = commands.add_parser("verify", help="read everything again and name what is wrong (exit status 1)")
    exporting = commands.add_parser("export", help="write all rows as JSON lines, or a data set of another trainer")
    reporting = commands.add_parser("report", help="write report.html again")
    for command in (verifying, exporting, reporting):
        command.add_argument("folder", type=Path, metavar="DIR", help="a mined folder")
    for command in (verifying, reporting, exporting):
        command.add_argument(
            "--input-root", type=Path, metavar="FOLDER", help="where the photographs lie, if they have moved"
        )
    for command in (verifying, exporting):
        command.add_argument("--workers", type=WORKERS_RANGE.read, help="processes (default: all cores)")
        command.add_argument("--no-progress", action="store_true", help="no progress bar")
    exporting.add_argument(
        "-o", "--output", type=Path, metavar="PATH", help="file (default: standard output); with --format, a folder"
    )
    exporting.add_argument("--format", **one_of(*FORMATS), help="write a data set of this trainer")
    add_format_arguments(exporting.add_argument_group("with --format"))
    return parser.parse_args()


def add_format_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the options that only an export with --format reads."""
    for name, meaning in _NUMBERS.items():
        default = getattr(ExportOptions, name)
        option = "--" + name.removesuffix("_px")
        values = range_of(ExportOptions, name)
        group.add_argument(option, dest=name, type=values.read, metavar="N", help=f"{meaning} (default: {default})")
    strengths = one_of("strong", "mild", "weak", "views")
    group.add_argument("--augmentation", **strengths, help="as data/augmentation of training (default: strong)")
    group.add_argument("--mask-strategy", metavar="NAME", help="as data.mask.strategy of training (default: sift_grid)")
    group.add_argument("--set", nargs="+", metavar="OPTION=VALUE", help="more options of training, such as data.mask.*")
    group.add_argument(
        "--caption", metavar="TEXT", help=f'caption of all samples (default: "{DEFAULT_CAPTIONS[False]}")'
    )
    group.add_argument(
        "--captions", type=Path, metavar="LIST", help="CSV or Parquet list with captions, such as the mined one"
    )
    group.add_argument("--caption-column", metavar="NAME", help="column of the captions (default: caption)")
    group.add_argument(
        "--side-by-side",
        action="store_true",
        default=None,
        help="put the reference to the left of target, source and mask",
    )
    group.add_argument(
        "--jpeg-quality", type=_JPEG_RANGE.read, metavar="Q", help="write JPEG images of this quality (default: PNG)"
    )
    group.add_argument(
        "--max-gib", type=_GIB_RANGE.read, metavar="G", help="stop before the samples take more than this"
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
            raise InputError(f"{', '.join(given)}: only with --format, which is one of {', '.join(FORMATS)}")
        export(arguments)
    else:
        export_for_trainer(arguments)


def verify(arguments: argparse.Namespace) -> int:
    """Check every file of a mined folder or of an export; the exit status is 1 where something is wrong."""
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
        print(f"{read}: {len(found.faults)} things are wrong, named above")
        return 1
    print(f"{read}: all is as the manifest says")
    return 0


def verify_exported(folder: Path, workers: int, progress: bool) -> int:
    """Check every file of an export; the exit status is 1 where something is wrong."""
    from mimicbrush.mining.exports.verify import verify_export

    faults, summary = verify_export(folder, workers=workers, progress=progress)
    for fault in faults:
        print(fault)
    read = describe_export(summary)
    print(f"{read}: {len(faults)} things are wrong, named above" if faults else f"{read}: all is as it was written")
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
        except BrokenPipeError:  # whoever read has seen enough; Python would complain once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            print(f"{export_rows(arguments.folder, file)} rows in {arguments.output}")

    check_output_file(arguments.output, "-o")
    write_aside(arguments.output, write)


def export_for_trainer(arguments: argparse.Namespace) -> None:
    """Write pairs as a data set of another trainer."""
    if arguments.output is None:
        raise InputError("--format needs -o OUT, the folder for the data set")
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
        again = ". The same command reads them again" if UNREADABLE_PAIR in summary["refused"] else ""
        print(f"{arguments.output / REFUSED_FILE} says why pairs were refused{again}")
    if left := summary["not_written_yet"]:
        print(
            f"stopped: more samples would take more than --max-gib {arguments.max_gib:g}; {left} pairs are not "
            "written. What is there can be trained on. To go on, give the same command with a larger --max-gib, or "
            "without it"
        )


def read_export_options(arguments: argparse.Namespace) -> ExportOptions:
    """Read what decides the content of an export.

    Raises:
        InputError: an option cannot be used.
    """
    from mimicbrush.mining.input_list import read_list_column

    given = {name: vars(arguments)[name] for name in (*_NUMBERS, "jpeg_quality", "side_by_side")}
    options = {name: value for name, value in given.items() if value is not None}
    captions = None
    if arguments.captions is None and arguments.caption_column is not None:
        raise InputError(f"--caption-column {arguments.caption_column}: name the list, too, with --captions LIST")
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
            raise InputError(f"--set {override}: an export reads OPTION=VALUE of {known}, and no other option")
        overrides.append(override)
    return compose_data_options(overrides, CONFIGS)


def describe_export(summary: dict[str, Any]) -> str:
    """Count an export for people."""
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
    print(f"look at {arguments.folder / 'report.html'}")
