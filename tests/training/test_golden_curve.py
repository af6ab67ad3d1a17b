from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def curves() -> ModuleType:
    """The script that measures them."""
    spec = importlib.util.spec_from_file_location("loss_curve", GOLDEN / "loss_curve.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loss_curve"] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    return module


#: `make test` takes this many steps of each, `make slow` all of them.
FIRST_STEPS = 40


@pytest.fixture(
    scope="module",
    params=[
        f"train.max_steps={FIRST_STEPS}",
        pytest.param("", marks=pytest.mark.slow),
        pytest.param("train.selective_checkpointing=true", marks=pytest.mark.slow),
    ],
)
def measured_curves(
    curves: ModuleType, script_environment: Callable[[], dict[str, str]], request: pytest.FixtureRequest
) -> tuple[dict[str, Any], bool]:
    """All of them, and whether they are whole, from another process: torch chooses its kernels when it starts."""
    done = subprocess.run(
        [sys.executable, GOLDEN / "loss_curve.py", "--print", *request.param.split()],
        env={**script_environment(), **curves.KERNELS},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1]), "max_steps" not in request.param


@pytest.mark.parametrize("name", ["loss_curve.json", "correspondence_curve.json"])
def test_losses_are_what_they_were(name: str, curves: ModuleType, measured_curves: tuple[dict[str, Any], bool]) -> None:
    curves_found, is_whole = measured_curves
    found, expected = curves_found[name], json.loads((GOLDEN / name).read_text())
    assert found.keys() == expected.keys() and ("loss_correspondence" in found) == (name != "loss_curve.json")
    for measured, before in zip(found.values(), expected.values(), strict=True):
        steps = curves.CURVES[name].steps
        assert len(before) == steps and len(measured) == (steps if is_whole else min(FIRST_STEPS, steps))
        # Kinds of processors differ by rounding, which grows: by 1e-7 at first.
        assert measured[:10] == pytest.approx(before[:10], rel=1e-6)
        assert measured == pytest.approx(before[: len(measured)], rel=1e-4)
    losses = found["losses"] if is_whole else expected["losses"]
    assert losses[0] > 0.7 and sum(losses[-10:]) < 0.75 * sum(losses[:10])
