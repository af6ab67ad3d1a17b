"""The whole training run at the smallest size, through the real configuration."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import warm_scripts
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from toy_run import SHORTEST, SMALLEST, differing, forget_accelerate, metrics, train, weights

from mimicbrush import assembly
from mimicbrush.data.manifest import read_manifest
from mimicbrush.errors import CheckpointError, DataError, InputError
from mimicbrush.training import checkpoints
from mimicbrush.training.guards import ALWAYS_ALLOWED

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


@pytest.fixture(scope="module")
def straight(mined: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    train(mined, run_dir, "train.max_steps=6")
    forget_accelerate()
    return run_dir


def test_a_run_leaves_what_it_promises(straight: Path) -> None:
    assert [values["step"] for values in metrics(straight)] == [2, 4, 6]
    assert all(values["loss"] > 0 for values in metrics(straight))
    names = [path.name for path in (straight / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000003", "step-00000006"]
    assert "max_steps: 6" in (straight / "config.yaml").read_text()
    seen = json.loads((straight / "pipeline" / "training_data.json").read_text())
    assert seen["heldout_ratio"] == 0.1 and len(seen["source_hashes"]) == 4  # two of four of each kind held out


def test_stopped_and_resumed_equals_straight(straight: Path, mined: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(mined, run_dir, "train.max_steps=6", "train.max_minutes=0")  # nothing but a checkpoint at step 0
    train(mined, run_dir, "train.max_steps=3", "train.resume=latest")
    train(mined, run_dir, "train.max_steps=6", "train.resume=latest")
    assert differing(straight, run_dir) == []
    train(mined, run_dir, "train.max_steps=6", "train.resume=latest")  # complete: nothing changes
    assert differing(straight, run_dir) == []
    assert [values["step"] for values in metrics(run_dir)][-1] == 6


def test_micro_batches_change_rounding_only(straight: Path, mined: Path, tmp_path: Path) -> None:
    train(mined, tmp_path / "run", "train.max_steps=6", "train.batch_size=1", "data.num_workers=1")
    pairs = [(a["loss"], b["loss"]) for a, b in zip(metrics(straight), metrics(tmp_path / "run"), strict=True)]
    assert all(abs(a - b) < 1e-3 for a, b in pairs), pairs


def test_a_run_goes_on_with_other_micro_batches_but_not_with_other_choices(mined: Path, tmp_path: Path) -> None:
    run_dir, options = tmp_path / "run", ["train.total_batch_size=4", "train.checkpoint_every=3"]
    train(mined, run_dir, *options, "train.max_steps=3", "train.batch_size=2")
    before = (run_dir / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match=r"train\.learning_rate: was 0\.003, now 0\.1"):
        train(mined, run_dir, *options, "train.max_steps=6", "train.resume=latest", "train.learning_rate=0.1")
    assert (run_dir / "config.yaml").read_text() == before
    train(mined, run_dir, *options, "train.max_steps=6", "train.batch_size=1", "train.resume=latest")
    train(mined, tmp_path / "straight", *options, "train.max_steps=6", "train.batch_size=2")
    a, b = weights(run_dir), weights(tmp_path / "straight")
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-4


def test_half_precision_trains_and_exports_the_frozen_parts_as_they_were(mined: Path, tmp_path: Path) -> None:
    for precision in ("no", "bf16"):
        train(mined, tmp_path / precision, "train.max_steps=2", f"train.mixed_precision={precision}")
        forget_accelerate()
    for part, file in (("vae", "diffusion_pytorch_model"), ("image_encoder", "model"), ("depth_estimator", "model")):
        one, other = (load_file(tmp_path / p / "pipeline" / part / f"{file}.safetensors") for p in ("no", "bf16"))
        assert all(torch.equal(one[key], other[key]) for key in one), part


def test_another_seed_is_another_run(straight: Path, mined: Path, tmp_path: Path) -> None:
    train(mined, tmp_path / "run", "train.max_steps=6", "seed=1")
    assert differing(straight, tmp_path / "run")
    with pytest.raises(CheckpointError, match="seed: was 1, now 2"):
        train(mined, tmp_path / "run", "train.max_steps=7", "seed=2", "train.resume=latest")
    with pytest.raises(CheckpointError, match="already has checkpoints"):
        train(mined, tmp_path / "run", "train.max_steps=7", "seed=1")


@pytest.mark.slow  # make test sees it fall in test_golden_curve.py
def test_the_loss_falls(mined: Path, tmp_path: Path) -> None:
    train(mined, tmp_path / "run", "train.max_steps=60", "train.log_every=20", "train.batch_size=4",
          "train.total_batch_size=4", "train.learning_rate=3e-3", "train.prediction_type=epsilon",
          "train.checkpoint_every=100")  # fmt: skip
    losses = [values["loss"] for values in metrics(tmp_path / "run")]
    assert losses[0] > 0.7 and losses[-1] < 0.6 * losses[0], losses


def test_a_killed_run_resumes_to_the_same_bits(
    straight: Path, mined: Path, tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "scripts/train.py", *SMALLEST, f"data.root={mined}", f"run_dir={run_dir}",
               "train.resume=latest"]  # fmt: skip
    process = warm_scripts.Popen(
        # All checkpoints are kept: on a busy machine the first would be rotated away before it is seen here.
        [*command, "train.max_steps=100000", "train.keep_checkpoints=100000"],
        cwd=ROOT,
        env=script_environment(),
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not (run_dir / "checkpoints" / "step-00000003").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (run_dir / "checkpoints" / "step-00000099.tmp").mkdir()  # as if killed while writing
    first = sorted((run_dir / "checkpoints").glob("step-*[0-9]"))[0]
    for later in sorted((run_dir / "checkpoints").glob("step-*[0-9]"))[1:]:
        later.rename(tmp_path / later.name)
    assert first.name == "step-00000003", "the machine was too fast for this test"
    train(mined, run_dir, "train.max_steps=6", "train.resume=latest")
    assert differing(straight, run_dir) == []


EXPERIMENTS, ABLATIONS = (
    sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml")) for group in ("experiment", "ablation")
)
ABLATIONS.append("ours/reference_unet_shared")  # the only one of ours with other networks
#: A choice of machine, and of size, for experiments that are not made for a CPU.
ON_A_CPU = ["train.device=cpu", "train.mixed_precision=no", "train.tracker=none", "eval.every_steps=0"]
AT_TOY_SIZE = ["model=toy", *SMALLEST[1:], "model.encoders=''"]
KLEIN_AT_TOY_SIZE = ["model=flux2_klein_toy", "model.num_single_layers=1", "model.head_width=8", *SHORTEST[1:]]
#: Ablations that choose what reads the reference beside a U-Net.
OF_U_NETS = ("reference_clip", "reference_dinov2", "ours/reference_unet_shared")


#: Experiments that begin with a trained pipeline.
DISTILLED = ("distill", "small_distill")


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("ablation", [None, *ABLATIONS])
def test_every_experiment_with_every_ablation_takes_a_step(
    mined: Path, tmp_path: Path, experiment: str, ablation: str | None
) -> None:
    def take_a_step(experiment: str, run_dir: Path, *model: str) -> None:
        chosen = [f"+experiment={experiment}", *([f"+ablation={ablation}"] if ablation else [])]
        given = [*chosen, *model, *ON_A_CPU, f"data.root={mined}", f"run_dir={run_dir}", "train.max_steps=1",
                 "train.lr_warmup_steps=0"]  # fmt: skip
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            config = compose("train", given)
        assert assembly.train(config, run_dir) == 0
        assert metrics(run_dir)[-1]["loss"] > 0

    assembly.register_schemas()
    if experiment.startswith("klein"):
        if ablation not in OF_U_NETS:
            take_a_step(experiment, tmp_path, *KLEIN_AT_TOY_SIZE)
        return
    if experiment not in DISTILLED:
        take_a_step(experiment, tmp_path, *AT_TOY_SIZE)
        return
    take_a_step("smoke", tmp_path / "teacher", *AT_TOY_SIZE)
    forget_accelerate()
    pipeline = ["model=pipeline", f"model.path={tmp_path / 'teacher' / 'pipeline'}",
                "train.prediction_type=v_prediction"]  # fmt: skip
    take_a_step(experiment, tmp_path / "student", *pipeline, *SHORTEST[1:])


@pytest.mark.slow
def test_killed_at_random_moments_a_run_loses_at_most_one_interval(
    straight: Path, mined: Path, tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    """Whole runs; a hundred kills of the saving alone are in test_checkpoints.py."""
    rng, folder = random.Random(0), tmp_path / "checkpoints"
    command = [sys.executable, "scripts/train.py", *SMALLEST, f"data.root={mined}", f"run_dir={tmp_path}",
               "train.resume=latest", "train.checkpoint_every=1", "train.max_steps=100000"]  # fmt: skip
    reached = 0
    for _ in range(4):
        process = warm_scripts.Popen(command, cwd=ROOT, env=script_environment(), stderr=subprocess.DEVNULL)
        while len(good := checkpoints.list_checkpoints(folder)) < 2 or int(good[-1].name[5:]) < reached + 2:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.wait()
        before = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1]]
        found = checkpoints.find_checkpoint(folder, "latest", pytest.fail)
        assert found is not None
        step = checkpoints.read_state(found)["step"]
        assert step >= reached + 2 and step >= max(before, default=0) - 2  # logged every other step, saved after it
        assert sum(checkpoints.verify_checkpoint(path) is None for path in checkpoints.list_checkpoints(folder)) >= 2
        reached = step
    # The data go on where the newest checkpoint was, to the same bits as without any kill.
    train(mined, tmp_path / "straight", f"train.max_steps={reached + 2}", "train.checkpoint_every=1")
    train(mined, tmp_path, f"train.max_steps={reached + 2}", "train.checkpoint_every=1", "train.resume=latest")
    assert differing(tmp_path / "straight", tmp_path) == []


def damaged_copy(mined: Path, root: Path, every: int) -> Path:
    """The folder with every n-th pair made unreadable."""
    shutil.copytree(mined, root)
    shard = root / "shards" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    for pair in read_manifest(root)[::every]:
        offset, length = pair.a_span
        data[offset : offset + length // 2] = bytes(length // 2)
    shard.write_bytes(data)
    return root


def test_unreadable_pairs_are_counted_and_named(mined: Path, tmp_path: Path) -> None:
    root, runs = damaged_copy(mined, tmp_path / "pairs", 8), [tmp_path / "none", tmp_path / "one"]
    for workers, run_dir in enumerate(runs):
        train(root, run_dir, "train.max_steps=6", "data.max_bad_ratio=0.9", f"data.num_workers={workers}",
              "data.heldout_ratio=0")  # fmt: skip
        forget_accelerate()
    assert differing(*runs) == []
    counts, others = ([values["bad_samples"] for values in metrics(run_dir)] for run_dir in runs)
    lines = (runs[0] / "bad_samples.txt").read_text().splitlines()
    assert counts == others and sum(counts) == len(lines) >= 2
    assert all(re.match(r"sample \d+: pair \S+: bytes", line) for line in lines)


def test_too_many_unreadable_pairs_stop_the_run(mined: Path, tmp_path: Path) -> None:
    root = damaged_copy(mined, tmp_path / "pairs", 2)
    with pytest.raises(DataError, match=r"of \d+ samples could not be read, more than data\.max_bad_ratio=0\.01"):
        train(root, tmp_path / "run", "train.max_steps=100", "data.heldout_ratio=0")
    assert metrics(tmp_path / "run")[-1]["step"] < 20
    assert len((tmp_path / "run" / "bad_samples.txt").read_text().splitlines()) > ALWAYS_ALLOWED


def test_drawing_on_the_device_trains_alike(straight: Path, mined: Path, tmp_path: Path) -> None:
    train(mined, tmp_path / "run", "train.max_steps=6", "data.augment_on=device")
    pairs = [(a["loss"], b["loss"]) for a, b in zip(metrics(straight), metrics(tmp_path / "run"), strict=True)]
    assert all(abs(a - b) < 0.02 * a for a, b in pairs), pairs


def test_named_sources_train(mined: Path, tmp_path: Path) -> None:
    named = f"+data.sources={{clips:{{root:'{mined}',kind:video,weight:2}},photos:{{root:'{mined}',kind:image}}}}"
    train("", tmp_path / "run", "train.max_steps=2", named)
    seen = json.loads((tmp_path / "run" / "pipeline" / "training_data.json").read_text())
    assert len(seen["source_hashes"]) == 4
    moved = tmp_path / "moved"
    shutil.copytree(mined, moved)
    train("", tmp_path / "run", "train.max_steps=3", "train.resume=latest", named.replace(str(mined), str(moved), 1))
    with pytest.raises(CheckpointError, match=r"data\.sources\.clips\.weight: was 2.*, now 3"):
        train("", tmp_path / "run", "train.resume=latest", named.replace("weight:2", "weight:3"))
    with pytest.raises(InputError, match=r"data\.sources\.photos\.root=.* is not a folder"):
        train("", tmp_path / "none", named.replace(f"root:'{mined}',kind:image", "root:nowhere,kind:image"))
    with pytest.raises(InputError, match="both given"):
        train(mined, tmp_path / "none", named)
