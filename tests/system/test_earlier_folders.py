"""Folders that version 0.1.0 made, before the modules got the places that they have: they open, go on and edit alike.

tests/golden/earlier.tar.xz holds clips and the folder mined of them, a run of two steps with its checkpoint and
pipeline and the pairs that it saw, the losses of steps 1 to 4 as that version went on, and an edit by that pipeline.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from toy_run import SHORTEST, metrics, train_with

from mimicbrush.assembly import export_run
from mimicbrush.data.manifest import read_manifest, split_pairs
from mimicbrush.mining.executors import Resources
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.run import mine_folder
from mimicbrush.mining.verify.folder import verify_folder
from mimicbrush.pipelines.open_pipeline import load_pipeline, seeded_generator

ARCHIVE = Path(__file__).parents[1] / "golden" / "earlier.tar.xz"
NUM_PAIRS = 16
OPTIONS = [
    *SHORTEST,
    "train.log_every=1",
    "model.size_px=16",
    "model.block_out_channels=[8,8]",
    "model.attention_heads=1",
    "model.context_width=8",
]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def edit(pipeline: Path) -> np.ndarray:
    pipe = load_pipeline(pipeline)
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(0)
    source, reference = (rng.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(2))
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 20:40] = 255
    return np.asarray(pipe(source, mask, reference, num_inference_steps=2, generator=seeded_generator(0)).images[0])


def test_a_mined_folder_is_read(earlier: Path) -> None:
    pairs = read_manifest(earlier / "pairs")
    assert len(pairs) == NUM_PAIRS
    for pair in pairs:
        first, second = pair.read_a(), pair.read_b()
        assert first.shape == second.shape and first.shape[1::-1] == pair.size_px
        assert len(pair.a_points) == len(pair.b_points)


def test_a_mined_folder_with_an_index_is_verified_split_and_not_mined_again(earlier: Path) -> None:
    folder = earlier / "mined"
    assert (folder / "index.arrow").is_file()
    checked = verify_folder(folder, progress=False)
    assert not checked.faults
    pairs = read_manifest(folder)
    assert len(np.unique(pairs.column("source_key"))) == 3
    train, heldout = (split_pairs(pairs, split, 0.4) for split in ("train", "heldout"))
    assert len(train) + len(heldout) == len(pairs) == 9
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.suffix in (".tar", ".parquet")}
    options = MiningOptions(pairs_per_clip=3, max_side_px=128)
    mined = mine_folder(earlier / "clips", folder, options, resources=Resources(workers=1), progress=False)
    assert mined.summary.pairs == 9 and before == {path: path.stat().st_mtime_ns for path in before}


def test_a_pipeline_folder_edits_to_the_same_pixels(earlier: Path) -> None:
    expected = np.load(earlier / "edited.npz")["edited"]
    found = edit(earlier / "run" / "pipeline")
    # Kinds of processors differ by rounding.
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert (found != expected).mean() < 0.01


def test_a_run_goes_on_to_the_same_losses_and_exports(
    earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(earlier, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")  # it was made with relative paths
    export_run(Path("run"), "latest", Path("exported"))
    assert np.array_equal(edit(Path("exported")), edit(Path("run/pipeline")))
    assert train_with(Path("pairs"), Path("run"), *OPTIONS, "train.max_steps=4", "train.resume=latest") == 0
    found = [values["loss"] for values in metrics(Path("run"))]
    assert found == pytest.approx(json.loads(Path("losses.json").read_text())["loss"], rel=1e-5)
