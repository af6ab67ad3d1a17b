"""scripts/speed.py: what is written, and the counts, which hang on no machine. Times are never asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import speed
import torch

from mimicbrush.errors import MimicBrushError

ROOT = Path(__file__).parents[2]


def test_a_measurement_is_written(tmp_path: Path, script_environment: Callable[[], dict[str, str]]) -> None:
    command = [sys.executable, "scripts/speed.py", "dropped_references", "--rounds", "1", "--json", str(tmp_path / "f")]
    subprocess.run(command, cwd=ROOT, env=script_environment(), check=True, stdout=subprocess.DEVNULL)
    figures = json.loads((tmp_path / "f").read_text())
    assert figures["name"] == "dropped_references"
    (case,) = figures["cases"]
    assert case["time_ratio"] > 0
    # Of four attentions' worth of work, one over the own tokens alone and its projections are saved.
    assert 1.4 < case["flop_ratio"] < 1.6
    assert case["flop_ratio_full_size"] == case["flop_ratio"]
    assert case["max_abs_diff"] < 1e-5


def test_a_full_size_edit_by_count() -> None:
    counted = speed.full_size_edit()
    # REFERENCE.md section 7 counts the leanest edit at these; remembered constants and projections save a little more.
    for reference_timestep, ours_tera, least in (("current", 130.7, 1.55), ("zero", 92.6, 2.2)):
        own, peer = counted[reference_timestep]
        assert 0.97 * ours_tera < own <= ours_tera
        assert peer / own >= least


@pytest.mark.parametrize(("side", "width"), [(64, 320), (32, 640)])
def test_a_reading_layer_by_count(side: int, width: int) -> None:
    own, peer = (speed.count_flops(side) for side in speed.read_block_sides(side, width, "meta"))
    assert peer / own >= 3


def test_results_that_differ_have_no_speed() -> None:
    case = speed.Case("wrong", lambda: torch.zeros(1), lambda: torch.ones(1), 1e-4, rounds=1)
    with pytest.raises(MimicBrushError, match="wrong: ours and the peer differ by 1"):
        speed.compare(case, 1)


def test_the_gpu_measurement_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MimicBrushError, match="needs a CUDA GPU"):
        speed.edit_gpu()


@pytest.mark.slow
def test_the_gpu_measurement_runs_on_a_cpu_at_a_small_size() -> None:
    # In float32: a CPU without instructions for bfloat16 takes minutes.
    case = speed.edit_cases("cpu", "float32", 128, (32, 32, 32, 32), 1)[0]
    assert case.case == "current, eager"
    assert speed.compare(case, 1)["max_abs_diff"] <= 1e-3
