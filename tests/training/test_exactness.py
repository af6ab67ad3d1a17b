"""What a run computes depends on its options alone: not on restarts, and but for rounding not on its processes."""

from __future__ import annotations

import json
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
from toy_run import SMALLEST, everything, forget_accelerate, metrics, train

from mimicbrush.errors import CheckpointError
from mimicbrush.training import method, performance
from mimicbrush.training.checkpoints import ADDED_LATER, checkpoint_path, find_identity_differences, read_state

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


def record(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What every pass feeds its loss, bit for bit."""
    fed: list[tuple[Any, ...]] = []
    honest = method.denoising_loss

    def recording(
        model: Any, scheduler: Any, conditions: Any, noise_sample: Any, gamma: Any, matches: Any, *rest: Any
    ) -> Any:
        sampled = (noise_sample.timestep, noise_sample.noise, noise_sample.posteriors)
        drops = (noise_sample.keep_reference, noise_sample.keep_depth)
        fed.append((*sampled, *drops, *vars(conditions).values(), *(vars(matches).values() if matches else ())))
        return honest(model, scheduler, conditions, noise_sample, gamma, matches, *rest)

    monkeypatch.setattr(method, "denoising_loss", recording)
    return fed


#: Ours beside the paper's: what teaches the reference attention where to look.
LOOKING = (
    "train.correspondence_weight=0.3",
    "train.unrelated_reference_ratio=0.3",
    "train.timestep_sampling=logit_normal",
    "train.latent_channel_weights=[2,1,1,0.5]",
)


@pytest.mark.parametrize("more", [(), (*LOOKING, "train.noise_on=device")], ids=["paper", "looking"])
def test_resumed_twice_within_an_epoch_equals_straight(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    # Eight pairs: an epoch is four steps of two samples.
    options = ["train.checkpoint_every=7", "train.log_every=1", *more]
    fed = record(monkeypatch)
    train(mined, tmp_path / "straight", "train.max_steps=7", *options)
    straight = list(fed)
    fed.clear()
    for stop, workers in ((1, 0), (3, 1), (7, 0)):
        resume = ["train.resume=latest", f"train.max_steps={stop}", f"data.num_workers={workers}"]
        train(mined, tmp_path / "resumed", *resume, *options)
    assert len(fed) == len(straight) == 7
    for one, other in zip(straight, fed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    a, b = (everything(checkpoint_path(tmp_path / run / "checkpoints", 7)) for run in ("straight", "resumed"))
    assert a.keys() == b.keys() and [key for key in a if not torch.equal(a[key], b[key])] == []
    losses, others = (
        [{key: value for key, value in values.items() if key.startswith(("loss", "gradient", "learning"))}
         for values in metrics(tmp_path / run)]
        for run in ("straight", "resumed")
    )  # fmt: skip
    assert losses == others


def test_moments_lie_in_memory_as_their_weights_after_a_resume(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels last, as on a GPU: the fused optimizer goes through weights and moments alike."""
    honest = performance.apply_speedups
    monkeypatch.setattr(performance, "apply_speedups", lambda *arguments, **_: honest(*arguments, channels_last=True))
    train(mined, tmp_path / "straight", "train.max_steps=4")
    for stop in (2, 4):
        train(mined, tmp_path / "twice", f"train.max_steps={stop}", "train.resume=latest")
    a, b = (everything(checkpoint_path(tmp_path / run / "checkpoints", 4)) for run in ("straight", "twice"))
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_a_schedule_that_ends_does_not_go_on_to_another_end(mined: Path, tmp_path: Path) -> None:
    options = ["train.lr_scheduler=cosine", "train.max_steps=2", "train.lr_warmup_steps=1"]
    train(mined, tmp_path, *options)
    with pytest.raises(CheckpointError, match=r"train\.max_steps: was 2, now 4"):
        train(mined, tmp_path, options[0], options[2], "train.max_steps=4", "train.resume=latest")


def test_weights_of_the_correspondence_loss_do_not_go_on_to_another_end(mined: Path, tmp_path: Path) -> None:
    options = ["train.correspondence_weight=0.3", "train.correspondence_final=0.1", "train.max_steps=2"]
    train(mined, tmp_path, *options)
    with pytest.raises(CheckpointError, match=r"train\.max_steps: was 2, now 4"):
        train(mined, tmp_path, *options[:2], "train.max_steps=4", "train.resume=latest")
    forget_accelerate()
    with pytest.raises(CheckpointError, match=r"train\.correspondence_weight: was 0\.3, now 0\.2"):
        train(mined, tmp_path, *options[1:], "train.correspondence_weight=0.2", "train.resume=latest")


def test_runs_of_before_an_option_came_are_the_same_run_with_its_default(mined: Path, tmp_path: Path) -> None:
    train(mined, tmp_path, "train.max_steps=1")
    identity = read_state(checkpoint_path(tmp_path / "checkpoints", 1))["identity"]
    before = {name: value for name, value in identity.items() if name not in ADDED_LATER}
    assert len(identity) - len(before) == len(ADDED_LATER)
    assert find_identity_differences(before, identity) == []
    assert find_identity_differences(before, identity | {"train.correspondence_weight": 0.3}) == [
        "train.correspondence_weight: was 0.0, now 0.3"
    ]


def run(
    command: list[str], mined: Path, run_dir: Path, environment: dict[str, str], *overrides: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command, *SMALLEST, f"data.root={mined}", f"run_dir={run_dir}", *overrides],
        cwd=ROOT,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )


WATCHED = "tests/helpers/watched_run.py"
TWO = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]


def inputs(file: Path) -> list[Any]:
    """All samples that all processes saw, in the order of their numbers within each step."""
    parts = sorted(file.parent.glob(f"{file.stem}.*"))
    return sorted(json.loads(line) for part in parts for line in part.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), LOOKING], ids=["paper", "looking"])
def test_two_processes_see_the_same_inputs_and_losses(
    mined: Path, tmp_path: Path, script_environment: Callable[[], dict[str, str]], more: tuple[str, ...]
) -> None:
    options = ["train.max_steps=20", "train.total_batch_size=4", "train.batch_size=4", "train.log_every=1",
               "train.learning_rate=1e-4", *more]  # fmt: skip
    for name, launcher in (("one", []), ("two", TWO)):
        environment = {**script_environment(), "WATCH": str(tmp_path / f"{name}.inputs")}
        done = run([*launcher, WATCHED], mined, tmp_path / name, environment, *options)
        assert f"{1 + (name == 'two')} process(es) on cpu" in done.stdout
    assert len(list(tmp_path.glob("two.*"))) == 2 and len(inputs(tmp_path / "two.inputs")) == 80
    assert inputs(tmp_path / "one.inputs") == inputs(tmp_path / "two.inputs")
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in (key for key in one if key.startswith("loss")):
            assert (one[name] is None) == (two[name] is None)
            assert one[name] is None or abs(one[name] - two[name]) < 1e-5, (name, one, two)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), LOOKING], ids=["paper", "looking"])
def test_sharded_processes_train_alike_and_share_checkpoints_with_one(
    mined: Path, tmp_path: Path, script_environment: Callable[[], dict[str, str]], more: tuple[str, ...]
) -> None:
    options = ["train.total_batch_size=4", "train.batch_size=2", "train.log_every=1", "train.checkpoint_every=2", *more]
    plain, sharded = script_environment(), {**script_environment(), "SHARD": "1"}
    run(["scripts/train.py"], mined, tmp_path / "one", plain, *options, "train.max_steps=6")
    run([*TWO, WATCHED], mined, tmp_path / "two", sharded, *options, "train.max_steps=2")
    run(["scripts/train.py"], mined, tmp_path / "two", plain, *options, "train.max_steps=4", "train.resume=latest")
    run([*TWO, WATCHED], mined, tmp_path / "two", sharded, *options, "train.max_steps=6", "train.resume=latest")
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("loss", "loss_inside", "gradient_norm", "gradient_norm_reference_unet"):
            assert abs(one[name] - two[name]) < 1e-4 * one[name], (name, one, two)
    a, b = (everything(checkpoint_path(tmp_path / run / "checkpoints", 6)) for run in ("one", "two"))
    assert a.keys() == b.keys()
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-3


@pytest.mark.slow
def test_a_network_that_is_called_twice_in_a_step_may_be_sharded(
    mined: Path, tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    options = ["model.reference_encoder=shared", "train.total_batch_size=4", "train.batch_size=2", "train.log_every=1",
               "train.max_steps=3", *LOOKING]  # fmt: skip
    train(mined, tmp_path / "one", *options)
    saving = "train.selective_checkpointing=true"
    run([*TWO, WATCHED], mined, tmp_path / "two", {**script_environment(), "SHARD": "1"}, *options, saving)
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("loss", "loss_correspondence", "gradient_norm", "gradient_norm_unet"):
            assert abs(one[name] - two[name]) < 1e-4 * one[name], (name, one, two)
    a, b = (everything(checkpoint_path(tmp_path / run / "checkpoints", 3)) for run in ("one", "two"))
    assert a.keys() == b.keys()
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-3


@pytest.mark.slow
def test_processes_that_a_launcher_starts_may_be_one(
    mined: Path, tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    # accelerate (1.15) starts more than one CPU process through MPI only, and says nothing where there is none.
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "scripts/train.py"]
    done = run(command, mined, tmp_path, script_environment(), "train.max_steps=2")
    assert "1 process(es) on cpu" in done.stdout


@pytest.mark.slow
def test_a_signal_that_one_process_hears_ends_all_of_them(
    mined: Path, tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    environment = {**script_environment(), "SIGNAL": "15"}
    done = subprocess.run(
        [sys.executable, *TWO, WATCHED, *SMALLEST, f"data.root={mined}", f"run_dir={tmp_path}", "train.max_steps=1000"],
        cwd=ROOT,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert "stopped by signal 15 after step 3 of 1000; saved" in done.stdout, done.stderr
    assert "exitcode  : 143" in done.stderr  # what torchrun tells of each
    assert checkpoint_path(tmp_path / "checkpoints", 3).is_dir()


@pytest.mark.slow
def test_the_slurm_script_starts_its_processes_itself_and_queues_a_stopped_run_again(
    mined: Path, tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    # Two tasks of a cluster of one machine, by stand-ins for the two commands of SLURM that the script calls.
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "scontrol").write_text(
        '#!/bin/bash\nif [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$CALLS"; fi\n'
    )
    (commands / "srun").write_text(
        '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\npids=()\nfor task in 0 1; do\n'
        '  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" & pids+=($!)\ndone\n'
        'worst=0\nfor pid in "${pids[@]}"; do wait "$pid" || worst=$?; done\nexit $worst\n'
    )
    for command in commands.iterdir():
        command.chmod(0o755)
    environment = script_environment() | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_ID": "7",
        "MASTER_PORT": "29541",
    }
    # The virtual environment may be another one than the script's.
    script = (ROOT / "configs" / "launch" / "slurm.sbatch").read_text().replace(".venv/bin/python", sys.executable)
    arguments = [*SMALLEST, f"data.root={mined}", f"run_dir={tmp_path / 'run'}"]

    def submit(*overrides: str) -> tuple[int, str]:
        command = ["bash", "-c", script, "slurm.sbatch", *arguments, *overrides]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
        return done.returncode, done.stdout

    status, said = submit("train.max_steps=2")
    assert status == 0 and "2 process(es) on cpu" in said, said
    assert not (tmp_path / "calls").exists()
    process = subprocess.Popen(
        ["bash", "-c", script, "slurm.sbatch", *arguments, "train.max_steps=100000"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while metrics(tmp_path / "run")[-1]["step"] < 4:
        assert process.poll() is None
        time.sleep(0.1)
    # As srun does it: every task hears the signal, the script does not.
    tasks = subprocess.run(["pgrep", "-f", f"run_dir={tmp_path / 'run'}"], capture_output=True, text=True, check=True)
    for pid in map(int, tasks.stdout.split()):
        if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:2] == [b"scripts/train.py"]:
            os.kill(pid, signal.SIGUSR1)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert (tmp_path / "calls").read_text() == "requeue 7\n"
