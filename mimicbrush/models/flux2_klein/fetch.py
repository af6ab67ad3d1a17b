"""Download and check a base model of FLUX.2 klein part by part, and encode the prompt if that is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from mimicbrush.errors import WeightsError
from mimicbrush.io.text import describe_error
from mimicbrush.models.flux2_klein.prompt import encode_prompt, read_prompt, write_prompt
from mimicbrush.models.options import Flux2KleinModel
from mimicbrush.models.pretrained.fetch import check_or_fetch_part
from mimicbrush.models.pretrained.files import StoredNetwork, read_head
from mimicbrush.models.pretrained.requirements import PartReport
from mimicbrush.models.pretrained.weights import find_commit, split_revision

#: Parts of the base that training needs; the text encoder is needed once, for the prompt.
_TRAINED_WITH = ("base.transformer", "base.vae")


def check_or_fetch_klein(
    options: Flux2KleinModel, *, fetching: bool, deep: bool, say: Callable[[str], None] = print
) -> list[PartReport]:
    """Check the files that a training run starts from, download missing or damaged ones, and encode the prompt.

    The text encoder (8 GB) is downloaded only if there is no file with the encoded prompt.

    Args:
        options: state the base, the prompt and the file of its embeddings.
        fetching: whether to download; False: only check what is on this machine.
        deep: also read every byte.
        say: prints what is done.

    Returns:
        One report per part; it has a problem if the part cannot be used.
    """

    def look(part: str) -> PartReport:
        return check_or_fetch_part(part, options.base, fetching=fetching, deep=deep, say=say)

    reports = [look(part) for part in _TRAINED_WITH]
    network = reports[0].network
    width = network.config.get("joint_attention_dim") if network else None
    prompt = _inspect_prompt(options, width)
    if fetching and prompt.network is None:
        text_encoder = look("base.text_encoder")
        reports.append(text_encoder)
        if text_encoder.problem is None and text_encoder.network is not None:
            try:
                _encode(options, text_encoder.network.folder, say)
            except WeightsError as error:
                text_encoder.problem = error
            else:
                prompt = _inspect_prompt(options, width)
    return [*reports, prompt]


def _inspect_prompt(options: Flux2KleinModel, width: int | None) -> PartReport:
    path = Path(options.prompt_embeddings)
    report = PartReport("prompt_embeddings", f"model.prompt_embeddings={path}")
    try:
        read_prompt(path, prompt=options.prompt, width=width)
        report.network = StoredNetwork(path.parent, {}, (path,), read_head(path))
    except WeightsError as error:
        report.problem = error
    return report


def _encode(options: Flux2KleinModel, folder: Path, say: Callable[[str], None]) -> None:
    """Encode the prompt with the text encoder in a folder, on a GPU if there is one, in the type of its weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    say(f"encoding the prompt on {device} (this takes {'seconds' if device == 'cuda' else 'a minute or two'})")
    try:
        text_encoder = Qwen3ForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder.parent / "tokenizer")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{folder} and its tokenizer cannot be loaded: {describe_error(error)}") from error
    commit = find_commit(folder)
    encoder = f"{split_revision(options.base)[0]}@{commit}" if commit else str(folder.parent.resolve())
    embeddings = encode_prompt(options.prompt, text_encoder.to(device), tokenizer, encoder=encoder)
    write_prompt(Path(options.prompt_embeddings), embeddings)
    say(f"the encoded prompt is in {options.prompt_embeddings}; the text encoder is no longer needed")
