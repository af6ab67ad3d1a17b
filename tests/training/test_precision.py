"""Half precision, on a CPU, where accelerate lets bf16 alone through; fp16 goes the same way with its scaler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from toy_run import everything, forget_accelerate, metrics, train

from mimicbrush.assembly import training_run
from mimicbrush.training import checkpoints, method


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


def let_fp16_run_on_a_cpu(monkeypatch: pytest.MonkeyPatch, initial_scale: float) -> None:
    honest = training_run.make_accelerator

    def with_scaler(options: Any, run_dir: Path) -> Accelerator:
        forget_accelerate()
        options.mixed_precision, asked = "no", options.mixed_precision
        accelerator = honest(options, run_dir)
        options.mixed_precision = asked
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=initial_scale, growth_interval=2)
        return accelerator

    monkeypatch.setattr(training_run, "make_accelerator", with_scaler)


def losses(run_dir: Path) -> list[float]:
    return [values["loss"] for values in metrics(run_dir)]


OPTIONS = ["train.max_steps=6", "train.log_every=1", "train.checkpoint_every=1", "train.keep_checkpoints=9"]


@pytest.fixture(scope="module")
def full(mined: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("full") / "run"
    train(mined, run_dir, *OPTIONS)
    forget_accelerate()
    return run_dir


@pytest.mark.parametrize("norms", [False, True])
def test_bf16_follows_full_precision(full: Path, mined: Path, tmp_path: Path, norms: bool) -> None:
    train(mined, tmp_path, *OPTIONS, "train.mixed_precision=bf16", f"train.low_precision_norms={norms}")
    assert losses(tmp_path) == pytest.approx(losses(full), rel=0.05)
    assert losses(tmp_path) != losses(full)
    weights = everything(checkpoints.checkpoint_path(tmp_path / "checkpoints", 6))
    assert all(value.dtype == torch.float32 for value in weights.values())  # only what is computed is in half precision


def test_bf16_teaches_the_same_places_as_full_precision(mined: Path, tmp_path: Path) -> None:
    more = ["train.correspondence_weight=0.3", "train.max_steps=4"]
    for precision in ("no", "bf16"):
        train(mined, tmp_path / precision, *OPTIONS, *more, f"train.mixed_precision={precision}")
        forget_accelerate()
    full, half = ([values["loss_correspondence"] for values in metrics(tmp_path / name)] for name in ("no", "bf16"))
    assert half == pytest.approx(full, rel=0.02) and half != full


@pytest.mark.slow
def test_fp16_follows_full_precision_and_resumes_exactly(
    full: Path, mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_fp16_run_on_a_cpu(monkeypatch, initial_scale=1024.0)
    train(mined, tmp_path / "straight", *OPTIONS, "train.mixed_precision=fp16")
    assert losses(tmp_path / "straight") == pytest.approx(losses(full), rel=0.05)
    assert losses(tmp_path / "straight") != losses(full)
    for stop in (3, 6):
        train(mined, tmp_path / "twice", *OPTIONS, "train.mixed_precision=fp16", "train.resume=latest",
              f"train.max_steps={stop}")  # fmt: skip
    folders = [checkpoints.checkpoint_path(tmp_path / name / "checkpoints", 6) for name in ("straight", "twice")]
    one, other = map(everything, folders)
    assert all(torch.equal(one[key], other[key]) for key in one)
    # The scaler doubled its scale every second step, before and after the stop.
    scales = [checkpoints.read_state(folder)["scaler"]["scale"] for folder in folders]
    assert scales == [8192.0, 8192.0]


def test_fp16_skips_steps_that_overflow_and_lowers_its_scale(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_fp16_run_on_a_cpu(monkeypatch, initial_scale=2.0**23)
    train(mined, tmp_path, *OPTIONS, "train.mixed_precision=fp16", "train.max_steps=14", "train.keep_checkpoints=99")
    states = [checkpoints.read_state(path) for path in checkpoints.list_checkpoints(tmp_path / "checkpoints")]
    skipped = states[-1]["skipped"]["total"]
    assert 2 <= skipped <= 12
    assert states[-1]["schedule"]["last_epoch"] == states[-1]["average_updates"] == 14 - skipped
    assert states[-1]["scaler"]["scale"] < 2.0**23
    for before, after in pairwise(states):
        if after["skipped"]["total"] > before["skipped"]["total"]:
            folders = [checkpoints.checkpoint_path(tmp_path / "checkpoints", s["step"]) for s in (before, after)]
            one, other = (load_file(folder / "weights.safetensors") for folder in folders)
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_frozen_networks_compute_in_half_precision(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()
    honest: Callable[..., Any] = method.FrozenEncoders.encode

    def encode(encoders: method.FrozenEncoders, *arguments: Any) -> Any:
        seen.update(module.dtype for module in (encoders.vae, encoders.image_encoder, encoders.depth_estimator))
        return honest(encoders, *arguments)

    monkeypatch.setattr(method.FrozenEncoders, "encode", encode)
    train(mined, tmp_path, "train.max_steps=1", "train.mixed_precision=bf16")
    assert torch.bfloat16 in seen
