"""Pairs that could not be read: written down, counted, and too many of them stop the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mimicbrush.errors import DataError

#: So many never stop a run, or one early fault would.
ALWAYS_ALLOWED = 10


class BadSamples:
    """Counts what the loader had to replace, over all processes.

    Args:
        max_ratio: unreadable pairs over samples; above it (and above `ALWAYS_ALLOWED`) the run stops. It holds for the
            time since the run was started or resumed, and for every stretch between two logs, so that a disk
            that fails late is noticed soon.
        path: gets a line per unreadable pair.
    """

    def __init__(self, max_ratio: float, path: Path) -> None:
        self.max_ratio, self.path = max_ratio, path
        self.num_faults = self.num_samples = 0

    def write(self, faults: Sequence[str]) -> None:
        """Name them in the file; on one process only."""
        if faults:
            with self.path.open("a") as file:
                file.writelines(f"{fault}\n" for fault in faults)

    def count(self, faults: Sequence[str], num_samples: int) -> None:
        """Count a stretch of samples and the faults among them, the same on all processes.

        Raises:
            DataError: there were too many.
        """
        self.num_faults += len(faults)
        self.num_samples += num_samples
        for found, among in ((len(faults), num_samples), (self.num_faults, self.num_samples)):
            if found > max(ALWAYS_ALLOWED, self.max_ratio * among):
                raise DataError(
                    f"{found} pairs could not be read among {among} samples, more than data.max_bad_ratio="
                    f"{self.max_ratio} allows. All are named in {self.path}; the last:\n  {faults[-1]}\n"
                    "Mend the data and go on with train.resume=latest, or allow more."
                )
