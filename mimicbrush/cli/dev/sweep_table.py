"""What has come out of a sweep so far: python scripts/sweep_table.py runs/sweep

Prints the table that a sweep ends with, and writes it into the folder as table.md and table.json. Jobs that are under
way, or were stopped, are in it with the figures they have.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mimicbrush.assembly.sweep_table import print_table
from mimicbrush.errors import cli_main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="hydra.sweep.dir of the sweep")
    print_table(parser.parse_args().folder)


if __name__ == "__main__":
    cli_main(main)
