"""What stops a step, or a run: numbers that are none, signals, and the clock. All processes decide alike."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from mimicbrush.errors import DataError, MimicBrushError

#: So many steps in a row that had to be skipped end a run.
MOST_SKIPPED_IN_A_ROW = 10

#: Signals after which a run saves and ends, and its exit status: clusters send the first two before they take the
#: machine away (the status of a process that SIGTERM ended, for both), Ctrl-C is the third.
EXIT_STATUS: dict[int, int] = {signal.SIGTERM: 143, signal.SIGINT: 130}
if hasattr(signal, "SIGUSR1"):
    EXIT_STATUS[signal.SIGUSR1] = 143


class AsyncScalars:
    """A few numbers that are on their way from the device: reading them waits for what made them, and no longer.

    Args:
        values: (n,) on any device.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._values = values.clone()
            return
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def read(self) -> list[float]:
        """The numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [float(value) for value in self._values]


class SkippedSteps:
    """Counts steps whose gradients were no numbers.

    Args:
        in_a_row: so many came just before.
        total: so many in the whole run.
    """

    def __init__(self, in_a_row: int = 0, total: int = 0) -> None:
        self.in_a_row, self.total = in_a_row, total

    def count(self, was_skipped: bool, step: int, folder: Path) -> None:
        """Take note of a step.

        Raises:
            MimicBrushError: it was one too many in a row.
        """
        self.in_a_row = self.in_a_row + 1 if was_skipped else 0
        self.total += was_skipped
        if self.in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise MimicBrushError(
                f"the loss or its gradients were no numbers in {self.in_a_row} steps in a row, up to step {step}. None "
                f"of these changed the weights, and what checkpoints there are in {folder} are good. Start anew in "
                "another run_dir with a lower train.learning_rate or a longer train.lr_warmup_steps, or with "
                "train.mixed_precision=bf16 instead of fp16."
            )


class StopRequests:
    """Whether the run is to end: a signal came, or its time is over.

    Every process hears signals of its own, and has a clock of its own; so with several of them each step's answer
    is the largest of all, which travels on the device beside the gradients.

    Args:
        max_minutes: from now; None for no limit.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self._ends_at = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._signal = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals while inside; a second Ctrl-C ends the process at once, as always."""
        before = {number: signal.signal(number, self._hear) for number in EXIT_STATUS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def ask(self, device: torch.device) -> torch.Tensor:
        """(2,) on the device: the number of a signal that came or 0, and 1 where the time is over."""
        is_late = self._ends_at is not None and time.monotonic() >= self._ends_at
        answer = torch.tensor([float(self._signal), float(is_late)]).to(device, non_blocking=True)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        return answer


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
