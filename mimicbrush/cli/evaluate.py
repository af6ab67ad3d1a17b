"""Evaluate an editor on held-out pairs, or several editors on a benchmark.

mimicbrush evaluate editor=PIPELINE pairs=MINED output=FOLDER
mimicbrush evaluate 'editor=[small,oracle,source]' benchmark=BENCH output=FOLDER

An editor is a pipeline folder, or a name such as small or oracle. See
docs/evaluation.md for examples. ??? marks options that must be given.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from mimicbrush.assembly.command_line import TextOption, list_plain_options, resolve_config, run_with_hydra
from mimicbrush.cli.project_files import CONFIGS, explain_options
from mimicbrush.errors import InputError, MimicBrushError, cli_main
from mimicbrush.io.locks import hold_folder
from mimicbrush.io.outputs import check_output_folder

NEEDED = {
    "editor": "PIPELINE, a folder such as runs/NAME/pipeline, or small (on a benchmark, also several: editor=[a,b])",
    "output": "FOLDER, to write to",
}
#: Options that are paths and names. The others are numbers and words.
EVALUATE_TEXTS = {
    "editor": TextOption(listed=True),
    "output": TextOption(),
    **dict.fromkeys(("pairs", "benchmark", "dino", "dinov2", "clip", "lpips"), TextOption(null=True)),
}
#: Options of one kind of evaluation, which have no effect in the other.
FOR_PAIRS = ("split", "max_pairs", "batch_size", "sets", "sheet_pairs", "num_references")
FOR_BENCHMARK = ("dino", "dinov2", "clip", "lpips", "shown_cases")


def main() -> None:
    """Evaluate with the options of the command line, or explain them."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n{explain_options('evaluate.yaml')}")
        return
    run_with_hydra(evaluate_composed, list_plain_options(CONFIGS / "evaluate.yaml", EVALUATE_TEXTS))


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="evaluate")
def evaluate_composed(config: DictConfig) -> None:
    """Evaluate with the config that Hydra composed."""
    cli_main(lambda: run(config))


def run(config: DictConfig) -> None:
    """Check the options, and evaluate on pairs or on a benchmark."""
    values = resolve_config(config)
    missing = [f"{key}={meaning}" for key, meaning in NEEDED.items() if OmegaConf.is_missing(config, key)]
    given = [key for key in ("pairs", "benchmark") if values[key] is not None]
    if len(given) != 1:
        missing.append("either pairs=FOLDER, with mined pairs (`mimicbrush mine` makes them)")
        missing.append("or benchmark=FOLDER, with cases (`mimicbrush benchmark` makes them)")
    if missing:
        raise InputError("please give:\n  " + "\n  ".join(missing))
    output = Path(values.pop("output"))
    check_output_folder(output, "output=")
    root, editor = Path(values.pop(given[0])), values.pop("editor")
    values.pop("benchmark" if given[0] == "pairs" else "pairs")
    _refuse(FOR_BENCHMARK if given[0] == "pairs" else FOR_PAIRS, given[0])
    for name in FOR_BENCHMARK if given[0] == "pairs" else FOR_PAIRS:
        values.pop(name)
    if given[0] == "pairs" and isinstance(editor, list):
        raise InputError(f"editor={editor}: expected one editor with pairs=; several are possible with benchmark=")

    from mimicbrush.data.manifest import check_outside_mined_folder

    check_outside_mined_folder(output, f"output={output}")
    with hold_folder(output):
        if given[0] == "pairs":
            on_pairs(root, str(editor), output, values)
        else:
            names = [str(name) for name in (editor if isinstance(editor, list) else [editor])]
            on_benchmark(root, names, output, values)


def _refuse(options: tuple[str, ...], kind: str) -> None:
    """Refuse options on the command line that would have no effect."""
    given = [argument for argument in sys.argv[1:] if argument.partition("=")[0].lstrip("+") in options]
    if given:
        raise InputError(f"{' '.join(given)}: this option has no effect with {kind}=; leave it out")


def on_pairs(pairs_folder: Path, editor_name: str, output: Path, values: dict[str, Any]) -> None:
    """Measure on held-out pairs how much a reference helps, and how much a wrong one harms."""
    # 1. What can be checked before anything heavy is imported.
    device = values.pop("device")

    from mimicbrush.evaluation.heldout.options import EvaluationOptions

    if isinstance(values["sets"], list):
        values["sets"] = tuple(values["sets"])
    values["seed"] = 0 if values["seed"] is None else values["seed"]
    options = EvaluationOptions(**values)

    from mimicbrush.data.manifest import read_manifest
    from mimicbrush.data.training_data import TrainingData, read_training_data
    from mimicbrush.evaluation.editors.registry import KLEIN, check_editor, find_editor_pipeline, open_editor
    from mimicbrush.evaluation.heldout import report
    from mimicbrush.evaluation.heldout.selection import select_heldout_pairs

    check_editor(editor_name, for_pairs=True)
    editor_folder = find_editor_pipeline(editor_name)
    # An editor without a model was trained on nothing.
    training = TrainingData(0.0, frozenset()) if editor_folder is None else read_training_data(editor_folder)
    selection = select_heldout_pairs(read_manifest(pairs_folder), options.split, training)
    for message in selection.messages:
        print(message)

    # 2. The editor.
    editor = open_editor(
        editor_name,
        device=device,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
    )

    from mimicbrush.evaluation.heldout.run import EDITS_FILE, IMAGES_FOLDER, evaluate_heldout
    from mimicbrush.models.options import ModelOptions

    # 3. The numbers.
    about = {
        "editor": str(editor_folder or editor_name),
        "dtype": editor.about.get("dtype", "none"),
        "pairs": str(pairs_folder),
        "selection": " ".join(selection.messages),
    }
    size_px = editor.size_px or ModelOptions().size_px  # an editor of any size gets the paper's canvas
    metrics = evaluate_heldout(editor, selection.pairs, size_px, options, output, about)
    print(report.format_summary(metrics, options.sets))
    print("\n".join(f"wrote {path}" for path in sorted(output.glob("[!.]*"))))
    edits = output / IMAGES_FOLDER / options.sets[0] / EDITS_FILE
    if edits.is_file() and editor_folder is not None:
        model = editor_name.removeprefix(f"{KLEIN}:")
        again = ["mimicbrush", "edit", "--batch", str(edits), "--output-dir", "edits", "--model", model]
        print(f"to repeat these edits: {shlex.join(again)}")


def on_benchmark(root: Path, names: list[str], output: Path, values: dict[str, Any]) -> None:
    """Measure the paper's metrics on the four tracks."""
    from mimicbrush.evaluation.benchmark.options import BackboneOptions, BenchmarkOptions
    from mimicbrush.evaluation.editors.registry import check_editor

    backbones = BackboneOptions(**{name: values.pop(name) for name in ("dino", "dinov2", "clip", "lpips")})
    values["seed"] = 1 if values["seed"] is None else values["seed"]
    options = BenchmarkOptions(editors=tuple(names), backbones=backbones, **values)
    for name in names:
        check_editor(name)

    from mimicbrush.evaluation.benchmark.run import BENCHMARK_METRICS_FILE, REPORT_FILE, TABLE_FILE, evaluate_benchmark

    found = evaluate_benchmark(root, options, output)
    print(f"\n{found.table}\n{found.tally}")
    for line in found.troubles:
        print(f"MISSING {line}", file=sys.stderr)
    print("\n".join(f"wrote {output / name}" for name in (REPORT_FILE, TABLE_FILE, BENCHMARK_METRICS_FILE)))
    if found.lost:
        raise MimicBrushError(f"{', '.join(found.lost)}: no case could be scored (see above)")
