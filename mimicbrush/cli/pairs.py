"""Look after a mined folder: check it, export its manifest, write its report.

mimicbrush pairs verify DIR                  read everything again; exit status 1 if anything is wrong
mimicbrush pairs export DIR [-o FILE.jsonl]  all rows of the manifest as JSON lines
mimicbrush pairs report DIR                  write DIR/report.html again
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path

from mimicbrush.io.outputs import check_output_file, check_output_folder
from mimicbrush.ranges import WORKERS_RANGE, CommandParser


def main() -> None:
    """Verify, export or report a mined folder."""
    parser = CommandParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    verifying = commands.add_parser("verify", help="read everything again and name what is wrong (exit status 1)")
    exporting = commands.add_parser("export", help="write all rows as JSON lines")
    reporting = commands.add_parser("report", help="write report.html again")
    for command in (verifying, exporting, reporting):
        command.add_argument("folder", type=Path, metavar="DIR", help="a mined folder")
    for command in (verifying, reporting):
        command.add_argument(
            "--input-root", type=Path, metavar="FOLDER", help="where the photographs lie, if they have moved"
        )
    cores = os.cpu_count() or 1
    verifying.add_argument("--workers", type=WORKERS_RANGE.read, default=cores, help="processes (default: all cores)")
    verifying.add_argument("--no-progress", action="store_true", help="no progress bar")
    exporting.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: standard output")
    arguments = parser.parse_args()
    if arguments.command == "verify":
        sys.exit(verify(arguments))
    if arguments.command == "export":
        export(arguments)
    else:
        report(arguments)


def verify(arguments: argparse.Namespace) -> int:
    """Check every file of a mined folder; the exit status is 1 where something is wrong."""
    from mimicbrush.mining.verify.folder import verify_folder

    found = verify_folder(
        arguments.folder,
        input_root=arguments.input_root,
        workers=arguments.workers,
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


def report(arguments: argparse.Namespace) -> None:
    """Write the report of a mined folder again."""
    from mimicbrush.mining.report.page import write_mining_report

    if arguments.folder.is_dir():
        check_output_folder(arguments.folder)
    write_mining_report(arguments.folder, input_root=arguments.input_root)
    print(f"look at {arguments.folder / 'report.html'}")
