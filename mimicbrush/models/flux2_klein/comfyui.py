"""A LoRA of FLUX.2 klein under the names that ComfyUI reads.

ComfyUI uses FLUX.2 as Black Forest Labs published it. It reads a LoRA of the layer ``NAME`` as
``diffusion_model.NAME.lora_A`` and ``lora_B`` (model_lora_keys_unet in its comfy/lora.py). Queries, keys and values are
one layer there. So their three pairs become one: the A matrices are stacked, and the B matrices are on a block
diagonal. B is multiplied by the scale, alpha / rank.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from safetensors.torch import save_file

from mimicbrush.errors import WeightsError
from mimicbrush.io.atomic import write_aside
from mimicbrush.io.text import make_storable, parse_json
from mimicbrush.models.pretrained.files import DamagedFileError, read_head

#: Layer of diffusers -> layer of the published weights. A tuple becomes one layer. ``{}`` is the number of the block.
COMFYUI_NAMES: dict[str | tuple[str, ...], str] = {
    (
        "transformer_blocks.{}.attn.to_q",
        "transformer_blocks.{}.attn.to_k",
        "transformer_blocks.{}.attn.to_v",
    ): "double_blocks.{}.img_attn.qkv",
    (
        "transformer_blocks.{}.attn.add_q_proj",
        "transformer_blocks.{}.attn.add_k_proj",
        "transformer_blocks.{}.attn.add_v_proj",
    ): "double_blocks.{}.txt_attn.qkv",
    "transformer_blocks.{}.attn.to_out.0": "double_blocks.{}.img_attn.proj",
    "transformer_blocks.{}.attn.to_add_out": "double_blocks.{}.txt_attn.proj",
    "transformer_blocks.{}.ff.linear_in": "double_blocks.{}.img_mlp.0",
    "transformer_blocks.{}.ff.linear_out": "double_blocks.{}.img_mlp.2",
    "transformer_blocks.{}.ff_context.linear_in": "double_blocks.{}.txt_mlp.0",
    "transformer_blocks.{}.ff_context.linear_out": "double_blocks.{}.txt_mlp.2",
    "single_transformer_blocks.{}.attn.to_qkv_mlp_proj": "single_blocks.{}.linear1",
    "single_transformer_blocks.{}.attn.to_out": "single_blocks.{}.linear2",
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
_PREFIX, _COMFYUI_PREFIX = "transformer.", "diffusion_model."
_NUMBER = re.compile(r"(?<=blocks\.)\d+")
#: No alpha reaches this: alpha / rank multiplies weights in half precision.
_MAX_ALPHA = 1e30

#: A (rank, in) and B (out, rank) of a layer; and layer -> its pair.
LoraPair = tuple[torch.Tensor, torch.Tensor]
LoraPairs = dict[str, LoraPair]


def convert_lora_for_comfyui(source: Path, output: Path) -> None:
    """Write a LoRA file of diffusers under the names that ComfyUI reads.

    Args:
        source: a LoRA file of diffusers.
        output: the new file.

    Raises:
        WeightsError: the file is damaged, is not such a LoRA, or has parts without a counterpart in ComfyUI.
    """
    renamed = rename_for_comfyui(_read_pairs(source), source)
    tensors = {
        f"{_COMFYUI_PREFIX}{name}.{half}.weight": tensor.contiguous()
        for name, pair in renamed.items()
        for half, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    write_aside(output, lambda aside: save_file(tensors, aside, metadata={"format": "pt"}))


def rename_for_comfyui(pairs: LoraPairs, source: Path) -> LoraPairs:
    """Rename the layers of diffusers to those of the published weights; see the module.

    Args:
        pairs: layer of diffusers -> its pair.
        source: path of the file, for errors.

    Raises:
        WeightsError: a layer has no counterpart, or layers that become one have different widths.
    """
    left, renamed = dict(pairs), {}
    numbers = sorted({found.group() for name in pairs if (found := _NUMBER.search(name))}, key=int)
    for names, new in COMFYUI_NAMES.items():
        for number in numbers if "{}" in new else [""]:
            parts = [each.format(number) for each in ([names] if isinstance(names, str) else names)]
            if present := [part for part in parts if part in left]:
                sides = {part: left.pop(part) for part in present}
                renamed[new.format(number)] = sides[parts[0]] if len(parts) == 1 else _join(parts, sides, source)
    if left:
        layer = make_storable(next(iter(left)))
        raise WeightsError(f"{source}: {layer} has no counterpart in ComfyUI; train a LoRA without this layer")
    return renamed


def _join(parts: list[str], pairs: LoraPairs, source: Path) -> LoraPair:
    """Join the pairs of layers that become one layer; for layers without a LoRA, the rows of B are 0.

    Returns:
        A (sum of the ranks, in) and B (number of parts x out, sum of the ranks).

    Raises:
        WeightsError: the layers have different widths.
    """
    width = next(iter(pairs.values()))[1].shape[0]  # queries, keys and values are equally wide
    present = [pairs[part] for part in parts if part in pairs]
    if len({a.shape[1] for a, _ in present}) > 1 or any(b.shape[0] != width for _, b in present):
        shapes = ", ".join(f"{tuple(a.shape)} and {tuple(b.shape)}" for a, b in present)
        raise WeightsError(
            f"{source}: {make_storable(parts[0])} and the layers beside it have sides of {shapes}, expected equal "
            "widths; train the LoRA again"
        )
    ranks = [pairs[part][0].shape[0] if part in pairs else 0 for part in parts]
    joined_a = torch.cat([a for a, _ in present])
    joined_b = torch.zeros(len(parts) * width, sum(ranks), dtype=joined_a.dtype)
    for number, part in enumerate(parts):
        if part in pairs:
            first = sum(ranks[:number])
            joined_b[number * width : (number + 1) * width, first : first + ranks[number]] = pairs[part][1]
    return joined_a, joined_b


def _read_pairs(file: Path) -> LoraPairs:
    """Read a LoRA, and multiply B by its scale."""
    names = read_head(file)
    with safe_open(file, "pt") as opened:
        try:
            config = parse_json((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
        except ValueError as error:
            raise DamagedFileError(file, f"its metadata cannot be read ({error})") from error
        layers = sorted({name.removesuffix(".weight").rpartition(".")[0] for name in names})
        expected = {f"{layer}.{half}.weight" for layer in layers for half in ("lora_A", "lora_B")}
        if not names or expected != names.keys() or any(not layer.startswith(_PREFIX) for layer in layers):
            wrong = sorted(expected ^ names.keys()) or list(names) or ["nothing"]
            raise WeightsError(
                f"{file} is not a LoRA of diffusers for a transformer: unexpected or missing {make_storable(wrong[0])}"
            )
        pairs = {}
        for layer in layers:
            a, b = (opened.get_tensor(f"{layer}.{half}.weight") for half in ("lora_A", "lora_B"))
            if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a):
                raise WeightsError(
                    f"{file}: {make_storable(layer)} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, expected "
                    "(rank, inputs) and (outputs, rank); train the LoRA again"
                )
            scaled = b.float() * (_read_alpha(file, config, a.shape[0]) / a.shape[0])
            pairs[layer.removeprefix(_PREFIX)] = a, scaled.to(b.dtype)
    return pairs


def _read_alpha(file: Path, config: Any, rank: int) -> float:
    """Read alpha from PEFT's config; the default is the rank."""
    if not isinstance(config, dict):
        raise DamagedFileError(file, "its metadata contains no PEFT config")
    facts = {str(name).removeprefix(_PREFIX): value for name, value in config.items()}
    for name in ("alpha_pattern", "use_dora", "use_rslora"):
        if facts.get(name):
            raise WeightsError(f"{file} was trained with {name}, which has no counterpart in ComfyUI's LoRA files")
    alpha = facts.get("lora_alpha", rank)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < _MAX_ALPHA:
        shown = make_storable(str(alpha), 100)
        raise DamagedFileError(file, f"its metadata has lora_alpha={shown}, expected a number below {_MAX_ALPHA:g}")
    return alpha
