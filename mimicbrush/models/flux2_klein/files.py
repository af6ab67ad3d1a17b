"""Find FLUX.2 klein on this machine. Imports no torch, so that missing files are reported within a second."""

from __future__ import annotations

from pathlib import Path

from mimicbrush.errors import WeightsError
from mimicbrush.io.hashing import fingerprint
from mimicbrush.io.text import make_storable
from mimicbrush.models.options import Flux2KleinModel
from mimicbrush.models.pretrained.files import StoredTensor, read_head, read_network
from mimicbrush.models.pretrained.weights import LAYOUTS, locate_weights

#: The networks that a training run needs, besides the encoded prompt.
TRAINING_NETWORKS = ("transformer", "vae")


def locate_klein(name: str) -> Path:
    """Find the pipeline of a base model on this machine. Nothing is downloaded.

    Args:
        name: a folder as diffusers writes it, or OWNER/NAME or OWNER/NAME@REVISION in the local cache.

    Raises:
        WeightsError: it is not there.
    """
    part = "base.transformer"
    transformer = locate_weights(part, name)
    if transformer is None:
        raise WeightsError(
            f"model.base={make_storable(name)} is neither a folder nor in the local Hugging Face cache; "
            "download it with `mimicbrush fetch` and the same model options, or name a folder"
        )
    folder = transformer.parent if transformer.name == LAYOUTS[part].subfolder else transformer
    if not (folder / "model_index.json").is_file():
        raise WeightsError(f"{folder} has no model_index.json; expected the folder of a Flux2KleinPipeline")
    return folder


def fingerprint_klein(folder: Path) -> str:
    """Compute a fingerprint of a base model from the weights of transformer and VAE, see `io.hashing.fingerprint`.

    Args:
        folder: folder of the base model.

    Raises:
        WeightsError: a network is absent or damaged.
    """
    networks = [read_network(folder / name, "diffusion_pytorch_model") for name in TRAINING_NETWORKS]
    return fingerprint([file for network in networks for file in network.files])


def list_klein_files(options: Flux2KleinModel) -> list[Path]:
    """List the files that a run starts from: transformer, VAE and encoded prompt. Their headers are read.

    Raises:
        WeightsError: a file is absent; the message says how to get it.
        DamagedFileError: a file is damaged.
    """
    folder, prompt = locate_klein(options.base), Path(options.prompt_embeddings)
    networks = [read_network(folder / name, "diffusion_pytorch_model") for name in TRAINING_NETWORKS]
    if not prompt.is_file():
        raise WeightsError(
            f"model.prompt_embeddings={make_storable(str(prompt))} does not exist; `mimicbrush fetch` with the same "
            "model options encodes the prompt once"
        )
    read_head(prompt)
    return [*(file for network in networks for file in network.files), prompt]


def read_lora_head(file: Path) -> dict[str, StoredTensor]:
    """Read which tensors a LoRA file of diffusers holds.

    Raises:
        WeightsError: the file is damaged, or holds something else.
    """
    stored = read_head(file)
    foreign = [key for key in stored if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if foreign or not stored:
        found = make_storable(foreign[0]) if foreign else "nothing"
        raise WeightsError(
            f"{file} is not a LoRA of diffusers: it contains {found}. Give such a file, or the folder of a training run"
        )
    return stored
