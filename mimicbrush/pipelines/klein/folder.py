"""Find and read the folder of a FLUX.2 klein run without loading it. Imports no torch, so that errors come at once.

A folder contains ``imitation.json`` and, next to it, the embeddings of the prompt and either a plain LoRA file of
diffusers (``pytorch_lora_weights.safetensors``), the whole base model (``base/``), or both.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mimicbrush import __version__
from mimicbrush.errors import InputError, WeightsError
from mimicbrush.io.stored_files import StoredFiles
from mimicbrush.io.text import make_storable
from mimicbrush.models.flux2_klein.files import fingerprint_klein, locate_klein, read_lora_head
from mimicbrush.models.options import KLEIN_HUB_ID, KLEIN_SIZE_RANGE
from mimicbrush.models.pretrained.files import DamagedFileError, read_object
from mimicbrush.pipelines.checksums import FILES_KEY, HOW_TO_MEND, check_stored_files, read_stated_files
from mimicbrush.pipelines.folder import IMITATION_FILE, check_components, is_klein_folder
from mimicbrush.pipelines.folder import PROMPT_FILE as PROMPT_FILE
from mimicbrush.ranges import REFERENCES_RANGE

#: What diffusers calls a LoRA file, and looks for in a folder.
LORA_FILE = "pytorch_lora_weights.safetensors"
#: The base in a folder of its own: a toy, or what full training changed.
BASE_FOLDER = "base"
#: The canvas of a model that was not trained here: what diffusers' pipeline takes where nothing is said, px.
KLEIN_SIZE_PX = 1024
#: Pipelines of diffusers whose folders hold the networks that edit here.
KLEIN_CLASSES = ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline")
_NETWORK_CLASSES = {"transformer": "Flux2Transformer2DModel", "vae": "AutoencoderKLFlux2"}
_FAMILY = "flux2_klein"
_NO_BASE = "A LoRA file alone does not name its base model, so this one is taken. A run's folder names its own"
_HUB_ID = re.compile(r"[A-Za-z0-9]\w*([.-]\w+)*/[A-Za-z0-9]\w*([.-]\w+)*")


@dataclass(frozen=True)
class KleinImitation:
    """Contents of `IMITATION_FILE`: what a LoRA, or a fully trained model, was trained for.

    Attributes:
        base: a repository of the hub; the absolute path of a folder; or `BASE_FOLDER`, which is next to the file.
        revision: of the repository; None: whichever is there.
        size_px: side of the square canvas, px.
        prompt: the one text of all its training.
        prompt_checksum: of its embeddings in `PROMPT_FILE`, see `models.flux2_klein.prompt.PromptEmbeddings`.
        num_references: images to imitate in each sample.
        version: of this project.
        base_fingerprint: of a base model elsewhere, see `models.flux2_klein.files.fingerprint_klein`; None: of
            `BASE_FOLDER`, and of older runs.
    """

    base: str
    revision: str | None
    size_px: int
    prompt: str
    prompt_checksum: str
    num_references: int = 1
    version: str = __version__
    base_fingerprint: str | None = None

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            InputError: names the value, and what it must be.
        """
        for name in ("base", "prompt", "prompt_checksum", "version"):
            _check_text(name, getattr(self, name))
        for name in ("revision", "base_fingerprint"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        is_known = self.base == BASE_FOLDER or Path(self.base).is_absolute() or _HUB_ID.fullmatch(self.base)
        if not is_known:
            raise InputError(
                f"base={make_storable(self.base)}: expected a repository such as {KLEIN_HUB_ID}, the absolute path of "
                f"a folder, or {BASE_FOLDER}"
            )
        KLEIN_SIZE_RANGE.check("size_px", self.size_px)
        REFERENCES_RANGE.check("num_references", self.num_references)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name}={make_storable(repr(value), 100)}: expected a string")


def is_klein_base(folder: Path) -> bool:
    """Whether a folder contains FLUX.2 klein as diffusers stores it; False for damaged ones, too."""
    try:
        return read_object(folder / "model_index.json").get("_class_name") in KLEIN_CLASSES
    except WeightsError:
        return False


def find_klein_folder(path: Path) -> Path | None:
    """Find the folder with the imitation.json that belongs to a path; None if there is none.

    Args:
        path: that folder, its LoRA file, or the folder of a run, which leaves it in RUN/pipeline.
    """
    for folder in (path, path / "pipeline", path.parent if is_lora_file(path) else path):
        if is_klein_folder(folder):
            return folder
    return None


def is_klein(path: Path) -> bool:
    """Whether a path is FLUX.2 klein: the folder of a training run, a LoRA file, or the folder of a base model."""
    return find_klein_folder(path) is not None or is_klein_base(path) or is_lora_file(path)


def is_lora_file(path: Path) -> bool:
    """Whether a path is a file that `check_klein` takes as a LoRA; it may hold something else."""
    return path.suffix == ".safetensors" and path.is_file()


def check_klein(path: Path) -> None:
    """Check that `flux2_klein.open_klein` can be expected to open a path; quick, nothing heavy is imported.

    Args:
        path: see `is_klein`.

    Raises:
        InputError, WeightsError: it is not whole or damaged, or its base model is not on this machine; says what to do.
    """
    folder = find_klein_folder(path)
    imitation = None if folder is None else read_imitation(folder)
    lora = find_lora(path, folder)
    if lora is not None:
        read_lora_head(lora)
    base = path if folder is None and lora is None else find_klein_base(imitation, folder)
    read_klein_base(base)
    check_base(imitation, folder, base)


def read_imitation(folder: Path, *, deep: bool = False) -> KleinImitation:
    """Read `IMITATION_FILE` of a folder, and check it and the files that it states.

    Args:
        folder: that holds it.
        deep: read every byte of the files; otherwise only their sizes are compared.

    Raises:
        InputError: there is none, or the folder lacks one of its files.
        WeightsError: it is damaged, was written for something else, or states values that no run writes; or a file is
            not what was saved.
    """
    file = folder / IMITATION_FILE
    if not file.is_file():
        raise InputError(
            f"{folder} has no {IMITATION_FILE}; expected the folder that a training run of FLUX.2 klein wrote"
        )
    try:
        stated = read_object(file)
    except DamagedFileError as error:
        raise DamagedFileError(file, f"{error.reason}. {HOW_TO_MEND}") from error
    family, files = stated.pop("family", None), stated.pop(FILES_KEY, None)
    if family != _FAMILY:
        raise WeightsError(f"{file} has the family {make_storable(str(family))}, expected {_FAMILY}")
    imitation = _build_imitation(file, stated)
    has_base, has_lora = imitation.base == BASE_FOLDER, (folder / LORA_FILE).is_file()
    if files is not None:
        listed = read_stated_files(file, files)
        check_stored_files(file, listed, deep=deep)
        if has_lora and LORA_FILE not in listed:
            raise WeightsError(
                f"{folder} has other files than those that were saved: {LORA_FILE} was not one of them. Move it to "
                "another folder, and give its path there"
            )
    if not has_lora and not has_base:
        raise InputError(f"{folder} is incomplete: it lacks {LORA_FILE}. {HOW_TO_MEND}")
    if not (folder / PROMPT_FILE).is_file():
        raise InputError(f"{folder} is incomplete: it lacks {PROMPT_FILE}, the embeddings of its prompt. {HOW_TO_MEND}")
    if has_base and not (folder / BASE_FOLDER).is_dir():
        raise InputError(
            f"{folder} is incomplete: it lacks {BASE_FOLDER}/, which is its base model according to {IMITATION_FILE}. "
            f"{HOW_TO_MEND}"
        )
    return imitation


def _build_imitation(file: Path, stated: dict[str, Any]) -> KleinImitation:
    names = {each.name for each in fields(KleinImitation)}
    stated = {"base_fingerprint": None, **stated}  # older files have none
    if names != set(stated):
        differing = sorted(names ^ set(stated))
        raise DamagedFileError(
            file,
            f"expected the keys {', '.join(sorted(names))}; missing or unknown: {', '.join(differing)}. {HOW_TO_MEND}",
        )
    try:
        return KleinImitation(**stated)
    except InputError as error:
        raise DamagedFileError(file, str(error)) from error


def format_imitation(imitation: KleinImitation, files: StoredFiles) -> dict[str, Any]:
    """Format what `IMITATION_FILE` holds: what the weights were trained for, and the files next to it."""
    return {"family": _FAMILY, **asdict(imitation), FILES_KEY: files}


def find_lora(path: Path, folder: Path | None) -> Path | None:
    """Find the LoRA file that a path means; None where there is none.

    Args:
        path: a folder, or the file itself.
        folder: see `find_klein_folder`.

    Raises:
        InputError: the file lies in the folder of a run, and is another than that of the run.
    """
    if folder is not None and path.is_file() and path.name != LORA_FILE:
        raise InputError(
            f"{path} is not the LoRA file that the training run wrote to {folder}. Give the folder, or move this file "
            "to another folder if it is a different LoRA"
        )
    if is_lora_file(path):
        return path
    if folder is not None and (folder / LORA_FILE).is_file():
        return folder / LORA_FILE
    return None


def find_klein_base(imitation: KleinImitation | None, folder: Path | None) -> Path:
    """Find the folder of the base model of a LoRA; nothing is fetched.

    Args:
        imitation: of its folder; None: the published base.
        folder: with the imitation.json.

    Raises:
        WeightsError: it is not there; says what to do.
    """
    stated = KLEIN_HUB_ID if imitation is None else imitation.base
    if stated == BASE_FOLDER and folder is not None:
        return folder / BASE_FOLDER
    if Path(stated).is_absolute():
        if not Path(stated).is_dir():
            raise WeightsError(
                f"{folder} was trained with the base model {stated}, but there is no such folder; put the base model "
                f'there, or write its new path into {IMITATION_FILE} as "base"'
            )
        return Path(stated)
    revision = None if imitation is None else imitation.revision
    try:
        return locate_klein(f"{stated}@{revision}" if revision else stated)
    except WeightsError as error:
        at = f" --revision {revision}" if revision else ""
        path_way = f'or write the absolute path of its folder into {IMITATION_FILE} as "base"'
        way = f", {path_way}" if folder is not None else f". {_NO_BASE}"
        raise WeightsError(
            f"the base model {stated} is not in the local Hugging Face cache. Download it with "
            f"`hf download {stated}{at}`{way}"
        ) from error


def check_base(imitation: KleinImitation | None, folder: Path | None, base: Path) -> None:
    """Check that a base model is the one that a run was trained with; where nothing is stated, any is.

    Args:
        imitation: of the run.
        folder: of the run.
        base: folder of the base model.

    Raises:
        WeightsError: it is another one; says what to do.
    """
    stated = None if imitation is None else imitation.base_fingerprint
    if stated is not None and stated != fingerprint_klein(base):
        raise WeightsError(
            f"{base} is not the base model that {folder} was trained with: its weights differ. Put the right one "
            f'there, or write the path of its folder into {IMITATION_FILE} as "base"'
        )


def read_klein_base(folder: Path) -> dict[str, Any]:
    """Read the model_index.json of a base model, and check its classes before the libraries import and build them.

    Raises:
        InputError: it holds no FLUX.2 klein.
        WeightsError: its index or a config is damaged, or see `folder.check_components`.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise InputError(f"{folder} is not a folder of FLUX.2 klein: it has no model_index.json")
    index = read_object(index_file)
    kind = index.get("_class_name")
    if kind not in KLEIN_CLASSES:
        raise InputError(f"{folder} contains a {make_storable(str(kind))}, expected a {KLEIN_CLASSES[0]}")
    check_components(folder, index)
    for name, expected in _NETWORK_CLASSES.items():
        if index.get(name) != ["diffusers", expected]:
            stated = make_storable(str(index.get(name)))
            raise WeightsError(f"{index_file} names {name}={stated}, expected {expected} of diffusers")
    absent = [name for name in ("transformer", "vae", "scheduler") if not (folder / name).is_dir()]
    if absent:
        raise InputError(f"{folder} is not a complete FLUX.2 klein: it lacks {', '.join(absent)}")
    return index
