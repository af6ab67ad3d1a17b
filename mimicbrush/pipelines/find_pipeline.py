"""Find the folder of a pipeline, also of the released one. To open it: `open_pipeline.open_pipeline`.

PyTorch is imported only where the released weights must be converted.
"""

from __future__ import annotations

from pathlib import Path

from mimicbrush.pipelines.folder import resolve_pipeline_folder
from mimicbrush.pipelines.klein.folder import check_klein, is_klein


def check_model(name: str | Path) -> None:
    """Check that `open_pipeline.open_any_pipeline` can be expected to open a model; quick, without PyTorch.

    Args:
        name: see `folder.resolve_pipeline_folder`; or what a run of FLUX.2 klein left, a LoRA file of it, or its base
            model.

    Raises:
        InputError, WeightsError: there is no such model, or it is not whole; says what to do.
    """
    path = Path(name)
    if is_klein(path):
        check_klein(path)
    else:
        resolve_pipeline_folder(name)


def find_pipeline(name: str | Path, *, fetch: bool = True) -> Path:
    """Find the folder of a pipeline by its name.

    Args:
        name: see `folder.resolve_pipeline_folder`. The released weights are converted once, and fetched unless they are
            in the local Hugging Face cache.
        fetch: False never fetches.

    Raises:
        InputError: there is no such pipeline.
        WeightsError: the released weights are neither in the cache nor can they be fetched.
    """
    folder = resolve_pipeline_folder(name)
    if folder is None:
        from mimicbrush.pipelines.conversion.hub import released_pipeline_folder

        folder = released_pipeline_folder(fetch=fetch)
    return folder
