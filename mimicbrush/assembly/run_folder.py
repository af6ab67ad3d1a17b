"""The mark of a complete run, written last. This module imports nothing heavy, so a sweep can skip a run at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mimicbrush.errors import CheckpointError
from mimicbrush.io.atomic import write_json
from mimicbrush.training.checkpoints import find_identity_differences, list_checkpoints

FINISHED_FILE = "finished.json"


@dataclass(frozen=True)
class FinishedRun:
    """Result of a complete run.

    Attributes:
        steps: that it has.
        seconds: since it was last started.
        figures: the last logged ones.
        identity: what a run must agree on to be the same one, see `assembly.run_identity`.
    """

    steps: int
    seconds: float
    figures: dict[str, float | None]
    identity: dict[str, Any]


def write_finished_run(run_dir: Path, finished: FinishedRun) -> None:
    """Mark a run as complete, after everything else is written."""
    write_json(run_dir / FINISHED_FILE, asdict(finished))


def read_finished_run(run_dir: Path) -> FinishedRun | None:
    """Read the result of a run; None if it is not complete.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = run_dir / FINISHED_FILE
    if not path.is_file():
        return None
    try:
        return FinishedRun(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete it, then run the same command again to continue"
        ) from error


def find_finished_run(run_dir: Path, identity: Mapping[str, Any], max_steps: int, resume: str) -> FinishedRun | None:
    """Find the result of a run that has nothing left to do; None if it can continue or start.

    Args:
        run_dir: of the run.
        identity: that the run there must have.
        max_steps: that it must reach.
        resume: `train.resume`.

    Raises:
        CheckpointError: another run is complete there, or this one is and may not, or cannot, go on.
    """
    finished = read_finished_run(run_dir)
    if finished is None:
        return None
    differing = find_identity_differences(finished.identity, identity)
    if differing:
        raise CheckpointError(
            f"{run_dir} has another run, which is complete ({'; '.join(differing)}); use the same options, or start "
            "in another folder (run_dir=..., or hydra.sweep.dir=... for a sweep)"
        )
    if not list_checkpoints(run_dir / "checkpoints"):
        if resume == "never":
            raise CheckpointError(
                f"{run_dir} already has this run, complete with {finished.steps} steps; start in another folder "
                "(run_dir=..., or hydra.sweep.dir=... for a sweep)"
            )
        if finished.steps < max_steps:
            raise CheckpointError(
                f"{run_dir} has this run, complete with {finished.steps} steps, but no checkpoint to continue from to "
                f"train.max_steps={max_steps}; start in another run_dir"
            )
    return finished if resume == "latest" and finished.steps >= max_steps else None
