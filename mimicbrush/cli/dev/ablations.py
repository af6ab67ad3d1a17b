"""The rows of the paper's Tables 3 and 4 at the scale of the small model.

python scripts/ablations.py --output runs/ablations

Trains every row with every seed (a sweep of scripts/train.py), evaluates each on held-out pairs, and writes effects.md,
which says whether the direction of the paper's effect is seen. Started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimicbrush.errors import InputError, MimicBrushError
from mimicbrush.ranges import SEED_RANGE, STEPS_RANGE, NumberRange, one_of

if TYPE_CHECKING:
    from mimicbrush.evaluation.ablations import AblationEffect

ABLATION_ROWS = ("full", "weak_augmentation", "grid_025", "grid_050", "grid_075", "single_box", "image_data_only")
ABSENT = dict.fromkeys(("reference_clip", "reference_dinov2"), "needs pretrained weights, which are not here")


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Read the command line, and leave the options of training as they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"), help="default: runs/ablations")
    parser.add_argument("--experiment", default="small_ablation", help="default: small_ablation")
    parser.add_argument(
        "--pairs", type=Path, default=Path("small_model_data/pairs/heldout"), help="mined pairs to test with"
    )
    parser.add_argument("--seeds", type=SEED_RANGE.read, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument(
        "--rows", nargs="+", **one_of(*ABLATION_ROWS), default=list(ABLATION_ROWS), help="default: all; full is needed"
    )
    most = NumberRange(at_least=1, whole=True)
    parser.add_argument("--max-pairs", type=most.read, default=46, help="of the held-out ones (default: 46)")
    parser.add_argument("--steps", type=STEPS_RANGE.read, default=4, help="of the sampler (default: 4)")
    return parser.parse_known_args()


def as_json(effect: AblationEffect) -> dict[str, Any]:
    """Write an effect as effects.json has it, where the direction is called `verdict`."""
    values = asdict(effect)
    return {**values, "verdict": values.pop("direction")}


def main() -> None:
    """Train all rows with all seeds, evaluate them, and write the table of effects."""
    arguments, overrides = parse_arguments()
    # Before hours of training, not after them.
    if "full" not in arguments.rows:
        raise InputError(f"--rows {' '.join(arguments.rows)}: every row is compared with full; name it, too")
    if not (arguments.pairs / "manifest").is_dir():
        raise InputError(
            f"--pairs {arguments.pairs} is no folder of mined pairs; for those of the small model:\n"
            "  python scripts/small_model_data.py --output small_model_data"
        )
    seeds = ",".join(map(str, arguments.seeds))
    run_step(
        "train",
        "-m",
        f"+experiment={arguments.experiment}",
        f"+ablation={','.join(arguments.rows)}",
        f"seed={seeds}",
        f"hydra.sweep.dir={arguments.output}",
        *overrides,
    )
    evaluations = {}
    for row in arguments.rows:
        evaluations[row] = [arguments.output / f"{row}-seed{seed}" / "evaluation" for seed in arguments.seeds]
        for folder in evaluations[row]:
            if is_evaluated(folder, arguments):
                print(f"{folder} is there already and is kept")
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

    from mimicbrush.evaluation import ablations
    from mimicbrush.io.atomic import write_aside

    effects = ablations.compare_rows(evaluations)
    text = ablations.format_ablations(effects, ABSENT)
    values = {
        row: {name: {key: as_json(effect) for key, effect in found.items()} for name, found in sets.items()}
        for row, sets in effects.items()
    }
    write_aside(arguments.output / "effects.md", lambda aside: aside.write_text(text))
    write_aside(arguments.output / "effects.json", lambda aside: aside.write_text(json.dumps(values, indent=1)))
    print(f"\n{text}\nwrote {arguments.output / 'effects.md'} and effects.json")


def is_evaluated(folder: Path, arguments: argparse.Namespace) -> bool:
    """Tell whether a run was evaluated on these pairs, in this way."""
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
        raise MimicBrushError(f"{name}.py ended with status {done.returncode}; the same command goes on from here")
