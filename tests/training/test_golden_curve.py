from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"


def test_a_hundred_losses_are_what_they_were(script_environment: Callable[[], dict[str, str]]) -> None:
    script = GOLDEN / "loss_curve.py"
    spec = importlib.util.spec_from_file_location("loss_curve", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    done = subprocess.run(
        [sys.executable, script, "--print"],
        env={**script_environment(), **module.KERNELS},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found, expected = json.loads(done.stdout.splitlines()[-1]), json.loads(module.FILE.read_text())
    assert len(expected["losses"]) == module.STEPS
    # Kinds of processors differ by rounding, which grows: by 1e-7 at first.
    assert found["losses"][:10] == pytest.approx(expected["losses"][:10], rel=1e-6)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
