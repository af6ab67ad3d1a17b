"""Released files in and out, on a toy snapshot in their exact layout and formats."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from released_snapshot import OLD_VAE_NAMES, UNET, write_snapshot
from safetensors.torch import load_file, save_file

from mimicbrush.cli import convert
from mimicbrush.errors import InputError, WeightsError
from mimicbrush.models.options import RELEASED_CONVENTIONS
from mimicbrush.models.pretrained.stored_weights import POSITION_IDS
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.models.unets import ReferenceUNet
from mimicbrush.pipelines.checksums import CHECKSUMS_FILE
from mimicbrush.pipelines.conversion.comparison import compare_part, compare_with_stock
from mimicbrush.pipelines.conversion.export_released import export_released, find_released_differences
from mimicbrush.pipelines.conversion.import_released import import_released
from mimicbrush.pipelines.conversion.key_maps import cast_weights
from mimicbrush.pipelines.conversion.layout import ReleasedFiles, find_released
from mimicbrush.pipelines.open_pipeline import load_pipeline

STOCK = ("inpainting", "sd15", "image_encoder")


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_snapshot(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def released(snapshot: tuple[Path, Path]) -> ReleasedFiles:
    return find_released(*snapshot)


@pytest.fixture(scope="module")
def pipeline(snapshot: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "pipeline"
    script("import", "--snapshot", snapshot[0], "--base", snapshot[1], "--output", folder)
    return folder


@pytest.fixture(scope="module")
def exported(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("exported") / "mimicbrush.bin"
    script("export", "--pipeline", pipeline, "--output", file)
    return file


def script(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
        convert.main()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_import_export_import_is_bit_equal(
    released: ReleasedFiles, pipeline: Path, exported: Path, tmp_path: Path
) -> None:
    again = tmp_path / "elsewhere"
    in_other_forms = ReleasedFiles(
        checkpoint=exported,
        inpainting=released.inpainting / "unet",
        sd15=released.sd15 / "unet" / "config.json",
        vae=released.vae / "diffusion_pytorch_model.bin",
        image_encoder=released.image_encoder / "config.json",
        depth=released.depth.parent,
    )
    import_released(in_other_forms, again)
    assert content(pipeline) == content(again)
    assert len(content(again)) == 16 + 2  # seven networks, scheduler, index, card, checksums
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]  # nothing is left beside it


def test_the_export_holds_what_was_released_and_loads_strictly(released: ReleasedFiles, exported: Path) -> None:
    before, after = (torch.load(file, weights_only=True) for file in (released.checkpoint, exported))
    assert list(before) == list(after)
    for part, weights in before.items():
        assert weights.keys() == after[part].keys(), part
        for key, tensor in weights.items():
            assert torch.equal(tensor, after[part][key]) and tensor.dtype == after[part][key].dtype, key
    ids = after["image_encoder"]["vision_model.embeddings.position_ids"]
    assert ids.dtype == torch.int64 and ids.tolist() == [list(range(17))]
    UNet2DConditionModel.from_config({**UNET, "in_channels": 13}).load_state_dict(after["unet"])
    ReferenceUNet.from_config({**UNET, "in_channels": 4}).load_state_dict(after["referencenet"])


def test_the_pipeline_does_as_the_released_code(pipeline: Path, released: ReleasedFiles) -> None:
    pipe = load_pipeline(pipeline)
    assert {name: pipe.config[name] for name in RELEASED_CONVENTIONS} == RELEASED_CONVENTIONS
    assert (pipe.config.default_num_inference_steps, pipe.config.default_guidance_scale) == (50, 5.0)
    expected = noise_scheduler()
    assert torch.equal(pipe.scheduler.alphas_cumprod, expected.alphas_cumprod)
    for name in ("steps_offset", "clip_sample", "set_alpha_to_one", "prediction_type"):
        assert pipe.scheduler.config[name] == expected.config[name]
    assert pipe.size_px == 64 and not list(pipeline.rglob("*.bin"))
    assert load_file(pipeline / "image_encoder" / "model.safetensors")["visual_projection.weight"].dtype == torch.half
    # The autoencoder came under its old names.
    old = torch.load(released.vae / "diffusion_pytorch_model.bin", weights_only=True)
    assert any(".query." in key for key in old) and not any(".to_q." in key for key in old)
    for key, tensor in pipe.vae.state_dict().items():
        for present, before in OLD_VAE_NAMES.items():
            key = key.replace(present, before) if "attentions" in key else key
        assert torch.equal(tensor, old.pop(key))
    assert not old


def test_dtype_casts_what_is_floating(released: ReleasedFiles) -> None:
    weights = torch.load(released.checkpoint, weights_only=True)["image_encoder"]
    assert cast_weights(weights, None) is weights
    kinds = {key: tensor.dtype for key, tensor in cast_weights(weights, torch.bfloat16).items()}
    assert kinds.pop(POSITION_IDS) == torch.int64 and set(kinds.values()) == {torch.bfloat16}


def test_what_does_not_fit_is_named(released: ReleasedFiles, tmp_path: Path) -> None:
    whole = torch.load(released.checkpoint, weights_only=True)
    unet = dict(whole["unet"])
    unet["conv_in.weight"] = unet["conv_in.weight"][:, :9].clone()
    unet["conv_in.bias_"] = unet.pop("conv_in.bias")
    torch.save({**whole, "unet": unet}, tmp_path / "wrong.bin")
    with pytest.raises(WeightsError) as caught:
        import_released(replace(released, checkpoint=tmp_path / "wrong.bin"), tmp_path / "pipeline")
    assert str(caught.value).splitlines() == [
        "unet does not fit:",
        "  conv_in.weight has shape (8, 9, 3, 3), expected (8, 13, 3, 3)",
        "  conv_in.bias is missing, expected shape (8,)",
        "  conv_in.bias_ is unexpected (its shape is (8,))",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.bin"]


def test_what_is_absent_is_said_with_a_way_to_get_it(released: ReleasedFiles, pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        find_released(tmp_path, None, depth=released.depth, vae=tmp_path / "nowhere")
    message = str(caught.value)
    assert "--depth" not in message and f"--vae: {tmp_path / 'nowhere'}: no such file" in message
    assert (
        "--sd15: neither this option nor --base is given. Download it: hf download xichenhku/cleansd --include"
        in message
    )
    assert "--image-encoder:" in message and "hf download xichenhku/MimicBrush --local-dir SNAPSHOT" in message
    with pytest.raises(InputError, match="--force"):
        import_released(released, pipeline)
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="is not a pipeline folder, so --force"):
        import_released(released, tmp_path / "mine", force=True)
    with pytest.raises(WeightsError, match=r"it is needed for the size of the network"):
        import_released(replace(released, image_encoder=tmp_path), tmp_path / "pipeline")


def stock_of(released: ReleasedFiles) -> dict[str, Path]:
    return {name: getattr(released, name) for name in STOCK}


def test_diff_tells_what_was_trained(
    released: ReleasedFiles, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "pipeline"
    shutil.copytree(pipeline, changed)
    file = changed / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_out.bias"][0] += 0.5
    save_file(weights, file, metadata={"format": "pt"})
    arguments = [f"--{name.replace('_', '-')}={path}" for name, path in stock_of(released).items()]
    script("diff", "--checkpoint", changed, "--json", "--vae", released.vae, "--depth", released.depth, *arguments)
    parts = {part["part"]: part for part in json.loads(capsys.readouterr().out)["parts"]}
    assert {name: part["verdict"] for name, part in parts.items()} == {
        "unet": "changed",
        "referencenet": "changed",
        "image_proj": "no stock weights",
        "depth_guider": "no stock weights",
        "image_encoder": "equal in half precision",
        "vae": "changed",
        "depth": "equal",
    }
    moved = {
        name: [block for block, change in part["blocks"].items() if change["verdict"] == "changed"]
        for name, part in parts.items()
    }
    assert moved["referencenet"] == ["up_blocks.2"] and moved["vae"] == ["decoder.conv_out"]
    assert len(parts["referencenet"]["excused_keys"]) == 24 and "conv_out.bias" in parts["referencenet"]["excused_keys"]
    assert parts["unet"]["new_inputs"]["channels"] == 4 and not parts["unet"]["new_inputs"]["all_zero"]
    for name, beginning in {
        "unet": "The imitative U-Net was trained, or started from other weights",
        "referencenet": "The reference U-Net was trained: its weights differ from those of ",
        "image_encoder": "The image encoder was not trained: ",
        "depth": "The depth estimator was not trained: ",
    }.items():
        assert parts[name]["sentence"].startswith(beginning)
    assert " in 1 of 14 blocks, by " in parts["referencenet"]["sentence"]
    assert " in every block, by " in parts["unet"]["sentence"]
    # By hand, for one block.
    new = torch.load(released.checkpoint, weights_only=True)["unet"]
    old = torch.load(released.inpainting / "unet" / "diffusion_pytorch_model.bin", weights_only=True)
    moved_weight, moved_bias = (
        new["conv_in.weight"][:, :9] - old["conv_in.weight"],
        new["conv_in.bias"] - old["conv_in.bias"],
    )
    change = torch.cat([moved_weight.flatten(), moved_bias])
    size = torch.cat([old["conv_in.weight"].flatten(), old["conv_in.bias"]])
    assert parts["unet"]["blocks"]["conv_in"]["relative"] == pytest.approx(float(change.norm() / size.norm()), rel=1e-5)
    with pytest.raises(InputError, match="does not contain vae"):
        compare_with_stock(released.checkpoint, **stock_of(released), vae=released.vae)


def test_a_change_that_vanishes_in_half_precision_is_told_from_rounding() -> None:
    stock = {"a.weight": torch.linspace(0.5, 1, 64), "b.0.weight": torch.zeros(2), "b.1.weight": torch.ones(2)}
    rounded = {key: tensor.half() for key, tensor in stock.items()}
    tiny = {**stock, "a.weight": stock["a.weight"].half().float() + 1e-5}
    moved = {**stock, "b.0.weight": torch.full((2,), 0.1)}
    sentences = []
    for new, verdict in ((stock, "equal"), (rounded, "equal in half precision"), (tiny, "equal in half precision"),
                         (moved, "changed")):  # fmt: skip
        change = compare_part("vae", new, stock, Path("stock"))
        assert change.verdict == verdict
        sentences.append(change.sentence())
        json.dumps(change.as_dict(), allow_nan=False)
    assert "rounded to half" in sentences[1] and "hardly trained" in sentences[2]
    assert "in 1 of 3 blocks" in sentences[3]  # from zero: by no finite amount


def test_inspect_counts(exported: Path, pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("inspect", str(exported), "--json", "--keys")
    parts = {part["part"]: part for part in json.loads(capsys.readouterr().out)["parts"]}
    assert parts["depth_guider"]["num_parameters"] == 150_260
    assert parts["image_encoder"]["dtypes"] == {"int64": 1, "float16": 56}
    assert parts["unet"]["keys"]["conv_in.weight"] == {"shape": [8, 13, 3, 3], "dtype": "float32"}
    assert parts["unet"]["num_keys"] - parts["referencenet"]["num_keys"] == 24
    script("inspect", str(pipeline))
    assert "depth_projector" in capsys.readouterr().out


def test_exports_that_the_released_code_cannot_hold_are_refused(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pipeline, tmp_path / "pipeline")
    (tmp_path / "pipeline" / CHECKSUMS_FILE).unlink()  # older folders have none
    index = tmp_path / "pipeline" / "model_index.json"
    index.write_text(index.read_text().replace('"ReferenceUNet"', '"KeyValueReferenceUNet"'))
    with pytest.raises(WeightsError, match="which shares hidden states"):
        export_released(tmp_path / "pipeline", tmp_path / "mimicbrush.bin")
    config = json.loads(index.read_text().replace('"KeyValueReferenceUNet"', '"ReferenceUNet"'))
    index.write_text(json.dumps({**config, "reference_blend": 1.0}))
    projector = tmp_path / "pipeline" / "depth_projector"
    weights = load_file(projector / "diffusion_pytorch_model.safetensors")
    three = weights["conv_in.weight"].repeat(1, 3, 1, 1)
    save_file({**weights, "conv_in.weight": three}, projector / "diffusion_pytorch_model.safetensors")
    (projector / "config.json").write_text(json.dumps({"depth_channels": 3}))
    with pytest.raises(WeightsError, match=r"conv_in\.weight takes 3 channels, expected 1"):
        export_released(tmp_path / "pipeline", tmp_path / "mimicbrush.bin")
    assert not (tmp_path / "mimicbrush.bin").exists()
    save_file(weights, projector / "diffusion_pytorch_model.safetensors")
    (projector / "config.json").write_text("{}")
    script("export", "--pipeline", tmp_path / "pipeline", "--output", tmp_path / "mimicbrush.bin")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert "reference_blend=1.0, but the released code always uses 0.5" in warnings[0]
    # A toy; else as released.
    assert (
        len(warnings) == 3
        and "trained for 64 px, but the depth guider of the released code always uses 512" in warnings[1]
    )
    assert "image_proj has other sizes" in warnings[2] and "(16, 32) here and (16, 1280) there)" in warnings[2]
    # The width of the context is free, that of the image tokens and the size are not.
    config = tmp_path / "pipeline" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 64}))
    released = torch.load(tmp_path / "mimicbrush.bin", weights_only=True)
    released["image_proj"]["projector.weight"] = torch.zeros(16, 1280)
    assert find_released_differences(tmp_path / "pipeline", released) == [warnings[0].removeprefix("warning: ")]
    with pytest.raises(InputError, match="--force"):
        export_released(tmp_path / "pipeline", tmp_path / "mimicbrush.bin")
