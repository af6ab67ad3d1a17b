"""Evaluate: python scripts/evaluate.py editor=PIPELINE pairs=MINED output=FOLDER (configs/evaluate.yaml)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from mimicbrush.errors import InputError, run_plainly

FOLDERS = {
    "editor": "a pipeline folder, such as runs/NAME/pipeline",
    "pairs": "a folder of mined pairs (scripts/mine_pairs.py makes one)",
    "output": "the folder to write to",
}


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
def main(config: DictConfig) -> None:
    run_plainly(lambda: run(config))


def run(config: DictConfig) -> None:
    # 1. What can be checked before anything heavy is imported.
    missing = [f"{key}={meaning}" for key, meaning in FOLDERS.items() if OmegaConf.is_missing(config, key)]
    if missing:
        raise InputError("still to be named:\n  " + "\n  ".join(missing))
    values: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    editor_folder, pairs_folder, output = (Path(str(values.pop(key))) for key in FOLDERS)
    device = values.pop("device")

    from mimicbrush.evaluation.options import EvaluationOptions

    if isinstance(values["sets"], list):
        values["sets"] = tuple(values["sets"])
    options = EvaluationOptions(**values)

    from mimicbrush.data.manifest import read_manifest
    from mimicbrush.evaluation import editors, heldout, report

    editors.check_pipeline_folder(editor_folder)
    if output.exists() and not output.is_dir():
        raise InputError(f"output={output}: this is a file; name a folder")
    training = heldout.read_training_data(editor_folder)
    selection = heldout.select_pairs(read_manifest(pairs_folder), options.split, training)
    for message in selection.messages:
        print(message)

    # 2. The model.
    from mimicbrush.pipelines.load import load_pipeline, on_device

    pipeline = on_device(load_pipeline(editor_folder), device)
    pipeline.set_progress_bar_config(disable=True)
    editor = editors.PipelineEditor(pipeline, options.num_inference_steps, options.guidance_scale)

    from mimicbrush.evaluation.run import evaluate

    # 3. The numbers.
    about = {"editor": str(editor_folder), "pairs": str(pairs_folder)}
    metrics = evaluate(editor, selection.pairs, pipeline.size_px, options, output, about)
    print(report.summary(metrics, options.sets))
    print("\n".join(f"wrote {path}" for path in sorted(output.iterdir())))


if __name__ == "__main__":
    main()
