"""The evaluation: pairs in; numbers, a line per pair, and contact sheets out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mimicbrush.data.pair import Pair
from mimicbrush.errors import InputError
from mimicbrush.evaluation import baselines, report, sheets
from mimicbrush.evaluation.editors import Editor
from mimicbrush.evaluation.measure import DEFINITIONS, GAINS, PairScores, interval_note, score, summarise
from mimicbrush.evaluation.options import EvaluationOptions, SetName
from mimicbrush.evaluation.samples import EvalSample, SamplePlan, load_sample, plan_samples
from mimicbrush.ops.files import write_picture

METRICS_FILE = "metrics.json"
PER_PAIR_FILE = "per_pair.jsonl"
PICTURES_FOLDER = "pictures"
SHEET_FILES: dict[SetName, str] = {"natural": "contact_sheet.png", "warped": "contact_sheet_warped.png"}

#: Columns of the contact sheets: what a sample or a row's result is shown under.
_COLUMNS = {
    "source": "source\n(hole in black)",
    "mask": "mask\n(white = repaint)",
    "reference": "reference",
    "model": "result",
    "target": "target",
    "wrong": "wrong\nreference",
    "wrong_reference": "its result",
    "no_reference": "result without\nreference",
    "copy_in_place": "copy in place\n(no model)",
    "opencv_inpaint": "OpenCV inpainting\n(no model)",
}

Results = dict[str, np.ndarray]  # row name -> (S, S, 3) uint8


def evaluate(
    editor: Editor,
    pairs: Sequence[Pair],
    size_px: int,
    options: EvaluationOptions,
    output: Path | None = None,
    about: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Measure how well an editor restores the masked part of one frame with the help of the other.

    Args:
        editor: what is measured.
        pairs: to evaluate on (see `heldout.select_pairs`); wrong references come from these too.
        size_px: side of the editor's square canvas.
        options: how; `split`, `num_inference_steps` and `guidance_scale` are only noted down here: they are
            the doing of whoever chose the pairs and built the editor.
        output: folder for metrics, scores per pair, contact sheets and their pictures; None: none written.
        about: what else is to be noted down, such as where the editor and the pairs came from.

    Returns:
        What metrics.json holds; its `definitions` say what each number means.

    Raises:
        DataError: the pairs come from a single source, or cannot be read.
        InputError: the editor returned something of another shape or type.
    """
    plans = plan_samples(pairs, options.max_pairs, options.seed)
    shown = _shown(len(plans), options.sheet_pairs)
    scores: dict[str, list[PairScores]] = {name: [] for name in options.sets}
    records: list[dict[str, Any]] = []
    pictures: dict[str, list[tuple[EvalSample, Results]]] = {name: [] for name in options.sets}
    with tqdm(total=len(plans), unit="pair", desc="evaluating") as progress:
        for start in range(0, len(plans), options.batch_size):
            batch = plans[start : start + options.batch_size]
            for name, samples, results in _edit_batch(editor, batch, size_px, options):
                for offset, (sample, result) in enumerate(zip(samples, results, strict=True)):
                    scored = _score(sample, result)
                    scores[name].append(scored)
                    records.append(_record(name, sample, scored))
                    if start + offset in shown:
                        pictures[name].append((sample, result))
            progress.update(len(batch))
    summaries = {name: summarise(scores[name], options.seed) for name in options.sets}
    metrics = _metrics(summaries, size_px, options) | {"about": about or {}}
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        report.write_jsonl(output / PER_PAIR_FILE, records)
        for name in options.sets:
            _write_pictures(output, name, pictures[name], metrics[name])
        report.write_json(output / METRICS_FILE, metrics)
    return metrics


def _edit_batch(
    editor: Editor, batch: Sequence[SamplePlan], size_px: int, options: EvaluationOptions
) -> Iterator[tuple[SetName, list[EvalSample], list[Results]]]:
    """Edit a few pairs in every way, set by set; what needs no reference is the same in all and done once."""
    without: list[np.ndarray] | None = None
    for name in options.sets:
        samples = [load_sample(plan, name, size_px, options.seed) for plan in batch]
        model = _edit(editor, samples, [sample.reference for sample in samples])
        wrong = _edit(editor, samples, [sample.wrong_reference for sample in samples])
        without = _edit(editor, samples, None) if without is None else without
        results = [
            {
                "model": model[i],
                "wrong_reference": wrong[i],
                "no_reference": without[i],
                "copy_in_place": baselines.copy_in_place(sample.source, sample.mask, sample.reference),
                "opencv_inpaint": baselines.opencv_inpaint(sample.source, sample.mask, sample.area),
            }
            for i, sample in enumerate(samples)
        ]
        yield name, samples, results


def _edit(editor: Editor, samples: Sequence[EvalSample], references: Sequence[np.ndarray] | None) -> list[np.ndarray]:
    sources = np.stack([sample.source for sample in samples])
    result = editor(
        sources,
        np.stack([sample.mask for sample in samples]),
        None if references is None else np.stack(references),
        [sample.noise_seed for sample in samples],
    )
    if result.shape != sources.shape or result.dtype != np.uint8:
        raise InputError(
            f"the editor returned {result.shape} {result.dtype} for sources of {sources.shape} uint8; "
            "both must be of one shape and type"
        )
    return list(result)


def _score(sample: EvalSample, results: Results) -> PairScores:
    rows = {name: score(result, sample.source, sample.mask) for name, result in results.items()}
    return PairScores(sample.plan.pair.source_hash, rows)


def _record(name: str, sample: EvalSample, scores: PairScores) -> dict[str, Any]:
    pair = sample.plan.pair
    return {
        "set": name,
        "pair_id": pair.pair_id,
        "source_path": pair.source_path,
        "source_hash": pair.source_hash,
        "wrong_pair_id": sample.plan.wrong.pair_id,
        "masked_ratio": float(sample.mask.sum() / sample.area.sum()),
        "rows": {row: values._asdict() for row, values in scores.rows.items()},
        **{gain: scores.gain(gain) for gain in GAINS},
    }


def _metrics(summaries: dict[SetName, dict[str, Any]], size_px: int, options: EvaluationOptions) -> dict[str, Any]:
    """The whole of metrics.json. What was not measured is null."""
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
        "note": interval_note(any_set["n_sources"]),
        "split": options.split,
        "seed": options.seed,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "size_px": size_px,
        "natural": top,
        "warped": summaries.get("warped"),
        "definitions": DEFINITIONS,
        "versions": report.versions(),
    }


def _shown(count: int, at_most: int) -> set[int]:
    """Which samples the contact sheets show: spread evenly, the first included."""
    return {count * i // min(count, at_most) for i in range(min(count, at_most))}


def _write_pictures(
    output: Path, name: SetName, shown: Sequence[tuple[EvalSample, Results]], summary: dict[str, Any]
) -> None:
    """The contact sheet of one set, and its pictures one by one at the model's own size."""
    if not shown:
        return
    folder = output / PICTURES_FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (sample, results) in enumerate(shown):
        cells = {
            "source": sheets.show_hole(sample.source, sample.mask),
            "mask": sample.mask * np.uint8(255),
            "reference": sample.reference,
            "target": sample.source,
            "wrong": sample.wrong_reference,
            **results,
        }
        clip = re.sub(r"\W+", "_", Path(sample.plan.pair.source_path).stem)[:60]
        for column, picture in cells.items():
            write_picture(Image.fromarray(picture), folder / f"{number:02d}_{clip}_{column}.png")
        psnr = {row: score(result, sample.source, sample.mask).psnr for row, result in results.items()}
        caption = (
            f"{sample.plan.pair.source_path}   PSNR in the hole: {psnr['model']:.1f} dB, with the wrong "
            f"reference {psnr['wrong_reference']:.1f} dB, without {psnr['no_reference']:.1f} dB"
        )
        rows.append(sheets.SheetRow(caption, [cells[column] for column in _COLUMNS]))
    title = f"{name} set, {summary['n']} pairs of {summary['n_sources']} source videos. Nothing is pasted back.\n"
    title += report.gain_sentences(summary).split("\n")[0]
    sheet = sheets.contact_sheet(title, list(_COLUMNS.values()), rows)
    write_picture(Image.fromarray(sheet), output / SHEET_FILES[name])
