"""A blind user study: raters rank the results of several editors (fidelity, harmony, quality), as in the paper.

mimicbrush study make EVALUATION --benchmark BENCH --output STUDY
mimicbrush study score STUDY answers-*.json

EVALUATION is the output of mimicbrush evaluate. The answers are the files that the raters sent back. Give the raters
STUDY/for_raters/study.html: it opens in any browser. STUDY/key.json says which result is whose. Do not give it away.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mimicbrush.io.locks import hold_name
from mimicbrush.io.outputs import check_output_file, check_output_folder
from mimicbrush.ranges import SEED_RANGE, CommandParser, NumberRange


def main() -> None:
    """Make a study, or score one."""
    parser = CommandParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write the page for the raters, and the key")
    making.add_argument("evaluation", type=Path, metavar="EVALUATION", help="holds results/EDITOR/...")
    making.add_argument("--benchmark", type=Path, required=True, metavar="BENCH", help="what was edited")
    making.add_argument("-o", "--output", type=Path, required=True, metavar="STUDY", help="replaced if it is a study")
    making.add_argument("--editors", nargs="+", default=[], metavar="NAME", help="whose results (default: all)")
    cases, side_px = NumberRange(at_least=1, whole=True), NumberRange(at_least=64, at_most=16384, whole=True)
    making.add_argument("--cases", type=cases.read, default=30, help="at most so many (default: 30)")
    making.add_argument("--seed", type=SEED_RANGE.read, default=0, help="of the choice and of the letters (default: 0)")
    side_help = "how large images are shown (default: 512)"
    making.add_argument("--long-side-px", type=side_px.read, default=512, help=side_help)
    making.add_argument(
        "--as-painted", action="store_true", help="show what the editors painted outside of the mask, too"
    )
    scoring = commands.add_parser("score", help="from answers to best %% and intervals")
    scoring.add_argument("study", type=Path, metavar="STUDY", help="the folder with key.json")
    scoring.add_argument("answers", type=Path, nargs="+", metavar="ANSWERS", help="what raters downloaded, a file each")
    scoring.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON, too")
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments)
    else:
        score(arguments)


def make(arguments: argparse.Namespace) -> None:
    """Write the page for the raters, and the key."""
    check_output_folder(arguments.output, "--output", is_replaced=True)

    from mimicbrush.evaluation.user_study.pages import make_study

    with hold_name(arguments.output):
        made = make_study(
            arguments.evaluation,
            arguments.benchmark,
            arguments.output,
            editors=arguments.editors,
            max_cases=arguments.cases,
            seed=arguments.seed,
            long_side_px=arguments.long_side_px,
            pasted_back=not arguments.as_painted,
        )
    for fault in made.faults:
        print(f"left out: {fault.path}: {fault.reason}")
    print(f"study {made.study}: {made.cases} cases of {', '.join(made.editors)}; {len(made.faults)} were left out")
    print(f"for the raters: {arguments.output / 'for_raters' / 'study.html'}; keep {arguments.output / 'key.json'}")


def score(arguments: argparse.Namespace) -> None:
    """Score the answers of the raters, and print the table."""
    if arguments.output:
        check_output_file(arguments.output, "--output")

    from mimicbrush.evaluation.user_study.score import format_scores, score_study
    from mimicbrush.io.atomic import write_aside

    found = score_study(arguments.study / "key.json", arguments.answers)
    print(format_scores(found))
    for path, missing in found.incomplete.items():
        print(f"incomplete: {path}: {missing} rankings are missing and do not count")
    if arguments.output:
        text = json.dumps(found.to_json(), indent=1) + "\n"
        write_aside(arguments.output, lambda aside: aside.write_text(text, encoding="utf-8"))
