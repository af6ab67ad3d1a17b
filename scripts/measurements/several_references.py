"""Compare two references with one on held-out pairs, as mined and with a first reference that shows too little.

python scripts/measurements/several_references.py PAIRS [--editor small] [--output FILE]

Each pair whose shot has a third frame is edited four times with the same noise: with the other frame of the pair (one),
with only the third frame, with both (two), and with the other frame twice. In the set "cut", the hole is a box, and the
first reference is the largest part of its frame next to the hole, so only the third frame shows what is in the hole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mimicbrush.data.manifest import read_manifest
from mimicbrush.data.training_data import read_training_data
from mimicbrush.errors import DataError, cli_main
from mimicbrush.evaluation.editors.protocol import Editor
from mimicbrush.evaluation.editors.registry import find_editor_pipeline, open_editor
from mimicbrush.evaluation.heldout.reference_gain import score_inside_mask
from mimicbrush.evaluation.heldout.samples import EvalSample, SamplePlan, load_sample, plan_samples
from mimicbrush.evaluation.heldout.scoring import edit_samples
from mimicbrush.evaluation.heldout.selection import select_heldout_pairs
from mimicbrush.evaluation.statistics import bootstrap_by_cluster
from mimicbrush.ops.canvas import IMAGE_FILL, letterbox
from mimicbrush.ops.geometry import letterbox_matrix, transform_points
from mimicbrush.ranges import CommandParser

SETS, ROWS = ("as mined", "cut"), ("one", "third frame", "two", "twice")
DIFFERENCES = (("two", "one"), ("two", "twice"), ("two", "third frame"))
#: The hole of the set "cut": side over that of the canvas. What is cut off reaches further by that much.
HOLE, MARGIN = 0.35, 0.08
#: A part of a frame is shown that has this much of its width or height, and such a hole has this many matches.
LEAST_PART, LEAST_MATCHES = 0.3, 4
_SEED, _BATCH = 0, 16


def main() -> None:
    """Measure with the arguments of the command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("pairs", type=Path, help="folder of mined pairs")
    parser.add_argument("--editor", default="small", help="pipeline folder, or small (default: small)")
    parser.add_argument("--output", type=Path, help="write the numbers of each pair to this JSON file")
    arguments = parser.parse_args()
    cli_main(lambda: measure(arguments.pairs, arguments.editor, arguments.output))


def measure(folder: Path, editor_name: str, output: Path | None) -> None:
    """Edit all pairs, print a table, and write the numbers of each pair."""
    pipeline_folder = find_editor_pipeline(editor_name)
    if pipeline_folder is None:
        raise DataError(f"--editor {editor_name}: expected a pipeline folder, or small")
    selection = select_heldout_pairs(read_manifest(folder), "heldout", read_training_data(pipeline_folder))
    editor = open_editor(editor_name)
    assert editor.size_px is not None
    plans = plan_samples(selection.pairs, None, _SEED, num_references=2)
    records: dict[str, list[dict[str, float | str]]] = {}
    for name in SETS:
        loaded = [make_sample(plan, name, editor.size_px) for plan in plans]
        records[name] = edit_all(editor, [sample for sample in loaded if sample is not None])
        print_table(name, records[name])
    if output is not None:
        output.write_text(json.dumps(records, indent=1) + "\n")


def make_sample(plan: SamplePlan, name: str, size_px: int) -> EvalSample | None:
    """Load a pair with two references; None if the set "cut" cannot have it."""
    sample = load_sample(plan, "natural", size_px, _SEED)
    if name == "as mined":
        return sample
    image = plan.pair.read_b()
    height, width = image.shape[:2]
    points = transform_points(plan.pair.a_points, letterbox_matrix(width, height, size_px))
    # 1. A box over the middle of the matches, within the image.
    side = round(HOLE * size_px)
    rows, columns = (np.flatnonzero(sample.area.any(axis=axis)) for axis in (1, 0))
    if not len(points) or side > min(len(rows), len(columns)):
        return None
    middle = np.median(points, axis=0)
    left, top = (
        int(np.clip(round(at - side / 2), inside[0], inside[-1] + 1 - side))
        for at, inside in zip(middle, (columns, rows), strict=True)
    )
    mask = np.zeros_like(sample.mask)
    mask[top : top + side, left : left + side] = 1
    # 2. Where the other frame shows what the hole covers.
    is_inside = ((points >= (left, top)) & (points < (left + side, top + side))).all(axis=1)
    if is_inside.sum() < LEAST_MATCHES:
        return None
    offset = np.median(plan.pair.b_points[is_inside] - plan.pair.a_points[is_inside], axis=0)
    scale = max(width, height) / size_px
    origin = np.array([columns[0], rows[0]])
    low = (np.array([left, top]) - origin) * scale + offset - MARGIN * max(width, height)
    high = low + side * scale + 2 * MARGIN * max(width, height)
    # 3. The largest part of it beside that.
    parts = [
        (0, 0, min(low[0], width), height),
        (max(high[0], 0), 0, width, height),
        (0, 0, width, min(low[1], height)),
        (0, max(high[1], 0), width, height),
    ]
    sizes = [(max(0, x1 - x0) / width, max(0, y1 - y0) / height) for x0, y0, x1, y1 in parts]
    best = max(range(4), key=lambda n: sizes[n][0] * sizes[n][1])
    if min(sizes[best]) < LEAST_PART:
        return None
    x0, y0, x1, y1 = (round(each) for each in parts[best])
    cut = letterbox(np.ascontiguousarray(image[y0:y1, x0:x1]), size_px, IMAGE_FILL)
    return replace(sample, mask=mask, reference=cut)


def edit_all(editor: Editor, samples: Sequence[EvalSample]) -> list[dict[str, float | str]]:
    """Edit each sample in all four ways: PSNR inside its mask by row, and its video."""
    records: list[dict[str, float | str]] = [{"source_hash": each.plan.pair.source_hash} for each in samples]
    for start in range(0, len(samples), _BATCH):
        batch = samples[start : start + _BATCH]
        thirds = [each.other_references for each in batch]
        variants = {
            "one": [replace(each, other_references=None) for each in batch],
            "third frame": [
                replace(each, reference=third[0], other_references=None)
                for each, third in zip(batch, thirds, strict=True)
                if third is not None
            ],
            "two": batch,
            "twice": [replace(each, other_references=each.reference[None]) for each in batch],
        }
        for row in ROWS:
            results = edit_samples(editor, variants[row], "reference").images
            for number, (result, sample) in enumerate(zip(results, batch, strict=True)):
                score = score_inside_mask(result, sample.source, sample.mask)
                records[start + number][row] = score.psnr
    return records


def print_table(name: str, records: Sequence[dict[str, float | str]]) -> None:
    """Print means, and differences with 95 % intervals over the videos."""
    if not records:
        print(f"{name}: no pairs")
        return
    videos = [str(each["source_hash"]) for each in records]
    values = {row: np.array([float(each[row]) for each in records]) for row in ROWS}
    means = ", ".join(f"{row} {values[row].mean():.2f} dB" for row in ROWS)
    print(f"{name}: {len(records)} pairs of {len(set(videos))} videos; {means}")
    for row, minus in DIFFERENCES:
        difference = values[row] - values[minus]
        low, high = bootstrap_by_cluster(difference, videos, _SEED)
        print(f"  {row} - {minus}: {difference.mean():+.2f} [{low:+.2f}, {high:+.2f}] dB")


if __name__ == "__main__":
    main()
