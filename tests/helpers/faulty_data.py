"""Pairs whose reading goes wrong for real, in whichever process reads them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

from mimicbrush.data.dataset import DecodedSample, PairDataset, Sample


class FaultyDataset(PairDataset):
    """Takes the place of `PairDataset`; `fault` is read where the dataset is made, and travels to the workers.

    Attributes:
        fault: what happens from which sample number on, and a file that is made just before.
    """

    fault: ClassVar[tuple[str, int, Path]]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.own_fault = type(self).fault

    def __getitem__(self, number: int) -> Sample | DecodedSample:
        what, first, told = self.own_fault
        if number >= first:
            told.touch()
            if what == "stuck":
                time.sleep(1000)
            elif what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise TypeError("a fault of the program")
        return super().__getitem__(number)
