"""Tables: means of scores with intervals, with the rows of the paper below ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np

from mimicbrush.evaluation.benchmark.backbones import Backbones
from mimicbrush.evaluation.benchmark.efficientnet_lite0 import PACKAGE
from mimicbrush.evaluation.benchmark.layout import TRACKS, Benchmark
from mimicbrush.evaluation.benchmark.metrics import METRIC_DEFINITIONS, METRICS, WITH_TRUTH, select_numbers
from mimicbrush.evaluation.benchmark.options import BenchmarkOptions
from mimicbrush.evaluation.benchmark.run_editor import VARIANTS, EditorRun
from mimicbrush.evaluation.heldout import report
from mimicbrush.evaluation.paper_tables import ABLATIONS, TABLE_1, PaperValues
from mimicbrush.evaluation.statistics import LEVEL, MIN_SOURCES, RESAMPLES, bootstrap_by_cluster

#: Task -> its tracks: with a ground truth, and without.
TASKS = {"part composition": ("part_inner", "part_inter"), "texture transfer": ("texture_inner", "texture_inter")}
TASK_TITLES = {
    "pasted": "pasted back into the source, as users get it",
    "painted": "raw output, not pasted back",
}
DIFFERENCE_HEADS = ["method", "track", "metric", "difference", "cases"]
PAPER_CAUTION = (
    "The paper's benchmark was never published. Its rows were measured on other images, with weights trained at full "
    "scale, so you can compare the order of the rows, but not the values."
)


def summarise_scores(runs: Sequence[EditorRun], seed: int) -> dict[str, Any]:
    """Average scores: editor -> track -> outcome counts, and variant -> metric -> mean, interval, n."""
    return {
        run.name: {
            "about": run.about,
            "tracks": {
                track: _summarise_track(run, track, seed)
                for track in TRACKS
                if any(each.case.track.name == track for each in run.cases)
            },
        }
        for run in runs
    }


def _summarise_track(run: EditorRun, track: str, seed: int) -> dict[str, Any]:
    of_track = [each for each in run.cases if each.case.track.name == track]
    scored = [each for each in of_track if each.outcome == "scored"]
    values: dict[str, Any] = {
        "cases": len(of_track),
        **{outcome.replace(" ", "_"): run.count(outcome, track) for outcome in ("scored", "not applicable", "failed")},
        "reasons": {
            f"{each.case.track.folder}/{each.case.number}": each.reason for each in of_track if each.outcome != "scored"
        },
    }
    for variant in VARIANTS:
        values[variant] = {}
        for metric in METRICS:
            if (metric in WITH_TRUTH) != TRACKS[track].has_truth:  # type: ignore[index]
                continue
            found = [
                (select_numbers(each.scores[variant])[metric], each.case.group or each.case.number)
                for each in scored
                if metric in select_numbers(each.scores[variant])
            ]
            values[variant][metric] = _average(found, seed) | {"n_missing": len(of_track) - len(found)}
            if not found and scored:
                values[variant][metric]["why"] = str(scored[0].scores[variant].get(metric, ""))
    return values


def _average(found: Sequence[tuple[float, str]], seed: int) -> dict[str, Any]:
    if not found:
        return {"mean": None, "ci95": None, "n": 0}
    values, groups = np.array([value for value, _ in found]), [group for _, group in found]
    return {
        "mean": float(values.mean()),
        "ci95": list(bootstrap_by_cluster(values, groups, seed)),
        "n": len(found),
        "n_groups": len(set(groups)),
    }


def compare_with_first(runs: Sequence[EditorRun], seed: int) -> list[dict[str, Any]]:
    """Subtract the first editor's scores from each other editor's, case by case.

    The interval of a paired difference is narrower than two separate intervals suggest.

    Returns:
        For each editor, track, variant and metric that both have: mean of its value - the first's over the cases that
        both could be scored on, with its interval, and n.
    """
    found = []
    for run in runs[1:]:
        for track, variant in product(TRACKS, VARIANTS):
            scores = [
                {each.case.number: (select_numbers(each.scores[variant]), each.case) for each in one.cases
                 if each.case.track.name == track and each.outcome == "scored"} for one in (runs[0], run)
            ]  # fmt: skip
            for metric in METRICS:
                pairs = [
                    (scores[1][number][0][metric] - values[metric], case.group or number)
                    for number, (values, case) in scores[0].items()
                    if metric in values and metric in scores[1].get(number, ({}, None))[0]
                ]
                if pairs:
                    about = {"editor": run.name, "beside": runs[0].name, "track": track, "variant": variant}
                    found.append({**about, "metric": metric, **_average(pairs, seed)})
    return found


def tabulate_differences(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lay the differences out, a table for each variant: a title and rows of (method, other cells)."""
    tables = []
    for variant, title in TASK_TITLES.items():
        rows = []
        for each in found:
            if each["variant"] == variant:
                heading, digits = METRICS[each["metric"]]
                low, high = each["ci95"]
                value = f"{each['mean']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
                rows.append((each["editor"], [TRACKS[each["track"]].title, heading, value, str(each["n"])]))
        if rows:
            tables.append({"title": f"Difference to {found[0]['beside']} case by case: {title}", "rows": rows})
    return tables


def format_differences(found: Sequence[dict[str, Any]]) -> str:
    """Format the differences for table.md; "" where there are none."""
    parts = []
    for each in tabulate_differences(found):
        lines = [f"### {each['title']}", "", "| " + " | ".join(DIFFERENCE_HEADS) + " |", "|" + "---|" * 5]
        lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in each["rows"]]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def build_metric_card(benchmark: Benchmark, options: BenchmarkOptions, backbones: Backbones) -> dict[str, Any]:
    """Build the card of everything that the numbers depend on."""
    return {
        "benchmark": str(benchmark.root),
        "built": benchmark.about,
        "faults": [{"path": str(fault.path), "reason": fault.reason} for fault in benchmark.faults],
        "seed": options.seed,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "backbones": backbones.about,
        "backbone_options": asdict(options.backbones),
        "not_measured": backbones.absent,
        "ci95": f"{LEVEL:.0%} percentile bootstrap, {RESAMPLES} resamples of whole subjects or videos",
        "definitions": METRIC_DEFINITIONS,
        "versions": report.find_package_versions(("torchmetrics", "torchvision", PACKAGE)),
    }


def format_benchmark(summary: dict[str, Any]) -> str:
    """Format all tables: each task, pasted back and as painted, the paper's rows below ours."""
    return (
        "\n\n".join(
            f"### {task}, {TASK_TITLES[variant]}\n\n" + "\n".join(_format_task(summary, task, variant))
            for task in list_tasks(summary)
            for variant in VARIANTS
        )
        + f"\n\n{PAPER_CAUTION}\n"
        + "".join(f"\n{caution}\n" for caution in list_cautions(summary))
    )


def list_tasks(summary: dict[str, Any]) -> list[str]:
    """List the tasks that have cases."""
    there = {track for editor in summary.values() for track in editor["tracks"]}
    return [task for task, tracks in TASKS.items() if there.intersection(tracks)]


def list_cautions(summary: dict[str, Any]) -> list[str]:
    """List the tracks whose intervals come from too few subjects or videos, a line each."""
    found = []
    for track in TRACKS:
        groups = [
            value["n_groups"]
            for editor in summary.values()
            if track in editor["tracks"]
            for variant in VARIANTS
            for value in editor["tracks"][track][variant].values()
            if value["n"]
        ]
        if groups and min(groups) < MIN_SOURCES:
            found.append(
                f"{track}: intervals over only {min(groups)} subjects or videos are too narrow; use {MIN_SOURCES} or "
                "more."
            )
    return found


def tabulate_task(summary: dict[str, Any], task: str, variant: str) -> list[tuple[str, dict[str, str]]]:
    """Lay out one task, (method, metric -> cell) a row: our editors, then the paper's rows."""
    inner, inter = TASKS[task]
    found = []
    for name, editor in summary.items():
        cells = {}
        for metric in METRICS:
            track = editor["tracks"].get(inner if metric in WITH_TRUTH else inter)
            cells[metric] = _format_cell(track[variant][metric], metric, track["cases"]) if track else "n/a"
        found.append((name, cells))
    paper: dict[str, PaperValues] = (
        dict(TABLE_1) if task == "part composition" else {"MimicBrush": ABLATIONS["full"].texture_transfer}
    )
    for name, values in paper.items():
        cells = {key: f"{getattr(values, key):.2f}" if key in PaperValues._fields else "" for key in METRICS}
        found.append((f"paper: {name}", cells))
    return found


def _format_cell(value: dict[str, Any], metric: str, cases: int) -> str:
    if value["mean"] is None:
        return "n/a"
    digits = METRICS[metric][1]
    low, high = value["ci95"]
    missing = f", {value['n']} of {cases}" if value["n"] < cases else ""
    return f"{value['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}{missing}]"


def _format_task(summary: dict[str, Any], task: str, variant: str) -> list[str]:
    heads = [heading for heading, _ in METRICS.values()]
    lines = ["| method | " + " | ".join(heads) + " |", "|" + "---|" * (len(heads) + 1)]
    return lines + [
        f"| {name} | " + " | ".join(cells.values()) + " |" for name, cells in tabulate_task(summary, task, variant)
    ]


def list_troubles(benchmark: Benchmark, runs: Sequence[EditorRun]) -> list[str]:
    """List everything that should have a number but has none, one per line."""
    lines = [f"not usable: {fault.path.name}: {fault.reason}" for fault in benchmark.faults]
    for run in runs:
        lines += [
            f"{run.name}: {each.case.track.folder}/{each.case.number}: {each.reason}"
            for each in run.cases
            if each.outcome == "failed"
        ]
    return lines


def count_outcomes(benchmark: Benchmark, runs: Sequence[EditorRun]) -> str:
    """Count the outcomes of every editor, in lines that add up to all cases."""
    lines = [f"{len(benchmark.cases) + len(benchmark.faults)} cases = {len(benchmark.cases)} usable "
             f"+ {len(benchmark.faults)} not usable"]  # fmt: skip
    for run in runs:
        counts = {outcome: run.count(outcome) for outcome in ("scored", "not applicable", "failed")}
        parts = " + ".join(f"{count} {outcome}" for outcome, count in counts.items())
        lines.append(f"  {run.name}: {len(run.cases)} = {parts}")
    return "\n".join(lines)
