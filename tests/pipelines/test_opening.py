"""One door for every command: names, folders and runs become pipelines; and nothing happens on import."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_edit import an_edit, build

from mimicbrush.errors import InputError, WeightsError
from mimicbrush.models.options import ToyModel
from mimicbrush.models.pretrained.files import DamagedFileError
from mimicbrush.pipelines import MimicBrushPipeline, small_model
from mimicbrush.pipelines.checksums import CHECKSUMS_FILE
from mimicbrush.pipelines.find_pipeline import find_pipeline
from mimicbrush.pipelines.folder import read_index, resolve_pipeline_folder
from mimicbrush.pipelines.open_pipeline import default_dtype, load_pipeline, open_pipeline, seeded_generator


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that left a pipeline."""
    run = tmp_path_factory.mktemp("runs") / "run"
    (run / "checkpoints").mkdir(parents=True)
    smallest = ToyModel(size_px=16, block_out_channels=(16, 32), attention_heads=2, context_width=16)
    build(smallest).save_pretrained(run / "pipeline")
    return run


def test_a_run_folder_is_its_pipeline(run_folder: Path) -> None:
    results = []
    for name in (run_folder, str(run_folder), run_folder / "pipeline"):
        assert resolve_pipeline_folder(name) == find_pipeline(name) == run_folder / "pipeline"
        pipe = open_pipeline(name)
        pipe.set_progress_bar_config(disable=True)
        results.append(pipe(**an_edit(), num_inference_steps=2, generator=seeded_generator(3)).images[0])
    assert all(np.array_equal(np.asarray(result), np.asarray(results[0])) for result in results)


def test_a_misspelt_model_names_the_nearest() -> None:
    for name, meant in (("smal", "small"), ("relased", "released")):
        with pytest.raises(InputError, match=rf"{name} is not a pipeline folder .*\. Did you mean '{meant}'\?"):
            resolve_pipeline_folder(name)


def test_names_of_the_small_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = open_pipeline("small").unet.state_dict()
    for other in (open_pipeline("proof"), MimicBrushPipeline.from_pretrained("small")):
        assert all(torch.equal(value, small[key]) for key, value in other.unet.state_dict().items())
    monkeypatch.setattr(small_model, "SHIPPED_MODEL", tmp_path / "absent")
    for name in ("small", "proof"):
        with pytest.raises(InputError, match="this installation does not contain the small model"):
            resolve_pipeline_folder(name)


def test_a_folder_comes_before_a_name(run_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_pipeline_folder("released") is None
    for name in ("released", "small", "proof"):
        (tmp_path / name).symlink_to(run_folder / "pipeline")
        assert resolve_pipeline_folder(name) == Path(name)


def test_what_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a pipeline folder \(there is no such folder\)"):
        open_pipeline(tmp_path / "absent")
    with pytest.raises(InputError, match=r"is not a pipeline folder \(it has no model_index.json\)"):
        open_pipeline(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match=r"run without a pipeline; `mimicbrush export"):
        open_pipeline(tmp_path)
    with pytest.raises(InputError, match=r"must be auto, float32, float16, bfloat16 or a torch\.dtype, got 'half'"):
        open_pipeline("small", dtype="half")


def test_every_file_must_be_the_one_that_was_saved(run_folder: Path, tmp_path: Path) -> None:
    """Each is deleted, emptied, cut, or exchanged with that of another run, which has the same size and shapes."""
    folder = shutil.copytree(run_folder / "pipeline", tmp_path / "pipeline")
    listed = json.loads((folder / CHECKSUMS_FILE).read_text())["files"]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(listed) == present - {CHECKSUMS_FILE, "README.md"}
    for name in listed:
        file, content = folder / name, (folder / name).read_bytes()
        for spoilt in (None, b"", content[:-1]):
            file.unlink() if spoilt is None else file.write_bytes(spoilt)
            with pytest.raises(WeightsError, match=f"{name} (is missing|has .* saved).*mimicbrush export RUN"):
                resolve_pipeline_folder(folder) if name == "model_index.json" and spoilt is None else read_index(folder)
        file.write_bytes(content)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + bytes(4))
    for load in (load_pipeline, MimicBrushPipeline.from_pretrained):
        with pytest.raises(WeightsError, match=r"unet/.* has another SHA-256 than when it was saved.*export RUN"):
            load(folder)
    for damaged in ("", "{}", '{"files": {"../x": [1, "0"]}}', '{"files": {"x": 1}}'):
        (folder / CHECKSUMS_FILE).write_text(damaged)
        with pytest.raises(DamagedFileError, match="mimicbrush export RUN"):
            read_index(folder)
    (folder / CHECKSUMS_FILE).unlink()  # as in folders of older versions
    load_pipeline(folder)


def test_the_rule_of_precision(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mimicbrush.pipelines.open_pipeline.move_to_device", lambda pipeline, device: pipeline
    )  # there is no GPU here
    for has_gpu, device, dtype, expected in (
        (False, "auto", None, torch.float32),
        (True, "auto", None, torch.float16),
        (True, "cuda", "auto", torch.float16),
        (True, "cpu", None, torch.float32),
        (True, "cuda", "bfloat16", torch.bfloat16),
        (True, "auto", torch.float32, torch.float32),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        pipe = open_pipeline(run_folder, device, dtype)
        assert {network.dtype for network in pipe.components.values() if hasattr(network, "dtype")} == {expected}
        if dtype in (None, "auto"):
            assert default_dtype(device) == expected


def test_names_are_resolved_without_torch_and_imports_change_nothing(
    script_environment: Callable[[], dict[str, str]],
) -> None:
    code = (
        "import os, sys; before = dict(os.environ); import mimicbrush\n"
        "from mimicbrush.errors import cli_main\n"
        "from mimicbrush.pipelines.find_pipeline import find_pipeline\n"
        "from mimicbrush.pipelines.small_model import SHIPPED_MODEL\n"
        "assert find_pipeline('small') == find_pipeline('proof') == SHIPPED_MODEL\n"
        "assert dict(os.environ) == before and 'torch' not in sys.modules\n"
        "cli_main(lambda: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules))\n"
    )
    given = {name: value for name, value in script_environment().items() if name != "OMP_WAIT_POLICY"}
    for environment, expected in ((given, "PASSIVE False"), ({**given, "OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE False")):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
