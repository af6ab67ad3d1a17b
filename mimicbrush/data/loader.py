"""Samples -> batches, in worker processes."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import signal
from typing import Any, cast

import cv2
import torch
from torch.utils.data import DataLoader

from mimicbrush.data.batch import DecodedBatch, collate_samples
from mimicbrush.data.dataset import PairDataset
from mimicbrush.data.sampler import RankBatches
from mimicbrush.types import TrainBatch

#: Signals that end a run.
_ENDING = ("SIGTERM", "SIGUSR1", "SIGINT")


def load_batches(
    dataset: PairDataset, batches: RankBatches, *, num_workers: int, pin_memory: bool = False
) -> DataLoader[TrainBatch | DecodedBatch]:
    """Load the batches of one rank, in order.

    It stays outside `accelerator.prepare`: the sampler already gives each rank its own samples, and
    accelerate's mid-epoch resume is wrong after the first epoch (accelerate#2016).

    Args:
        dataset: the samples, by global number.
        batches: which numbers make which batch.
        num_workers: processes; 0 loads in this one. They are forks of a process that has imported what they need and
            used nothing of it: a fork that inherits OpenCV's threads hangs at its first warp, and one that starts anew
            imports PyTorch for seconds.
        pin_memory: for copies to a GPU that do not wait.
    """
    return DataLoader(
        cast(Any, dataset),
        batch_sampler=cast(Any, batches),
        num_workers=num_workers,
        collate_fn=cast(Any, collate_samples),
        worker_init_fn=_prepare_worker,
        multiprocessing_context=_worker_context() if num_workers else None,
        pin_memory=pin_memory,
        # It seeds the workers, which take no random number from it; the global one is dropout's.
        generator=torch.Generator(),
    )


def _worker_context() -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver, resource_tracker

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mimicbrush.data.dataset"])
    # Signals that end a run go to its whole group of processes. The server must outlive them, as the workers do, or the
    # batches of the last step never come. It inherits what is blocked here; the run gets such a signal a moment later.
    ending = {getattr(signal, name) for name in _ENDING if hasattr(signal, name)}
    for ensure_running in (resource_tracker.ensure_running, forkserver.ensure_running):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ending)
        try:
            ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _prepare_worker(_worker: int) -> None:
    """Give a worker one thread, or N workers with N threads each fight for the cores.

    Signals that end a run go to its whole group of processes. What they mean is for the training to decide, which
    still needs the batches of its last step; workers end when it does.
    """
    for name in _ENDING:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
