"""Sweeps as they are started from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import warm_scripts

ROOT = Path(__file__).parents[2]
SMALLEST = [
    "+experiment=smoke",
    "model.size_px=16",
    "model.block_out_channels=[16,32]",
    "model.attention_heads=2",
    "model.context_width=16",
    "train.total_batch_size=2",
    "train.log_every=1",
    "train.checkpoint_every=2",
]


class Sweep:
    """Starts the script in a process of its own."""

    def __init__(self, mined: Path, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.command = [sys.executable, "scripts/train.py", "-m", *SMALLEST]
        self.command += [f"data.root={mined}", f"hydra.sweep.dir={folder}"]

    def run(self, *overrides: str) -> subprocess.CompletedProcess[str]:
        # Launchers begin processes of their own, and expect one that was started in the usual way.
        has_launcher = self.command[1] == "-m" or any("launcher" in each for each in overrides)
        run = subprocess.run if has_launcher else warm_scripts.run
        done: subprocess.CompletedProcess[str] = run(
            [*self.command, *overrides], cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False
        )
        return done

    def start(self, *overrides: str) -> warm_scripts.Popen:
        return warm_scripts.Popen(
            [*self.command, *overrides],
            cwd=ROOT,
            env=self.environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def touched(self, job: str) -> dict[str, int]:
        """When each file of a job was last changed."""
        files = [path for path in (self.folder / job).rglob("*") if path.is_file()]
        return {path.relative_to(self.folder).as_posix(): path.stat().st_mtime_ns for path in files}

    def table(self) -> dict[str, tuple[str, int]]:
        """Folder -> state and steps, as the table has it."""
        rows = json.loads((self.folder / "table.json").read_text())["rows"]
        return {run["folder"]: (run["state"], run["step"]) for row in rows for run in row["runs"]}


@pytest.fixture
def sweep(mined: Path, tmp_path: Path, script_environment: Callable[[], dict[str, str]]) -> Sweep:
    return Sweep(mined, tmp_path / "sweep", script_environment())


def test_a_failing_job_leaves_the_others_alone_and_what_is_complete_is_skipped(sweep: Sweep) -> None:
    first = sweep.run("train.max_steps=2", "train.total_batch_size=0,2")
    bad, good = (f"smoke-seed0-train.total_batch_size_{size}" for size in (0, 2))
    assert sweep.table() == {bad: ("failed", 0), good: ("complete", 2)}
    assert first.returncode == 1, first.stderr
    error = "train.total_batch_size=0: expected a whole number from 1 to 1048576"
    assert f"error: {bad}: {error}" in first.stderr
    last = f"error: 1 of the jobs failed. Run the same command again to retry them:\n  {bad}: {error}\n"
    assert first.stderr.endswith(last)
    assert "Traceback" not in first.stderr
    assert "| 2 of 2 |" in first.stdout and (sweep.folder / "table.md").read_text() in first.stdout

    # Started again without it: nothing to do, and what failed in another sweep does not fail this one.
    before = sweep.touched(good)
    again = sweep.run("train.max_steps=2", "train.total_batch_size=2,2")
    assert again.returncode == 0, again.stderr
    assert f"{good} is complete (2 steps): skipped" in again.stdout and sweep.touched(good) == before
    # The same folder asked for with another choice: nothing is overwritten.
    differing = sweep.run("train.max_steps=2", "train.total_batch_size=2,2", "train.learning_rate=0.5")
    assert differing.returncode == 1
    assert "another run, which is complete (train.learning_rate: was 0.003, now 0.5)" in differing.stderr
    assert "hydra.sweep.dir=..." in differing.stderr
    assert {name: at for name, at in sweep.touched(good).items() if "failed.json" not in name} == before


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_an_added_row_moves_none(sweep: Sweep) -> None:
    options = ["train.max_steps=60"]
    process = sweep.start(*options, "+ablation=full,grid_050")
    second = sweep.folder / "grid_050-seed0" / "checkpoints"
    deadline = time.monotonic() + 250
    while not list(second.glob("step-*[0-9]")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reached = sorted(path.name for path in second.glob("step-*[0-9]"))[-1]
    assert reached < "step-00000060", "the machine was too fast for this test"
    before = sweep.touched("full-seed0")
    assert any("checkpoints/" in name for name in before) and "full-seed0/finished.json" in before

    script = [sys.executable, "scripts/sweep_table.py", str(sweep.folder)]
    warm_scripts.run(script, cwd=ROOT, env=sweep.environment, check=True, stdout=subprocess.DEVNULL)
    states = sweep.table()
    assert states["full-seed0"] == ("complete", 60) and states["grid_050-seed0"][0] == "unfinished"

    done = sweep.run(*options, "+ablation=full,grid_025,grid_050")
    assert done.returncode == 0, done.stderr
    assert sweep.touched("full-seed0") == before
    assert f"{sweep.folder / 'full-seed0'} is complete (60 steps): skipped" in done.stdout
    assert f"resumed from {second}/step-" in done.stdout
    assert sweep.table() == {f"{name}-seed0": ("complete", 60) for name in ("full", "grid_025", "grid_050")}


@pytest.mark.slow
def test_a_signal_ends_the_sweep_with_its_job_saved(sweep: Sweep) -> None:
    process = sweep.start("train.max_steps=100000", "+ablation=full,grid_050")
    first = sweep.folder / "full-seed0" / "checkpoints"
    deadline = time.monotonic() + 250
    while not list(first.glob("step-*[0-9]")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert not (sweep.folder / "grid_050-seed0").exists() and not (first.parent / "failed.json").exists()


@pytest.mark.slow
def test_jobs_in_processes_side_by_side(sweep: Sweep) -> None:
    done = sweep.run(
        "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "train.max_steps=2", "+ablation=full,grid_050", "seed=0,1"
    )
    assert done.returncode == 0, done.stderr
    expected = {f"{name}-seed{seed}": ("complete", 2) for name in ("full", "grid_050") for seed in (0, 1)}
    assert sweep.table() == expected


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "submitit"])
def test_processes_that_share_each_job(sweep: Sweep, launcher: str) -> None:
    options = ["train.max_steps=2", "+ablation=full,grid_050", "eval=heldout", "eval.num_inference_steps=1"]
    if launcher == "torchrun":
        sweep.command[1:1] = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    else:
        options += ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=5"]
    done = sweep.run(*options)
    assert done.returncode == 0, done.stderr
    assert sweep.table() == {f"{name}-seed0": ("complete", 2) for name in ("full", "grid_050")}
    said = done.stdout + "".join(log.read_text() for log in sweep.folder.glob(".submitit/*/*_log.out"))
    assert said.count("2 process(es) on cpu") == 2
    lines = (sweep.folder / "full-seed0" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2  # of one process
    heldout = (sweep.folder / "full-seed0" / "heldout" / "heldout.jsonl").read_text().splitlines()
    assert [json.loads(line)["heldout/n"] for line in heldout] == [6]


@pytest.mark.slow
def test_jobs_of_one_process_may_want_different_precisions(sweep: Sweep) -> None:
    done = sweep.run("train.max_steps=2", "train.mixed_precision=no,bf16")
    assert done.returncode == 0, done.stderr
    assert {state for state, _ in sweep.table().values()} == {"complete"}


@pytest.mark.slow
def test_all_ablations_are_rows(sweep: Sweep) -> None:
    done = sweep.run("train.max_steps=1", "+ablation=glob(*)")
    assert done.returncode == 0, done.stderr
    names = {path.stem for path in (ROOT / "configs" / "ablation").glob("*.yaml")}
    assert sweep.table() == {f"{name}-seed0": ("complete", 1) for name in names}
