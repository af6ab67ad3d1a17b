from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_scripts
from torch.optim.lr_scheduler import LambdaLR
from toy_run import SMALLEST, differing, everything, forget_accelerate, metrics, train

from mimicbrush.errors import MimicBrushError
from mimicbrush.training import checkpoints, method, trainer
from mimicbrush.training.guards import MOST_SKIPPED_IN_A_ROW, SkippedSteps

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


def spoil(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[int], bool]) -> None:
    """Let the loss of some passes, counted from 1, be no number."""
    honest, passes = method.denoising_loss, [0]

    def spoilt(*arguments: Any) -> Any:
        loss = honest(*arguments)
        passes[0] += 1
        if not is_bad(passes[0]):
            return loss
        return type(loss)(**{name: value * float("nan") for name, value in vars(loss).items()})

    monkeypatch.setattr(method, "denoising_loss", spoilt)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_step_without_finite_gradients_changes_nothing(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    spoil(monkeypatch, lambda number: number == 3 * passes)
    train(mined, tmp_path, "train.max_steps=4", "train.checkpoint_every=1", "train.keep_checkpoints=9",
          f"train.total_batch_size={2 * passes}", "train.log_every=1")  # fmt: skip
    folders = [checkpoints.checkpoint_path(tmp_path / "checkpoints", step) for step in (2, 3, 4)]
    before, skipped, after = map(everything, folders)
    assert all(torch.equal(before[name], skipped[name]) for name in before)
    assert any(not torch.equal(skipped[name], after[name]) for name in after)
    states = [checkpoints.read_state(folder) for folder in folders]
    assert [state["schedule"]["last_epoch"] for state in states] == [2, 2, 3]
    assert [state["average_updates"] for state in states] == [2, 2, 3]
    assert [state["skipped"] for state in states] == [
        {"in_a_row": 0, "total": 0},
        {"in_a_row": 1, "total": 1},
        {"in_a_row": 0, "total": 1},
    ]
    logged = metrics(tmp_path)
    assert [values["skipped_steps"] for values in logged] == [0, 0, 1, 1]
    assert logged[2]["loss"] is None and logged[2]["gradient_norm"] is None and logged[3]["loss"] > 0


def test_ten_in_a_row_stop_the_run_and_the_last_good_checkpoint_stays(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda number: number > 4)
    with pytest.raises(MimicBrushError, match="not finite in 10 consecutive steps, up to step 14"):
        train(mined, tmp_path, "train.max_steps=100", "train.checkpoint_every=4")
    found = checkpoints.find_checkpoint(tmp_path / "checkpoints", "latest")
    assert found is not None and all(bool(value.isfinite().all()) for value in everything(found).values())
    assert not (tmp_path / "pipeline").exists()


def test_a_rate_that_bursts_the_weights_stops_the_run(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The largest rate that is taken, 1, does not burst a toy.
    monkeypatch.setattr(trainer, "get_scheduler", lambda _name, adam, **_: LambdaLR(adam, lambda _step: 1e30))
    with pytest.raises(MimicBrushError, match=r"not finite in 10 consecutive steps(?s:.*)lower train\.learning_rate"):
        train(mined, tmp_path, "train.max_steps=40", "train.learning_rate=1", "train.lr_warmup_steps=0")


def test_only_steps_in_a_row_are_too_many() -> None:
    skipped = SkippedSteps()
    for step in range(200):
        skipped.count(step % MOST_SKIPPED_IN_A_ROW != 0, step, Path())
    assert skipped.total == 180
    with pytest.raises(MimicBrushError):
        skipped.count(True, 200, Path())


@pytest.fixture(scope="module")
def straight(mined: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    train(mined, run_dir, "train.max_steps=3")
    forget_accelerate()
    return run_dir


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGUSR1, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_ends_the_run(
    mined: Path, tmp_path: Path, script_environment: Callable[[], dict[str, str]], number: int, status: int
) -> None:
    command = [sys.executable, "scripts/train.py", *SMALLEST, f"data.root={mined}", f"run_dir={tmp_path}",
               "train.resume=latest", "train.checkpoint_every=1000000", "data.num_workers=1"]  # fmt: skip
    process = warm_scripts.Popen(
        [*command, "train.max_steps=1000000"],
        cwd=ROOT,
        env=script_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not (tmp_path / "metrics.jsonl").exists() or not metrics(tmp_path):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as a terminal and most clusters do it: the loader's workers hear it, too
    said, _ = process.communicate(timeout=100)
    assert process.returncode == status, said
    assert f"stopped by signal {int(number)} after step" in said
    found = checkpoints.find_checkpoint(tmp_path / "checkpoints", "latest", pytest.fail)
    assert found is not None and checkpoints.read_state(found)["step"] >= 2
    assert not (tmp_path / "pipeline").exists()


def test_a_run_that_a_signal_stopped_goes_on_to_the_same_bits(
    straight: Path, mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, passes = method.denoising_loss, [0]

    def interrupting(*arguments: Any) -> Any:
        passes[0] += 1
        if passes[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(*arguments)

    monkeypatch.setattr(method, "denoising_loss", interrupting)
    assert train(mined, tmp_path, "train.max_steps=3", "train.checkpoint_every=100") == 143
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]
    assert train(mined, tmp_path, "train.max_steps=3", "train.checkpoint_every=100", "train.resume=latest") == 0
    assert differing(straight, tmp_path) == []
