"""A piece of scripts/gpu_check.sh in its own process: python -m measurements.gpu_pieces REQUEST.

REQUEST is JSON: the piece, its variants, the device, whether at toy size, and the cases that are done already. It
writes what it finds to standard output, as JSON, a line each: the machine, then each row as it begins and as it ends.
Everything else that is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from measurements.breakdown import BREAKDOWN_STEPS, breakdown_rows
from measurements.editing import EditSetting, edit_rows
from measurements.harness import Counted, free_memory
from measurements.klein import klein_rows
from measurements.training_step import SMALL, StepSetting
from measurements.training_variants import train_step_rows

from mimicbrush.errors import MimicBrushError

ROOT = Path(__file__).resolve().parents[2]
#: What runs on the device that $DEVICE names. What a test notes of itself (`user_properties`) is in its row.
PARITY_TESTS = ("tests/parity/test_on_a_device.py",)
#: The status of a process whose GPU no longer responds: another one may go on.
GPU_LOST = 3

Tell = Callable[[dict[str, Any]], None]


def main() -> None:
    request = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(found: dict[str, Any]) -> None:
        out.write(json.dumps(found) + "\n")
        out.flush()

    run(request, tell)


def run(request: dict[str, Any], tell: Tell) -> None:
    """Run what is asked for.

    Raises:
        MimicBrushError: there is no such device.
        SystemExit: the GPU no longer responds.
    """
    device, done = request["device"], set(request["done"])
    if device == "cuda" and not torch.cuda.is_available():
        raise MimicBrushError("PyTorch sees no GPU; set DEVICE=cpu to try everything on a CPU, at toy size")
    tell({"machine": describe_machine(device)})
    if request["piece"] == "parity":
        run_parity(device, request["toy"], done, tell)
    else:
        run_rows(rows_of(request["piece"], request["variants"], device, request["toy"]), device, done, tell)


def describe_machine(device: str) -> dict[str, object]:
    """Describe the machine that the figures are from."""
    found: dict[str, object] = {
        "name": platform.processor() or platform.machine(),
        "torch": torch.__version__,  # it also names its CUDA
        **{package: version(package) for package in ("diffusers", "transformers")},
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def rows_of(piece: str, variants: Collection[str], device: str, toy: bool) -> Iterator[Counted]:
    """The rows of a piece that times something, at full size in bf16, or at toy size in float32."""
    trained = StepSetting(half=True, device=device)
    edited = EditSetting(device=device, dtype="bfloat16")
    exact, profiled_samples, profiled_steps = SMALL, 32, BREAKDOWN_STEPS
    if toy:
        trained = exact = StepSetting(size_px=64, block_out_channels=(32,) * 4, batch_size=2, device=device)
        edited = EditSetting(size_px=128, block_out_channels=(32,) * 4, steps=1, device=device)
        profiled_samples, profiled_steps = trained.batch_size, edited.steps
    if piece == "train_step":
        return train_step_rows(device, trained, exact, variants, toy)
    if piece == "klein":
        return klein_rows(device, toy)
    if piece == "edit":
        return edit_rows(edited, variants)
    return breakdown_rows(
        replace(trained, batch_size=profiled_samples), replace(edited, steps=profiled_steps), variants
    )


def run_rows(rows: Iterable[Counted], device: str, done: Collection[str], tell: Tell) -> None:
    """Measure row by row; one that fails leaves the others.

    Raises:
        SystemExit: the GPU no longer responds.
    """
    for row in rows:
        if row.case in done:
            continue
        tell({"case": row.case, "status": "running"})
        start = time.monotonic()
        try:
            found = {"status": "done", **row.figures()}
        except Exception as error:  # noqa: BLE001 - a variant may fail in any way, and the next may not
            found = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
        tell({"case": row.case, **found, "seconds": round(time.monotonic() - start, 1)})
        if found["status"] == "failed":
            check_gpu(device)


def check_gpu(device: str) -> None:
    """Free what has failed, and check that the GPU still answers: after some errors it never does in this process.

    Raises:
        SystemExit: it does not.
    """
    try:
        free_memory()  # first: a full memory is no lost GPU
        torch.ones(1, device=device).cpu()
    except RuntimeError as error:
        print(f"the GPU no longer responds: {error}", file=sys.stderr)
        raise SystemExit(GPU_LOST) from None


def run_parity(device: str, toy: bool, done: Collection[str], tell: Tell) -> None:
    """Run the tests; each is a row. To try it, those that take longer are left out.

    Raises:
        SystemExit: the GPU no longer responds.
    """
    # Other plugins of pytest that happen to be installed have no part in this.
    os.environ.update(DEVICE=device, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    # The project's own settings are for its tests as a whole, and name packages that are not needed here.
    options = ["-q", "-c", os.devnull, f"--rootdir={ROOT}", "--noconftest", "-p", "no:cacheprovider"]
    options += ["-m", "not slow"] if toy else []
    tests = [f"{ROOT / path}" for path in PARITY_TESTS]
    deselected = [f"--deselect={case}" for case in done]
    status = pytest.main([*options, *deselected, *tests], plugins=[TellTests(device, tell)])
    all_were_done = status == pytest.ExitCode.NO_TESTS_COLLECTED and done
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not all_were_done:
        raise SystemExit(int(status))


class TellTests:
    """Tell what becomes of each test; a plugin of pytest.

    Args:
        device: where they run.
        tell: takes the rows.
    """

    def __init__(self, device: str, tell: Tell) -> None:
        self.device, self.tell = device, tell

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        self.tell({"case": nodeid, "status": "running"})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A part of a test has ended: what sets it up, itself, or what clears it away."""
        row = {"case": report.nodeid, "seconds": round(report.duration, 1), **dict(report.user_properties)}
        if report.failed:
            self.tell({**row, "status": "failed", "error": report.longreprtext[-2000:]})
            try:
                check_gpu(self.device)
            except SystemExit as error:
                pytest.exit("the GPU no longer responds", returncode=int(str(error)))
        elif report.skipped:
            self.tell({**row, "status": "skipped", "error": report.longreprtext[-500:]})
        elif report.when == "call":
            self.tell({**row, "status": "done"})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file could not be read."""
        if report.failed:
            self.tell({"case": report.nodeid, "status": "failed", "error": report.longreprtext[-2000:]})


if __name__ == "__main__":
    main()
