"""Exports read by the packages that trainers read them with; exports by several processes, and killed ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from export_readers import READERS

from mimicbrush.mining.exports.options import ExportOptions
from mimicbrush.mining.exports.run import export_pairs
from mimicbrush.mining.exports.verify import verify_export

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CAPTION = 'a "quoted", = caf\u00e9 火'


def export(mined: Path, output: Path, name: str, **more: int) -> None:
    options = ExportOptions(format=name, size_px=32, views=2, caption=CAPTION)
    export_pairs(mined, output, options, progress=False, samples_per_part=6, **more)


@pytest.mark.filterwarnings("default")
def test_datasets_opens_an_image_folder_as_the_scripts_of_diffusers_do(mined: Path, tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    export(mined, tmp_path / "out", "diffusers")
    for split in ("train", "heldout"):
        opened = datasets.load_dataset(str(tmp_path / "out" / split), cache_dir=str(tmp_path / "cache"))["train"]
        expected = {each.name: each for each in READERS["diffusers"](tmp_path / "out" / split)}
        assert len(opened) == len(expected) == 16
        columns = {"image", "source", "reference", "mask", "text"}
        assert set(opened.column_names) == columns
        for row, each in zip(opened, expected.values(), strict=True):
            assert row["text"] == CAPTION and np.array_equal(row["image"], each.target)
            assert np.array_equal(row["source"], each.conditions[0]) and np.array_equal(row["mask"], each.mask)
            assert np.array_equal(row["reference"], each.conditions[1])


@pytest.mark.filterwarnings("default")
def test_webdataset_reads_the_tars(mined: Path, tmp_path: Path) -> None:
    import webdataset

    export(mined, tmp_path / "out", "webdataset")
    tars = sorted(map(str, (tmp_path / "out" / "train").glob("*.tar")))
    assert len(tars) == 3
    rows = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    expected = {each.name: each for each in READERS["webdataset"](tmp_path / "out" / "train")}
    assert {row["__key__"] for row in rows} == expected.keys()
    for row in rows:
        each = expected[row["__key__"]]
        assert row["txt"] == row["json"]["caption"] == CAPTION
        assert np.array_equal(row["target.png"], each.target) and np.array_equal(row["source.png"], each.conditions[0])
        assert np.array_equal(row["reference.png"], each.conditions[1])
        assert np.array_equal(row["mask.png"][..., 0], each.mask)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_killed_export_goes_on_in_processes_that_share_it_to_the_same_bytes(mined: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    code = f"""
from pathlib import Path
from test_exports_slowly import export
export(Path({str(mined)!r}), Path({str(output)!r}), "ai-toolkit")
"""
    paths = [str(ROOT), *(str(ROOT / "tests" / name) for name in ("mining", "helpers"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    markers = output / "records" / "markers"
    while not (markers.is_dir() and len(list(markers.glob("*.json"))) > 1):
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "records" / "summary.json").exists()
    export(mined, output, "ai-toolkit", workers=2)
    assert verify_export(output, progress=False)[0] == []
    export(mined, tmp_path / "whole", "ai-toolkit")
    assert bytes_of(output) == bytes_of(tmp_path / "whole")
