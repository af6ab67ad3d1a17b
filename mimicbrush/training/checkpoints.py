"""Checkpoints: written aside, renamed when whole, and only then are old ones deleted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mimicbrush.errors import CheckpointError

_STATE_FILE = "state.json"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after this many steps lies."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first. A folder is whole exactly if it lost its ``.tmp``."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp" and path.is_dir())


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` names: "never" -> none, "latest" -> the newest or none, or a folder.

    Raises:
        CheckpointError: "never" though there are checkpoints, or a folder that is no checkpoint.
    """
    existing = list_checkpoints(folder)
    if resume == "never":
        if existing:
            raise CheckpointError(
                f"{folder} already holds checkpoints (up to {existing[-1].name}); go on with "
                "train.resume=latest, or start in another folder (run_dir=..., of a sweep hydra.sweep.dir=...)"
            )
        return None
    if resume == "latest":
        return existing[-1] if existing else None
    path = Path(resume)
    if not (path / _STATE_FILE).is_file():
        raise CheckpointError(
            f"train.resume={resume}: no checkpoint there (no {_STATE_FILE}); it takes never, latest, or the folder of "
            "a checkpoint"
        )
    later = [other.name for other in existing if path.resolve().parent == folder.resolve() and other.name > path.name]
    if later or (existing and path.resolve().parent != folder.resolve()):
        raise CheckpointError(
            f"train.resume={resume}: {folder} holds other checkpoints ({', '.join(later or [existing[-1].name])}), "
            "which the new ones would mix with; name another run_dir, or move them away"
        )
    return path


def begin(folder: Path, step: int) -> Path:
    """An empty folder to write into; what a killed run left half-written there is removed."""
    aside = checkpoint_path(folder, step).with_suffix(".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def finish(aside: Path, state: dict[str, Any], keep: int) -> Path:
    """Note what the checkpoint belongs to, rename it into place, then delete all but the newest `keep`."""
    (aside / _STATE_FILE).write_text(json.dumps(state, indent=1))
    final = aside.with_suffix("")
    aside.rename(final)
    for old in list_checkpoints(final.parent)[:-keep]:
        shutil.rmtree(old)
    return final


def read_state(checkpoint: Path, expected: dict[str, Any]) -> int:
    """The step of a checkpoint.

    Args:
        checkpoint: its folder.
        expected: what must be the same for the run to go on as if never interrupted.

    Raises:
        CheckpointError: the run differs; the message names all differences.
    """
    try:
        state = json.loads((checkpoint / _STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} is damaged ({error}); move it away to use the one before it") from error
    differing = [
        f"{name}: {state.get(name)!r} there, {value!r} now"
        for name, value in expected.items()
        if state.get(name) != value
    ]
    if differing:
        raise CheckpointError(
            f"{checkpoint} belongs to another run ({'; '.join(differing)}); "
            "use the same options, or start in another run_dir"
        )
    return int(state["step"])
