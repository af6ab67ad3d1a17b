"""Find and read the folder of a FLUX.2 klein run without loading it. Imports no torch, so that errors come at once.

A folder holds ``imitation.json`` and, beside it, the embeddings of the prompt and either a plain LoRA file of diffusers
(``pytorch_lora_weights.safetensors``), the whole base model (``base/``), or both.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mimicbrush import __version__
from mimicbrush.errors import InputError, WeightsError
from mimicbrush.io.text import make_storable
from mimicbrush.models.options import KLEIN_HUB_ID, KLEIN_SIZE_RANGE
from mimicbrush.models.pretrained.files import DamagedFileError, read_object
from mimicbrush.pipelines.folder import IMITATION_FILE, check_components, is_klein_folder
from mimicbrush.ranges import REFERENCES_RANGE

#: What diffusers calls a LoRA file, and looks for in a folder.
LORA_FILE = "pytorch_lora_weights.safetensors"
#: The base in a folder of its own: a toy, or what full training changed.
BASE_FOLDER = "base"
#: What the folder calls the embeddings of its prompt.
PROMPT_FILE = "prompt_embeddings.safetensors"
#: The canvas of a model that was not trained here: what diffusers' pipeline takes where nothing is said, px.
KLEIN_SIZE_PX = 1024
#: Pipelines of diffusers whose folders hold the networks that edit here.
KLEIN_CLASSES = ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline")
_NETWORK_CLASSES = {"transformer": "Flux2Transformer2DModel", "vae": "AutoencoderKLFlux2"}
_FAMILY = "flux2_klein"
_HUB_ID = re.compile(r"[A-Za-z0-9]\w*([.-]\w+)*/[A-Za-z0-9]\w*([.-]\w+)*")


@dataclass(frozen=True)
class KleinImitation:
    """Contents of `IMITATION_FILE`: what a LoRA, or a fully trained model, was trained for.

    Attributes:
        base: a repository of the hub; the absolute path of a folder; or `BASE_FOLDER`, which lies beside the file.
        revision: of the repository; None: whichever is there.
        size_px: side of the square canvas, px.
        prompt: the one text of all its training.
        prompt_checksum: of its embeddings in `PROMPT_FILE`, see `models.flux2_klein.prompt.PromptEmbeddings`.
        num_references: images to imitate in each sample.
        version: of this project.
    """

    base: str
    revision: str | None
    size_px: int
    prompt: str
    prompt_checksum: str
    num_references: int = 1
    version: str = __version__

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            InputError: names the value, and what it must be.
        """
        for name in ("base", "prompt", "prompt_checksum", "version"):
            _check_text(name, getattr(self, name))
        if self.revision is not None:
            _check_text("revision", self.revision)
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
    for folder in (path, path / "pipeline", path.parent if path.suffix == ".safetensors" and path.is_file() else path):
        if is_klein_folder(folder):
            return folder
    return None


def is_klein(path: Path) -> bool:
    """Whether a path is FLUX.2 klein: the folder of a training run, or of a base model."""
    return find_klein_folder(path) is not None or is_klein_base(path)


def read_imitation(folder: Path) -> KleinImitation:
    """Read `IMITATION_FILE` of a folder, and check it and the files that it names.

    Raises:
        InputError: there is none, or the folder lacks one of its files.
        WeightsError: it is damaged, was written for something else, or states values that no run writes.
    """
    file = folder / IMITATION_FILE
    if not file.is_file():
        raise InputError(
            f"{folder} has no {IMITATION_FILE}; expected the folder that a training run of FLUX.2 klein wrote"
        )
    stated = read_object(file)
    family = stated.pop("family", None)
    if family != _FAMILY:
        raise WeightsError(f"{file} has the family {make_storable(str(family))}, expected {_FAMILY}")
    imitation = _build_imitation(file, stated)
    prompt, lora, base = folder / PROMPT_FILE, folder / LORA_FILE, folder / BASE_FOLDER
    if not prompt.is_file():
        raise InputError(f"{folder} is incomplete: it lacks {PROMPT_FILE}, the embeddings of its prompt")
    if not lora.is_file() and imitation.base != BASE_FOLDER:
        raise InputError(f"{folder} is incomplete: it has neither {LORA_FILE} nor its own base model")
    if imitation.base == BASE_FOLDER and not base.is_dir():
        raise InputError(
            f"{folder} is incomplete: it lacks {BASE_FOLDER}/, which is its base model according to {IMITATION_FILE}"
        )
    return imitation


def _build_imitation(file: Path, stated: dict[str, Any]) -> KleinImitation:
    names = {each.name for each in fields(KleinImitation)}
    if names != set(stated):
        differing = sorted(names ^ set(stated))
        raise DamagedFileError(
            file, f"expected the keys {', '.join(sorted(names))}; missing or unknown: {', '.join(differing)}"
        )
    try:
        return KleinImitation(**stated)
    except InputError as error:
        raise DamagedFileError(file, str(error)) from error


def format_imitation(imitation: KleinImitation) -> dict[str, Any]:
    """Format what `IMITATION_FILE` holds."""
    return {"family": _FAMILY, **asdict(imitation)}


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
