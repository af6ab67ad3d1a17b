"""The prompt of FLUX.2 klein: encoded as the pipeline of diffusers does it, and read as it was written."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline
from safetensors.torch import load_file, save_file
from toy_qwen import toy_text_encoder, toy_tokenizer

from mimicbrush.errors import WeightsError
from mimicbrush.models.flux2_klein.prompt import (
    HIDDEN_LAYERS,
    MAX_TOKENS,
    PromptEmbeddings,
    encode_prompt,
    read_prompt,
    write_prompt,
)
from mimicbrush.models.pretrained.files import DamagedFileError

PROMPT = "Fill the hole with what image 2 shows."
LAYERS, TOKENS = (1, 2, 3), 64


@pytest.fixture(scope="module")
def encoded() -> PromptEmbeddings:
    encoder, tokenizer = toy_text_encoder(), toy_tokenizer()
    return encode_prompt(PROMPT, encoder, tokenizer, encoder="toy@1", hidden_layers=LAYERS, max_tokens=TOKENS)


@pytest.fixture
def stored(encoded: PromptEmbeddings, tmp_path: Path) -> Path:
    path = tmp_path / "prompts" / "one.safetensors"
    write_prompt(path, encoded)
    return path


def test_embeddings_are_the_hidden_states_of_the_text_encoder(encoded: PromptEmbeddings) -> None:
    """By transformers alone: the template, padding on the right, three hidden states side by side."""
    model, tokenizer = toy_text_encoder(), toy_tokenizer()
    for text, found in ((PROMPT, encoded.embeds), ("", encoded.empty_embeds)):
        ids = tokenizer(f"<|im_start|>user {text}<|im_end|><|im_start|>-")["input_ids"]
        assert 5 < len(ids) < TOKENS and tokenizer.unk_token_id not in ids
        padded = torch.tensor([ids + [tokenizer.pad_token_id] * (TOKENS - len(ids))])
        mask = torch.tensor([[1] * len(ids) + [0] * (TOKENS - len(ids))])
        with torch.no_grad():
            states = model(input_ids=padded, attention_mask=mask, output_hidden_states=True).hidden_states
        torch.testing.assert_close(found, torch.cat([states[layer] for layer in LAYERS], dim=-1), rtol=0, atol=0)
    assert not torch.equal(encoded.embeds, encoded.empty_embeds)
    positions = torch.zeros(1, TOKENS, 4, dtype=torch.int64)
    positions[0, :, 3] = torch.arange(TOKENS)
    assert torch.equal(encoded.text_ids, positions)


def test_the_pipeline_takes_stored_embeddings_for_its_own(stored: Path) -> None:
    pipeline = Flux2KleinPipeline(
        scheduler=None, vae=None, text_encoder=toy_text_encoder(), tokenizer=toy_tokenizer(), transformer=None
    )
    with torch.no_grad():
        embeds, ids = pipeline.encode_prompt(
            PROMPT, device=torch.device("cpu"), max_sequence_length=TOKENS, text_encoder_out_layers=LAYERS
        )
    read = read_prompt(stored, prompt=PROMPT, width=48)
    assert torch.equal(read.embeds, embeds) and torch.equal(read.text_ids, ids)
    without_encoder = Flux2KleinPipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=None)
    taken, ids = without_encoder.encode_prompt(None, device=torch.device("cpu"), prompt_embeds=read.embeds)
    assert torch.equal(taken, embeds) and torch.equal(ids, read.text_ids)
    defaults = inspect.signature(Flux2KleinPipeline.encode_prompt).parameters
    assert defaults["text_encoder_out_layers"].default == HIDDEN_LAYERS
    assert defaults["max_sequence_length"].default == MAX_TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_was_written(encoded: PromptEmbeddings, tmp_path: Path, dtype: torch.dtype) -> None:
    written = PromptEmbeddings(
        encoded.facts, encoded.embeds.to(dtype), encoded.empty_embeds.to(dtype), encoded.text_ids
    )
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        write_prompt(path, written)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    read = read_prompt(paths[0])
    assert read.facts == encoded.facts and read.checksum == written.checksum
    for name, tensor in written.tensors().items():
        assert torch.equal(read.tensors()[name], tensor) and read.tensors()[name].dtype == tensor.dtype


def test_a_file_that_is_not_the_one_is_refused(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"there is no file .*absent.*`mimicbrush fetch`"):
        read_prompt(tmp_path / "absent.safetensors")
    with pytest.raises(
        WeightsError, match=r"contains the prompt 'Fill the hole.*expected 'Another'.*`mimicbrush fetch`"
    ):
        read_prompt(stored, prompt="Another")
    with pytest.raises(WeightsError, match=r"of width 48, but the transformer takes 7680.*toy@1"):
        read_prompt(stored, width=7680)


def test_damage_is_found(stored: Path) -> None:
    whole = stored.read_bytes()
    flipped = bytearray(whole)
    flipped[-1000] ^= 1
    prompt = bytearray(whole)
    prompt[whole.index(b"hole")] ^= 1
    for content, why in ((flipped, "checksum"), (prompt, "checksum"), (whole[:-10], "interrupted"), (b"", "no header")):
        stored.write_bytes(content)
        with pytest.raises(DamagedFileError, match=why):
            read_prompt(stored)
    stored.write_bytes(whole)
    tensors = load_file(stored)
    for metadata in (None, {"mimicbrush_prompt": "no JSON"}, {"mimicbrush_prompt": "{}"}):
        save_file(tensors, stored, metadata=metadata)
        with pytest.raises(DamagedFileError, match="not a file of an encoded prompt"):
            read_prompt(stored)
