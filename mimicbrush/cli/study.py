"""Make a blind user study, and score its answers.

mimicbrush study make EVALUATION --benchmark BENCH --output STUDY
mimicbrush study score STUDY answers-*.json

Raters rank the results of several editors by fidelity, harmony and quality, as
in the paper. EVALUATION is the output of `mimicbrush evaluate` on BENCH. Give
the raters STUDY/for_raters/study.html, which opens in any browser. They send
back their answers as files. STUDY/key.json says which editor made which result:
keep it to yourself.
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
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    making = commands.add_parser("make", help="write the page for the raters, and the key", description=make.__doc__)
    making.add_argument(
        "evaluation",
        type=Path,
        metavar="EVALUATION",
        help="folder with results/EDITOR/..., written by `mimicbrush evaluate`",
    )
    making.add_argument("--benchmark", type=Path, required=True, metavar="BENCH", help="benchmark that was edited")
    making.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="STUDY",
        help="folder for the study; an older study is replaced",
    )
    making.add_argument("--editors", nargs="+", default=[], metavar="NAME", help="editors to compare (default: all)")
    cases, side_px = NumberRange(at_least=1, whole=True), NumberRange(at_least=64, at_most=16384, whole=True)
    making.add_argument("--cases", type=cases.read, default=30, metavar="N", help="show at most N cases (default: 30)")
    making.add_argument(
        "--seed", type=SEED_RANGE.read, default=0, help="seed of the choice of cases and of the order (default: 0)"
    )
    side_help = "longer side of the shown images, in pixels (default: 512)"
    making.add_argument("--long-side-px", type=side_px.read, default=512, metavar="N", help=side_help)
    making.add_argument(
        "--as-painted", action="store_true", help="show the whole painted image, also outside of the mask"
    )
    scoring = commands.add_parser("score", help="count the answers", description=score.__doc__)
    scoring.add_argument("study", type=Path, metavar="STUDY", help="folder with key.json")
    scoring.add_argument("answers", type=Path, nargs="+", metavar="ANSWERS", help="files that the raters sent back")
    scoring.add_argument("--output", type=Path, metavar="FILE", help="also write the numbers as JSON")
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
        print(f"skipped: {fault.path}: {fault.reason}")
    print(f"study {made.study}: {made.cases} cases of {', '.join(made.editors)}; {len(made.faults)} were skipped")
    print(f"give {arguments.output / 'for_raters' / 'study.html'} to the raters; keep {arguments.output / 'key.json'}")


def score(arguments: argparse.Namespace) -> None:
    """Score the answers of the raters, and print how often each editor was best, with intervals."""
    if arguments.output:
        check_output_file(arguments.output, "--output")

    from mimicbrush.evaluation.user_study.score import format_scores, score_study
    from mimicbrush.io.atomic import write_aside

    found = score_study(arguments.study / "key.json", arguments.answers)
    print(format_scores(found))
    for path, missing in found.incomplete.items():
        print(f"incomplete: {path}: {missing} rankings are missing and are not counted")
    if arguments.output:
        text = json.dumps(found.to_json(), indent=1) + "\n"
        write_aside(arguments.output, lambda aside: aside.write_text(text, encoding="utf-8"))
