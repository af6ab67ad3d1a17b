"""Download video clips whose licence allows training, and mine them.

mimicbrush fetch-clips --output CLIPS
mimicbrush fetch-clips --output CLIPS --pairs PAIRS

Reads a list of clips with addresses, licences, authors and SHA-256 hashes; the
default list comes with the project. Every clip is checked against its hash. If
the list has no hash for a clip, the hash of its first download is recorded.
Existing clips are not downloaded again, and an interrupted download continues.

CLIPS/clips.csv is a list for `mimicbrush mine`. CLIPS/ATTRIBUTION.md names the
authors: keep it with the clips.
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
    """Download clips, print the result, and mine them if --pairs is given."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add(
        "clips",
        type=Path,
        nargs="?",
        default=FREE_CLIPS,
        metavar="LIST",
        help=f"CSV list of clips (default: {FREE_CLIPS.name})",
    )
    add("-o", "--output", type=Path, required=True, metavar="CLIPS", help="folder for the clips")
    max_gib = NumberRange(above=0, at_most=1024)
    add("--max-gib", type=max_gib.read, default=4, metavar="G", help="skip clips of more than G GiB (default: 4)")
    add("--pairs", type=Path, metavar="PAIRS", help="also mine the clips into this folder, with the default options")
    add("--no-progress", action="store_true", help="show no progress bar")
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
        print("stopped. Run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    size = sum((arguments.output / clip.path).stat().st_size for clip in fetched.clips)
    here = f"{len(fetched.clips)} of {len(clips)} clips are in {arguments.output} ({in_bytes(size)})"
    print(f"{here}; {fetched.num_fetched} were downloaded now")
    for clip in fetched.pinned:
        print(f"note: the list has no hash for {clip.path}. From now on, its hash must be {clip.sha256}")
    for clip, reason in fetched.failures:
        print(f"failed: {clip.path}: {reason}", file=sys.stderr)
    if not fetched.clips:
        raise MimicBrushError("no clip could be downloaded")
    listed = arguments.output / LIST_NAME
    print(f"{arguments.output / CREDITS_NAME} lists their authors and licences: keep it with the clips")
    if arguments.pairs is None:
        print(f"next: mimicbrush mine {shlex.quote(f'input={listed}')} output=PAIRS")
    else:
        from mimicbrush.cli import mine
        from mimicbrush.mining.run import mine_folder

        mined = mine_folder(listed, arguments.pairs, progress=not arguments.no_progress)
        print(mine.report(mined, arguments.pairs))
    if fetched.failures:
        sys.exit(1)
