from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mimicbrush.assembly.run_folder import FinishedRun, write_finished_run
from mimicbrush.assembly.sweep_table import (
    FAILED_FILE,
    JOB_FILE,
    collect_values,
    format_markdown,
    print_table,
    read_sweep,
)
from mimicbrush.errors import InputError
from mimicbrush.evaluation.paper_tables import ABLATIONS

ROOT = Path(__file__).parents[2]
HELDOUT = {
    "heldout/n_sources": 9,
    "heldout/psnr": 17.0,
    "heldout/ssim": 0.5,
    "heldout/gain_over_no_reference_db": 0.25,
    "heldout/gain_over_no_reference_db_ci95_low": -0.5,
    "heldout/gain_over_no_reference_db_ci95_high": 1.0,
    "heldout/wrong_against_none_db": -1.25,
    "heldout/wrong_against_none_db_ci95_low": -2.0,
    "heldout/wrong_against_none_db_ci95_high": -0.5,
    "heldout/reference_gain_db": 1.5,
    "heldout/reference_gain_db_ci95_low": 0.5,
    "heldout/reference_gain_db_ci95_high": 2.5,
}


def job(sweep: Path, name: str, seed: int = 0, *, loss: float | None = None, steps: int = 20, label: str = "") -> Path:
    folder = sweep / f"{name}-seed{seed}{label}"
    folder.mkdir(parents=True)
    (folder / JOB_FILE).write_text(json.dumps({"run_name": name, "seed": seed, "max_steps": 20}))
    if loss is not None:
        lines = [{"step": 1, "loss": 9.0}, {"step": steps, "loss": loss, "loss_inside": 2 * loss, "loss_outside": None}]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def complete(sweep: Path, name: str, seed: int, loss: float, heldout: dict[str, float] | None = None) -> Path:
    folder = job(sweep, name, seed, loss=loss)
    if heldout is not None:
        (folder / "heldout").mkdir()
        (folder / "heldout" / "heldout.jsonl").write_text(json.dumps({"step": 20, **heldout}) + "\n")
    write_finished_run(folder, FinishedRun(20, 1.0, {}, {}))
    return folder


def cells(text: str, row: str) -> list[list[str]]:
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith(f"| {row} ")]
    return [[cell.strip() for cell in line] for line in lines]


def test_every_row_of_the_paper_is_an_ablation_and_only_ours_has_no_row() -> None:
    files = {path.stem for path in (ROOT / "configs" / "ablation").glob("*.yaml")}
    assert files - set(ABLATIONS) == {"orb_grid"} and set(ABLATIONS) <= files


def test_rows_stand_beside_the_papers(tmp_path: Path) -> None:
    complete(tmp_path, "own", 0, 0.4)
    complete(tmp_path, "full", 0, 0.25, HELDOUT)
    job(tmp_path, "grid_050", loss=0.5, steps=7)
    failed = job(tmp_path, "grid_025")
    (failed / FAILED_FILE).write_text(json.dumps({"error": "no more memory\nat all"}))
    runs = read_sweep(tmp_path)
    assert [run.run_name for run in runs] == ["grid_025", "grid_050", "full", "own"]
    text = format_markdown(runs)
    (full,) = cells(text, "full")
    assert full == ["full", "0", "20 of 20", "0.2500", "0.5000", "17.00", "0.500",
                    "+0.25 (-0.50 to +1.00)", "-1.25 (-2.00 to -0.50)", "+1.50 (+0.50 to +2.50)",
                    "0.70", "17.54", "0.28", "56.48", "84.30", "30.08"]  # fmt: skip
    assert cells(text, "grid_050")[0][1:8] == ["0", "7 of 20, unfinished", "0.5000", "1.0000", "-", "-", "-"]
    assert cells(text, "grid_050")[0][8:10] == ["-", "-"]
    assert cells(text, "grid_025")[0][1:4] == ["0", "0 of 20, failed", "-"]
    assert cells(text, "own")[0][10:] == [""] * 6
    assert "* grid_025-seed0 failed: no more memory\n" in text
    assert "from only 9 videos" in text and "from only" not in format_markdown(
        [run for run in runs if run.row != "full"]
    )


def test_several_seeds_are_averaged_where_they_are_complete(tmp_path: Path) -> None:
    complete(tmp_path, "full", 0, 0.2, HELDOUT)
    complete(tmp_path, "full", 1, 0.4, {**HELDOUT, "heldout/reference_gain_db": 0.5})
    job(tmp_path, "full", 2, loss=99.0, steps=3)
    runs = read_sweep(tmp_path)
    mean, *each = cells(format_markdown(runs), "full")
    assert mean[1:8] == ["mean", "2 of 3 complete", "0.3000", "0.6000", "17.00", "0.500", "+0.25"]
    assert mean[8:10] == ["-1.25", "+1.00"] and mean[11] == "17.54"
    assert [line[1] for line in each] == ["0", "1", "2"] and all(line[10:] == [""] * 6 for line in each)
    (row,) = collect_values(runs)["rows"]
    assert row["mean"]["loss"] == pytest.approx(0.3) and row["complete"] == 2
    assert [run["seed"] for run in row["runs"]] == [0, 1, 2]
    assert row["paper"]["texture_transfer"]["psnr"] == 17.73


def test_options_that_were_swept_make_rows_of_their_own(tmp_path: Path) -> None:
    for rate in ("0.1", "0.2"):
        for seed in (0, 1):
            job(tmp_path, "full", seed, label=f"-train.learning_rate_{rate}")
    rows = collect_values(read_sweep(tmp_path))["rows"]
    assert [(row["row"], len(row["runs"])) for row in rows] == [
        ("full-train.learning_rate_0.1", 2),
        ("full-train.learning_rate_0.2", 2),
    ]


def test_runs_of_an_earlier_version_are_read_and_what_they_lack_reads_na(tmp_path: Path) -> None:
    old = {name: value for name, value in HELDOUT.items() if "wrong_against_none" not in name}
    complete(tmp_path, "full", 0, 0.2, old)
    (row,) = cells(format_markdown(read_sweep(tmp_path)), "full")
    assert row[7:10] == ["+0.25 (-0.50 to +1.00)", "n/a", "+1.50 (+0.50 to +2.50)"]


def test_an_evaluation_that_is_not_of_the_last_step_says_so(tmp_path: Path) -> None:
    folder = complete(tmp_path, "full", 0, 0.2, HELDOUT)
    (folder / "heldout" / "heldout.jsonl").write_text(json.dumps({"step": 10, **HELDOUT}) + '\n{"step": 20, "hel')
    assert "to +2.50) at step 10 |" in format_markdown(read_sweep(tmp_path))


def test_the_table_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete(tmp_path / "deep" / "down", "full", 0, 0.2)  # where an option with a slash was swept
    print_table(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    values: dict[str, Any] = json.loads((tmp_path / "table.json").read_text())
    assert values["rows"][0]["runs"][0]["folder"] == "deep/down/full-seed0"
    with pytest.raises(InputError, match="has no jobs of a sweep"):
        print_table(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [JOB_FILE, FAILED_FILE, "finished.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\0", b'{"run_name": 1, "seed": "x"}'])
def test_a_job_whose_files_are_damaged_is_a_failed_one(name: str, content: bytes, tmp_path: Path) -> None:
    complete(tmp_path, "full", 0, 0.5)
    (complete(tmp_path, "full", 1, 0.5) / name).write_bytes(content)
    good, bad = sorted(read_sweep(tmp_path), key=lambda run: run.folder)
    assert good.state == "complete" and bad.state == "failed" and "its files are damaged" in bad.error
    assert format_markdown([good, bad])
