"""Loads batches of samples in worker processes."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import multiprocessing.process
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, cast

import cv2
import torch
from torch.utils.data import DataLoader

from mimicbrush.data.batch import LoadedBatch, collate_samples
from mimicbrush.data.dataset import DecodedSample, EncodedSample, FixedViewDataset, PairDataset, Sample
from mimicbrush.data.sampler import RankBatches
from mimicbrush.errors import LoaderError, MimicBrushError

#: Signals that end a run.
_ENDING_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
#: Time after which a caller that waits for a batch gets control back.
_POLL_S = 0.5
#: Shortest timeout for the first batch of a worker, which must start and import.
_START_S = 60.0
_LESS_MEMORY = "Set a smaller data.num_workers or train.batch_size"


def poll_batches(
    dataset: PairDataset | FixedViewDataset,
    batches: RankBatches | Sequence[Sequence[int]],
    *,
    num_workers: int,
    pin_memory: bool = False,
    timeout_s: float = 600.0,
) -> Iterator[LoadedBatch | None]:
    """Load the batches of one rank, in order, and yield None whenever half a second has passed without one.

    So the caller can check other things meanwhile, such as signals. `accelerator.prepare` is not used: the sampler
    already gives each rank its own samples, and accelerate's mid-epoch resume is wrong after the first epoch
    (accelerate#2016).

    Args:
        dataset: the samples, by global number.
        batches: the sample numbers of each batch.
        num_workers: number of worker processes; 0: load in this process. Workers are forked from a server process that
            has only imported their modules: a fork that inherits OpenCV's threads hangs at its first warp, and a new
            process needs seconds to import PyTorch.
        pin_memory: put batches into page-locked memory, for asynchronous copies to a GPU.
        timeout_s: longest time that a worker may take for its next batch; at least a minute for its first one.

    Raises:
        LoaderError: a worker was killed, ran out of memory or exceeded `timeout_s`.
        DataError: too many pairs in a row cannot be read.
        OSError: a disk is full.
    """
    loader = DataLoader(
        cast(Any, _PassingErrors(dataset)),
        batch_sampler=cast(Any, batches),
        num_workers=num_workers,
        collate_fn=cast(Any, _collate_or_pass),
        worker_init_fn=_prepare_worker,
        multiprocessing_context=_worker_context() if num_workers else None,
        pin_memory=pin_memory,
        timeout=_POLL_S if num_workers else 0,
        # Seeds the workers, which do not use it. Without it, DataLoader would draw from the global generator, which
        # dropout uses.
        generator=torch.Generator(),
    )
    iterator = iter(loader)
    workers: list[BaseProcess] = list(getattr(iterator, "_workers", ()))  # torch has no public name for them
    try:
        for count, numbers in enumerate(batches):
            polls = 0
            while (batch := _try_next(iterator, workers)) is None:
                polls += 1  # the clock is not used, because it also counts time during which a cluster suspends the job
                worker = count % len(workers)  # workers load the batches in turn
                if polls * _POLL_S >= (timeout_s if count >= len(workers) else max(timeout_s, _START_S)):
                    raise LoaderError(
                        f"loader worker {worker} (process {workers[worker].pid}), which reads the samples "
                        f"{numbers[0]}..{numbers[-1]}, has not answered for {timeout_s:g} s. Check that the disk or "
                        "network share with the pairs responds, and that the shared memory (/dev/shm) is not full. For "
                        "a slow disk, set a larger data.loader_timeout_s"
                    )
                yield None
            yield batch
    finally:
        _end_workers(workers)


class _PassingErrors(torch.utils.data.Dataset[Any]):
    """Dataset that returns errors as samples: torch would reduce an error of a worker to the text of its traceback."""

    def __init__(self, dataset: PairDataset | FixedViewDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, number: int) -> Sample | DecodedSample | EncodedSample | Exception:
        try:
            return self.dataset[number]
        except (MimicBrushError, OSError) as error:
            return error


def _collate_or_pass(samples: Sequence[Any]) -> LoadedBatch | Exception:
    error = next((sample for sample in samples if isinstance(sample, Exception)), None)
    return collate_samples(samples) if error is None else error


def _try_next(iterator: Iterator[Any], workers: Sequence[BaseProcess]) -> LoadedBatch | None:
    """Take the next batch; None if none has come for `_POLL_S`."""
    try:
        batch: LoadedBatch | Exception = next(iterator)
    except (RuntimeError, MemoryError) as error:
        ended = [number for number, worker in enumerate(workers) if not worker.is_alive()]
        if ended:
            raise LoaderError(_describe_end(ended[0], workers[ended[0]])) from error
        if isinstance(error, MemoryError):
            raise LoaderError(f"a loader worker ran out of memory. {_LESS_MEMORY}") from error
        if str(error).startswith("DataLoader timed out"):
            return None
        raise
    if isinstance(batch, Exception):
        raise batch
    return batch


def _describe_end(number: int, worker: BaseProcess) -> str:
    code = worker.exitcode or 0
    how = f"ended with status {code}"
    if code < 0:
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
    return (
        f"loader worker {number} (process {worker.pid}) {how}. The kernel does this if memory or shared memory "
        f"(/dev/shm) is full. {_LESS_MEMORY}"
    )


def _end_workers(workers: Sequence[BaseProcess]) -> None:
    """Kill all workers: they ignore the signals that end a run."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(timeout=1)
        if worker.is_alive():
            # It waits inside the kernel, where no signal reaches it. Python would wait for it at exit.
            multiprocessing.process._children.discard(worker)  # type: ignore[attr-defined]


def _worker_context() -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver, resource_tracker

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mimicbrush.data.dataset"])
    # Signals that end a run are sent to its whole process group. The fork server must survive them, as the workers do,
    # or the batches of the last step are never loaded. It inherits the signals that are blocked here; this process
    # receives them after they are unblocked.
    ending = {getattr(signal, name) for name in _ENDING_SIGNALS if hasattr(signal, name)}
    for ensure_running in (resource_tracker.ensure_running, forkserver.ensure_running):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ending)
        try:
            ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _prepare_worker(_worker: int) -> None:
    """Give a worker one thread, because N workers with N threads each would compete for the cores.

    Workers ignore the signals that end a run, which are sent to its whole process group: training still needs the
    batches of its last step. It ends the workers when it is done.
    """
    for name in _ENDING_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
