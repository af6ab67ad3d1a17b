"""Does a model know what belongs where? Keypoint transfer (PCK) of its reference attention and its features.

python scripts/pck.py --pairs MINED --output FOLDER [--model DIR]

Beside it: the same networks before training, features (DIFT), these with DINOv2's where its weights are given, chance.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mimicbrush.errors import InputError, run_plainly
from mimicbrush.evaluation.shipped import SHIPPED_NAME, model_folder

if TYPE_CHECKING:
    from mimicbrush.evaluation.keypoint_transfer.methods import Method
    from mimicbrush.evaluation.keypoint_transfer.tasks import TransferTask
    from mimicbrush.pipelines import MimicBrushPipeline


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--pairs", type=Path, help="mined pairs, of which held-out frames are warped")
    parser.add_argument("--spair", type=Path, help="or the folder of SPair-71k")
    parser.add_argument("--model", default=SHIPPED_NAME, metavar="DIR|proof", help="pipeline folder (default: proof)")
    parser.add_argument("--output", type=Path, required=True, help="folder for pck.json, table.md and transfers.png")
    parser.add_argument("--max-pairs", type=int, default=46, help="pictures at most (default: 46)")
    parser.add_argument("--dinov2", type=Path, help="folder of DINOv2 weights, for SD + DINO features")
    parser.add_argument("--seed", type=int, default=0, help="of warps, untrained weights and bootstrap (default: 0)")
    arguments = parser.parse_args()
    if (arguments.pairs is None) == (arguments.spair is None):
        parser.error("name either --pairs or --spair")
    if arguments.max_pairs < 1:
        parser.error("--max-pairs must be 1 or more")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    folder = model_folder(arguments.model)
    if not (folder / "model_index.json").is_file():
        raise InputError(f"--model {arguments.model} is no pipeline folder (it has no model_index.json)")

    import torch

    from mimicbrush.evaluation import report
    from mimicbrush.evaluation.keypoint_transfer import methods, pck
    from mimicbrush.evaluation.keypoint_transfer.methods import FEATURE_TIMESTEP, NoFeaturesError
    from mimicbrush.evaluation.keypoint_transfer.picture import draw_transfers
    from mimicbrush.evaluation.keypoint_transfer.tasks import GRID
    from mimicbrush.evaluation.measure import interval_note
    from mimicbrush.ops.files import write_aside, write_picture
    from mimicbrush.pipelines.load import load_pipeline

    pipeline = load_pipeline(folder, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.reference_unet is None:
        raise InputError(f"--model {arguments.model} has no reference U-Net, so there is no reference attention")
    tasks, left_out = read_tasks(arguments, folder, pipeline)
    before = methods.untrained(pipeline, arguments.seed)
    before.set_progress_bar_config(disable=True)
    rows: dict[str, Method] = {
        "reference attention": methods.AttentionTransfer(pipeline),
        "reference attention, untrained": methods.AttentionTransfer(before),
    }
    absent = {}
    try:
        rows["features (DIFT)"] = methods.FeatureTransfer(pipeline)
        rows["features (DIFT), untrained"] = methods.FeatureTransfer(before)
        if arguments.dinov2 is None:
            absent["features and DINOv2"] = "--dinov2 names no weights"
        else:
            rows["features and DINOv2"] = methods.FeatureTransfer(pipeline, dinov2=read_dinov2(arguments.dinov2))
    except NoFeaturesError as error:
        absent["features"] = str(error)
    rows |= {"same place": methods.same_place, "chance": methods.Chance(arguments.seed)}

    results = pck.measure(rows, tasks, arguments.seed)
    table = pck.markdown(results, absent)
    card = {
        "model": str(folder),
        "data": str(arguments.pairs or arguments.spair),
        "keypoints": "SPair-71k's" if arguments.spair else f"a grid of {GRID} x {GRID}, where both pictures show it",
        "left_out": left_out,
        "untrained": "one draw of random weights; its interval is over sources only",
        "features": "what enters the last shared self-attention of the reference U-Net, at "
        f"t = {FEATURE_TIMESTEP} (DIFT's for Stable Diffusion 2.1; not tuned)",
        "note": interval_note(len({task.group for task in tasks})),
        "pictures": len(tasks),
        "points": sum(len(task.source_xy) for task in tasks),
        "sources": len({task.group for task in tasks}),
        "seed": arguments.seed,
        "canvas_px": pipeline.size_px,
        "attention_steps": methods.ATTENTION_STEPS,
        "definition": "correct within alpha of the longer side of the canvas (SPair: of the object's box), mean over "
        "pictures, 95 % bootstrap over sources",
        "versions": report.versions(),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    report.write_json(arguments.output / "pck.json", {"results": results, "absent": absent, "card": card})
    write_aside(arguments.output / "table.md", lambda aside: aside.write_text(table))
    write_picture(draw_transfers(tasks, rows["reference attention"]), arguments.output / "transfers.png")
    print(f"\n{table}\n{card['points']} keypoints in {len(tasks)} pictures of {card['sources']} sources")
    for pair in left_out:
        print(f"left out: {pair}: its warped frame shows no keypoint")
    if card["note"]:
        print(f"NOTE: {card['note']}")
    print("\n".join(f"wrote {arguments.output / name}" for name in ("pck.json", "table.md", "transfers.png")))


def read_tasks(
    arguments: argparse.Namespace, folder: Path, pipeline: MimicBrushPipeline
) -> tuple[list[TransferTask], list[str]]:
    """The pictures with their keypoints, and what has none; of mined pairs only those that were not trained on."""
    from mimicbrush.evaluation.keypoint_transfer.tasks import spair_tasks, warped_tasks

    if arguments.spair is not None:
        return spair_tasks(arguments.spair, pipeline.size_px, arguments.max_pairs), []

    from mimicbrush.data.manifest import read_manifest
    from mimicbrush.evaluation import heldout

    selection = heldout.select_pairs(read_manifest(arguments.pairs), "heldout", heldout.read_training_data(folder))
    for message in selection.messages:
        print(message)
    return warped_tasks(selection.pairs, pipeline.size_px, arguments.max_pairs, arguments.seed)


def read_dinov2(folder: Path):  # type: ignore[no-untyped-def]  # the class is imported late
    """DINOv2, of a folder."""
    from transformers import Dinov2Model

    try:
        model, info = Dinov2Model.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise InputError(f"--dinov2 {folder} cannot be loaded: {error}") from error
    if missing := sorted(info["missing_keys"]):  # the library would fill in random ones
        raise InputError(f"--dinov2 {folder} lacks {len(missing)} weights of a DINOv2, {missing[0]} among them")
    return model.eval()


if __name__ == "__main__":
    run_plainly(main)
