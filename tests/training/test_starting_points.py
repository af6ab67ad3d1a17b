"""What a run begins from: starting weights in the hub's layout, or a pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from starting_weights import REPOSITORIES, SIZE_PX, weights_file, write_repositories
from toy_data import photograph, write_mined_folder
from toy_run import SHORTEST, differing, forget_accelerate, metrics, train, train_with

from mimicbrush import assembly
from mimicbrush.errors import CheckpointError, InputError, WeightsError
from mimicbrush.models.options import ModelOptions, PipelineModel
from mimicbrush.pipelines.checksums import CHECKSUMS_FILE
from mimicbrush.pipelines.folder import read_conventions
from mimicbrush.pipelines.open_pipeline import load_pipeline, seeded_generator
from mimicbrush.training.options import TrainOptions

CONVENTIONS = {
    "letterbox_order": "pad_then_resize",
    "reference_blend": 0.5,
    "reference_timestep": "zero",
    "depth_channels": 3,
    "depth_convention": "released",
    "no_depth_convention": "zero_input",
}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


@pytest.fixture(scope="module")
def base(mined: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two steps with every convention that can be another."""
    run_dir = tmp_path_factory.mktemp("base") / "run"
    train(mined, run_dir, "train.max_steps=2", *[f"model.{name}={value}" for name, value in CONVENTIONS.items()])
    forget_accelerate()
    return run_dir


def go_on(mined: Path, run_dir: Path, path: Path, *more: str) -> int:
    options = ["model=pipeline", f"model.path={path}", "train.max_steps=1", "train.prediction_type=v_prediction"]
    return train_with(mined, run_dir, *SHORTEST, *options, *more)


def starting_weights(hub: Path) -> list[str]:
    return [f"model.{part}={hub / name}" for part, name in REPOSITORIES.items()]


def test_toy_weights_in_the_hubs_layout_train_and_edit(mined: Path, tmp_path: Path) -> None:
    write_repositories(tmp_path / "hub")
    named = starting_weights(tmp_path / "hub")
    train_with(
        mined,
        tmp_path / "run",
        *SHORTEST,
        "model=sd15",
        f"model.size_px={SIZE_PX}",
        *named,
        "train.max_steps=2",
    )
    assert metrics(tmp_path / "run")[-1]["loss"] > 0
    stored = load_file(weights_file(tmp_path / "hub", "vae"))
    exported = load_pipeline(tmp_path / "run" / "pipeline")
    assert torch.equal(exported.vae.decoder.conv_out.weight, stored["decoder.conv_out.weight"])
    assert exported.size_px == SIZE_PX and exported.unet.config.in_channels == 13
    source, mask = photograph("coffee.png"), np.ones((400, 600), bool)
    mask[:, :300] = False
    exported.set_progress_bar_config(disable=True)
    result = exported(
        source, mask, photograph("chelsea.png"), num_inference_steps=2, generator=seeded_generator(0)
    ).images[0]
    assert np.array_equal(np.asarray(result)[:, :250], source[:, :250])


def test_a_cut_file_stops_a_run_before_anything_else(mined: Path, tmp_path: Path) -> None:
    write_repositories(tmp_path / "hub")
    file = weights_file(tmp_path / "hub", "depth_estimator")
    file.write_bytes(file.read_bytes()[:-1])
    named = starting_weights(tmp_path / "hub")
    with pytest.raises(InputError) as caught:
        train_with(tmp_path / "nowhere", tmp_path / "run", *SHORTEST, "model=sd15", *named)
    for expected in ("data.root", "model.depth_estimator=", str(file), "the download was interrupted"):
        assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_pipeline_is_gone_on_from_with_all_that_it_was_made_for(mined: Path, tmp_path: Path, base: Path) -> None:
    go_on(mined, tmp_path / "run", base / "pipeline", "train.learning_rate=0")
    before, after = load_pipeline(base / "pipeline"), load_pipeline(tmp_path / "run" / "pipeline")
    assert after.options() == before.options() and after.scheduler.config == before.scheduler.config
    # With no learning rate, all weights are what they were, those of the frozen networks, too.
    for name in ("unet", "reference_unet", "image_projector", "depth_projector", "vae", "image_encoder",
                 "depth_estimator"):  # fmt: skip
        one, other = (getattr(pipeline, name).state_dict() for pipeline in (before, after))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    assert (tmp_path / "run" / "config.yaml").read_text().count("reference_blend: 0.5") == 1


def test_every_option_is_open_until_it_is_chosen() -> None:
    open_ones = {each.name: each.default for each in fields(PipelineModel)}
    for each in fields(ModelOptions):
        assert open_ones[each.name] != each.default
        with pytest.raises(InputError, match=f"model.{each.name}=.*: expected"):
            replace(ModelOptions(), **{each.name: open_ones[each.name]})


def test_what_a_folder_says_is_what_the_loaded_pipeline_says(base: Path) -> None:
    said = read_conventions(base / "pipeline")
    assert ModelOptions(**said.options) == load_pipeline(base / "pipeline").options()
    assert {**said.options, **CONVENTIONS} == said.options and said.prediction_type == "v_prediction"
    assert said.size_step_px == 4 and not said.rescale_betas_zero_snr


def test_it_learns_resumes_and_takes_adapters(mined: Path, tmp_path: Path, base: Path) -> None:
    more = ["train.unet=lora", "train.lora_rank=2", "train.reference_unet=frozen"]
    go_on(mined, tmp_path / "resumed", base / "pipeline", *more)
    forget_accelerate()
    go_on(mined, tmp_path / "resumed", base / "pipeline", *more, "train.max_steps=2", "train.resume=latest")
    moved = {key.split(".")[0] for key in differing(tmp_path / "resumed", base)}
    assert moved == {"unet", "image_projector", "depth_projector"}
    assembly.export_run(tmp_path / "resumed", "latest", tmp_path / "exported")  # knows the pipeline it began from
    again, run_s_own = (load_pipeline(tmp_path / name) for name in ("exported", "resumed/pipeline"))
    assert torch.equal(again.unet.conv_out.weight, run_s_own.unet.conv_out.weight)
    swapped = base / "pipeline" / "depth_estimator" / "model.safetensors"
    good = swapped.read_bytes()
    try:  # other weights under the same path
        swapped.write_bytes(good[:-64] + bytes(byte ^ 1 for byte in good[-64:]))
        with pytest.raises(CheckpointError, match="starting weights"):
            go_on(mined, tmp_path / "resumed", base / "pipeline", *more, "train.max_steps=3", "train.resume=latest")
        with pytest.raises(WeightsError, match="have changed since the run began"):
            assembly.export_run(tmp_path / "resumed", "latest", tmp_path / "exported")
    finally:
        swapped.write_bytes(good)
    # The same weights may lie elsewhere by then.
    shutil.copytree(base / "pipeline", tmp_path / "elsewhere")
    go_on(mined, tmp_path / "resumed", tmp_path / "elsewhere", *more, "train.max_steps=3", "train.resume=latest")
    assert metrics(tmp_path / "resumed")[-1]["step"] == 3


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("model.reference_sharing=keys_values", "model.reference_sharing must be hidden_states, got keys_values"),
        ("model.depth_channels=1", "model.depth_channels must be 3, got 1"),
        ("model.reference_encoder=clip", "model.reference_encoder must be unet, got clip"),
        ("model.size_px=18", "model.size_px must be a multiple of 4, got 18"),
        ("train.prediction_type=epsilon", "train.prediction_type must be v_prediction, got epsilon"),
        ("model.reference_timestep=never", "model.reference_timestep=never: expected one of"),
        ("model.path=nowhere", "model.path=nowhere cannot be used: nowhere is not a pipeline folder"),
        ("model.path=released", r"model=pipeline model\.path=released"),
    ],
)
def test_choices_that_they_do_not_allow_are_refused(
    mined: Path, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, choice: str, message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=message):
        go_on(mined, tmp_path / "run", base / "pipeline", choice)
    assert not (tmp_path / "run").exists()


def test_pure_noise_at_the_last_timestep_can_be_learnt_and_is_kept(
    mined: Path, tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rescaled = tmp_path / "rescaled"
    go_on(mined, rescaled, base / "pipeline", "train.rescale_betas_zero_snr=true")
    assert "note: train.rescale_betas_zero_snr=true, but the weights were trained for false" in capsys.readouterr().out
    scheduler = load_pipeline(rescaled / "pipeline").scheduler
    assert scheduler.alphas_cumprod[-1] == 0 and scheduler.alphas_cumprod[-2] > 0
    forget_accelerate()
    with pytest.raises(InputError, match=r"add train\.rescale_betas_zero_snr=true"):
        go_on(mined, tmp_path / "run", rescaled / "pipeline")


@pytest.mark.parametrize("other", [{"prediction_type": "epsilon"}, {"min_snr_gamma": 5.0}])
def test_what_cannot_learn_pure_noise_is_refused(other: dict[str, Any]) -> None:
    allowed = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    TrainOptions(**allowed)
    with pytest.raises(InputError, match=rf"rescale_betas_zero_snr=true needs train\.{next(iter(other))}"):
        TrainOptions(**{**allowed, **other})


def test_a_damaged_pipeline_is_refused(mined: Path, tmp_path: Path, base: Path) -> None:
    shutil.copytree(base / "pipeline", tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "depth_estimator" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"depth_estimator/model\.safetensors has .* were saved.*export RUN"):
        go_on(mined, tmp_path / "run", tmp_path / "pipeline")
    (tmp_path / "pipeline" / CHECKSUMS_FILE).unlink()  # older folders have none
    with pytest.raises(InputError) as caught:
        go_on(mined, tmp_path / "run", tmp_path / "pipeline")
    assert f"model.path={tmp_path / 'pipeline'} cannot be used: {file} is damaged" in str(caught.value)


def test_choices_that_the_weights_allow_are_noted_and_what_was_seen_before_is_remembered(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_mined_folder(tmp_path / "pairs", pairs_per_photo=1, with_images=False)
    manifest = other / "manifest" / "part-000000.parquet"
    table = pq.read_table(manifest)
    hashes = pa.array([value[::-1] for value in table.column("source_hash").to_pylist()])
    pq.write_table(table.set_column(table.schema.get_field_index("source_hash"), "source_hash", hashes), manifest)
    choices = ["data.video_ratio=1", "model.size_px=32", "model.reference_blend=0.0"]
    go_on(other, tmp_path / "run", base / "pipeline", *choices)
    said = capsys.readouterr().out
    assert "note: model.size_px=32, but the weights were trained for 16" in said
    assert "note: model.reference_blend=0.0, but the weights were trained for 0.5" in said
    options, expected = (asdict(load_pipeline(run / "pipeline").options()) for run in (tmp_path / "run", base))
    assert options == {**expected, "size_px": 32, "reference_blend": 0.0}
    seen, before = (
        set(json.loads((run / "pipeline" / "training_data.json").read_text())["source_hashes"])
        for run in (tmp_path / "run", base)
    )
    assert seen > before
