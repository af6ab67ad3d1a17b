"""Fetch the weights that a training run begins from, and check them.

mimicbrush fetch [+experiment=default] [model=pipeline model.path=released] [model.unet=FOLDER_OR_ID ...]

Takes the options of mimicbrush train. Weights in the local Hugging Face cache, or in a folder, are checked. Those that
are missing or damaged in the cache are fetched: only safetensors and configs, and only what is needed. After an
interruption, the same command fetches the missing files. It uses HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mimicbrush.cli.project_files import CONFIGS
from mimicbrush.io.text import in_bytes
from mimicbrush.ranges import CommandParser

if TYPE_CHECKING:
    from mimicbrush.models.pretrained.requirements import PartReport


def main() -> None:
    """Fetch what a training run needs, and print what was checked."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="OPTION=VALUE", help="as for mimicbrush train")
    parser.add_argument("--check", action="store_true", help="fetch nothing: only check what is here")
    parser.add_argument(
        "--deep", action="store_true", help="read every byte: hashes of the hub's files, and finite numbers"
    )
    arguments = parser.parse_args()

    from mimicbrush import assembly

    reports = assembly.provide_weights(arguments.overrides, CONFIGS, fetching=not arguments.check, deep=arguments.deep)
    if not reports:
        print("this model has random weights: there is nothing to fetch")
        return
    print(as_table(reports))
    problems = [report for report in reports if report.problem is not None]
    for report in problems:
        print(f"error: {report.part} ({report.named}): {report.problem}", file=sys.stderr)
    sys.exit(2 if problems else 0)


def as_table(reports: list[PartReport]) -> str:
    """Write part, files, size, type, check and place of each network in columns."""
    rows = [("part", "files", "size", "type", "check", "where")]
    for report in reports:
        network = report.network
        rows.append(
            (
                report.part,
                str(len(network.files)) if network else "-",
                in_bytes(network.num_bytes) if network else "-",
                network.dtypes if network else "-",
                "good" if report.problem is None else "NOT GOOD",
                str(network.folder) if network else report.named,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"note: {report.part}: {note}" for report in reports for note in report.notes]
    return "\n".join(lines)
