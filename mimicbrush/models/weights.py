"""Where starting weights lie. No heavy import here: a run must stop within seconds where they are absent."""

from __future__ import annotations

from pathlib import Path

from mimicbrush.errors import WeightsError
from mimicbrush.models.options import PretrainedModel


def find_weights(options: PretrainedModel) -> dict[str, Path]:
    """Part -> local folder. Nothing is downloaded: a run of days should not begin by surprise.

    Raises:
        WeightsError: names every part whose weights are not there, its option and how to get them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    found: dict[str, Path] = {}
    missing: list[str] = []
    for part in options.weight_options():
        name = getattr(options, part)
        if Path(name).is_dir():
            found[part] = Path(name)
            continue
        try:
            found[part] = Path(snapshot_download(name, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            missing.append(f"  model.{part}={name}")
    if missing:
        raise WeightsError(
            "starting weights are neither a folder nor in the local Hugging Face cache:\n"
            + "\n".join(missing)
            + "\n  Fetch a repository with `hf download ID`, or point its option to a folder."
        )
    return found
