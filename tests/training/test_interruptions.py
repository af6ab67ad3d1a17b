"""Whatever ends a run from outside: there is one message, and what was learnt is saved."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_scripts
from accelerate.tracking import TensorBoardTracker
from faulty_data import FaultyDataset
from toy_run import SMALLEST, forget_accelerate, metrics, train

from mimicbrush.data import dataset
from mimicbrush.errors import LoaderError, MimicBrushError, UnsavedError, cli_main
from mimicbrush.evaluation.heldout.during_training import HeldOutEvaluation
from mimicbrush.training import checkpoints, method
from mimicbrush.training.export import PipelineExporter
from mimicbrush.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
#: Nothing but the end of a run saves or logs.
ONLY_AT_THE_END = ("train.checkpoint_every=1000", "train.log_every=1000", "train.max_steps=1000")
EVALUATED = ("eval.every_steps=2", "eval.max_pairs=4", "eval.num_inference_steps=1", "eval.sheet_pairs=1")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Path]:
    """Let the data go wrong from a sample number on; returns a file that is there once they do."""

    def spoil(what: str, first: int) -> Path:
        told = tmp_path / "told"
        monkeypatch.setattr(FaultyDataset, "fault", (what, first, told), raising=False)
        monkeypatch.setattr(dataset, "PairDataset", FaultyDataset)
        return told

    return spoil


def saved_step(run_dir: Path) -> int:
    found = checkpoints.find_checkpoint(run_dir / "checkpoints", "latest", pytest.fail)
    assert found is not None
    return int(checkpoints.read_state(found)["step"])


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, error: Exception) -> None:
    """Let the loss of a pass, counted from 1, be an error."""
    honest, passes = method.denoising_loss, [0]

    def failing(*arguments: Any) -> Any:
        passes[0] += 1
        if passes[0] == number:
            raise error
        return honest(*arguments)

    monkeypatch.setattr(method, "denoising_loss", failing)


def test_a_worker_that_stops_answering_ends_the_run_which_is_saved(
    mined: Path, tmp_path: Path, faulty: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty("stuck", 4)
    with pytest.raises(LoaderError) as caught:
        train(mined, tmp_path / "run", *ONLY_AT_THE_END, "data.num_workers=1", "data.loader_timeout_s=3")
    assert caught.value.exit_status == 75
    assert re.match(
        r"loader worker 0 \(process \d+\), which reads the samples 4\.\.5, has not answered for 3 s\. Check (?s:.*)"
        r"data\.loader_timeout_s\nThe state after step 2 is saved; to continue, run with train\.resume=latest\.$",
        str(caught.value),
    )
    assert saved_step(tmp_path / "run") == 2
    # The steps since the last log are logged, too.
    assert [(values["step"], values["loss"] > 0) for values in metrics(tmp_path / "run")] == [(2, True)]
    monkeypatch.undo()
    forget_accelerate()
    assert train(mined, tmp_path / "run", "train.max_steps=3", "train.resume=latest") == 0
    assert [values["step"] for values in metrics(tmp_path / "run")] == [2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "status", "message"),
    [
        ("killed", 75, r"loader worker \d \(process \d+\) was killed by signal 9 \(SIGKILL\)\. The kernel"),
        ("broken", 1, r"TypeError: a fault of the program(?s:.*)Please report it"),
    ],
)
def test_a_worker_that_ends_or_fails_ends_the_run_which_is_saved(
    mined: Path,
    tmp_path: Path,
    faulty: Callable[[str, int], Path],
    capfd: pytest.CaptureFixture[str],
    what: str,
    status: int,
    message: str,
) -> None:
    faulty(what, 6)
    with pytest.raises(SystemExit) as caught:
        cli_main(lambda: sys.exit(train(mined, tmp_path / "run", *ONLY_AT_THE_END, "data.num_workers=2")))
    said = capfd.readouterr().err
    assert re.search(message, said)
    assert caught.value.code == status
    # At most the three steps before; a batch of a killed worker may be lost with it.
    assert f"The state after step {saved_step(tmp_path / 'run')} is saved" in said
    assert saved_step(tmp_path / "run") <= 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_heard_while_a_worker_is_stuck(
    mined: Path, tmp_path: Path, faulty: Callable[[str, int], Path], number: int
) -> None:
    told, sent = faulty("stuck", 4), [0.0]

    def send() -> None:
        while not (tmp_path / "run/metrics.jsonl").exists() or not told.exists():
            time.sleep(0.05)
        time.sleep(1)  # both steps that there are data for are done
        sent[0] = time.monotonic()
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    status = train(mined, tmp_path / "run", *ONLY_AT_THE_END, "data.num_workers=1")
    assert time.monotonic() - sent[0] < 30  # a busy machine; the time-out is ten minutes
    thread.join()
    assert status == (130 if number == signal.SIGINT else 143)
    assert saved_step(tmp_path / "run") == 2 == metrics(tmp_path / "run")[-1]["step"]
    assert not (tmp_path / "run" / "pipeline").exists()


def test_a_tracker_that_fails_is_left_out_and_told_of_once(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(TensorBoardTracker, "log", failing)
    monkeypatch.setattr(TensorBoardTracker, "finish", failing)
    options = ["train.max_steps=2", "train.log_every=1", "train.tracker=tensorboard"]
    assert train(mined, tmp_path, *options) == 0
    assert [(values["step"], values["failed_trackers"]) for values in metrics(tmp_path)] == [(1, 0), (2, 1)]
    said = capsys.readouterr().out
    assert said.count("the tracker tensorboard failed (ConnectionError: the server is gone)") == 1


@pytest.mark.slow
@pytest.mark.parametrize("when", ["store_init_configuration", "finish"])
def test_a_tracker_that_fails_at_the_start_or_the_end_costs_nothing(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(TensorBoardTracker, when, failing)
    assert train(mined, tmp_path, "train.max_steps=2", "train.tracker=tensorboard") == 0
    assert (tmp_path / "finished.json").exists() and (tmp_path / "pipeline").is_dir()
    assert capsys.readouterr().out.count("the tracker tensorboard failed (RuntimeError: no)") == 1


def test_an_evaluation_that_fails_is_told_of_and_the_training_goes_on(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest, calls = HeldOutEvaluation._edit, [0]

    def failing(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(*arguments)

    monkeypatch.setattr(HeldOutEvaluation, "_edit", failing)
    assert train(mined, tmp_path, "train.max_steps=4", *EVALUATED) == 0
    assert [values["failed_evaluations"] for values in metrics(tmp_path)] == [0, 1]
    said = capsys.readouterr().out
    assert "the evaluation after step 2 failed (OutOfMemoryError: CUDA out of memory); training continues" in said
    assert "1 evaluation(s) on held-out pairs failed" in said
    assert len((tmp_path / "heldout" / "heldout.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_signal_ends_an_evaluation_which_is_made_again(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = HeldOutEvaluation._edit, [0]

    def interrupting(*arguments: Any) -> Any:
        calls[0] += 1
        os.kill(os.getpid(), signal.SIGTERM)
        return honest(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(HeldOutEvaluation, "_edit", interrupting)
        assert train(mined, tmp_path, "train.max_steps=4", "eval.batch_size=1", *EVALUATED) == 143
    assert calls[0] == 1 and saved_step(tmp_path) == 2
    assert (tmp_path / "heldout" / "heldout.jsonl").read_text() == ""
    forget_accelerate()
    assert train(mined, tmp_path, "train.max_steps=4", "train.resume=latest", *EVALUATED) == 0
    assert len((tmp_path / "heldout" / "heldout.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), MimicBrushError, r"out of memory on cpu.*train\.batch_size"),
        pytest.param(ZeroDivisionError("why"), ZeroDivisionError, "why", marks=pytest.mark.slow),
    ],
)
def test_an_error_in_a_step_leaves_the_state_of_the_step_before(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type, message: str
) -> None:
    fail_at(monkeypatch, 3, error)
    with pytest.raises(raised, match=message) as caught:
        train(mined, tmp_path, *ONLY_AT_THE_END)
    assert "The state after step 2 is saved" in f"{caught.value}{getattr(caught.value, '__notes__', '')}"
    assert saved_step(tmp_path) == 2 == metrics(tmp_path)[-1]["step"]


def test_a_step_that_fails_while_it_changes_the_weights_is_not_saved(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Trainer._step

    def failing(trainer: Trainer, norm: torch.Tensor) -> torch.Tensor:
        if trainer.state.step == 2:
            raise RuntimeError("half done")
        return honest(trainer, norm)

    monkeypatch.setattr(Trainer, "_step", failing)
    with pytest.raises(RuntimeError, match="half done"):
        train(mined, tmp_path, "train.max_steps=9", "train.checkpoint_every=1")
    assert saved_step(tmp_path) == 2 and not (tmp_path / "checkpoints" / "step-00000003").exists()


def test_a_disk_that_refuses_the_last_checkpoint_or_the_pipeline_has_a_status_of_its_own(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UnsavedError, match="the pipeline could not be written") as one:
        patch.setattr(PipelineExporter, "build_pipeline", full)
        train(mined, tmp_path, "train.max_steps=1")
    assert saved_step(tmp_path) == 1
    forget_accelerate()
    with monkeypatch.context() as patch, pytest.raises(UnsavedError, match="the last checkpoint could not be") as two:
        patch.setattr(checkpoints, "_flush", full)
        train(mined, tmp_path, "train.max_steps=2", "train.resume=latest")
    assert saved_step(tmp_path) == 1 and not (tmp_path / "pipeline").exists()
    assert one.value.exit_status == two.value.exit_status == 74


def start_ranks(
    count: int, port: int, mined: Path, run_dir: Path, environment: dict[str, str], *overrides: str
) -> list[warm_scripts.Popen]:
    """Start processes that train together, as a cluster does it: without a launcher, which takes its time."""
    shared = {**environment, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        warm_scripts.Popen(
            [sys.executable, "tests/helpers/watched_run.py", *SMALLEST, f"data.root={mined}", f"run_dir={run_dir}",
             f"train.total_batch_size={count}", *overrides],
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


def end_ranks(processes: list[warm_scripts.Popen]) -> list[tuple[int, str]]:
    ended = [process.communicate(timeout=200)[0] for process in processes]
    return [(process.wait(), said) for process, said in zip(processes, ended, strict=True)]


@pytest.mark.slow
def test_a_stuck_worker_of_one_process_ends_all_of_them(
    mined: Path, tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    environment = {**script_environment(), "STUCK": "1"}
    options = [*ONLY_AT_THE_END, "data.num_workers=1", "data.loader_timeout_s=5"]
    ended = end_ranks(start_ranks(2, 29551, mined, tmp_path, environment, *options))
    assert [status for status, _ in ended] == [75, 75], ended
    assert all("has not answered for 5 s" in said for _, said in ended)
    assert saved_step(tmp_path) == metrics(tmp_path)[-1]["step"] > 0


@pytest.mark.slow
def test_a_full_disk_of_the_main_process_ends_sharded_processes_together(
    mined: Path, tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    environment = {**script_environment(), "SHARD": "1", "FULL": "1"}
    ended = end_ranks(start_ranks(2, 29552, mined, tmp_path, environment, "train.max_steps=2", *EVALUATED))
    assert [status for status, _ in ended] == [74, 74], ended
    # The evaluation makes a pipeline, too: it fails on both, and the training goes on.
    for wanted in ("the evaluation after step 2 failed", "the pipeline could not be written"):
        assert all(wanted in said for _, said in ended)
    assert saved_step(tmp_path) == 2


@pytest.mark.slow
def test_four_processes_have_the_losses_of_one(
    mined: Path, tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    options = ["train.max_steps=4", "train.log_every=1", "train.learning_rate=1e-4"]
    train(mined, tmp_path / "one", *options, "train.total_batch_size=4", "train.batch_size=4")
    ended = end_ranks(start_ranks(4, 29553, mined, tmp_path / "four", script_environment(), *options))
    assert [status for status, _ in ended] == [0] * 4, ended
    assert "4 process(es) on cpu" in ended[0][1]
    ones, fours = metrics(tmp_path / "one"), metrics(tmp_path / "four")
    assert [values["step"] for values in ones] == [values["step"] for values in fours] == [1, 2, 3, 4]
    for one, four in zip(ones, fours, strict=True):
        for name in (key for key in one if key.startswith("loss")):
            assert (one[name] is None) == (four[name] is None)
            assert one[name] is None or abs(one[name] - four[name]) < 1e-5, (name, one, four)
