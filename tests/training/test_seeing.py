"""What a run shows while it learns: figures, images, the best weights, wandb, tensorboard and trackio."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import SMALLEST, forget_accelerate, metrics, train

from mimicbrush.evaluation.heldout.reference_gain import GAINS
from mimicbrush.pipelines.open_pipeline import load_pipeline
from mimicbrush.training.checkpoints import checkpoint_path, read_state
from mimicbrush.training.export import PipelineExporter
from mimicbrush.training.metrics import TrainingMetrics

ROOT = Path(__file__).parents[2]
EVALUATED = ["eval.every_steps=2", "eval.max_pairs=4", "eval.num_inference_steps=2", "eval.sheet_pairs=2"]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


def events(run_dir: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir / "mimicbrush"), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def test_a_run_tells_figures_shows_images_and_keeps_the_best(mined: Path, tmp_path: Path) -> None:
    options = [*EVALUATED, "train.tracker=tensorboard", "train.log_every=1", "train.checkpoint_every=2"]
    train(mined, tmp_path, "train.max_steps=3", *options)
    logged = metrics(tmp_path)
    for name in ("loss", "loss_inside", "loss_outside", "gradient_norm", "gradient_norm_unet",
                 "gradient_norm_reference_unet", "gradient_norm_depth_projector", "learning_rate", "samples_per_s",
                 "data_wait_ratio"):  # fmt: skip
        assert all(values[name] > 0 for values in logged), name
    bands = [name for name in logged[0] if name.startswith("loss_t")]
    assert bands == ["loss_t000_249", "loss_t250_499", "loss_t500_749", "loss_t750_999"]
    # Two samples a step: every step has at most two bands, and their mean is the loss where it is two.
    for values in logged:
        told = [values[name] for name in bands if values[name] is not None]
        assert 1 <= len(told) <= 2
        assert len(told) == 1 or sum(told) / 2 == pytest.approx(values["loss"], rel=1e-4)
    found = [json.loads(line) for line in (tmp_path / "heldout" / "heldout.jsonl").read_text().splitlines()]
    assert [values["step"] for values in found] == [2, 3]  # every other step, and at the end
    best = max(found, key=lambda values: values["heldout/gain_over_no_reference_db"])
    kept = json.loads((tmp_path / "best" / "heldout.json").read_text())
    assert kept["step"] == best["step"] and kept["heldout/psnr"] == best["heldout/psnr"]
    assert load_pipeline(tmp_path / "best").size_px == 16
    shown = events(tmp_path)
    assert {"loss", "loss_inside", "heldout/psnr", *(f"heldout/{gain}" for gain in GAINS)} <= set(
        shown.Tags()["scalars"]
    )
    assert [event.step for event in shown.Scalars("loss")] == [1, 2, 3]
    columns = {tag.split("/")[2] for tag in shown.Tags()["images"] if tag.startswith("heldout/pictures/")}
    assert {"source", "mask", "reference", "model", "target", "correspondence"} <= columns
    # A run that goes on from step 2 cuts off what came after it, and writes it again.
    last = checkpoint_path(tmp_path / "checkpoints", 3)
    last.rename(tmp_path / "away")
    forget_accelerate()
    train(mined, tmp_path, "train.max_steps=3", "train.resume=latest", *options)
    again = [json.loads(line) for line in (tmp_path / "heldout" / "heldout.jsonl").read_text().splitlines()]
    assert [values["step"] for values in again] == [2, 3]
    assert again[1]["heldout/psnr"] == found[1]["heldout/psnr"]
    assert [event.step for event in events(tmp_path).Scalars("loss")] == [1, 2, 3]


def test_a_run_of_an_earlier_version_goes_on_and_keeps_the_best_over_none(
    mined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(mined, tmp_path, "train.max_steps=2", *EVALUATED)
    path = tmp_path / "heldout" / "heldout.jsonl"
    (old,) = (json.loads(line) for line in path.read_text().splitlines())
    lacking = {name: value for name, value in old.items() if "wrong_against_none" not in name}
    # At step 1 it had the largest reference gain of all, but was far from helped.
    before = lacking | {"step": 1, "heldout/gain_over_no_reference_db": -99.0, "heldout/reference_gain_db": 99.0}
    path.write_text("".join(f"{json.dumps(line)}\n" for line in (before, lacking)))
    forget_accelerate()
    capsys.readouterr()
    train(mined, tmp_path, "train.max_steps=4", "train.resume=latest", *EVALUATED)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in found] == [1, 2, 4]
    kept = json.loads((tmp_path / "best" / "heldout.json").read_text())
    best = max(found, key=lambda line: line["heldout/gain_over_no_reference_db"])
    assert kept["step"] == best["step"] > 1
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 4: "))
    places = [told.index(f"{gain.name} {found[-1][f'heldout/{key}']:+.2f} dB (") for key, gain in GAINS.items()]
    assert places == sorted(places) and places[0] == len("step 4: ")


def test_what_a_gpu_makes_of_its_time() -> None:
    training_metrics = TrainingMetrics(torch.device("cpu"), 1, 1000, flop_per_sample=1e12, peak_flop_per_s=1e15)
    training_metrics.end_step(torch.tensor(True))
    found = training_metrics.read(samples_per_step=8, num_processes=2, reduce=lambda sums: sums)
    assert found["tflop_per_s_and_device"] == pytest.approx(found["samples_per_s"] / 2)
    assert found["share_of_peak"] == pytest.approx(found["tflop_per_s_and_device"] / 1000)


def test_evaluating_changes_nothing_of_what_is_learnt(mined: Path, tmp_path: Path) -> None:
    for name, options in (("with", EVALUATED), ("without", [])):
        train(mined, tmp_path / name, "train.max_steps=4", "train.log_every=1", *options)
        forget_accelerate()
    losses = [[values["loss"] for values in metrics(tmp_path / name)] for name in ("with", "without")]
    assert losses[0] == losses[1]


def test_a_disk_that_refuses_the_best_weights_ends_no_run(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = PipelineExporter.export

    def refuse(exporter: PipelineExporter, weights: Any, folder: Path) -> None:
        if folder.name == "best":
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        honest(exporter, weights, folder)

    monkeypatch.setattr(PipelineExporter, "export", refuse)
    assert train(mined, tmp_path, "train.max_steps=3", *EVALUATED) == 0
    assert not (tmp_path / "best").exists() and (tmp_path / "pipeline").is_dir()
    found = [json.loads(line) for line in (tmp_path / "heldout" / "heldout.jsonl").read_text().splitlines()]
    assert [values["step"] for values in found] == [2, 3]


@pytest.mark.slow
def test_wandb_offline_holds_the_run_and_goes_on_with_it(mined: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_API_KEY")}
    environment |= {"HOME": str(tmp_path / "home"), "WANDB_SILENT": "true"}
    command = [sys.executable, "scripts/train.py", *SMALLEST, *EVALUATED, f"data.root={mined}",
               f"run_dir={tmp_path / 'run'}", "train.tracker=wandb", "train.resume=latest"]  # fmt: skip
    for steps in (2, 4):
        job = [*command, f"train.max_steps={steps}"]
        done = subprocess.run(job, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        assert "wandb has no API key (`wandb login`), so it logs offline" in done.stdout
    runs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    # Both parts have one id, under which `wandb sync` joins them.
    identity = read_state(checkpoint_path(tmp_path / "run" / "checkpoints", 4))["tracker"]["wandb"]
    assert [run.name.rsplit("-", 1)[1] for run in runs] == [identity, identity]
    assert all(list(run.glob("*.wandb")) for run in runs)
    assert list(runs[0].rglob("media/table/heldout/*.table.json"))


@pytest.mark.slow
def test_trackio_holds_the_run_on_this_machine_and_goes_on_with_it(mined: Path, tmp_path: Path) -> None:
    store = tmp_path / "trackio"
    environment = os.environ | {"TRACKIO_DIR": str(store), "HOME": str(tmp_path / "home")}
    command = [sys.executable, "scripts/train.py", *SMALLEST, f"data.root={mined}", "run_name=toy", "train.log_every=1",
               f"run_dir={tmp_path / 'run'}", "train.tracker=trackio", "train.resume=latest"]  # fmt: skip
    for options in (["train.max_steps=2"], ["train.max_steps=4", *EVALUATED]):
        job = [*command, *options]
        subprocess.run(job, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as store; run = ('mimicbrush', 'toy')\n"
        "print(json.dumps([store.get_runs(run[0]), store.get_logs(*run), store.get_run_config(*run)]))"
    )
    read = [sys.executable, "-c", code]
    done = subprocess.run(read, env=environment, check=True, capture_output=True, text=True)
    runs, logged, config = json.loads(done.stdout)
    assert runs == ["toy"]  # the second part goes on with the first
    losses = [values["loss"] for values in logged if "loss" in values]
    assert losses == [values["loss"] for values in metrics(tmp_path / "run")] and len(losses) == 4
    assert config["model.size_px"] == 16
    last = next(values for values in logged if values["step"] == 4 and "heldout/pictures" in values)
    shown = [cell for cell in last["heldout/pictures"]["_value"][0].values() if isinstance(cell, dict)]
    assert len(shown) > 5 and all((store / "media" / cell["file_path"]).is_file() for cell in shown)
