"""The benchmark: editors in; results in the released layout, metrics.json, table.md and report.html out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimicbrush.evaluation.benchmark import table
from mimicbrush.evaluation.benchmark.backbones import load_backbones
from mimicbrush.evaluation.benchmark.html_report import write_benchmark_report
from mimicbrush.evaluation.benchmark.layout import read_benchmark
from mimicbrush.evaluation.benchmark.options import BenchmarkOptions
from mimicbrush.evaluation.benchmark.run_editor import CaseScores, EditorRun, check_result_folders, run_editor
from mimicbrush.evaluation.editors.registry import check_editor, open_editor
from mimicbrush.evaluation.heldout import report
from mimicbrush.io.atomic import write_aside, write_json
from mimicbrush.io.outputs import write_results

BENCHMARK_METRICS_FILE, PER_CASE_FILE, TABLE_FILE, REPORT_FILE = (
    "metrics.json",
    "per_case.jsonl",
    "table.md",
    "report.html",
)


@dataclass(frozen=True)
class BenchmarkResult:
    """The result of a run over the benchmark.

    Attributes:
        metrics: what metrics.json holds.
        table: what table.md holds.
        tally: how many cases came out how, of every editor.
        troubles: a line for everything that has no number and should have one.
        lost: editors of which not one case could be scored, though some should have been.
    """

    metrics: dict[str, Any]
    table: str
    tally: str
    troubles: Sequence[str]
    lost: Sequence[str]


def _build_case_record(run: EditorRun, scores: CaseScores) -> dict[str, Any]:
    return {
        "editor": run.name,
        "track": scores.case.track.name,
        "number": scores.case.number,
        "group": scores.case.group,
        "outcome": scores.outcome,
        "reason": scores.reason,
        **scores.scores,
    }


def evaluate_benchmark(root: Path, options: BenchmarkOptions, output: Path) -> BenchmarkResult:
    """Run editors over a benchmark, one after the other, and measure.

    Results that are there already, of the same editor, images and seed, are kept: a run that was stopped goes on.

    Raises:
        InputError: there is no benchmark, an editor or a backbone is unknown or cannot be loaded.
        WeightsError: weights of an editor are absent.
        OutputError: `output` cannot be written to any more; the message holds the table, and says where all is kept.
    """
    check_result_folders(options.editors)
    for name in options.editors:
        check_editor(name)
    benchmark = read_benchmark(root)
    backbones = load_backbones(options.backbones)
    output.mkdir(parents=True, exist_ok=True)
    runs = []
    for name in options.editors:  # one at a time: two large ones would not fit into memory together
        editor = open_editor(
            name,
            device=options.device,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
        )
        runs.append(run_editor(editor, benchmark, output, backbones, options.seed))
        del editor
    summary = table.summarise_scores(runs, options.seed)
    card = table.build_metric_card(benchmark, options, backbones)
    differences = table.compare_with_first(runs, options.seed)
    text = "\n".join(part for part in (table.format_benchmark(summary), table.format_differences(differences)) if part)
    metrics = {"editors": summary, "differences": differences, "card": card}

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / BENCHMARK_METRICS_FILE, metrics)
        report.write_jsonl(
            folder / PER_CASE_FILE, (_build_case_record(run, each) for run in runs for each in run.cases)
        )
        write_aside(folder / TABLE_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))
        write_benchmark_report(folder / REPORT_FILE, benchmark, runs, summary, differences, card, options.shown_cases)

    write_results(output, write, text)
    lost = [run.name for run in runs if run.count("failed") and not run.count("scored")]
    return BenchmarkResult(
        metrics, text, table.count_outcomes(benchmark, runs), table.list_troubles(benchmark, runs), lost
    )
