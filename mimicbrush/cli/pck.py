"""Measure keypoint transfer (PCK): does the model look at the right place?

mimicbrush pck --pairs MINED --output FOLDER --model DIR

Every keypoint is tested twice: once under the mask, and once where the model
sees it. The table compares the reference attention with the same networks
before training, with features (DIFT, optionally with DINOv2), with keeping the
same place, and with chance. A second table has the attention by layer and by
third of the steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mimicbrush.errors import InputError
from mimicbrush.io.outputs import check_output_folder, write_results
from mimicbrush.pipelines.small_model import SHIPPED_NAME
from mimicbrush.ranges import SEED_RANGE, CommandParser, NumberRange, one_of

if TYPE_CHECKING:
    from mimicbrush.evaluation.keypoint_transfer.methods import Method
    from mimicbrush.evaluation.keypoint_transfer.tasks import TransferTask
    from mimicbrush.pipelines import MimicBrushPipeline
    from mimicbrush.pipelines.klein.pipeline import KleinPipeline

_STRENGTHS = ("weak", "medium", "strong")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(description=__doc__)
    data = parser.add_argument_group("images (give one of these)").add_mutually_exclusive_group(required=True)
    data.add_argument("--pairs", type=Path, metavar="DIR", help="mined pairs; held-out frames are warped")
    photographs_help = "folder of photographs; two views are made of each"
    data.add_argument("--photographs", type=Path, metavar="DIR", help=photographs_help)
    data.add_argument(
        "--homographies",
        type=Path,
        metavar="DIR",
        help="folders of 1.ppm to 6.ppm with H_1_2 to H_1_6 (HPatches), or of img1.ppm, img2.ppm and H1to2p",
    )
    data.add_argument("--spair", type=Path, metavar="DIR", help="folder of SPair-71k")
    model_help = "model, as for `mimicbrush edit` (default: small)"
    parser.add_argument("--model", default=SHIPPED_NAME, metavar="DIR|released|small", help=model_help)
    output_help = "folder for pck.json, table.md and transfers.png"
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help=output_help)
    most = NumberRange(at_least=1, whole=True)
    parser.add_argument(
        "--max-pairs", type=most.read, default=46, metavar="N", help="use at most N pairs (default: 46)"
    )
    parser.add_argument(
        "--strength",
        nargs="+",
        **one_of(*_STRENGTHS),
        help="how strongly the views of --photographs are warped (default: all three)",
    )
    parser.add_argument(
        "--logits",
        action="store_true",
        help="average the attention scores before the softmax instead of the probabilities",
    )
    parser.add_argument(
        "--reciprocal",
        action="store_true",
        help="add the transposed attention map of the swapped pair (takes twice as long)",
    )
    parser.add_argument(
        "--dinov2", type=Path, metavar="DIR", help="folder of DINOv2 weights, to add features of SD and DINO"
    )
    seed_help = "seed of warps, untrained weights and bootstrap (default: 0)"
    parser.add_argument("--seed", type=SEED_RANGE.read, default=0, help=seed_help)
    arguments = parser.parse_args()
    if arguments.strength and not arguments.photographs:
        parser.error("--strength can only be used with --photographs")
    return arguments


def main() -> None:
    """Measure keypoint transfer, and write its table, numbers and plot."""
    arguments = parse_arguments()
    check_output_folder(arguments.output, "--output")

    from mimicbrush.data.manifest import check_outside_mined_folder
    from mimicbrush.pipelines.find_pipeline import find_pipeline

    check_outside_mined_folder(arguments.output, f"--output {arguments.output}")

    folder = find_pipeline(arguments.model)

    from tqdm import tqdm

    from mimicbrush.evaluation.heldout import report
    from mimicbrush.evaluation.heldout.reference_gain import describe_few_sources
    from mimicbrush.evaluation.keypoint_transfer import methods, pck
    from mimicbrush.evaluation.keypoint_transfer.attention import ATTENTION_STEPS, AttentionTransfer
    from mimicbrush.evaluation.keypoint_transfer.transfer_plot import plot_transfers
    from mimicbrush.io.atomic import write_aside, write_json
    from mimicbrush.io.images import write_image
    from mimicbrush.pipelines.open_pipeline import open_any_pipeline

    pipeline = open_any_pipeline(folder, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    if not pipeline.can_record_attention:
        raise InputError(f"--model {arguments.model} has no reference U-Net, so there is no reference attention")
    data = read_data(arguments, folder, pipeline)
    tasks = data.tasks
    before, untrained = methods.remove_training(pipeline, arguments.seed)
    before.set_progress_bar_config(disable=True)

    # 1. The attention: both of its tasks from the same edits.
    how = {"scores": arguments.logits, "reciprocal": arguments.reciprocal}
    found, found_before = (
        [AttentionTransfer(each, **how)(task) for task in tqdm(tasks, desc=name, unit="image", disable=None)]
        for name, each in (("reference attention", pipeline), ("reference attention, untrained", before))
    )
    places = {
        "reference attention in holes": [each.inside_mask for each in found],
        "reference attention in holes, untrained": [each.inside_mask for each in found_before],
        "reference attention at seen tokens": [each.outside_mask for each in found],
        "reference attention at seen tokens, untrained": [each.outside_mask for each in found_before],
    }

    # 2. What it is compared with.
    others, absent = feature_methods(arguments, pipeline, before)
    others |= {"same place": methods.keep_place, "chance": methods.RandomPlaces(arguments.seed)}
    places |= pck.carry_keypoints(others, tasks)

    # 3. Tables.
    results = pck.measure_pck(places, tasks, arguments.seed)
    sets = pck.measure_sets(places, tasks, arguments.seed)
    layers = pck.measure_layers(found, tasks, arguments.seed)
    table = pck.format_pck(results, absent)
    if sets:
        table += f"\n{pck.format_sets(sets)}"
    by_layer = pck.format_layers(layers)
    card = {
        "model": str(folder),
        "data": str(data.root),
        "keypoints": data.keypoints,
        "left_out": data.left_out,
        "untrained": untrained,
        "in_holes": "the keypoint's token is in the hole (a chessboard of 4 x 4 fields; two edits)",
        "at_seen_tokens": "the keypoint's token is outside of the hole of the same two edits; features see it, too",
        "features": "what enters the last shared self-attention of the reference U-Net, at "
        f"t = {methods.FEATURE_TIMESTEP} (DIFT's for Stable Diffusion 2.1; not tuned)",
        "logits": arguments.logits,
        "reciprocal": arguments.reciprocal,
        "attention": _ATTENTION[arguments.logits] + (_RECIPROCAL if arguments.reciprocal else ""),
        "note": describe_few_sources(len({task.group for task in tasks})),
        "pictures": len(tasks),
        "points": sum(len(task.source_xy) for task in tasks),
        "sources": len({task.group for task in tasks}),
        "seed": arguments.seed,
        "canvas_px": pipeline.size_px,
        "attention_steps": ATTENTION_STEPS,
        "definition": "correct within alpha of the longer side of the canvas (SPair: of the object's box), mean over "
        "images, 95 % bootstrap over sources",
        "versions": report.find_package_versions(),
    }
    values = {"results": results, "sets": sets, "layers": layers, "absent": absent, "card": card}

    # 4. Write and print.
    def write(output: Path) -> None:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "pck.json", values)
        write_aside(output / "table.md", lambda aside: aside.write_text(f"{table}\n{by_layer}", encoding="utf-8"))
        image = plot_transfers(tasks, places["reference attention in holes"], "reference attention in holes")
        write_image(image, output / "transfers.png")

    write_results(arguments.output, write, f"{table}\n{by_layer}")
    print(f"\n{table}\n{by_layer}")
    print(f"{card['points']} keypoints in {len(tasks)} images of {card['sources']} sources")
    for each in data.left_out:
        print(f"skipped: {each}")
    if card["note"]:
        print(f"NOTE: {card['note']}")
    print("\n".join(f"wrote {arguments.output / name}" for name in ("pck.json", "table.md", "transfers.png")))


_ATTENTION = {
    False: "mean of probabilities over heads, layers and steps",
    True: "mean of scores before the softmax over heads, layers and steps; each layer's are standardised at each step: "
    "a token's mean over the reference taken away, divided by the layer's deviation",
}
_RECIPROCAL = "; the transposed map of the swapped pair is added"


class Data(NamedTuple):
    """Images with keypoints, where they come from, and what was left out of them and why."""

    tasks: list[TransferTask]
    root: Path
    keypoints: str
    left_out: list[str]


def read_data(arguments: argparse.Namespace, folder: Path, pipeline: MimicBrushPipeline | KleinPipeline) -> Data:
    """The images with their keypoints; of mined pairs and photographs only those that were not trained on."""
    from mimicbrush.evaluation.heldout import selection
    from mimicbrush.evaluation.keypoint_transfer import homographies
    from mimicbrush.evaluation.keypoint_transfer.tasks import GRID, make_warped_tasks, read_spair_tasks

    size_px, most, seed = pipeline.size_px, arguments.max_pairs, arguments.seed
    grid = f"a grid of {GRID} x {GRID}, where both images show it"
    if arguments.spair is not None:
        return Data(read_spair_tasks(arguments.spair, size_px, most), arguments.spair, "SPair-71k's", [])
    if arguments.homographies is not None:
        tasks, empty = homographies.read_homography_tasks(arguments.homographies, size_px, most)
        left_out = [f"{each}: its images have no keypoint in common" for each in empty]
        return Data(tasks, arguments.homographies, grid, left_out)

    from mimicbrush.data.training_data import read_training_data

    training = read_training_data(folder)
    if arguments.photographs is not None:
        files, seen = homographies.find_unseen_photographs(arguments.photographs, training)
        strengths = [name for name in _STRENGTHS if name in (arguments.strength or _STRENGTHS)]
        tasks, empty = homographies.make_photograph_tasks(files, strengths, size_px, most, seed)
        left_out = [f"{each}: its views have no keypoint in common" for each in empty]
        return Data(tasks, arguments.photographs, grid, [f"{each}: it was trained on" for each in seen] + left_out)

    from mimicbrush.data.manifest import read_manifest

    heldout = selection.select_heldout_pairs(read_manifest(arguments.pairs), "heldout", training)
    for message in heldout.messages:
        print(message)
    tasks, empty = make_warped_tasks(heldout.pairs, size_px, most, seed)
    return Data(tasks, arguments.pairs, grid, [f"{each}: its warped frame shows no keypoint" for each in empty])


def feature_methods(
    arguments: argparse.Namespace,
    pipeline: MimicBrushPipeline | KleinPipeline,
    before: MimicBrushPipeline | KleinPipeline,
) -> tuple[dict[str, Method], dict[str, str]]:
    """Build the rows of features, which see the keypoints; rows that cannot be measured come with the reason."""
    from mimicbrush.evaluation.keypoint_transfer import methods

    rows: dict[str, Method] = {}
    absent = {}
    try:
        rows["features (DIFT) at seen tokens"] = methods.FeatureTransfer(pipeline)
        rows["features (DIFT) at seen tokens, untrained"] = methods.FeatureTransfer(before)
        if arguments.dinov2 is None:
            absent["features and DINOv2"] = "--dinov2 is not given"
        else:
            dinov2 = read_dinov2(arguments.dinov2)
            rows["features and DINOv2 at seen tokens"] = methods.FeatureTransfer(pipeline, dinov2=dinov2)
    except methods.NoFeaturesError as error:
        absent["features"] = str(error)
    return rows, absent


def read_dinov2(folder: Path):  # type: ignore[no-untyped-def]  # the class is imported late
    """Load DINOv2 from a folder."""
    from transformers import Dinov2Model

    try:
        model, info = Dinov2Model.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise InputError(f"--dinov2 {folder} cannot be loaded: {error}") from error
    if missing := sorted(info["missing_keys"]):  # the library would fill in random ones
        raise InputError(f"--dinov2 {folder} lacks {len(missing)} weights of DINOv2, such as {missing[0]}")
    return model.eval()
