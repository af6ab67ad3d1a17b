"""Print the results of a sweep so far: mimicbrush sweep-table runs/sweep

Prints the table that a sweep ends with, and writes it into the folder as table.md and table.json. It also has the
figures so far of jobs that are running or were stopped.
"""

from __future__ import annotations

from pathlib import Path

from mimicbrush.assembly.sweep_table import print_table
from mimicbrush.io.outputs import check_output_folder
from mimicbrush.ranges import CommandParser


def main() -> None:
    """Print the table of a sweep, and write it into the sweep's folder."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="hydra.sweep.dir of the sweep")
    folder = parser.parse_args().folder
    if folder.is_dir():  # it says itself what else this is
        check_output_folder(folder)
    print_table(folder)
