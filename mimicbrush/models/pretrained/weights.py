"""Find starting weights on this machine, and download them. Imports no torch, see `files`."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mimicbrush.errors import WeightsError
from mimicbrush.models.options import PretrainedModel
from mimicbrush.models.pretrained.files import HALF_VARIANT


@dataclass(frozen=True)
class WeightsLayout:
    """Layout of a network in a repository or folder.

    Attributes:
        subfolder: subfolder of the network; if it does not exist, or is None, the network is at the root.
        file_stem: name of its files in the library.
        beside: patterns of other files of the repository that are also needed.
    """

    subfolder: str | None
    file_stem: str
    beside: tuple[str, ...] = ()

    def files(self) -> list[str]:
        """List patterns of all needed files: no pickles, no half-precision variants, nothing of other networks."""
        shards = f"{self.file_stem}-*-of-*.safetensors"
        return [*self._in_both_places("config.json", *self._heads(), shards), *self.beside]

    def half_files(self) -> list[str]:
        """List the names that the half-precision variant may have."""
        return self._in_both_places(f"{self.file_stem}.{HALF_VARIANT}.safetensors")

    def has_weights(self, root: Path) -> bool:
        """Whether a repository's folder holds the weights in their usual form."""
        return any((root / name).is_file() for name in self._in_both_places(*self._heads()))

    def _heads(self) -> tuple[str, str]:
        return f"{self.file_stem}.safetensors", f"{self.file_stem}.safetensors.index.json"

    def _in_both_places(self, *names: str) -> list[str]:
        return [*names, *([] if self.subfolder is None else [f"{self.subfolder}/{name}" for name in names])]


#: Part -> layout. A part is an option of `PretrainedModel`, or "base." and the folder of a network of
#: `Flux2KleinModel.base`. A Stable Diffusion repository has many networks, each in its own folder. The repositories of
#: sd-vae-ft-mse, CLIP, DINOv2 and Depth Anything have only one network, at the root.
LAYOUTS = {
    "unet": WeightsLayout("unet", "diffusion_pytorch_model"),
    "reference_unet": WeightsLayout("unet", "diffusion_pytorch_model"),
    "vae": WeightsLayout("vae", "diffusion_pytorch_model"),
    "image_encoder": WeightsLayout("image_encoder", "model"),
    "dinov2": WeightsLayout(None, "model"),
    "depth_estimator": WeightsLayout(None, "model"),
    "base.transformer": WeightsLayout(
        "transformer", "diffusion_pytorch_model", ("model_index.json", "scheduler/scheduler_config.json")
    ),
    "base.vae": WeightsLayout("vae", "diffusion_pytorch_model"),
    "base.text_encoder": WeightsLayout("text_encoder", "model", ("tokenizer/*",)),
}

#: Hub id -> the commit to download if the name states no revision, so that a new upload changes nothing.
REVISIONS = {
    "stable-diffusion-v1-5/stable-diffusion-inpainting": "8a4288a76071f7280aedbdb3253bdb9e9d5d84bb",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    "stabilityai/sd-vae-ft-mse": "31f26fdeee1355a5c34592e401dd41e45d25a493",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "facebook/dinov2-large": "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
    "h94/IP-Adapter": "018e402774aeeddd60609b4ecdb7e298259dc729",
    "black-forest-labs/FLUX.2-klein-base-4B": "a3b4f4849157f664bdbc776fd7453c2783562f4d",
}

HOW_TO_FETCH = (
    "Download and check everything with `mimicbrush fetch` and the same model options, or set an option to a folder."
)


def split_revision(name: str) -> tuple[str, str | None]:
    """Split the name of a repository, ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.

    Returns:
        Its hub id and its revision: the one that is stated, else that of `REVISIONS`; None: the newest.
    """
    hub_id, _, revision = name.partition("@")
    return hub_id, revision or REVISIONS.get(hub_id)


def find_commit(folder: Path) -> str | None:
    """Find the commit of a folder in the Hugging Face cache, which is in its path; None for any other folder."""
    return next((part for part in reversed(folder.parts) if re.fullmatch(r"[0-9a-f]{40}", part)), None)


def note_revision(name: str, folder: Path) -> list[str]:
    """Note the revision of a repository in the Hugging Face cache, if the name does not state it.

    Args:
        name: name of the repository, see `split_revision`.
        folder: folder of its network.
    """
    found = find_commit(folder)
    hub_id, wanted = split_revision(name)
    if Path(name).is_dir() or found is None or found == wanted:
        return []
    return [f"revision {found}, the newest when it was downloaded; use {hub_id}@{found} to keep this revision"]


def locate_weights(part: str, name: str) -> Path | None:
    """Find the folder of a network on this machine, or None if it is not (completely) here. Nothing is downloaded.

    Args:
        part: a key of `LAYOUTS`.
        name: value of its option: a folder or a hub id, see `split_revision`. If it states no revision, a local copy of
            another revision is also accepted.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    root: Path | None = Path(name) if Path(name).is_dir() else None
    hub_id, revision = split_revision(name)
    for wanted in dict.fromkeys((revision, revision if "@" in name else None)):
        if root is None:
            with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
                patterns = LAYOUTS[part].files()
                root = Path(snapshot_download(hub_id, revision=wanted, allow_patterns=patterns, local_files_only=True))
    if root is None:
        return None
    inside = root / (LAYOUTS[part].subfolder or "")
    return inside if inside.is_dir() else root


def find_weights(options: PretrainedModel) -> dict[str, Path]:
    """Find the local folder of each part's network. Nothing is downloaded.

    Raises:
        WeightsError: names every part whose weights are not there, its option and how to get them.
    """
    folders = {part: locate_weights(part, getattr(options, part)) for part in options.weight_options()}
    missing = [f"  model.{part}={getattr(options, part)}" for part, folder in folders.items() if folder is None]
    if missing:
        raise WeightsError(
            "starting weights are neither a folder nor (completely) in the local Hugging Face cache:\n"
            + "\n".join(missing)
            + f"\n  {HOW_TO_FETCH}"
        )
    return {part: folder for part, folder in folders.items() if folder is not None}


def fetch_network(part: str, name: str, damaged: Path | None = None) -> None:
    """Download the files of a network into the local Hugging Face cache; existing files are kept.

    Args:
        part: a key of `LAYOUTS`.
        name: a hub id, see `split_revision`.
        damaged: a file in the cache to download again; it is not replaced before the new one is complete.

    Raises:
        WeightsError: it cannot be downloaded; the message says why.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    # The base class belongs to the HTTP library of the hub library, which depends on the version.
    http_error = cast(type[Exception], HfHubHTTPError.__mro__[1])
    try:
        hub_id, revision = split_revision(name)
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=LAYOUTS[part].files()))
        if not LAYOUTS[part].has_weights(folder):
            # Some repositories have pickles in full precision, and safetensors only in half precision.
            snapshot_download(hub_id, revision=revision, allow_patterns=LAYOUTS[part].half_files())
        if damaged is not None and damaged.is_relative_to(folder):
            again = damaged.relative_to(folder).as_posix()
            snapshot_download(hub_id, revision=revision, allow_patterns=[again], force_download=True)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise WeightsError(
            "the hub does not show this repository: it does not exist, or it needs a token with access "
            "(HF_TOKEN, or `hf auth login`)"
        ) from error
    except LocalEntryNotFoundError as error:
        why = _in_short(error.__cause__ or error)
        raise WeightsError(f"it is not completely in the local cache, and the hub cannot be reached ({why})") from error
    except (OSError, ValueError, RuntimeError, http_error) as error:
        raise WeightsError(f"it cannot be downloaded ({_in_short(error)})") from error


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
