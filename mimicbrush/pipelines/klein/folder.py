"""Find and read the folder of a FLUX.2 klein run without loading it. Imports no torch, so that errors come quickly.

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

#: Name of a LoRA file that diffusers writes, and finds in a folder.
LORA_FILE = "pytorch_lora_weights.safetensors"
#: Subfolder of a base model that is stored with the run: a toy model, or a fully trained one.
BASE_FOLDER = "base"
#: Side of the canvas of a model that was not trained here: the default of diffusers' pipeline, px.
KLEIN_SIZE_PX = 1024
#: Pipelines of diffusers whose folders have the networks that are used here.
KLEIN_CLASSES = ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline")
_NETWORK_CLASSES = {"transformer": "Flux2Transformer2DModel", "vae": "AutoencoderKLFlux2"}
_FAMILY = "flux2_klein"
_NO_BASE = "A LoRA file alone does not name its base model, so this one is used. The folder of a run names its base"
_HUB_ID = re.compile(r"[A-Za-z0-9]\w*([.-]\w+)*/[A-Za-z0-9]\w*([.-]\w+)*")


@dataclass(frozen=True)
class KleinImitation:
    """Contents of `IMITATION_FILE`: what a LoRA, or a fully trained model, was trained for.

    Attributes:
        base: a repository of the hub; the absolute path of a folder; or `BASE_FOLDER`, which is next to the file.
        revision: revision of the repository; None: any that is on this machine.
        size_px: side of the square canvas, px.
        prompt: the prompt of all training samples.
        prompt_checksum: checksum of the embeddings in `PROMPT_FILE`, see `models.flux2_klein.prompt`.
        num_references: number of images to imitate in each sample.
        version: version of this project.
        base_fingerprint: see `models.flux2_klein.files.fingerprint_klein`; None if the base is in `BASE_FOLDER`, and
            in older runs.
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
            InputError: a value is wrong; the message names it, and says what it must be.
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
    """Whether a folder contains FLUX.2 klein as diffusers stores it; False if its index is damaged."""
    try:
        return read_object(folder / "model_index.json").get("_class_name") in KLEIN_CLASSES
    except WeightsError:
        return False


def find_klein_folder(path: Path) -> Path | None:
    """Find the folder with the imitation.json that belongs to a path; None if there is none.

    Args:
        path: that folder, its LoRA file, or the folder of a run, which has it as RUN/pipeline.
    """
    for folder in (path, path / "pipeline", path.parent if is_lora_file(path) else path):
        if is_klein_folder(folder):
            return folder
    return None


def is_klein(path: Path) -> bool:
    """Whether a path is FLUX.2 klein: the folder of a training run, a LoRA file, or the folder of a base model."""
    return find_klein_folder(path) is not None or is_klein_base(path) or is_lora_file(path)


def is_lora_file(path: Path) -> bool:
    """Whether a path is a file that `check_klein` reads as a LoRA; its content is not checked."""
    return path.suffix == ".safetensors" and path.is_file()


def check_klein(path: Path) -> None:
    """Check quickly that `flux2_klein.open_klein` should be able to open a path; nothing heavy is imported.

    Args:
        path: see `is_klein`.

    Raises:
        InputError, WeightsError: it is incomplete or damaged, or its base model is not on this machine.
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
    """Read `IMITATION_FILE` of a folder, and check it and the files that it lists.

    Args:
        folder: folder that contains it.
        deep: read every byte of the files; otherwise only their sizes are compared.

    Raises:
        InputError: it does not exist, or the folder lacks one of its files.
        WeightsError: it is damaged, belongs to another family of models, or has invalid values; or a file has changed
            since it was saved.
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
    """Format the content of `IMITATION_FILE`: what the weights were trained for, and the files next to it."""
    return {"family": _FAMILY, **asdict(imitation), FILES_KEY: files}


def find_lora(path: Path, folder: Path | None) -> Path | None:
    """Find the LoRA file that a path means; None if there is none.

    Args:
        path: a folder, or the file itself.
        folder: see `find_klein_folder`.

    Raises:
        InputError: the file is in the folder of a run, but it is not the LoRA of the run.
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
    """Find the folder of the base model of a LoRA; nothing is downloaded.

    Args:
        imitation: imitation of its folder; None: use the published base.
        folder: folder with the imitation.json.

    Raises:
        WeightsError: it is not on this machine; the message says what to do.
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
    """Check that a base model is the one that a run was trained with; without a fingerprint, any is accepted.

    Args:
        imitation: imitation of the run.
        folder: folder of the run.
        base: folder of the base model.

    Raises:
        WeightsError: it is another base model; the message says what to do.
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
        InputError: the folder does not contain FLUX.2 klein.
        WeightsError: its index or a config is damaged; or see `pipelines.folder.check_components`.
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
