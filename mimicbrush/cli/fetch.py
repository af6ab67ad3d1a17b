"""Download and check the weights that a training run starts from.

mimicbrush fetch +experiment=default
mimicbrush fetch model=pipeline model.path=released
mimicbrush fetch +experiment=default model.unet=FOLDER_OR_HUB_ID

The options are those of `mimicbrush train`. Files in the local Hugging Face
cache or in a folder are only checked. Files that are missing or damaged in the
cache are downloaded: only safetensors and configs, and only what is needed. If
the download is interrupted, run the same command again. HF_TOKEN, HF_HOME,
HF_ENDPOINT and HF_HUB_OFFLINE have their usual meaning.
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
    """Download what a training run needs, and print what was checked."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="OPTION=VALUE", help="options of `mimicbrush train`")
    parser.add_argument("--check", action="store_true", help="only check local files, and download nothing")
    parser.add_argument(
        "--deep",
        action="store_true",
        help="read every byte: compare the hashes of files from the hub, and check that all numbers are finite",
    )
    arguments = parser.parse_args()

    from mimicbrush import assembly

    reports = assembly.provide_weights(arguments.overrides, CONFIGS, fetching=not arguments.check, deep=arguments.deep)
    if not reports:
        print("this model starts from random weights: there is nothing to download")
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
