"""Fetch clips whose licence allows it, and mine them: mimicbrush fetch-clips --output CLIPS [--pairs PAIRS].

Reads a list of clips with addresses, licences, makers and SHA-256 hashes. Without LIST, it is the one that comes with
the project (free_clips.csv). Every clip is checked against its hash. A clip whose hash nobody has stated keeps the hash
of the first fetch. What is there is not fetched again, and a fetch that was stopped goes on. CLIPS/clips.csv is a list
that mimicbrush mine reads, and CLIPS/ATTRIBUTION.md names the makers: keep it with the clips.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from mimicbrush.cli.project_files import DATA_MANIFESTS
from mimicbrush.errors import MimicBrushError
from mimicbrush.io.outputs import check_output_folder
from mimicbrush.io.text import in_bytes
from mimicbrush.ranges import CommandParser, NumberRange

FREE_CLIPS = DATA_MANIFESTS / "free_clips.csv"


def main() -> None:
    """Fetch clips, say what was fetched and what was not, and mine them if that is wanted."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("clips", type=Path, nargs="?", default=FREE_CLIPS, metavar="LIST", help=f"default: {FREE_CLIPS.name}")
    add("-o", "--output", type=Path, required=True, metavar="CLIPS", help="folder for the clips; made if needed")
    max_gib = NumberRange(above=0, at_most=1024)
    add("--max-gib", type=max_gib.read, default=4, help="a larger clip is not fetched (default: 4)")
    add("--pairs", type=Path, metavar="PAIRS", help="mine the clips into this folder, with the default options")
    add("--no-progress", action="store_true", help="no progress bar")
    arguments = parser.parse_args()

    from mimicbrush.mining.clips.clip_list import CREDITS_NAME, LIST_NAME, read_clip_list
    from mimicbrush.mining.clips.fetch import fetch_clips

    clips = read_clip_list(arguments.clips)
    if arguments.pairs is not None:
        check_output_folder(arguments.pairs, "--pairs")
    try:
        fetched = fetch_clips(
            clips, arguments.output, max_bytes=int(arguments.max_gib * 2**30), progress=not arguments.no_progress
        )
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    size = sum((arguments.output / clip.path).stat().st_size for clip in fetched.clips)
    here = f"{len(fetched.clips)} of {len(clips)} clips are here ({in_bytes(size)})"
    print(f"{here}; {fetched.num_fetched} were fetched now")
    for clip in fetched.pinned:
        print(f"note: nobody has stated the hash of {clip.path}. From now on it must be {clip.sha256}")
    for clip, reason in fetched.failures:
        print(f"failed: {clip.path}: {reason}", file=sys.stderr)
    if not fetched.clips:
        raise MimicBrushError("no clip could be fetched")
    listed = arguments.output / LIST_NAME
    print(f"{arguments.output / CREDITS_NAME} names who made them and under which licence: keep it with the clips")
    if arguments.pairs is None:
        print(f"next: mimicbrush mine {shlex.quote(f'input={listed}')} output=PAIRS")
    else:
        from mimicbrush.cli import mine
        from mimicbrush.mining.run import mine_folder

        mined = mine_folder(listed, arguments.pairs, progress=not arguments.no_progress)
        print(mine.report(mined, arguments.pairs))
    if fetched.failures:
        sys.exit(1)
