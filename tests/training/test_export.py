from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import warm_scripts
from safetensors.torch import load_file
from toy_run import forget_accelerate, train

from mimicbrush import assembly
from mimicbrush.assembly.training_run import _read_stored_options
from mimicbrush.errors import CheckpointError, InputError
from mimicbrush.pipelines.open_pipeline import load_pipeline
from mimicbrush.training.checkpoints import checkpoint_path

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


@pytest.mark.parametrize("options", [[], ["train.unet=lora", "train.reference_unet=frozen", "train.lora_rank=2"],
                                     ["+ablation=reference_dinov2"]], ids=["whole", "adapters", "dinov2"])  # fmt: skip
def test_an_exported_checkpoint_is_what_the_run_exports(mined: Path, tmp_path: Path, options: list[str]) -> None:
    train(mined, tmp_path, "train.max_steps=3", *options)
    found = assembly.export_run(tmp_path, "latest", tmp_path / "exported")
    assert found == checkpoint_path(tmp_path / "checkpoints", 3)
    files = [path.relative_to(tmp_path / "pipeline") for path in (tmp_path / "pipeline").rglob("*") if path.is_file()]
    assert len(files) > 10
    for file in files:
        own, other = tmp_path / "pipeline" / file, tmp_path / "exported" / file
        if file.suffix == ".safetensors":
            one, two = load_file(own), load_file(other)
            assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), file
        else:
            assert own.read_text() == other.read_text(), file


def test_raw_weights_and_what_is_refused(
    mined: Path, tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    run_dir = tmp_path / "run"
    train(mined, run_dir, "train.max_steps=2")
    done = warm_scripts.run(
        [sys.executable, "scripts/export_run.py", run_dir, "--raw", "-o", tmp_path / "raw"],
        cwd=ROOT, env=script_environment(), check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "the last weights of" in done.stdout
    saved = load_file(checkpoint_path(run_dir / "checkpoints", 2) / "weights.safetensors")
    weights = load_pipeline(tmp_path / "raw").unet.state_dict()
    assert all(torch.equal(weights[key], saved[f"unet.{key}"]) for key in weights)
    with pytest.raises(InputError, match="is not the folder of a training run"):
        assembly.export_run(tmp_path, "latest", tmp_path / "x")
    with pytest.raises(InputError, match="is not a pipeline folder"):
        assembly.export_run(run_dir, "latest", run_dir)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        assembly.export_run(run_dir, str(tmp_path), tmp_path / "x")
    (checkpoint_path(run_dir / "checkpoints", 2) / "ema.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        assembly.export_run(run_dir, "latest", tmp_path / "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Missing key model"),
        ("[1]", "attribute access"),
        ("a: [1\nb: }", "expected"),
        ("\udcff", "decode"),
        ("seed: 1\nmodel: {bogus: 1}", "no kind of model has all of these options: bogus"),
        ("seed: 1\nmodel: {size_px: big}\ntrain: {}", "'big' of type 'str'"),
        ("seed: 1\nmodel: {size_px: 64}\ntrain: {max_minutes: -1}", "train.max_minutes=-1"),
    ],
)
def test_a_damaged_config_of_a_run_is_one_message(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match=f"config.yaml cannot be read .*{message}.* restore the file"):
        _read_stored_options(tmp_path / "config.yaml")


@pytest.mark.parametrize("name", ["checkpoints", "pipeline"])
def test_a_file_in_the_way_of_what_a_run_leaves_is_said_before_it_trains(
    name: str, mined: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("a file of somebody")
    with pytest.raises(InputError, match=f"{name}: this is a file, expected a folder"):
        train(mined, tmp_path, "train.max_steps=1")
    assert (tmp_path / name).read_text() == "a file of somebody"
