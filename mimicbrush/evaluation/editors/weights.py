"""Public weights of the editors that are compared, and where they lie. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mimicbrush.errors import WeightsError
from mimicbrush.models.options import KLEIN_HUB_ID
from mimicbrush.models.pretrained.weights import REVISIONS


@dataclass(frozen=True)
class Repository:
    """A repository of weights.

    Attributes:
        hub_id: its name in the local Hugging Face cache.
        mark: a file that shows that a folder holds it.
    """

    hub_id: str
    mark: str

    @property
    def folder_name(self) -> str:
        """Its name in a folder of several repositories."""
        return self.hub_id.rpartition("/")[2]


#: File of the adapter; the plain one, whose four tokens come from CLIP's image embedding.
IP_ADAPTER_FOLDER, IP_ADAPTER_FILE = "models", "ip-adapter_sd15.safetensors"

INPAINTING = Repository("stable-diffusion-v1-5/stable-diffusion-inpainting", "model_index.json")
STABLE_DIFFUSION = Repository("stable-diffusion-v1-5/stable-diffusion-v1-5", "unet/config.json")
PAINT_BY_EXAMPLE = Repository("Fantasy-Studio/Paint-by-Example", "model_index.json")
FLUX2_KLEIN = Repository(KLEIN_HUB_ID, "model_index.json")
IP_ADAPTER = Repository("h94/IP-Adapter", f"{IP_ADAPTER_FOLDER}/{IP_ADAPTER_FILE}")


def find_repository(repository: Repository, folder: Path | None) -> Path:
    """Find the folder of a repository; nothing is fetched.

    Args:
        repository: which.
        folder: where it lies: itself, or a folder that holds it under its own name (the last part of its hub id).
            None: the local Hugging Face cache.

    Raises:
        WeightsError: it is not there; says what was looked for.
    """
    places = _find_cached(repository) if folder is None else [folder / repository.folder_name, folder]
    for place in places:
        if (place / repository.mark).is_file():
            return place
    if folder is not None:
        raise WeightsError(
            f"{folder} does not contain {repository.hub_id}: there is neither {places[0] / repository.mark} "
            f"nor {places[1] / repository.mark}"
        )
    revision = REVISIONS.get(repository.hub_id)
    command = f"hf download {repository.hub_id}" + (f" --revision {revision}" if revision else "")
    raise WeightsError(
        f"{repository.hub_id} is not (completely) in the local Hugging Face cache: {repository.mark} is missing. "
        f"Download it with `{command}`, or name a folder that contains {repository.folder_name}/ after a colon, as "
        "in NAME:DIR"
    )


def _find_cached(repository: Repository) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache

    revisions = dict.fromkeys((REVISIONS.get(repository.hub_id), None))  # the pinned one, or whatever is there
    found = [try_to_load_from_cache(repository.hub_id, repository.mark, revision=each) for each in revisions]
    return [Path(each).parents[repository.mark.count("/")] for each in found if isinstance(each, str)]
