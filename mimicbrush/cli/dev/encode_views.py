"""Encode K fixed augmentations of every training pair once, to train from them without the frozen encoders.

mimicbrush encode-views +experiment=NAME data.root=MINED data.fixed_views=K [OPTION=VALUE ...] --output DIR

Takes the options of mimicbrush train. It prints the size before it starts. After an interruption, the same command
encodes the missing shards. Then train with the same options and data.encoded_views=DIR (docs/speed.md).
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
    parser.add_argument("overrides", nargs="*", metavar="OPTION=VALUE", help="as for mimicbrush train")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the encoded views")
    parser.add_argument(
        "--part", type=read_part, metavar="I/N", help="encode every N-th shard, starting with number I (0 to N-1); "
        "default: all shards, which the processes of torchrun share",
    )  # fmt: skip
    parser.add_argument(
        "--precision",
        **one_of("float16", "float32"),
        default="float16",
        help="type of the stored numbers (default: float16)",
    )
    parser.add_argument("--size", action="store_true", help="only print how large the views will be")
    parser.add_argument("--verify", action="store_true", help="only read every byte in DIR, and compare checksums")
    arguments = parser.parse_intermixed_args()
    if arguments.verify:
        from mimicbrush.assembly.encoding import verify_views

        print(f"all {verify_views(arguments.output)} shards in {arguments.output} are whole")
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
        print(f"{arguments.output} is complete. Train with the same options and {option}")
    elif not arguments.size:
        print(f"{arguments.output} is not complete yet: other parts are missing")


def read_part(text: str) -> tuple[int, int]:
    """Read which part of the shards is meant: "0/8" is the first of eight.

    Raises:
        ArgumentTypeError: it is written in another way, or there is no such part.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"must be I/N, with I in 0..N-1, got {text!r}")
    return int(match[1]), int(match[2])
