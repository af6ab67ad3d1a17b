"""Compare readers of videos on the same damaged files: ours, decord and OpenCV.

python scripts/compare_readers.py VIDEOS

Makes short undamaged clips from the videos in the folder, damages each in fifteen ways (with a fixed seed), and lets
every reader read every file in a worker process with a time limit and a memory limit. Each reading ends as one of

  refused   the reader reported an error or gave no frame
    right     every frame has the right number, and at least 30 dB against the undamaged clip
  visible   a frame is below 30 dB
  wrong     a frame has a wrong number, there are fewer or more frames than in the undamaged clip, or there are
            frames although the file is no video
  hung, crashed, memory
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimicbrush.errors import InputError, cli_main
from mimicbrush.io.outputs import check_output_file
from mimicbrush.ranges import SEED_RANGE, WORKERS_RANGE, CommandParser, NumberRange

if TYPE_CHECKING:
    from damaged.read import Reading

FLIPS = NumberRange(at_least=0, at_most=10**6, whole=True)
TIMEOUT_S, MEMORY_GIB = NumberRange(above=0, at_most=10**7), NumberRange(at_least=0, at_most=2**20)
OUTCOMES = ("refused", "right", "visible", "wrong", "hung", "crashed", "memory")


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of undamaged videos")
    parser.add_argument(
        "--reader", default="pyav", help="our reader to compare: pyav, decord or torchcodec (default: pyav)"
    )
    flips_help = "files per clip with 1, 4 and 16 flipped bits"
    parser.add_argument("--flips", type=FLIPS.read, default=4, metavar="N", help=flips_help)
    parser.add_argument("--seed", type=SEED_RANGE.read, default=0)
    parser.add_argument("--workers", type=WORKERS_RANGE.read, default=1)
    parser.add_argument(
        "--timeout",
        type=TIMEOUT_S.read,
        default=60.0,
        metavar="S",
        help="time limit for one file, in seconds (default: 60)",
    )
    parser.add_argument(
        "--memory", type=MEMORY_GIB.read, default=6.0, metavar="GIB", help="memory limit of a worker (default: 6)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all readings to this file")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the clips in this folder")
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        raise InputError(f"{arguments.folder} is not a folder; give a folder of videos")
    if arguments.json:
        check_output_file(arguments.json, "--json")
    with tempfile.TemporaryDirectory() as temporary:
        readings = compare(arguments, arguments.keep or Path(temporary))
    print(table(readings))
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(reading) for reading in readings], indent=0) + "\n")


def compare(arguments: argparse.Namespace, workspace: Path) -> list[Reading]:
    from damaged.make import make_damaged, make_undamaged
    from damaged.read import READERS, read_all, write_truth

    from mimicbrush.mining.video.other_readers import open_reader

    ours = open_reader(arguments.reader)
    folders = [workspace / name for name in ("undamaged", "damaged", "truth")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    clips = make_undamaged(arguments.folder, folders[0])
    for clip in clips:
        write_truth(clip, folders[2])
    repeats = dict.fromkeys(("1 bit", "4 bits", "16 bits"), arguments.flips)
    files = make_damaged(clips, folders[1], arguments.seed, repeats)
    print(f"{len(clips)} undamaged clips, {len(files)} damaged", file=sys.stderr)
    return [
        reading
        for reader in ("ours", *READERS)
        for reading in read_all(
            reader,
            ours,
            clips,
            files,
            folders[2],
            workers=arguments.workers,
            timeout_s=arguments.timeout,
            memory_gib=arguments.memory,
        )
    ]


def table(readings: list[Reading]) -> str:
    """Markdown: a row per class and reader, and the totals."""
    lines = [
        "| damage | reader | files | " + " | ".join(OUTCOMES) + " | accepted frames | below 30 dB |",
        "|---" * (len(OUTCOMES) + 5) + "|",
    ]
    kinds = list(dict.fromkeys(reading.kind for reading in readings))
    readers = list(dict.fromkeys(reading.reader for reading in readings))
    for kind in [*kinds, "all damaged"]:
        for reader in readers:
            chosen = [
                reading
                for reading in readings
                if reading.reader == reader
                and (reading.kind == kind or (kind == "all damaged" and reading.kind != "undamaged"))
            ]
            counts = [sum(reading.outcome == outcome for reading in chosen) for outcome in OUTCOMES]
            assert sum(counts) == len(chosen), "a reading without an outcome"
            frames, damaged = (sum(getattr(r, name) for r in chosen) for name in ("num_frames", "num_visible"))
            cells: list[Any] = [kind, reader, len(chosen), *counts, frames, f"{damaged / max(frames, 1):.2%}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli_main(main)
