"""The small model that comes with the project: its names and its folder. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path

from mimicbrush.errors import InputError
from mimicbrush.models.options import vae_scale_factor

#: Its name on command lines.
SHIPPED_NAME = "small"
#: All names that it has; the second is an older one.
SHIPPED_NAMES = (SHIPPED_NAME, "proof")
#: A pipeline folder, with a card that says what it was trained on and what it can do.
SHIPPED_MODEL = Path(__file__).parents[1] / "assets" / "proof"


def is_shipped() -> bool:
    """Whether this installation has it."""
    return (SHIPPED_MODEL / "model_index.json").is_file()


def model_folder(name: str) -> Path:
    """Find the folder of a model: that of the small model for one of its names, otherwise the name as a path.

    Raises:
        InputError: the small model is named, and this installation has none.
    """
    if name not in SHIPPED_NAMES or (Path(name) / "model_index.json").is_file():
        return Path(name)
    if not is_shipped():
        raise InputError(
            f"{name}: this installation does not contain the small model; name a pipeline folder, or train one "
            "(docs/training.md)"
        )
    return SHIPPED_MODEL


def shipped_size_px() -> int:
    """Read the side of the square canvas that the small model edits at."""
    unet, vae = (json.loads((SHIPPED_MODEL / part / "config.json").read_text()) for part in ("unet", "vae"))
    return int(unet["sample_size"] * vae_scale_factor(vae))
