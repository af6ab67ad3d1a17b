"""Starting weights in the hub's layout: read as they are, or refused with a word why."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from starting_weights import REPOSITORIES, model_of, weights_file, write_repositories

from mimicbrush.errors import WeightsError
from mimicbrush.models.components import pretrained_components, random_components
from mimicbrush.models.options import PretrainedModel
from mimicbrush.models.pretrained.fetch import check_or_fetch_weights
from mimicbrush.models.pretrained.requirements import inspect_starting_weights
from mimicbrush.models.pretrained.stored_weights import depth_hub_name
from mimicbrush.models.pretrained.weights import LAYOUTS
from mimicbrush.models.unets import SharedUNet


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starting")
    write_repositories(folder)
    return folder


@pytest.fixture
def own(hub: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    shutil.copytree(hub, tmp_path / "hub")
    return tmp_path / "hub"


def problems(options: PretrainedModel, *, deep: bool = False) -> dict[str, str]:
    reports = check_or_fetch_weights(options, fetching=False, deep=deep)
    return {report.part: str(report.problem) for report in reports if report.problem is not None}


def state(root: Path, part: str) -> dict[str, torch.Tensor]:
    folder = weights_file(root, part).parent
    files = [path for path in folder.glob("*model*.safetensors") if "fp16" not in path.name and "open" not in path.name]
    return {key: value for path in files for key, value in load_file(path).items()}


def test_the_half_precision_variant_is_taken_where_there_is_no_other(own: Path) -> None:
    options = model_of(own)
    exact = state(own, "unet")
    file = weights_file(own, "unet")
    half = {key: value.half() for key, value in exact.items()}
    save_file(half, file.with_name(f"{file.stem}.fp16.safetensors"), metadata={"format": "pt"})
    assert check_or_fetch_weights(options, fetching=False, deep=False)[0].network.variant is None  # the other is there
    file.unlink()
    report = check_or_fetch_weights(options, fetching=False, deep=True)[0]
    assert report.problem is None and any("half-precision variant" in note for note in report.notes)
    found = pretrained_components(options).unet.state_dict()
    assert all(value.dtype == torch.float32 for value in found.values())
    assert all(torch.equal(found[key], value.float()) for key, value in half.items() if key != "conv_in.weight")


def test_parts_hold_what_the_files_hold(hub: Path) -> None:
    options = model_of(hub)
    assert problems(options, deep=True) == {}
    parts = pretrained_components(options)
    unet = state(hub, "unet")
    wide = parts.unet.state_dict()
    assert torch.equal(wide["conv_in.weight"][:, :9], unet.pop("conv_in.weight"))
    assert wide.pop("conv_in.weight").shape[1] == 13 and not parts.unet.conv_in.weight[:, 9:].any()
    assert wide.keys() == unet.keys() and all(torch.equal(wide[key], unet[key]) for key in unet)
    stock = state(hub, "reference_unet")  # in shards
    assert parts.reference_unet is not None
    assert all(torch.equal(value, stock[key]) for key, value in parts.reference_unet.state_dict().items())
    vae = state(hub, "vae")  # under its old names
    attention = parts.vae.decoder.mid_block.attentions[0]
    assert torch.equal(attention.to_q.weight, vae["decoder.mid_block.attentions.0.query.weight"])
    assert parts.vae.config.scaling_factor == 0.18215
    clip = state(hub, "image_encoder")  # a whole CLIP
    assert all(torch.equal(value, clip[key]) for key, value in parts.image_encoder.state_dict().items())
    assert parts.image_projector.projector.weight.shape == (16, 32)
    assert parts.unet.config.sample_size == 8


def test_dinov2_takes_the_place_of_clip(hub: Path) -> None:
    options = model_of(hub, reference_encoder="dinov2", image_encoder="nobody/nothing", reference_unet="nobody/nothing")
    assert problems(options) == {}
    parts = pretrained_components(options)
    stored = state(hub, "dinov2")
    assert torch.equal(parts.image_encoder.layernorm.weight, stored["layernorm.weight"])
    assert sum(p.numel() for p in parts.image_encoder.parameters()) == sum(value.numel() for value in stored.values())


def test_one_unet_for_both_begins_as_the_inpainting_one(hub: Path) -> None:
    options = model_of(hub, reference_encoder="shared", reference_unet="nobody/nothing")
    assert problems(options) == {}
    parts = pretrained_components(options)
    assert type(parts.unet) is SharedUNet and parts.reference_unet is None and parts.unet.config.sample_size == 8
    stock, wide = state(hub, "unet"), parts.unet.state_dict()
    assert torch.equal(wide.pop("conv_in.weight")[:, :9], stock.pop("conv_in.weight"))
    assert wide.keys() == stock.keys() and all(torch.equal(wide[key], stock[key]) for key in stock)


def test_weights_in_half_precision_are_trained_in_full(own: Path) -> None:
    for part in REPOSITORIES:
        for file in weights_file(own, part).parent.glob("*model*.safetensors"):
            if "fp16" not in file.name and "open" not in file.name:
                half = {key: v.half() if v.is_floating_point() else v for key, v in load_file(file).items()}
                save_file(half, file, metadata={"format": "pt"})
    parts = pretrained_components(model_of(own))
    assert {module.dtype for module in vars(parts).values()} == {torch.float32}


def test_a_folder_may_be_the_networks_own(hub: Path) -> None:
    options = model_of(hub, unet=str(hub / REPOSITORIES["unet"] / "unet"))
    assert problems(options) == {}


def config(part: str, **said: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        file = weights_file(root, part).parent / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **said}))

    return change


def tensors(part: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(root: Path) -> None:
        file = weights_file(root, part)
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})

    return rewrite


def content(part: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def rewrite(root: Path) -> None:
        file = weights_file(root, part)
        file.write_bytes(change(file.read_bytes()))

    return rewrite


def only_pickles(root: Path) -> None:
    file = weights_file(root, "depth_estimator")
    file.rename(file.with_name("pytorch_model.bin"))


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    (
        "vae",
        content("vae", lambda data: data[:-1000]),
        r"is damaged: it has .* its tensors need .*; the download was interrupted",
    ),
    ("vae", content("vae", lambda data: data + b"0"), "there is extra data after them"),
    ("dinov2", content("dinov2", lambda data: data[:5]), "it has 5 bytes and no header"),
    ("dinov2", content("dinov2", lambda data: b"<html>no such file</html>" * 99), "and no header"),
    ("dinov2", content("dinov2", lambda data: data[:8] + b"{]" + data[10:]), "its header cannot be read"),
    ("reference_unet", lambda root: weights_file(root, "reference_unet").unlink(), "lacks diffusion_.*-00011-of-00011"),
    ("reference_unet", tensors("reference_unet", lambda w: w.popitem()), "does not fit its shards"),
    ("depth_estimator", only_pickles, "it contains pytorch_model.bin, but pickles and other variants are not loaded"),
    ("unet", lambda root: (weights_file(root, "unet").parent / "config.json").unlink(), "has no config.json"),
    ("unet", config("unet", in_channels=4), "in_channels=4, expected 9"),
    ("reference_unet", config("reference_unet", in_channels=9), "in_channels=9, expected 4"),
    ("reference_unet", config("reference_unet", cross_attention_dim=32), r"attn2.* \(16, 16\), expected \(16, 32\)"),
    ("vae", config("vae", scaling_factor=0.13025), "scaling_factor=0.13025, expected 0.18215"),
    ("vae", config("vae", latent_channels=16), "latent_channels=16, expected 4"),
    ("vae", config("vae", block_out_channels=[8, 8, 16]), "expected 4 levels"),
    ("image_encoder", config("image_encoder", model_type="siglip"), "model_type='siglip', expected CLIP"),
    ("depth_estimator", config("depth_estimator", depth_estimation_type="metric"), "'metric', expected 'relative'"),
    ("unet", tensors("unet", lambda w: w.pop("conv_out.bias")), r"conv_out\.bias is missing"),
    ("unet", tensors("unet", lambda w: w.update(more=torch.zeros(2))), "more is unexpected"),
    ("unet", config("unet", attention_head_dim="many"), "does not describe a UNet2DConditionModel"),
    ("vae", tensors("vae", lambda w: w.update({"conv": torch.zeros(2, dtype=torch.int8)})), "1 tensors of integers"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "damage", "message"), DAMAGE)
def test_what_is_wrong_is_named_with_its_place(
    own: Path, part: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(own)
    found = problems(model_of(own, reference_encoder="dinov2" if part == "dinov2" else "unet"))
    assert list(found) == [part] and re.search(message, found[part])


def test_the_libraries_fill_in_nothing(own: Path) -> None:
    tensors("image_encoder", lambda weights: weights.pop("vision_model.post_layernorm.bias"))(own)
    with pytest.raises(WeightsError, match=r"vision_model\.post_layernorm\.bias is missing") as caught:
        pretrained_components(model_of(own))
    assert f"image_encoder in {own / REPOSITORIES['image_encoder']}" in str(caught.value)


def test_only_a_deep_look_sees_numbers_that_are_none(own: Path) -> None:
    tensors("vae", lambda weights: weights["encoder.conv_in.bias"].fill_(float("nan")))(own)
    assert problems(model_of(own)) == {}
    found = problems(model_of(own), deep=True)
    assert list(found) == ["vae"] and "encoder.conv_in.bias contains NaN or infinite values" in found["vae"]


def test_all_problems_are_told_at_once_with_their_options(own: Path) -> None:
    content("vae", lambda data: data[:-1])(own)
    config("unet", in_channels=13)(own)
    with pytest.raises(WeightsError) as caught:
        inspect_starting_weights(model_of(own))
    message = str(caught.value)
    for part in ("vae", "unet"):
        assert f"model.{part}={own / REPOSITORIES[part]}: " in message
    assert "model.image_encoder" not in message and "mimicbrush fetch" in message


def test_the_two_unets_must_fit_each_other(own: Path) -> None:
    config("reference_unet", cross_attention_dim=32)(own)
    with pytest.raises(WeightsError, match=r"does not fit model\.unet \(cross_attention_dim is 16 there and 32 here\)"):
        inspect_starting_weights(model_of(own))


def test_other_sizes_than_the_papers_are_noted(hub: Path) -> None:
    notes = {report.part: report.notes for report in check_or_fetch_weights(model_of(hub), fetching=False, deep=False)}
    assert "cross_attention_dim=16 (paper: 768)" in notes["unet"]
    assert "hidden_size=32 (paper: 1280)" in notes["image_encoder"]


def test_looking_at_files_imports_nothing_heavy() -> None:
    code = (
        "import sys, mimicbrush.models.pretrained.requirements, mimicbrush.pipelines.folder\n"
        "sys.exit(str({'torch', 'diffusers', 'transformers'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


@pytest.mark.slow
def test_at_full_size_a_look_takes_seconds_and_says_nothing(tmp_path: Path) -> None:
    with torch.device("meta"):
        parts = random_components()
        unets = {name: UNet2DConditionModel(in_channels=channels, cross_attention_dim=768) for name, channels in
                 (("unet", 9), ("reference_unet", 4))}  # fmt: skip
    whole = {**unets, "vae": parts.vae, "image_encoder": parts.image_encoder, "depth_estimator": parts.depth_estimator}
    for name, network in whole.items():
        folder = tmp_path / name
        save_config = network.save_config if hasattr(network, "save_config") else network.config.save_pretrained
        save_config(folder)
        _write_head_alone(folder / f"{LAYOUTS[name].file_stem}.safetensors", network)
    start = time.monotonic()
    reports = check_or_fetch_weights(
        PretrainedModel(**{name: str(tmp_path / name) for name in whole}), fetching=False, deep=False
    )
    assert time.monotonic() - start < 20
    assert [(report.problem, report.notes) for report in reports] == [(None, [])] * 5
    assert reports[0].network is not None and reports[0].network.num_bytes > 3.4e9


def _write_head_alone(file: Path, network: torch.nn.Module) -> None:
    """As long as with all weights, which are a hole in the file."""
    head, end = {}, 0
    for key, tensor in network.state_dict().items():
        offsets = [end, end := end + 4 * tensor.numel()]
        head[depth_hub_name(key)] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(head).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
