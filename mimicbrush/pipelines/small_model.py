"""The small model that comes with the project: where it is. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path

from mimicbrush.errors import InputError

#: How it is named on command lines.
SHIPPED_NAME = "proof"
#: A pipeline folder, with a card that says what it was trained on and what it can do.
SHIPPED_MODEL = Path(__file__).parents[1] / "assets" / "proof"


def is_shipped() -> bool:
    """Whether this installation has it."""
    return (SHIPPED_MODEL / "model_index.json").is_file()


def model_folder(name: str) -> Path:
    """The folder of a model that is named on a command line: "proof" for the shipped one, otherwise itself.

    Raises:
        InputError: the shipped one is named, and this installation has none.
    """
    if name != SHIPPED_NAME or (Path(name) / "model_index.json").is_file():
        return Path(name)
    if not is_shipped():
        raise InputError(
            f"{name}: no model comes with this installation; name a pipeline folder, or train one (docs/training.md)"
        )
    return SHIPPED_MODEL


def shipped_size_px() -> int:
    """Side of the square canvas that the shipped model edits at."""
    unet, vae = (json.loads((SHIPPED_MODEL / part / "config.json").read_text()) for part in ("unet", "vae"))
    return int(unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1))
