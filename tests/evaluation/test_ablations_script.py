"""The ablations as they are started from the command line."""

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

from mimicbrush.evaluation.ablations import SETS

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, "scripts/ablations.py"]
SMALLEST = [
    "model.size_px=16",
    "model.block_out_channels=[16,32]",
    "model.attention_heads=2",
    "model.context_width=16",
    "train.total_batch_size=2",
    "train.max_steps=2",
    "train.lr_warmup_steps=1",
    "data.heldout_ratio=0.5",
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "grid_050"], "every row is compared with full"),
        (["--table", "options", "--rows", "all_heads"], "every row is compared with recipe"),
        (["--table", "options", "--rows", "recipe", "grid_050"], "expected one of recipe, no_correspondence_loss"),
        (["--pairs", "nowhere"], "mimicbrush data"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    arguments: list[str], message: str, tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    command = [*SCRIPT, "--output", str(tmp_path / "out"), *arguments]
    done = warm_scripts.run(command, cwd=ROOT, env=script_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_between_two_evaluations_it_goes_on_and_keeps_what_is_done(
    mined: Path, tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    output = tmp_path / "ablations"
    command = [*SCRIPT, "--experiment", "smoke", "--rows", "full", "grid_050", "--seeds", "0", "--output", str(output)]
    command += ["--pairs", str(mined), "--max-pairs", "2", "--steps", "1", *SMALLEST, f"data.root={mined}"]
    environment = script_environment()
    process = warm_scripts.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    first = output / "full-seed0" / "evaluation" / "metrics.json"
    deadline = time.monotonic() + 200
    while not first.is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "effects.md").exists()
    before = first.stat().st_mtime_ns

    done = warm_scripts.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "is complete (2 steps): skipped" in done.stdout and f"{first.parent} already exists" in done.stdout
    assert first.stat().st_mtime_ns == before
    effects = json.loads((output / "effects.json").read_text())
    assert list(effects) == ["full", "grid_050"] and list(effects["full"]) == list(SETS)
    assert effects["grid_050"]["natural"]["psnr"]["interval"]
    assert (output / "full-seed0" / "pck" / "pck.json").is_file()
    told = (output / "effects.md").read_text()
    assert told in done.stdout and "needs pretrained weights" in told
