"""Encode K fixed augmentations of every training pair once.

mimicbrush encode-views +experiment=NAME data.root=MINED \\
    data.fixed_views=K [OPTION=VALUE ...] --output DIR

Training from them is faster, because it does not run the frozen encoders. The
options are those of `mimicbrush train`. The size is printed first. If the
command is interrupted, run it again to encode the missing shards. Then train
with the same options and data.encoded_views=DIR (docs/speed.md).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from pathlib import Path

from mimicbrush.cli.project_files import CONFIGS
from mimicbrush.ranges import CommandParser, one_of


def main() -> None:
    """Encode the views, or verify those that are there."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="OPTION=VALUE", help="options of `mimicbrush train`")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the encoded views")
    parser.add_argument(
        "--part", type=read_part, metavar="I/N", help="encode every N-th shard, starting with shard I (0 to N-1; "
        "default: all shards, divided among the processes of torchrun)",
    )  # fmt: skip
    parser.add_argument(
        "--precision",
        **one_of("float16", "float32"),
        default="float16",
        help="data type of the encoded views (default: float16)",
    )
    parser.add_argument("--size", action="store_true", help="only print the size of the encoded views")
    parser.add_argument("--verify", action="store_true", help="only read all files in DIR, and compare their checksums")
    arguments = parser.parse_intermixed_args()
    if arguments.verify:
        from mimicbrush.assembly.encoding import verify_views

        print(f"all {verify_views(arguments.output)} shards in {arguments.output} are intact")
        return

    from mimicbrush.assembly.encoding import encode_views

    started = (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    is_complete = encode_views(
        arguments.overrides,
        CONFIGS,
        arguments.output,
        part=arguments.part or started,
        precision=arguments.precision,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        only_size=arguments.size,
    )
    if is_complete:
        option = shlex.quote(f"data.encoded_views={arguments.output}")
        print(f"{arguments.output} is complete. To train from it, use the same options and {option}")
    elif not arguments.size:
        print(f"{arguments.output} is not complete yet: some shards are missing")


def read_part(text: str) -> tuple[int, int]:
    """Read which part of the shards is meant: "0/8" is the first of eight.

    Raises:
        ArgumentTypeError: the text has another form, or there is no such part.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N-1, got {text!r}")
    return int(match[1]), int(match[2])
