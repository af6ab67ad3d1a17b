"""FLUX.2 klein of the real classes at toy size, as a run leaves it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from peft import LoraConfig

from mimicbrush.models.flux2_klein.components import KleinComponents, toy_klein
from mimicbrush.models.flux2_klein.prompt import PromptEmbeddings, PromptFacts
from mimicbrush.models.flux2_klein.sequence import make_text_ids
from mimicbrush.models.options import ToyFlux2KleinModel
from mimicbrush.pipelines.flux2_klein import KleinPipeline, write_klein_folder
from mimicbrush.pipelines.klein.folder import BASE_FOLDER, KleinImitation

#: Diffusers' pipeline takes no smaller image.
SIZE_PX = 64
OPTIONS = ToyFlux2KleinModel(size_px=SIZE_PX, num_layers=1, num_single_layers=1, attention_heads=2, head_width=8)
TOKENS = 3
_SINGLE = "single_transformer_blocks.0.attn.to_out"  # in the others, it is a list of layers
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_qkv_mlp_proj", _SINGLE)


def build_klein(seed: int = 0) -> KleinComponents:
    """All networks but those of the text, each time new ones."""
    return copy.deepcopy(_build_once(seed))


@functools.cache
def _build_once(seed: int) -> KleinComponents:
    return replace(toy_klein(OPTIONS, seed=seed), text_encoder=None, tokenizer=None)


def toy_prompt(seed: int = 0) -> PromptEmbeddings:
    """Embeddings of a prompt that no text encoder made."""
    width = 3 * OPTIONS.text_width
    numbers = torch.randn(2, 1, TOKENS, width, generator=torch.Generator().manual_seed(seed))
    return PromptEmbeddings(PromptFacts("Imitate.", "toy"), numbers[0], numbers[1], make_text_ids(TOKENS)[None])


def add_lora(
    transformer: Flux2Transformer2DModel, rank: int = 2, alpha: int = 3, layers: Sequence[str] = LAYERS
) -> None:
    """Adapters as training leaves them: not zero any more."""
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def toy_imitation(**values: Any) -> KleinImitation:
    stated = {"base": BASE_FOLDER, "revision": None, "size_px": SIZE_PX, "prompt": "Imitate.", "prompt_checksum": ""}
    return KleinImitation(**{**stated, **values})


def write_toy_klein(folder: Path, lora: bool = True, **values: Any) -> Path:
    """What a run of the toy leaves."""
    components = build_klein()
    if lora:
        add_lora(components.transformer)
    write_klein_folder(folder, toy_imitation(**values), toy_prompt(), components)
    return folder


def open_toy(**values: Any) -> KleinPipeline:
    """A toy editor in memory, without a LoRA."""
    editor = KleinPipeline(build_klein().build_pipeline(), toy_imitation(**values), toy_prompt())
    editor.set_progress_bar_config(disable=True)
    return editor
