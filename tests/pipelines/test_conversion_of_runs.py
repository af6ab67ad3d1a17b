"""A checkpoint of a training run as a file with the released names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from mimicbrush import assembly
from mimicbrush.errors import WeightsError
from mimicbrush.pipelines.conversion.export_released import export_released
from mimicbrush.pipelines.conversion.key_maps import PARTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(mined: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of three steps, at the smallest size."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    assembly.register_schemas()
    choices = {
        "data.root": mined,
        "data.num_workers": 0,
        "model.size_px": 16,
        "model.block_out_channels": "[16,32]",
        "model.context_width": 16,
        "train.batch_size": 2,
        "train.total_batch_size": 2,
        "train.max_steps": 3,
        "run_dir": run_dir,
    }
    overrides = ["+experiment=smoke", *[f"{name}={value}" for name, value in choices.items()]]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", overrides)
    assembly.train(config, run_dir)
    yield run_dir
    AcceleratorState._reset_state()
    PartialState._reset_state()


def test_the_average_is_what_the_runs_own_pipeline_holds(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000003"
    warnings = export_released(run / "pipeline", tmp_path / "average.bin", checkpoint=checkpoint)
    export_released(run / "pipeline", tmp_path / "pipeline.bin")
    export_released(run / "pipeline", tmp_path / "raw.bin", checkpoint=checkpoint, average=False)
    average, pipeline, raw = (
        torch.load(tmp_path / f"{name}.bin", weights_only=True) for name in ("average", "pipeline", "raw")
    )
    last = load_file(checkpoint / "weights.safetensors")
    moved = 0
    for part, weights in pipeline.items():
        assert weights.keys() == average[part].keys() == raw[part].keys()
        for key, tensor in weights.items():
            assert torch.equal(tensor, average[part][key]), (part, key)
            if part != "image_encoder":
                assert torch.equal(raw[part][key], last[f"{PARTS[part]}.{key}"])
                moved += not torch.equal(raw[part][key], tensor)
    assert moved > 100
    said = " | ".join(warnings)
    for expected in ("reference_blend=1.0", "prediction_type", "depth_guider has other sizes", "PatchAutoencoder"):
        assert expected in said


def test_a_folder_that_is_no_checkpoint(run: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not a checkpoint of a training run"):
        export_released(run / "pipeline", tmp_path / "x.bin", checkpoint=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_adapters_is_refused(run: Path, tmp_path: Path) -> None:
    for name in ("weights", "ema"):
        save_file({"unet.x.to_q.lora_A.default.weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match="contains only LoRA adapters"):
        export_released(run / "pipeline", tmp_path / "x.bin", checkpoint=tmp_path)


def test_an_average_that_is_not_there(run: Path, tmp_path: Path) -> None:
    save_file({"unet.conv_in.bias": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match="no averaged weights"):
        export_released(run / "pipeline", tmp_path / "x.bin", checkpoint=tmp_path)
    with pytest.raises(WeightsError, match="unet of"):  # one key is not all of them
        export_released(run / "pipeline", tmp_path / "x.bin", checkpoint=tmp_path, average=False)
