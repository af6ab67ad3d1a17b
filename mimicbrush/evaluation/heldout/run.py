"""The evaluation on held-out pairs: makes metrics, a line of scores per pair, and contact sheets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mimicbrush.data.pair import Pair
from mimicbrush.evaluation.editors.protocol import Editor
from mimicbrush.evaluation.heldout import report, showcase
from mimicbrush.evaluation.heldout.options import EvaluationOptions, SetName
from mimicbrush.evaluation.heldout.reference_gain import (
    GAIN_DEFINITIONS,
    GAINS,
    PairScores,
    describe_few_sources,
    summarise_pairs,
)
from mimicbrush.evaluation.heldout.samples import SamplePlan, choose_shown_samples, plan_samples
from mimicbrush.evaluation.heldout.scoring import SHEET_COLUMNS, EditedPair, edit_batch, edit_samples, load_sets
from mimicbrush.io.atomic import write_json
from mimicbrush.io.images import write_image
from mimicbrush.io.outputs import write_or_keep, write_results
from mimicbrush.ops.contact_sheet import SheetRow, contact_sheet
from mimicbrush.ops.correspondence import LEGEND, Correspondence

METRICS_FILE = "metrics.json"
PER_PAIR_FILE = "per_pair.jsonl"
IMAGES_FOLDER = "pictures"
#: The pairs that are shown, as a list for `mimicbrush edit --batch`.
EDITS_FILE = "edits.jsonl"
SHOWCASE_FILE = "showcase.png"
SHEET_FILES: dict[SetName, str] = {"natural": "contact_sheet.png", "warped": "contact_sheet_warped.png"}

#: Columns of the contact sheets.
_SHOWN_COLUMNS = [name for name in SHEET_COLUMNS if name not in ("reference_places", "correspondence")]


def evaluate_heldout(
    editor: Editor,
    pairs: Sequence[Pair],
    size_px: int,
    options: EvaluationOptions,
    output: Path | None = None,
    about: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Measure how well an editor restores the masked part of one frame with the help of the other.

    Args:
        editor: the editor to evaluate.
        pairs: pairs to evaluate on (see `selection.select_heldout_pairs`); wrong references also come from these.
        size_px: side of the editor's square canvas.
        options: options of the evaluation. `split`, `num_inference_steps` and `guidance_scale` are only recorded
            here; the caller has already applied them.
        output: folder for metrics, scores per pair, contact sheets and their images; None: nothing is written.
        about: further facts to record, such as the origin of editor and pairs.

    Returns:
        The content of metrics.json; its `definitions` explain each number.

    Raises:
        DataError: the pairs come from a single source, or cannot be read.
        InputError: the editor returned something of another shape or type.
        OutputError: `output` can no longer be written; the message has the numbers and says where the files were saved.
    """
    plans = plan_samples(pairs, options.max_pairs, options.seed, options.num_references)
    shown = choose_shown_samples(len(plans), options.sheet_pairs)
    scores: dict[str, list[PairScores]] = {name: [] for name in options.sets}
    records: list[dict[str, Any]] = []
    images: dict[str, list[EditedPair]] = {name: [] for name in options.sets}
    with tqdm(total=len(plans), unit="pair", desc="evaluating") as progress:
        for start in range(0, len(plans), options.batch_size):
            batch = plans[start : start + options.batch_size]
            loaded = [load_sets(plan, options.sets, size_px, options.seed) for plan in batch]
            for count, edited in enumerate(edit_batch(editor, loaded)):
                scores[edited.set_name].append(edited.scores)
                records.append(_build_record(edited))
                if start + count % len(batch) in shown:
                    images[edited.set_name].append(edited)
            progress.update(len(batch))
    summaries = {name: summarise_pairs(scores[name], options.seed) for name in options.sets}
    metrics = _build_metrics(summaries, size_px, options) | {"about": about or {}}

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        report.write_jsonl(folder / PER_PAIR_FILE, records)
        for name in options.sets:
            _write_images(folder, name, images[name], metrics[name])
        write_json(folder / METRICS_FILE, metrics)

    if output is not None:
        write_results(output, write, report.format_summary(metrics, options.sets))
        _write_showcase(output / SHOWCASE_FILE, editor, plans, size_px, options)
    return metrics


def _build_record(edited: EditedPair) -> dict[str, Any]:
    sample, scores = edited.sample, edited.scores
    pair = sample.plan.pair
    return {
        "set": edited.set_name,
        "pair_id": pair.pair_id,
        "source_path": pair.source_path,
        "source_hash": pair.source_hash,
        "wrong_pair_id": sample.plan.wrong_pair.pair_id,
        "masked_ratio": float(sample.mask.sum() / sample.area.sum()),
        "rows": {row: values._asdict() for row, values in scores.rows.items()},
        **{gain: scores.gain(gain) for gain in GAINS},
    }


def _build_metrics(
    summaries: dict[SetName, dict[str, Any]], size_px: int, options: EvaluationOptions
) -> dict[str, Any]:
    """Build the content of metrics.json. Values that were not measured are null."""
    top = summaries.get("natural")
    any_set = next(iter(summaries.values()))
    metrics: dict[str, Any] = {
        "n": top["n"] if top else None,
        "n_sources": any_set["n_sources"],
        "psnr": top["rows"]["model"]["psnr"] if top else None,
        "ssim": top["rows"]["model"]["ssim"] if top else None,
    }
    for gain in GAINS:
        metrics[gain] = top[gain] if top else None
        metrics[f"{gain}_ci95"] = top[f"{gain}_ci95"] if top else None
    return metrics | {
        "note": describe_few_sources(any_set["n_sources"]),
        "split": options.split,
        "seed": options.seed,
        "max_pairs": options.max_pairs,
        "num_references": options.num_references,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "size_px": size_px,
        "natural": top,
        "warped": summaries.get("warped"),
        "definitions": GAIN_DEFINITIONS,
        "versions": report.find_package_versions(),
    }


def _write_images(output: Path, name: SetName, shown: Sequence[EditedPair], summary: dict[str, Any]) -> None:
    """Write the contact sheet of one set, and its images as separate files at the size of the model."""
    folder = output / IMAGES_FOLDER / name
    (folder / EDITS_FILE).unlink(missing_ok=True)  # may be left from an earlier run
    if not shown:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows, edits = [], []
    for number, edited in enumerate(shown):
        images, cells = edited.make_images(), edited.make_cells()
        clip = re.sub(r"\W+", "_", Path(edited.sample.plan.pair.source_path).stem)[:60]
        names = {column: f"{number:02d}_{clip}_{column}.png" for column in images}
        for column, image in images.items():
            write_image(Image.fromarray(image), folder / names[column])
        references = [names["reference"]]
        others = edited.sample.other_references
        for place, image in enumerate([] if others is None else others, start=2):
            references.append(f"{number:02d}_{clip}_reference_{place}.png")
            write_image(Image.fromarray(image), folder / references[-1])
        edits.append(
            {
                "source": names["target"],
                "mask": names["mask"],
                "reference": references if len(references) > 1 else references[0],
                "output": f"{number:02d}_{clip}_edited.png",
            }
        )
        rows.append(SheetRow(edited.make_caption(), [cells[column] for column in _SHOWN_COLUMNS]))
    report.write_jsonl(folder / EDITS_FILE, edits)
    title = f"{name} set, {summary['n']} pairs of {summary['n_sources']} source videos. Raw outputs, not pasted back.\n"
    title += report.describe_gains(summary)
    sheet = contact_sheet(title, [SHEET_COLUMNS[column] for column in _SHOWN_COLUMNS], rows)
    write_image(Image.fromarray(sheet), output / SHEET_FILES[name])


def _write_showcase(
    path: Path, editor: Editor, plans: Sequence[SamplePlan], size_px: int, options: EvaluationOptions
) -> None:
    """Edit a few pairs again, with masks whose content only the reference shows, and write large images of them."""
    path.unlink(missing_ok=True)  # may be left from an earlier run
    chosen = showcase.choose_showcase_pairs(plans) if "natural" in options.sets and options.sheet_pairs else []
    if not chosen:
        return
    samples = [showcase.load_showcase_sample(plan, hole, size_px, options.seed) for plan, hole in chosen]
    results: list[np.ndarray] = []
    correspondences: list[Correspondence] = []
    for start in range(0, len(samples), options.batch_size):
        edited = edit_samples(editor, samples[start : start + options.batch_size], "reference", True)
        results += list(edited.images)
        correspondences += edited.correspondences or []
    rows = []
    for number, (sample, (plan, hole)) in enumerate(zip(samples, chosen, strict=True)):
        correspondence = correspondences[number] if correspondences else None
        row = showcase.make_showcase_row(plan.pair.source_path, sample, hole, results[number], correspondence)
        rows.append(row)
    title = (
        f"The surroundings do not show what these {len(rows)} masks hide. The reference does, at another place.\n"
        f"They were chosen for this from {len(plans)} pairs, not for their results. The results are pasted back."
    )
    if correspondences:
        title += "\n" + LEGEND.replace(". ", ".\n")
    sheet = Image.fromarray(showcase.make_showcase_sheet(title, showcase.SHOWCASE_COLUMNS, rows))
    write_or_keep(path, partial(write_image, sheet))
