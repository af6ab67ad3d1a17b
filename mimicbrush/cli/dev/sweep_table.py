"""Print the results of a sweep of training runs.

mimicbrush sweep-table runs/sweep

Prints the same table as at the end of the sweep, and writes it into the folder
as table.md and table.json. Jobs that are still running or were stopped are
included with their latest figures.
"""

from __future__ import annotations

from pathlib import Path

from mimicbrush.assembly.sweep_table import print_table
from mimicbrush.io.outputs import check_output_folder
from mimicbrush.ranges import CommandParser


def main() -> None:
    """Print the table of a sweep, and write it into the sweep's folder."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the sweep (its hydra.sweep.dir)")
    folder = parser.parse_args().folder
    if folder.is_dir():  # otherwise, `print_table` reports what is wrong
        check_output_folder(folder)
    print_table(folder)
