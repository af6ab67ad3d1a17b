"""Reasons to skip a step or stop a run: gradients that are not finite, signals, time, errors, bad data.

All processes must decide the same: if only some of them stopped, the others would wait for them forever.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from accelerate.utils import gather_object

from mimicbrush.errors import DataError, MimicBrushError, is_out_of_memory
from mimicbrush.io.text import describe_error, make_storable

_T = TypeVar("_T")
#: State of the next item of a process, see `StopRequests.agree`.
_READY, _WAITING, _FAILED = range(3)

#: A run ends after this many skipped steps in a row.
MOST_SKIPPED_IN_A_ROW = 10

#: Signals after which a run saves its state and ends -> its exit status. Clusters send SIGTERM or SIGUSR1 before they
#: stop a job; both have the usual status for SIGTERM. Ctrl-C sends SIGINT.
EXIT_STATUS: dict[int, int] = {signal.SIGTERM: 143, signal.SIGINT: 130}
if hasattr(signal, "SIGUSR1"):
    EXIT_STATUS[signal.SIGUSR1] = 143
#: Longest wait for other processes: one may write, hash and export tens of gigabytes meanwhile.
_LONGEST_WAIT = timedelta(hours=2)


class AsyncScalars:
    """Numbers that are being copied from the device. Reading them waits only for the work that computes them.

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
        """Return the numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [float(value) for value in self._values]


class SkippedSteps:
    """Counts steps whose gradients were not finite.

    Args:
        in_a_row: number of latest steps that were skipped.
        total: number of skipped steps of the whole run.
    """

    def __init__(self, in_a_row: int = 0, total: int = 0) -> None:
        self.in_a_row, self.total = in_a_row, total

    def count(self, was_skipped: bool, step: int, folder: Path) -> None:
        """Count a step.

        Raises:
            MimicBrushError: too many in a row were skipped.
        """
        self.in_a_row = self.in_a_row + 1 if was_skipped else 0
        self.total += was_skipped
        if self.in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise MimicBrushError(
                f"the loss or its gradients were not finite in {self.in_a_row} consecutive steps, up to step {step}. "
                f"These steps did not change the weights, and the checkpoints in {folder} are good. Start again in "
                "another run_dir with a lower train.learning_rate or a longer train.lr_warmup_steps, or with "
                "train.mixed_precision=bf16 instead of fp16."
            )


class StopRequests:
    """Requests to end the run: by a signal, or because its time is over.

    Each process has its own signals and its own clock. Several processes exchange their requests, and all use the
    largest. They do this on the CPU, so no process waits for its GPU.

    Args:
        max_minutes: time limit from now; None: no limit.

    Attributes:
        signal: the number of the signal that all processes agreed on, or 0.
        is_late: whether they agreed that the time is over.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self._ends_at = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._own_signal = 0
        self.signal, self.is_late = 0, False
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_LONGEST_WAIT))

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Catch signals inside the block; a second Ctrl-C ends the process at once, as usual."""
        before = {number: signal.signal(number, self._catch) for number in EXIT_STATUS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        self._own_signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agree(self, level: int = 0) -> int:
        """Exchange the requests of all processes, and return the highest level. All of them must call it.

        Args:
            level: a further number of this process to exchange; the caller defines its meaning.
        """
        is_late = self._ends_at is not None and time.monotonic() >= self._ends_at
        own = torch.tensor([self._own_signal, is_late, level])
        if self._group is not None:
            dist.all_reduce(own, op=dist.ReduceOp.MAX, group=self._group)
        self.signal, late, level = own.tolist()
        self.is_late = bool(late)
        return level

    @property
    def is_agreed(self) -> bool:
        """Whether all processes agreed to end the run."""
        return self.signal != 0 or self.is_late


def await_next(items: Iterator[_T], stop: StopRequests) -> tuple[_T | None, Exception | None]:
    """Wait until all processes have their next item or agree to stop; return the item and an error of any process.

    Args:
        items: items of this process; it yields None if the next item is not ready yet.
        stop: stop requests, which all processes exchange meanwhile.
    """
    item: _T | None = None
    error: Exception | None = None
    level = _WAITING
    while level == _WAITING and not stop.is_agreed:
        if item is None:
            try:
                item = next(items)
            except Exception as caught:  # noqa: BLE001 - the caller raises it after it has saved the state
                error = caught
        level = stop.agree(_FAILED if error else _WAITING if item is None else _READY)
    return item, share_error(error) if level == _FAILED else None


def share_error(error: Exception | None) -> Exception | None:
    """Return the error of this process, or if there is none, that of another one; all processes must call this."""
    sent = error if error is None or isinstance(error, MimicBrushError) else MimicBrushError(describe_error(error))
    found = [each for each in gather_object([sent]) if each is not None]
    return error or (found[0] if found else None)


def run_together(work: Callable[[], _T]) -> _T:
    """Run `work` on every process; if it fails on one of them, raise an error on all of them.

    All processes must call this. Collective calls inside `work` must also happen if a part of it fails.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:  # noqa: BLE001 - it is raised again below, on all processes
        error = caught
    if (shared := share_error(error)) is not None:
        raise shared
    return cast(_T, result)


def explain_error(error: Exception, device: torch.device) -> Exception:
    """Return the error of a step; an out-of-memory error becomes one whose message says what to do."""
    if not is_out_of_memory(error):
        return error
    return MimicBrushError(
        f"out of memory on {device} ({make_storable(str(error), 300)}). Set a smaller train.batch_size (a step still "
        "has train.total_batch_size samples), train.selective_checkpointing=true, or "
        "train.activation_checkpointing=true; docs/speed.md says what fits"
    )


#: Up to this many bad samples never stop a run, because a single early one would exceed any ratio.
ALWAYS_ALLOWED = 10


class BadSamples:
    """Counts the pairs that the loader had to replace, over all processes.

    Args:
        max_ratio: largest share of samples whose pair cannot be read; above it (and above `ALWAYS_ALLOWED`) the run
            stops. It is checked since the start of this process, and between two logs, so that a disk that fails late
            is noticed soon.
        path: file to which a line per unreadable pair is appended.
    """

    def __init__(self, max_ratio: float, path: Path) -> None:
        self.max_ratio, self.path = max_ratio, path
        self.num_faults = self.num_samples = 0

    def write(self, faults: Sequence[str]) -> None:
        """Append faults to the file; call this on one process only."""
        if faults:
            with self.path.open("a", encoding="utf-8") as file:  # faults contain file names
                file.writelines(f"{fault}\n" for fault in faults)

    def count(self, faults: Sequence[str], num_samples: int) -> None:
        """Count samples and the faults among them; the counts are the same on all processes.

        Raises:
            DataError: there were too many faults.
        """
        self.num_faults += len(faults)
        self.num_samples += num_samples
        for bad, among in ((len(faults), num_samples), (self.num_faults, self.num_samples)):
            if bad > max(ALWAYS_ALLOWED, self.max_ratio * among):
                raise DataError(
                    f"{bad} pairs of {among} samples could not be read, more than data.max_bad_ratio={self.max_ratio} "
                    f"allows. {self.path} lists all of them; the last:\n  {faults[-1]}\n"
                    "Repair the data and continue with train.resume=latest, or increase data.max_bad_ratio."
                )
