"""Open FLUX.2 klein as an editor that imitates, and write the results of its training runs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

from mimicbrush.data.training_data import TRAINING_DATA_FILE
from mimicbrush.errors import InputError, WeightsError
from mimicbrush.io.atomic import write_json
from mimicbrush.models.flux2_klein.components import KleinComponents, load_klein
from mimicbrush.models.flux2_klein.lora import load_klein_lora, write_klein_lora
from mimicbrush.models.flux2_klein.prompt import PromptEmbeddings, encode_prompt, read_prompt, write_prompt
from mimicbrush.models.library_logs import quiet_libraries, silence_diffusers
from mimicbrush.models.options import KLEIN_PROMPT
from mimicbrush.models.pretrained.files import DamagedFileError
from mimicbrush.pipelines.checksums import list_weights
from mimicbrush.pipelines.folder import IMITATION_FILE, class_names
from mimicbrush.pipelines.klein.folder import (
    BASE_FOLDER,
    KLEIN_SIZE_PX,
    LORA_FILE,
    PROMPT_FILE,
    check_base,
    find_klein_base,
    find_klein_folder,
    find_lora,
    format_imitation,
    is_klein_base,
    read_imitation,
    read_klein_base,
)
from mimicbrush.pipelines.klein.folder import KleinImitation as KleinImitation
from mimicbrush.pipelines.klein.pipeline import KleinPipeline as KleinPipeline


def open_klein(
    name: str | Path,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    *,
    base: Path | None = None,
) -> KleinPipeline:
    """Open FLUX.2 klein as an editor that imitates.

    Args:
        name: the folder of a training run, the pipeline folder or LoRA file in it; any other LoRA file; or a folder of
            FLUX.2 klein itself, which was not trained to imitate.
        device: "cpu", "cuda", or "auto", which is a GPU if PyTorch finds one.
        dtype: of all networks; None: bfloat16 on a GPU, float32 on a CPU.
        base: folder of the base model; None: as `IMITATION_FILE` says, or the local Hugging Face cache.

    Raises:
        InputError: there is no such folder or file, or it is incomplete; or the device is unknown or absent.
        WeightsError: something is damaged, does not fit, or is not in the cache; says what to do.
    """
    from mimicbrush.pipelines.open_pipeline import choose_device

    target = choose_device(device)  # an absent one must show before gigabytes are read
    path = Path(name)
    folder = find_klein_folder(path)
    imitation = None if folder is None else read_imitation(folder, deep=True)
    lora = find_lora(path, folder)
    if folder is None and lora is None and not is_klein_base(path):
        raise InputError(
            f"{path} is not a FLUX.2 klein model; expected the folder that a training run wrote ({IMITATION_FILE}), a "
            "LoRA file (.safetensors), or a folder of FLUX.2 klein (model_index.json)"
        )
    if base is None:
        base = path if folder is None and lora is None else find_klein_base(imitation, folder)
    check_base(imitation, folder, base)
    if dtype is None:
        dtype = torch.bfloat16 if target == "cuda" else torch.float32
    pipeline = load_klein_base(base, dtype, with_text_encoder=imitation is None)
    if imitation is None or folder is None:
        prompt = _encode_for_untrained(pipeline, base)
        imitation = KleinImitation(str(base.absolute()), None, KLEIN_SIZE_PX, KLEIN_PROMPT, prompt.checksum)
    else:
        width = pipeline.transformer.config.joint_attention_dim
        prompt = read_prompt(folder / PROMPT_FILE, prompt=imitation.prompt, width=width)
        if prompt.checksum != imitation.prompt_checksum:
            raise DamagedFileError(
                folder / PROMPT_FILE,
                f"its checksum is {prompt.checksum}, but {IMITATION_FILE} expects {imitation.prompt_checksum}",
            )
    if lora is not None:
        load_klein_lora(pipeline, lora)
    is_trained = lora is not None or folder is not None
    return KleinPipeline(pipeline.to(target), imitation, prompt, is_trained)


def list_klein_folders(path: Path) -> list[Path]:
    """List the folders and files that `open_klein` would load from: what is named, and its base.

    Raises:
        InputError, WeightsError: see `open_klein`.
    """
    folder = find_klein_folder(path)
    if folder is None and is_klein_base(path):
        return [path]
    imitation = None if folder is None else read_imitation(folder)
    base = find_klein_base(imitation, folder)
    named = path if folder is None else folder
    return [named] if base.parent == named else [named, base]


def load_klein_base(folder: Path, dtype: torch.dtype, with_text_encoder: bool) -> Flux2KleinPipeline:
    """Load the pipeline of diffusers from a folder without downloading anything.

    Args:
        folder: as diffusers stores it.
        dtype: of all networks.
        with_text_encoder: False leaves out half of the bytes, where the prompt is encoded already.

    Raises:
        InputError, WeightsError: see `klein.folder.read_klein_base` and `load_klein`.
    """
    index = read_klein_base(folder)
    quiet_libraries()
    is_whole = "text_encoder" in class_names(index)
    return load_klein(folder, dtype=dtype, with_text_encoder=with_text_encoder and is_whole).build_pipeline()


def _encode_for_untrained(pipeline: Flux2KleinPipeline, base: Path) -> PromptEmbeddings:
    """Encode the prompt of a model that was not trained here, and free the text encoder."""
    if pipeline.text_encoder is None or pipeline.tokenizer is None:
        raise WeightsError(
            f"{base} has no text encoder, and there is no stored prompt; use a complete FLUX.2 klein folder"
        )
    prompt = encode_prompt(KLEIN_PROMPT, pipeline.text_encoder, pipeline.tokenizer, encoder=str(base))
    pipeline.text_encoder = pipeline.tokenizer = None
    return prompt


def write_klein_folder(
    folder: Path, imitation: KleinImitation, prompt: PromptEmbeddings, components: KleinComponents
) -> None:
    """Write the folder of a FLUX.2 klein training run; `open_klein` reads it.

    The adapters of the transformer become a plain LoRA file of diffusers. The base is written only where `imitation`
    names it `BASE_FOLDER`: of a toy, or after full training.

    Args:
        folder: to write into; `IMITATION_FILE` comes last.
        imitation: what the weights were trained for; its prompt and checksum are taken from `prompt`.
        prompt: the embeddings of its prompt.
        components: the transformer has adapters, or is fully trained; text encoder and tokenizer are not written.

    Raises:
        InputError: there is nothing to write: no adapters, and no base either.
    """
    transformer = components.transformer
    has_lora, has_base = bool(getattr(transformer, "peft_config", None)), imitation.base == BASE_FOLDER
    if not has_lora and not has_base:
        raise InputError(
            f"the transformer has no adapters, and base={imitation.base} stores its weights: there is nothing to write"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if has_base:
        whole = replace(components, transformer=_strip_adapters(transformer), text_encoder=None, tokenizer=None)
        with silence_diffusers():  # of a text encoder and a tokenizer that are not there
            whole.build_pipeline().save_pretrained(folder / BASE_FOLDER, safe_serialization=True)
    if has_lora:
        write_klein_lora(folder / LORA_FILE, transformer)
    write_prompt(folder / PROMPT_FILE, prompt)
    stated = replace(imitation, prompt=prompt.facts.prompt, prompt_checksum=prompt.checksum)
    parts = [PROMPT_FILE, TRAINING_DATA_FILE, *([LORA_FILE] if has_lora else []), *([BASE_FOLDER] if has_base else [])]
    write_json(folder / IMITATION_FILE, format_imitation(stated, list_weights(folder, parts)))


def _strip_adapters(transformer: Flux2Transformer2DModel) -> Flux2Transformer2DModel:
    """The transformer as it was before it got adapters: a copy, where it has any."""
    if not getattr(transformer, "peft_config", None):
        return transformer
    bare = copy.deepcopy(transformer)
    bare.unload_lora()
    return bare
