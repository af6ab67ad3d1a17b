"""Logs with one JSON object per line for each step of a run, which may continue from an earlier step."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimicbrush.io.atomic import write_aside


class StepLog:
    """Log that appends to a JSON-lines file. After a restart, lines beyond the checkpoint are cut off first.

    Args:
        path: the file; its folder is there.
        first_step: steps after this one will be logged (again).
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        lines = _read_lines(path)
        content = "".join(f"{line}\n" for line in lines if _step_of(line) <= first_step)
        # Compared as a whole: a last line without its newline would be joined to the next line.
        if not path.exists() or path.read_bytes() != content.encode():
            write_aside(path, lambda aside: aside.write_text(content))

    def append(self, values: Mapping[str, object]) -> None:
        """Write one line, at once; `values` has a "step", and no number in it is NaN or infinite.

        Raises:
            OSError: the disk refuses it; nothing of the line is left, to which the next one would be glued.
        """
        line = (json.dumps(values, allow_nan=False) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(start)
                raise


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log, without incomplete ones; none if there is no file."""
    return [json.loads(line) for line in _read_lines(path) if _step_of(line) < float("inf")]


def _read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _step_of(line: str) -> float:
    """The step of a line; one that a kill cut short, or a lost disk damaged, counts as beyond any step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")
