"""LoRA files of FLUX.2 klein under ComfyUI's names: diffusers reads them back, and finds the same weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from toy_klein import add_lora, build_klein, write_toy_klein

from mimicbrush.cli import convert
from mimicbrush.errors import InputError, WeightsError
from mimicbrush.models.flux2_klein.comfyui import convert_lora_for_comfyui
from mimicbrush.models.flux2_klein.lora import write_klein_lora

EVERY_LAYER = [
    *("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "linear_in", "linear_out"),
    *("transformer_blocks.0.attn.to_out.0", "to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out"),
    *("x_embedder", "context_embedder", "linear_1", "linear_2", "proj_out", "single_stream_modulation.linear"),
    *("double_stream_modulation_img.linear", "double_stream_modulation_txt.linear"),
]


def products(weights: dict[str, torch.Tensor], scale: float = 1.0) -> dict[str, torch.Tensor]:
    """What a LoRA adds to each layer."""
    return {
        name.removesuffix(".lora_A.weight"): scale * (weights[name.replace("lora_A", "lora_B")] @ weights[name])
        for name in weights
        if ".lora_A." in name
    }


@pytest.mark.parametrize("targets", [EVERY_LAYER, ["to_k", "add_v_proj", "to_qkv_mlp_proj"]])
def test_diffusers_reads_back_what_comfyui_reads(tmp_path: Path, targets: list[str]) -> None:
    transformer = build_klein().transformer
    add_lora(transformer, rank=3, alpha=5, layers=targets)
    write_klein_lora(tmp_path / "ours.safetensors", transformer)
    convert_lora_for_comfyui(tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors")
    names = load_file(tmp_path / "theirs.safetensors")
    assert all(name.startswith("diffusion_model.") for name in names)
    found = products(Flux2KleinPipeline.lora_state_dict(tmp_path / "theirs.safetensors"))
    expected = products(load_file(tmp_path / "ours.safetensors"), scale=5 / 3)
    for name, value in expected.items():
        torch.testing.assert_close(found.pop(name), value)
    assert all(not value.any() for value in found.values())  # what is fused with a layer that has a LoRA
    if targets == EVERY_LAYER:
        linear = [name for name, each in build_klein().transformer.named_modules() if isinstance(each, torch.nn.Linear)]
        assert {name.removeprefix("transformer.") for name in expected} == {*linear} - {"norm_out.linear"}


def test_names_are_those_of_the_published_weights(tmp_path: Path) -> None:
    """As in src/flux2/model.py of black-forest-labs/flux2."""
    transformer = build_klein().transformer
    add_lora(transformer, layers=["to_q", "to_k", "to_v", "to_qkv_mlp_proj", "ff.linear_in"])
    write_klein_lora(tmp_path / "ours.safetensors", transformer)
    convert_lora_for_comfyui(tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors")
    layers = {name.rpartition(".lora_")[0] for name in load_file(tmp_path / "theirs.safetensors")}
    assert layers == {
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "diffusion_model.double_blocks.0.img_mlp.0",
        "diffusion_model.single_blocks.0.linear1",
    }


def test_a_layer_without_a_counterpart_is_named(tmp_path: Path) -> None:
    transformer = build_klein().transformer
    add_lora(transformer, layers=["norm_out.linear"])
    write_klein_lora(tmp_path / "ours.safetensors", transformer)
    with pytest.raises(WeightsError, match=r"norm_out\.linear has no counterpart"):
        convert_lora_for_comfyui(tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors")


def test_another_kind_of_lora_is_refused(tmp_path: Path) -> None:
    transformer = build_klein().transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_rslora=True))
    write_klein_lora(tmp_path / "ours.safetensors", transformer)
    with pytest.raises(WeightsError, match="use_rslora"):
        convert_lora_for_comfyui(tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors")
    save_file({"transformer.to_q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "half.safetensors")
    with pytest.raises(WeightsError, match="not a LoRA of diffusers"):
        convert_lora_for_comfyui(tmp_path / "half.safetensors", tmp_path / "theirs.safetensors")


@pytest.mark.parametrize(("a", "b"), [((0, 8), (8, 0)), ((2, 8), (8, 3)), ((), ()), ((2, 8), (8,))])
def test_a_lora_whose_sides_do_not_fit_is_refused(a: tuple[int, ...], b: tuple[int, ...], tmp_path: Path) -> None:
    layer = "transformer.transformer_blocks.0.attn.to_q"
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(a), f"{layer}.lora_B.weight": torch.ones(b)},
        tmp_path / "lora.safetensors",
    )
    with pytest.raises(WeightsError, match=r"to_q has lora_A .* expected \(rank, inputs\) and \(outputs, rank\)"):
        convert_lora_for_comfyui(tmp_path / "lora.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(("k_inputs", "k_outputs"), [(6, 8), (8, 6)])
def test_layers_that_become_one_must_be_equally_wide(k_inputs: int, k_outputs: int, tmp_path: Path) -> None:
    layer = "transformer.transformer_blocks.0.attn"
    sides = {"to_q": (8, 8), "to_k": (k_inputs, k_outputs)}
    tensors = {f"{layer}.{name}.lora_A.weight": torch.ones(2, inputs) for name, (inputs, _) in sides.items()}
    tensors |= {f"{layer}.{name}.lora_B.weight": torch.ones(outputs, 2) for name, (_, outputs) in sides.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(WeightsError, match=r"to_q and the layers beside it have sides of .* expected equal widths"):
        convert_lora_for_comfyui(tmp_path / "lora.safetensors", tmp_path / "out.safetensors")


@pytest.mark.parametrize("alpha", ["1" + 400 * "0", "NaN", "Infinity", "-1e300"])
def test_an_alpha_that_no_float_can_hold_is_refused(alpha: str, tmp_path: Path) -> None:
    layer = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(8, 2)}
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: f'{{"transformer.lora_alpha": {alpha}}}'}
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    with pytest.raises(WeightsError, match=r"its metadata (has lora_alpha=.*, expected a number below|cannot be read)"):
        convert_lora_for_comfyui(tmp_path / "lora.safetensors", tmp_path / "out.safetensors")


def test_the_command_converts_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toy_klein(tmp_path / "run" / "pipeline")
    output = tmp_path / "comfyui.safetensors"

    def command(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["convert", "lora", *map(str, arguments), "--output", str(output)])
        convert.main()

    command(tmp_path / "run")
    assert f"wrote {output}; put it into models/loras of ComfyUI" in capsys.readouterr().out
    converted = output.read_bytes()
    command(tmp_path / "run" / "pipeline" / "pytorch_lora_weights.safetensors", "--force")
    assert output.read_bytes() == converted
    (tmp_path / "run" / "pipeline" / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"pytorch_lora_weights\.safetensors is missing.*mimicbrush export RUN"):
        command(tmp_path / "run", "--force")
    write_toy_klein(tmp_path / "trained" / "pipeline", lora=False)
    with pytest.raises(InputError, match="has no LoRA of FLUX"):
        command(tmp_path / "trained", "--force")
