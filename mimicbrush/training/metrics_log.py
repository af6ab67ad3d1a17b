"""metrics.jsonl: one object per logged step."""

from __future__ import annotations

import json
from pathlib import Path


class MetricsLog:
    """Appends to a JSON-lines file. After a restart, what was logged beyond the checkpoint is cut off first.

    Args:
        path: the file.
        first_step: steps after this one will be logged (again).
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= first_step]
        if kept != lines or not path.exists():
            aside = path.with_suffix(".tmp")
            aside.write_text("".join(f"{line}\n" for line in kept))
            aside.replace(path)

    def append(self, values: dict[str, float | None]) -> None:
        """Write one line, at once."""
        with self.path.open("a") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")


def _step_of(line: str) -> float:
    """The step of a line; a line that a kill cut short counts as beyond any step."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
