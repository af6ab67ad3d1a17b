"""The released weights out of a Hugging Face cache: converted once, then at hand."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_scripts
from accelerate.state import AcceleratorState, PartialState
from hydra import compose, initialize_config_dir
from PIL import Image
from released_snapshot import COMMITS, as_hub_cache, write_snapshot

from mimicbrush import assembly
from mimicbrush.errors import WeightsError
from mimicbrush.pipelines.conversion.hub import released_pipeline_folder
from mimicbrush.pipelines.open_pipeline import load_pipeline, seeded_generator

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_snapshot(folder)
    as_hub_cache(folder, folder / "home")
    return folder / "home"


#: `scripts/infer.py` with another cache. A warm process has imported huggingface_hub, which then reads no variable.
EDIT_WITH_CACHE = """
import sys
from pathlib import Path
import huggingface_hub.constants, huggingface_hub.utils._cache_assets
from mimicbrush.cli.edit import main
from mimicbrush.errors import cli_main
home = Path(sys.argv.pop(1))
huggingface_hub.constants.HF_HUB_CACHE = str(home / "hub")
huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE = str(home / "assets")
cli_main(main)
"""


def cache_at(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    # huggingface_hub reads the environment when it is imported, which is long ago.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(home / "assets"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_two_at_once_convert_once_and_the_result_edits(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script_environment: Callable[[], dict[str, str]],
) -> None:
    random = np.random.default_rng(0)
    source, reference = (random.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(2))
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 20:40] = 255
    for name, image in (("ref", reference), ("src", source), ("mask", mask)):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    (tmp_path / "edit.py").write_text(EDIT_WITH_CACHE)
    command = [sys.executable, "edit.py", str(home), "ref.png", "src.png", "mask.png"]
    command += ["--model", "released", "--steps", "2", "-o", "result.png"]
    other = warm_scripts.Popen(command, cwd=tmp_path, env=script_environment(), stderr=subprocess.PIPE, text=True)
    cache_at(monkeypatch, home)
    folder = released_pipeline_folder()
    _, errors = other.communicate()
    assert other.returncode == 0, errors
    with Image.open(tmp_path / "result.png") as result:
        assert result.size == (64, 48)
    assert folder.is_relative_to(home / "assets" / "mimicbrush") and folder.name == "pipeline"
    assert all(commit[:16] in str(folder) for commit in COMMITS.values())
    assert {path.name for path in folder.parent.iterdir()} <= {"pipeline", "pipeline.lock"}

    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "keep_shape": True, "generator": seeded_generator(0)}
    result = np.asarray(pipe(source, mask, reference, **options).images[0])
    assert result.shape == source.shape
    assert np.array_equal(result[42:], source[42:]) and not np.array_equal(result[15:25, 25:35], source[15:25, 25:35])

    used = folder.stat().st_mtime_ns
    assert released_pipeline_folder() == folder and folder.stat().st_mtime_ns == used  # not made again


def test_the_released_weights_are_fine_tuned_as_they_were_trained(
    home: Path, mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_at(monkeypatch, home)
    assembly.register_schemas()
    choices = ["+experiment=smoke", "model=pipeline", "model.path=released", "train.unet=lora", "train.max_steps=1"]
    small = ["train.batch_size=2", "train.total_batch_size=2", "train.prediction_type=epsilon", "train.learning_rate=0"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", [*choices, *small, f"data.root={mined}", f"run_dir={tmp_path / 'run'}"])
    try:
        assembly.train(config, tmp_path / "run")
    finally:
        AcceleratorState._reset_state()
        PartialState._reset_state()
    before, after = load_pipeline(released_pipeline_folder()), load_pipeline(tmp_path / "run" / "pipeline")
    assert after.options() == before.options() and after.config.reference_blend == 0.5
    weights = before.unet.state_dict()
    assert all(torch.equal(value, weights[key].float()) for key, value in after.unet.state_dict().items())

    reports = assembly.provide_weights(choices[1:3], ROOT / "configs", fetching=False, deep=True)
    assert [report.part for report in reports if report.problem is None] == [report.part for report in reports]
    assert {"unet", "reference_unet", "vae", "depth_projector"} <= {report.part for report in reports}


def test_offline_with_nothing_says_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_at(monkeypatch, tmp_path)
    with pytest.raises(WeightsError) as caught:
        released_pipeline_folder()
    message = str(caught.value)
    assert "hf download xichenhku/MimicBrush --include 'mimicbrush/mimicbrush.bin'" in message
    assert "not in the local cache" in message


def test_what_a_partial_copy_lacks_is_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(home / "hub", tmp_path / "hub", symlinks=True)
    snapshot = tmp_path / "hub" / "models--xichenhku--cleansd" / "snapshots" / COMMITS["xichenhku/cleansd"]
    (snapshot / "stable-diffusion-v1-5" / "unet" / "config.json").unlink()
    cache_at(monkeypatch, tmp_path)
    with pytest.raises(WeightsError, match=r"does not contain stable-diffusion-v1-5/unet/config\.json"):
        released_pipeline_folder()
