from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_measurement_is_written(tmp_path: Path, script_environment: Callable[[], dict[str, str]]) -> None:
    command = [sys.executable, "scripts/speed.py", "dropped_references", "--rounds", "1", "--json", str(tmp_path / "f")]
    subprocess.run(command, cwd=ROOT, env=script_environment(), check=True, stdout=subprocess.DEVNULL)
    figures = json.loads((tmp_path / "f").read_text())
    assert figures["name"] == "dropped_references" and figures["time_ratio"] > 0
    # Of four attentions' worth of work, one over the own tokens alone and its projections are saved.
    assert 1.4 < figures["flop_ratio"] < 1.6
    assert figures["max_abs_diff"] < 1e-5
