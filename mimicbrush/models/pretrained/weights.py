"""Where starting weights lie, and how they come there. Imports no torch, see `files`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mimicbrush.errors import WeightsError
from mimicbrush.models.options import PretrainedModel


@dataclass(frozen=True)
class WeightsLayout:
    """Layout of a network in a repository or folder.

    Attributes:
        subfolder: where it lies if the folder has that; otherwise at the root, or always at the root (None).
        file_stem: what its library calls its files.
    """

    subfolder: str | None
    file_stem: str

    def files(self) -> list[str]:
        """List patterns of all needed files: no pickles, no half-precision variants, nothing of other networks."""
        names = [
            "config.json",
            f"{self.file_stem}.safetensors",
            f"{self.file_stem}.safetensors.index.json",
            f"{self.file_stem}-*-of-*.safetensors",
        ]
        return names + ([] if self.subfolder is None else [f"{self.subfolder}/{name}" for name in names])


#: By option of `PretrainedModel`. A Stable Diffusion repository holds many networks, each in a folder of its own;
#: that of sd-vae-ft-mse holds the VAE alone, at its root, and so do those of CLIP, DINOv2 and Depth Anything.
LAYOUTS = {
    "unet": WeightsLayout("unet", "diffusion_pytorch_model"),
    "reference_unet": WeightsLayout("unet", "diffusion_pytorch_model"),
    "vae": WeightsLayout("vae", "diffusion_pytorch_model"),
    "image_encoder": WeightsLayout("image_encoder", "model"),
    "dinov2": WeightsLayout(None, "model"),
    "depth_estimator": WeightsLayout(None, "model"),
}

HOW_TO_FETCH = (
    "Fetch and check all with `python scripts/fetch_weights.py` and the same model options, or point an option to a "
    "folder."
)


def locate_weights(part: str, name: str) -> Path | None:
    """Find the folder of a network on this machine, or None where it is not (wholly) here. Nothing is fetched.

    Args:
        part: an option of `PretrainedModel`.
        name: its value: a folder or a hub id.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    root = Path(name)
    if not root.is_dir():
        try:
            root = Path(snapshot_download(name, allow_patterns=LAYOUTS[part].files(), local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return None
    inside = root / (LAYOUTS[part].subfolder or "")
    return inside if inside.is_dir() else root


def find_weights(options: PretrainedModel) -> dict[str, Path]:
    """Find the local folder of each part's network. Nothing is downloaded: a run of days should not begin by surprise.

    Raises:
        WeightsError: names every part whose weights are not there, its option and how to get them.
    """
    folders = {part: locate_weights(part, getattr(options, part)) for part in options.weight_options()}
    missing = [f"  model.{part}={getattr(options, part)}" for part, folder in folders.items() if folder is None]
    if missing:
        raise WeightsError(
            "starting weights are neither a folder nor (wholly) in the local Hugging Face cache:\n"
            + "\n".join(missing)
            + f"\n  {HOW_TO_FETCH}"
        )
    return {part: folder for part, folder in folders.items() if folder is not None}


def fetch_network(part: str, name: str, damaged: Path | None = None) -> None:
    """Fetch the files of a network into the local Hugging Face cache; files that are there already stay.

    Args:
        part: an option of `PretrainedModel`.
        name: a hub id.
        damaged: a file in the cache to be fetched again; it is not replaced before the new one is whole.

    Raises:
        WeightsError: it cannot be had; the message says why.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    # httpx is the hub library's own choice, and has another name in newer versions.
    http_error = cast(type[Exception], HfHubHTTPError.__mro__[1])
    try:
        folder = Path(snapshot_download(name, allow_patterns=LAYOUTS[part].files()))
        if damaged is not None and damaged.is_relative_to(folder):
            again = damaged.relative_to(folder).as_posix()
            snapshot_download(name, allow_patterns=[again], force_download=True)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise WeightsError(
            "the hub does not show it: there is none, or it wants a token of somebody who may see it "
            "(HF_TOKEN, or `hf auth login`)"
        ) from error
    except LocalEntryNotFoundError as error:
        why = _in_short(error.__cause__ or error)
        raise WeightsError(f"it is not wholly in the local cache, and the hub is not reached ({why})") from error
    except (OSError, ValueError, RuntimeError, http_error) as error:
        raise WeightsError(f"it cannot be fetched ({_in_short(error)})") from error


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
