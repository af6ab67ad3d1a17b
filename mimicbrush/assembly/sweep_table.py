"""The table of a sweep: the result of each job next to that of the paper. This module imports nothing heavy."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mimicbrush.assembly.run_folder import FINISHED_FILE
from mimicbrush.errors import InputError
from mimicbrush.evaluation.heldout.reference_gain import GAINS
from mimicbrush.evaluation.paper_tables import ABLATIONS, PAPER_COLUMNS
from mimicbrush.evaluation.statistics import MIN_SOURCES
from mimicbrush.io.atomic import write_aside, write_json
from mimicbrush.io.jsonl import read_steps
from mimicbrush.io.text import make_storable

#: Files in the folder of each job: its name and seed, and why it failed.
JOB_FILE = "job.json"
FAILED_FILE = "failed.json"
#: Name of the table's files in the folder of a sweep, without suffix.
TABLE_NAME = "table"

#: Figure -> heading and digits. The first two are logged while training, the others measured on held-out pairs.
_COLUMNS = {
    "loss": ("loss", 4),
    "loss_inside": ("loss inside", 4),
    "heldout/psnr": ("held-out PSNR, dB", 2),
    "heldout/ssim": ("held-out SSIM", 3),
    **{f"heldout/{key}": (f"{gain.name}, dB (95 % interval)", 2) for key, gain in GAINS.items()},
}
_GAINS = [f"heldout/{key}" for key in GAINS]
_NOTE = (
    "Losses are from the last steps. Held-out figures are from the last evaluation: with the averaged weights, on "
    "pairs that were not trained on, without pasting back. The paper's values are from its part-composition benchmark "
    "(Table 3), with weights trained at full scale: compare the order of the rows, not the values."
)


@dataclass(frozen=True)
class SweepRun:
    """Result of one job of a sweep.

    Attributes:
        folder: of the job, within that of the sweep.
        run_name, seed: of the run.
        state: "complete", "unfinished" (it runs, waits, or was stopped) or "failed".
        step, max_steps: that it has, and must reach.
        figures: the last of each name: those logged while training, and those of the last evaluation.
        heldout_step: of that evaluation.
        error: why it failed.
        failed_ns: when, by the clock of the disk.
    """

    folder: str
    run_name: str
    seed: int
    state: str
    step: int
    max_steps: int
    figures: dict[str, float] = field(default_factory=dict)
    heldout_step: int | None = None
    error: str = ""
    failed_ns: int = 0

    @property
    def row(self) -> str:
        """Name of the table row. Runs that differ only by their seed have the same row."""
        return self.folder.replace(f"-seed{self.seed}", "", 1)


def read_sweep(folder: Path) -> list[SweepRun]:
    """Read all jobs of a sweep, in the order of the paper's rows, then by name.

    Raises:
        InputError: there are none.
    """
    runs = []
    for where, subfolders, files in os.walk(folder):
        if JOB_FILE in files:
            subfolders.clear()
            runs.append(_read_run(folder, Path(where)))
    if not runs:
        raise InputError(
            f"{folder} has no jobs of a sweep (no */{JOB_FILE}). Give the folder that was hydra.sweep.dir of the sweep"
        )
    order = {name: number for number, name in enumerate(ABLATIONS)}
    return sorted(runs, key=lambda run: (order.get(run.run_name, len(order)), run.row, run.seed))


def _read_run(sweep: Path, folder: Path) -> SweepRun:
    """Read a job of a sweep. One with damaged files counts as failed, and does not affect the other jobs."""
    try:
        return _read_files(sweep, folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        failed = folder / FAILED_FILE
        return SweepRun(
            folder=folder.relative_to(sweep).as_posix(),
            run_name=folder.name,
            seed=0,
            state="failed",
            step=0,
            max_steps=0,
            error=f"its files are damaged ({make_storable(repr(error))}); delete {FINISHED_FILE}, or the folder",
            failed_ns=failed.stat().st_mtime_ns if failed.exists() else 0,
        )


def _read_files(sweep: Path, folder: Path) -> SweepRun:
    about = json.loads((folder / JOB_FILE).read_text())
    failed, finished = folder / FAILED_FILE, folder / FINISHED_FILE
    logged, heldout = (read_steps(folder / name)[-1:] for name in ("metrics.jsonl", "heldout/heldout.jsonl"))
    figures = {name: value for line in (*logged, *heldout) for name, value in line.items() if name != "step"}
    step = int(logged[0]["step"]) if logged else 0
    if finished.is_file():
        step = int(json.loads(finished.read_text())["steps"])
    return SweepRun(
        folder=folder.relative_to(sweep).as_posix(),
        run_name=str(about["run_name"]),
        seed=int(about["seed"]),
        state="failed" if failed.is_file() else "complete" if finished.is_file() else "unfinished",
        step=step,
        max_steps=int(about["max_steps"]),
        figures={name: float(value) for name, value in figures.items() if isinstance(value, int | float)},
        heldout_step=int(heldout[0]["step"]) if heldout else None,
        error=str(json.loads(failed.read_text())["error"]) if failed.is_file() else "",
        failed_ns=failed.stat().st_mtime_ns if failed.is_file() else 0,
    )


def print_table(folder: Path) -> list[SweepRun]:
    """Write ``table.md`` and ``table.json`` into the folder of a sweep, and print the first; see `read_sweep`."""
    runs = read_sweep(folder)
    text = format_markdown(runs)
    print(f"\n{text}")
    write_aside(folder / f"{TABLE_NAME}.md", lambda aside: aside.write_text(text, encoding="utf-8"))
    write_json(folder / f"{TABLE_NAME}.json", collect_values(runs))
    print(f"wrote {folder / TABLE_NAME}.md and .json")
    return runs


def _by_row(runs: Sequence[SweepRun]) -> dict[str, list[SweepRun]]:
    rows: dict[str, list[SweepRun]] = {}
    for run in runs:
        rows.setdefault(run.row, []).append(run)
    return rows


def _means(runs: Sequence[SweepRun]) -> dict[str, float]:
    """Average all figures that every one of these runs has."""
    shared = set.intersection(*(set(run.figures) for run in runs)) if runs else set()
    return {name: sum(run.figures[name] for run in runs) / len(runs) for name in sorted(shared)}


def collect_values(runs: Sequence[SweepRun]) -> dict[str, Any]:
    """Collect the table for programs: for each row, the values of the paper, all runs, and means over complete runs."""
    rows = []
    for row, of_row in _by_row(runs).items():
        paper = ABLATIONS.get(of_row[0].run_name)
        complete = [run for run in of_row if run.state == "complete"]
        rows.append(
            {
                "row": row,
                "paper": None
                if paper is None
                else {
                    "name": paper.name,
                    "part_composition": paper.part_composition._asdict(),
                    "texture_transfer": paper.texture_transfer._asdict(),
                },
                "complete": len(complete),
                "mean": _means(complete),
                "runs": [{name: value for name, value in asdict(run).items() if name != "failed_ns"} for run in of_row],
            }
        )
    return {"note": _NOTE, "rows": rows}


def format_markdown(runs: Sequence[SweepRun]) -> str:
    """Format the table as Markdown. With several seeds, their mean comes first, then each seed."""
    headings = ["row", "seed", "steps", *(heading for heading, _ in _COLUMNS.values())]
    headings += [f"paper: {PAPER_COLUMNS[0]}", *PAPER_COLUMNS[1:]]
    lines = [headings, ["---"] * len(headings)]
    for row, of_row in _by_row(runs).items():
        paper = ABLATIONS.get(of_row[0].run_name)
        theirs = [f"{value:.2f}" for value in paper.part_composition] if paper else [""] * len(PAPER_COLUMNS)
        if len(of_row) > 1:
            complete = [run for run in of_row if run.state == "complete"]
            count = f"{len(complete)} of {len(of_row)} complete"
            lines.append([row, "mean", count, *_cells(_means(complete)), *theirs])
            theirs = [""] * len(PAPER_COLUMNS)
        for run in of_row:
            steps = f"{run.step} of {run.max_steps}" + ("" if run.state == "complete" else f", {run.state}")
            lines.append([row, str(run.seed), steps, *_cells(run.figures, run), *theirs])
    notes = [f"* {run.folder} failed: {run.error.splitlines()[0]}" for run in runs if run.error]
    fewest = min((run.figures["heldout/n_sources"] for run in runs if "heldout/n_sources" in run.figures), default=None)
    if fewest is not None and fewest < MIN_SOURCES:
        notes.append(
            f"* Held-out pairs come from only {fewest:g} videos: the intervals are too narrow, and the result is not "
            "reliable."
        )
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([table, "", _NOTE, *([""] if notes else []), *notes]) + "\n"


def _cells(figures: Mapping[str, float], run: SweepRun | None = None) -> list[str]:
    """Format one cell per column; of a single run the gains with intervals, and the step where that is not the last.

    A gain that the evaluation of an earlier version did not measure reads n/a.
    """
    cells = [f"{figures[name]:.{digits}f}" if name in figures else "-" for name, (_, digits) in _COLUMNS.items()]
    for number, name in enumerate(_GAINS, len(_COLUMNS) - len(_GAINS)):
        if name not in figures:
            cells[number] = "n/a" if "heldout/psnr" in figures else "-"
            continue
        cells[number] = f"{figures[name]:+.2f}"
        if run is not None:
            low, high = figures[f"{name}_ci95_low"], figures[f"{name}_ci95_high"]
            cells[number] += f" ({low:+.2f} to {high:+.2f})"
    if run is not None and "heldout/psnr" in figures and run.heldout_step != run.step:
        cells[-1] += f" at step {run.heldout_step}"
    return cells
