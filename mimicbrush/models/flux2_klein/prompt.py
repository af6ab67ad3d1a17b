"""The fixed prompt of FLUX.2 klein, encoded once and kept in a file.

The prompt is the same for every sample, and its text encoder is as large as the transformer (4 B parameters, 8 GB). So
the encoder runs once, and neither training nor editing needs it. The file contains a checksum of the prompt and of the
numbers, so a changed file is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from mimicbrush.errors import WeightsError
from mimicbrush.io.atomic import write_aside
from mimicbrush.io.text import make_storable, parse_json
from mimicbrush.models.pretrained.files import DamagedFileError, read_head

#: Hidden states of the text encoder that the transformer takes, and number of tokens of a padded prompt, as in
#: `Flux2KleinPipeline.encode_prompt`.
HIDDEN_LAYERS = (9, 18, 27)
MAX_TOKENS = 512

HOW_TO_ENCODE = (
    "`mimicbrush fetch` with the same model options downloads the text encoder (8 GB) and encodes the prompt once"
)

# The only key in the metadata of the file, because safetensors writes several keys in any order.
_KEY = "mimicbrush_prompt"


@dataclass(frozen=True)
class PromptFacts:
    """Facts about the embeddings in a file.

    Attributes:
        prompt: the text.
        encoder: model that the text encoder belongs to: OWNER/NAME@REVISION, or a folder.
        hidden_layers: layers of the text encoder; their states are joined along the width.
        max_tokens: number of tokens of a prompt; a shorter one is padded.
    """

    prompt: str
    encoder: str
    hidden_layers: tuple[int, ...] = HIDDEN_LAYERS
    max_tokens: int = MAX_TOKENS


@dataclass(frozen=True)
class PromptEmbeddings:
    """Embeddings of the prompt, and of the empty prompt for classifier-free guidance.

    Attributes:
        facts: the prompt, and how it was encoded.
        embeds, empty_embeds: (1, tokens, width), in the type of the text encoder.
        text_ids: (1, tokens, 4) integers, positions of the tokens in the transformer.
    """

    facts: PromptFacts
    embeds: torch.Tensor
    empty_embeds: torch.Tensor
    text_ids: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by their names in the file."""
        return {"embeds": self.embeds, "empty_embeds": self.empty_embeds, "text_ids": self.text_ids}

    @cached_property
    def checksum(self) -> str:
        """The SHA-256, hex, of the facts and of every number; the path of the file does not matter."""
        digest = hashlib.sha256(json.dumps(asdict(self.facts), sort_keys=True).encode())
        for name, tensor in self.tensors().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@torch.no_grad()
def encode_prompt(
    prompt: str,
    text_encoder: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    encoder: str,
    hidden_layers: Sequence[int] = HIDDEN_LAYERS,
    max_tokens: int = MAX_TOKENS,
) -> PromptEmbeddings:
    """Encode a prompt with `Flux2KleinPipeline`, without its other networks.

    Args:
        prompt: the text; if it is longer than `max_tokens` with its template, its end is cut off.
        text_encoder: the text encoder, on the device to use.
        tokenizer: its tokenizer, with a chat template.
        encoder: name of its model, which is stored in the file, see `PromptFacts`.
        hidden_layers: see `PromptFacts`.
        max_tokens: see `PromptFacts`.

    Returns:
        Embeddings on the CPU.
    """
    pipeline = Flux2KleinPipeline(
        scheduler=None, vae=None, text_encoder=text_encoder.eval(), tokenizer=tokenizer, transformer=None
    )
    embeds, empty_embeds = (
        pipeline.encode_prompt(
            text,
            device=text_encoder.device,
            max_sequence_length=max_tokens,
            text_encoder_out_layers=tuple(hidden_layers),
        )
        for text in (prompt, "")
    )
    facts = PromptFacts(prompt, encoder, tuple(hidden_layers), max_tokens)
    return PromptEmbeddings(facts, embeds[0].cpu(), empty_embeds[0].cpu(), embeds[1].cpu())


def write_prompt(path: Path, embeddings: PromptEmbeddings) -> None:
    """Write embeddings to a temporary file, and rename it when it is complete.

    Args:
        path: the file, .safetensors. Its folder is created if needed.
        embeddings: what to write.
    """
    stored = json.dumps({**asdict(embeddings.facts), "checksum": embeddings.checksum})
    tensors = {name: tensor.contiguous() for name, tensor in embeddings.tensors().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda aside: save_file(tensors, aside, metadata={_KEY: stored}))


def read_prompt(path: Path, *, prompt: str | None = None, width: int | None = None) -> PromptEmbeddings:
    """Read embeddings from a file, and verify every number.

    Args:
        path: a file of `write_prompt`.
        prompt: the expected prompt; None: any.
        width: the expected width (the transformer's `joint_attention_dim`); None: any.

    Raises:
        WeightsError: there is no such file, or it has another prompt or another width.
        DamagedFileError: it is not a file of `write_prompt`, or it was changed.
    """
    if not path.is_file():
        raise WeightsError(f"there is no file {path} with the encoded prompt. {HOW_TO_ENCODE}")
    read_head(path)
    try:
        with safe_open(path, "pt") as opened:
            stored = parse_json((opened.metadata() or {}).get(_KEY, "null"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        found, checksum = _build(stored, tensors)
    except (IndexError, KeyError, OSError, TypeError, ValueError) as error:
        raise DamagedFileError(
            path, f"it is not a file of an encoded prompt ({type(error).__name__}: {error})"
        ) from error
    if found.checksum != checksum:
        raise DamagedFileError(
            path, "its checksum does not match its numbers; delete the file, and encode the prompt again"
        )
    if prompt is not None and found.facts.prompt != prompt:
        there, wanted = make_storable(repr(found.facts.prompt)), make_storable(repr(prompt))
        raise WeightsError(f"{path} contains the prompt {there}, expected {wanted}. {HOW_TO_ENCODE}")
    if width is not None and found.embeds.shape[-1] != width:
        raise WeightsError(
            f"{path} contains embeddings of width {found.embeds.shape[-1]}, but the transformer takes {width}: they "
            f"come from the text encoder of another model ({make_storable(found.facts.encoder)})"
        )
    return found


def _build(stored: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> tuple[PromptEmbeddings, str]:
    facts = PromptFacts(
        str(stored["prompt"]), str(stored["encoder"]), tuple(stored["hidden_layers"]), int(stored["max_tokens"])
    )
    found = PromptEmbeddings(facts, **tensors)
    tokens = found.embeds.shape[1]
    if found.embeds.shape != found.empty_embeds.shape or found.text_ids.shape != (1, tokens, 4):
        raise ValueError("the shapes of its tensors do not match")
    return found, str(stored["checksum"])
