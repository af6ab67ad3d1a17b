"""Ablations at the scale of the small model: the paper's rows, or our own options.

mimicbrush ablations --output runs/ablations
mimicbrush ablations --table options --output runs/options

Trains every row with every seed (a sweep of mimicbrush train), evaluates each on held-out pairs, and writes effects.md.
This table says how much better the first row is than each other row. The same command continues a run that was stopped.
--table paper (the default) has the rows of the paper's Tables 3 and 4, and says whether the direction of the paper's
effect is seen. With --table options, each row leaves out or changes one of our options. Both measure keypoint transfer,
too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimicbrush.errors import InputError, MimicBrushError
from mimicbrush.io.locks import hold_folder
from mimicbrush.io.outputs import check_output_folder
from mimicbrush.ranges import SEED_RANGE, STEPS_RANGE, Choices, CommandParser, NumberRange, one_of

if TYPE_CHECKING:
    from mimicbrush.evaluation.ablations import AblationEffect


@dataclass(frozen=True)
class AblationTable:
    """The rows of a table of ablations, and how each is trained and measured.

    Attributes:
        rows: files in `folder`; the first is what the others are compared with.
        folder: below `configs/ablation`, with a "/" at its end; "" is that folder itself.
        experiment: file in `configs/experiment` that all rows share.
        absent: row -> why it cannot be run.
        notes: row -> what its title in the table needs to say besides its name.
        without_attention: rows whose model has no reference attention, so that keypoint transfer has nothing to ask.
    """

    rows: tuple[str, ...]
    folder: str
    experiment: str
    absent: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    without_attention: tuple[str, ...] = ()


TABLES = {
    "paper": AblationTable(
        (
            "full",
            "reference_clip",
            "image_data_only",
            "weak_augmentation",
            "single_box",
            "grid_025",
            "grid_050",
            "grid_075",
        ),
        folder="",
        experiment="small_ablation",
        absent={"reference_dinov2": "needs pretrained weights, which are not here"},
        notes={"reference_clip": "here the image encoder of the small model"},
        without_attention=("reference_clip",),
    ),
    "options": AblationTable(
        (
            "recipe",
            "no_correspondence_loss",
            "correspondence_weight_1",
            "all_heads",
            "few_matches",
            "no_unrelated_references",
            "reference_unet_shared",
            "zero_snr",
            "high_noise_timesteps",
            "channel_weights",
            "identity_probability",
        ),
        folder="ours/",
        experiment="small_options",
    ),
}
#: Frames whose keypoints are carried.
_KEYPOINT_FRAMES = 23


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Read the command line, and leave the options of training as they are."""
    parser = CommandParser(description=__doc__)
    output_help = "folder for runs and results (default: runs/ablations)"
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"), metavar="DIR", help=output_help)
    parser.add_argument("--table", **one_of(*TABLES), default="paper", help="rows to train (default: paper)")
    parser.add_argument(
        "--experiment", metavar="NAME", help="experiment of all rows (default: small_ablation, or small_options)"
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        default=Path("small_model_data/pairs/heldout"),
        metavar="DIR",
        help="mined pairs for evaluation (default: small_model_data/pairs/heldout)",
    )
    parser.add_argument(
        "--seeds", type=SEED_RANGE.read, nargs="+", default=[0, 1], metavar="N", help="seeds of each row (default: 0 1)"
    )
    rows_help = "rows to train; the first row of the table (full, or recipe) is required (default: all)"
    parser.add_argument("--rows", nargs="+", metavar="NAME", help=rows_help)
    most = NumberRange(at_least=1, whole=True)
    parser.add_argument(
        "--max-pairs", type=most.read, default=46, metavar="N", help="evaluate on at most N pairs (default: 46)"
    )
    parser.add_argument("--steps", type=STEPS_RANGE.read, default=1, metavar="N", help="sampler steps (default: 1)")
    arguments, overrides = parser.parse_known_args()
    table = TABLES[arguments.table]
    arguments.rows = arguments.rows or list(table.rows)
    arguments.experiment = arguments.experiment or table.experiment
    for row in arguments.rows:
        if fault := Choices(table.rows).find_fault(row):
            parser.error(f"--rows {row}: {fault}")
    return arguments, overrides


def as_json(effect: AblationEffect) -> dict[str, Any]:
    """Write an effect as effects.json has it, where the direction is called `verdict`."""
    values = asdict(effect)
    return {**values, "verdict": values.pop("direction")}


def main() -> None:
    """Train all rows with all seeds, evaluate them, and write the table of effects."""
    arguments, overrides = parse_arguments()
    # Before hours of training, not after them.
    table = TABLES[arguments.table]
    base = table.rows[0]
    if base not in arguments.rows:
        raise InputError(f"--rows {' '.join(arguments.rows)}: every row is compared with {base}; add it")
    if not (arguments.pairs / "manifest").is_dir():
        raise InputError(
            f"--pairs {arguments.pairs} is not a folder of mined pairs. To make those of the small model:\n"
            "  mimicbrush data --output small_model_data"
        )
    check_output_folder(arguments.output, "--output")
    with hold_folder(arguments.output):
        compare_ablations(arguments, overrides)


def compare_ablations(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Train, evaluate and compare into the output folder, which is held."""
    table = TABLES[arguments.table]
    seeds = ",".join(map(str, arguments.seeds))
    run_step(
        "train",
        "-m",
        f"+experiment={arguments.experiment}",
        f"+ablation={','.join(table.folder + row for row in arguments.rows)}",
        f"seed={seeds}",
        f"hydra.sweep.dir={arguments.output}",
        *overrides,
    )
    evaluations = {}
    for row in arguments.rows:
        evaluations[row] = [arguments.output / f"{row}-seed{seed}" / "evaluation" for seed in arguments.seeds]
        for folder in evaluations[row]:
            if is_evaluated(folder, arguments):
                print(f"{folder} already exists and is kept")
            else:
                run_step(
                    "evaluate",
                    f"editor={folder.parent / 'pipeline'}",
                    f"pairs={arguments.pairs}",
                    f"output={folder}",
                    f"max_pairs={arguments.max_pairs}",
                    f"num_inference_steps={arguments.steps}",
                    "sheet_pairs=4",
                )
    keypoints = measure_keypoints(arguments, table.without_attention)

    from mimicbrush.evaluation import ablations
    from mimicbrush.io.atomic import write_aside, write_json

    effects = ablations.compare_rows(evaluations, table.rows[0])
    text = ablations.format_ablations(effects, table.absent, keypoints, table.notes)
    values = {
        row: {name: {key: as_json(effect) for key, effect in found.items()} for name, found in sets.items()}
        for row, sets in effects.items()
    }
    print(f"\n{text}")
    write_aside(arguments.output / "effects.md", lambda aside: aside.write_text(text, encoding="utf-8"))
    write_json(arguments.output / "effects.json", values)
    print(f"wrote {arguments.output / 'effects.md'} and effects.json")


def measure_keypoints(
    arguments: argparse.Namespace, without_attention: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """Measure how well the reference attention finds places: row -> task -> PCK@0.1 in per cent, for each seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in (each for each in arguments.rows if each not in without_attention):
        for seed in arguments.seeds:
            run = arguments.output / f"{row}-seed{seed}"
            path = run / "pck" / "pck.json"
            if not path.is_file():
                pairs = ["--pairs", str(arguments.pairs), "--max-pairs", str(_KEYPOINT_FRAMES)]
                run_step("pck", *pairs, "--model", str(run / "pipeline"), "--output", str(path.parent))
            results = json.loads(path.read_text())["results"]
            for task in ("in holes", "at seen tokens"):
                scores = found.setdefault(row, {}).setdefault(f"PCK@0.1 {task}, %", [])
                scores.append(results[f"reference attention {task}"]["0.1"]["per_picture"])
    return found


def is_evaluated(folder: Path, arguments: argparse.Namespace) -> bool:
    """Return whether a run was evaluated on these pairs, in this way."""
    path = folder / "metrics.json"  # written last
    if not path.is_file():
        return False
    found = json.loads(path.read_text())
    return (found["about"]["pairs"], found.get("max_pairs"), found["num_inference_steps"]) == (
        str(arguments.pairs),
        arguments.max_pairs,
        arguments.steps,
    )


def run_step(name: str, *arguments: str) -> None:
    """Run one of the commands, and end with it where it fails."""
    done = subprocess.run([sys.executable, "-m", "mimicbrush", name, *arguments], check=False)
    if done.returncode:
        raise MimicBrushError(
            f"mimicbrush {name} ended with status {done.returncode}. Run the same command again to continue"
        )
