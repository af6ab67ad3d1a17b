"""The package as `pip install` puts it on a machine without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_data import photograph

from mimicbrush.io.images import read_image
from mimicbrush.synthetic import clips

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `mimicbrush ...` of the wheel in a folder; the packages that it needs are those of the tests."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "mimicbrush", *arguments],
            cwd=folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert str(ROOT) not in done.stdout + done.stderr  # nothing of the repository was used
        return done

    return run_in


def test_it_holds_every_file_of_the_package_and_what_stands_beside(wheel: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "mimicbrush", "configs", "data_manifests"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    expected = {name if name.startswith("mimicbrush/") else f"mimicbrush/{name}" for name in listed}
    present = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert present == expected


def test_mine_train_edit_and_evaluate_away_from_the_repository(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    list(clips.write_clips(tmp_path / "videos", clips.demo_clips(clips.TRAIN_PHOTOGRAPHS, 3, seed=0)))
    run(tmp_path, "mine", "input=videos", "output=pairs")
    short = ("train.max_steps=2", "train.tracker=none", "run_dir=run", "data.heldout_ratio=0", "eval=none")
    run(tmp_path, "train", "+experiment=fine_tune", "data.root=pairs", *short)
    for name in ("ref.png", "src.png"):
        Image.fromarray(photograph("coffee.png")[:96, :128]).save(tmp_path / name)
    mask = np.zeros((96, 128), np.uint8)
    mask[30:60, 40:80] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    run(tmp_path, "edit", "ref.png", "src.png", "mask.png", "--model", "run/pipeline", "-o", "edited.png")
    edited, source = (np.asarray(read_image(tmp_path / name, "RGB")) for name in ("edited.png", "src.png"))
    assert (edited[:20] == source[:20]).all() and (edited[40:50, 50:70] != source[40:50, 50:70]).any()
    run(tmp_path, "evaluate", "editor=small", "pairs=pairs", "output=scores", "max_pairs=2", "split=all")
    assert (tmp_path / "scores" / "metrics.json").is_file()


@pytest.mark.parametrize("command", ["app", "benchmark", "convert", "export", "fetch", "pairs", "pck", "study"])
def test_the_other_commands_start(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, command: str
) -> None:
    assert run(tmp_path, command, "--help").stdout
