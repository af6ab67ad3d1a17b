"""The released weights of the Hugging Face hub as a pipeline folder: fetched once, converted once, then kept."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import cached_assets_path, snapshot_download
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # listed, but not as mypy wants it

from mimicbrush.errors import WeightsError
from mimicbrush.io.atomic import replace_folder
from mimicbrush.models.library_logs import quiet_libraries
from mimicbrush.pipelines.conversion.import_released import released_pipeline
from mimicbrush.pipelines.conversion.layout import HUB_FILES, find_released

#: To be raised when an import writes something else than before: older results are then not used any more.
_VERSION = 1


def released_pipeline_folder(*, fetch: bool = True) -> Path:
    """Return the released weights as a pipeline folder; convert them, if that has not been done.

    What is not in the local Hugging Face cache is fetched (2.5 billion weights), if `fetch`. The result
    lies among huggingface_hub's assets, by the commits that it was made of. Of several processes that ask at once,
    one converts, the others wait.

    Raises:
        WeightsError: files are neither in the cache nor to be had, or they do not fit.
    """
    snapshots = {repository: _snapshot(repository, fetch) for repository in HUB_FILES}
    name = "-".join([f"v{_VERSION}", *[folder.name[:16] for folder in snapshots.values()]])
    folder = cached_assets_path("mimicbrush", "released", name)
    final = folder / "pipeline"
    if not final.is_dir():
        with WeakFileLock(folder / "pipeline.lock"):
            if not final.is_dir():
                quiet_libraries()
                released = released_pipeline(find_released(*snapshots.values()), scratch=folder)
                replace_folder(final, released.save_pretrained)
    return final


def _snapshot(repository: str, fetch: bool) -> Path:
    """Find the folder of a repository in the local cache, with all files that are needed."""
    patterns = list(HUB_FILES[repository])
    problem = ""
    # The local copy comes first: the weights were released only once.
    for local_files_only in (True, False) if fetch else (True,):
        try:
            found = snapshot_download(repository, allow_patterns=patterns, local_files_only=local_files_only)
        except OSError as error:  # absent, no network, no such repository, disk full
            problem = problem or f"it is not in the local cache and could not be fetched ({_first_line(error)})"
        else:
            missing = [pattern for pattern in patterns if not any(Path(found).glob(pattern))]
            if not missing:
                return Path(found)
            problem = f"its copy in {found} does not contain {', '.join(missing)}"
    raise WeightsError(_how_to_fetch(repository, problem))


def _how_to_fetch(repository: str, problem: str) -> str:
    wanted = " ".join(f"--include '{pattern}'" for pattern in HUB_FILES[repository])
    return (
        f"the released weights need {repository}, but {problem}.\n"
        f"  Download it into the same Hugging Face cache, from a machine with a network:\n"
        f"  hf download {repository} {wanted}"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
