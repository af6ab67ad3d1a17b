"""wandb or tensorboard, through accelerate, so that a run which goes on is the same run there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from mimicbrush.training.checkpoints import read_state


def start_tracker(
    accelerator: Accelerator,
    name: str,
    run_name: str,
    run_dir: Path,
    config: dict[str, Any],
    resume_from: Path | None,
) -> None:
    """Start what `Accelerator.log` logs to.

    Without a key wandb writes into `run_dir` only; ``wandb sync`` uploads that later.

    Args:
        accelerator: made with this tracker.
        name: "none", "wandb" or "tensorboard".
        run_name: what the run is called there.
        run_dir: for what stays here.
        config: option -> value.
        resume_from: the checkpoint that the run goes on from.
    """
    if name == "none":
        return
    state: dict[str, Any] = {"tracker": {}} if resume_from is None else read_state(resume_from)
    wandb: dict[str, Any] = {"name": run_name, "dir": str(run_dir)}
    if name == "wandb":
        if "WANDB_MODE" not in os.environ and not _has_key():
            wandb["mode"] = "offline"
            accelerator.print("note: wandb has no key (wandb login), so it logs offline; `wandb sync` uploads it later")
        if state["tracker"].get("wandb"):
            wandb |= {"id": state["tracker"]["wandb"], "resume": "allow"}
    accelerator.init_trackers(
        "mimicbrush",
        config=config,
        # What was logged beyond the checkpoint will be logged again.
        init_kwargs={"wandb": wandb, "tensorboard": {"purge_step": state["step"] + 1 if "step" in state else None}},
    )


def log_pictures(
    accelerator: Accelerator, name: str, rows: Sequence[tuple[str, Mapping[str, np.ndarray]]], step: int
) -> None:
    """Show a table of pictures: to wandb as one, to tensorboard column by column.

    Args:
        accelerator: with its trackers.
        name: of the table.
        rows: a caption, and pictures (H, W) or (H, W, 3) uint8 by column, the same columns in all; none shows nothing.
        step: of the run.
    """
    if not rows:
        return
    columns = list(rows[0][1])
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            import wandb

            data = [[caption, *[wandb.Image(pictures[column]) for column in columns]] for caption, pictures in rows]
            tracker.log_table(name, columns=["pair", *columns], data=data, step=step)
        elif tracker.name == "tensorboard":
            stacked = {
                f"{name}/{column}": np.stack([np.atleast_3d(pictures[column]) for _, pictures in rows])
                for column in columns
            }
            tracker.log_images(stacked, step=step, dataformats="NHWC")


def tracker_ids(accelerator: Accelerator) -> dict[str, str]:
    """What a checkpoint must keep for the tracker to go on with the same run; on the main process."""
    return {tracker.name: str(tracker.tracker.id) for tracker in accelerator.trackers if tracker.name == "wandb"}


def _has_key() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
