"""Reads files in worker processes, with a time limit, a memory limit and several tries.

A decoder can crash, hang or use all memory on a damaged file. Then this file is refused, and no other file is lost. A
worker may also have been killed from outside, so its file is tried again in other workers before it is refused.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType

import cv2
from pebble import ProcessExpired, ProcessPool

from mimicbrush.errors import DataError
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.plan import Item
from mimicbrush.mining.video.strict_reader import FrameReader
from mimicbrush.mining.worker import ItemOutcome, describe_failure, mine_item, refuse_file

#: A file is refused when this many workers have died while reading it.
_ATTEMPTS = 5
_POLL_S = 0.2
_BROKEN_POOLS = 20


class WorkerPool:
    """A pool of worker processes; used by several threads at once.

    Args:
        workers: number of processes.
        timeout_s: time limit for one file.
        memory_gib: memory limit for one worker, on Linux; 0: no limit.
    """

    def __init__(self, workers: int, timeout_s: float, memory_gib: float) -> None:
        self._workers, self._timeout_s, self._memory_gib = workers, timeout_s, memory_gib
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._num_broken = 0
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._workers,
            context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(self._memory_gib,),
        )

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop all workers at once. Threads that wait for an outcome get a DataError."""
        self._stopped.set()
        with self._lock:  # so that no other thread replaces the pool meanwhile
            self._pool.stop()
            self._pool.join()

    def submit(
        self, root: Path, item: Item, reader: FrameReader, options: MiningOptions, spool_path: Path
    ) -> PendingOutcome:
        """Schedule an input to be mined (see `mine_item`); the arguments are pickled."""
        return PendingOutcome(self, (root, item, reader, options, spool_path))

    def _schedule(self, arguments: tuple[Path, Item, FrameReader, MiningOptions, Path]) -> Future[ItemOutcome]:
        with self._lock:
            if self._stopped.is_set():
                raise DataError("stopped early")
            if not self._pool.active:
                self._replace_pool()
            future: Future[ItemOutcome] = self._pool.schedule(mine_item, args=arguments, timeout=self._timeout_s)
        return future

    def _replace_pool(self) -> None:
        """Replace the pool: Pebble stops using a pool whose workers die before they get a file."""
        self._num_broken += 1
        if self._num_broken > _BROKEN_POOLS:
            raise DataError(
                f"worker processes ended {_BROKEN_POOLS} times in a row before they had read any file. Do they have "
                f"enough memory (memory_gib={self._memory_gib:g})? Finished shards are kept"
            )
        self._pool.stop()
        self._pool.join()
        self._pool = self._new_pool()

    def _reset_broken(self) -> None:
        self._num_broken = 0


class PendingOutcome:
    """The future outcome of an input that a worker is mining."""

    def __init__(self, pool: WorkerPool, arguments: tuple[Path, Item, FrameReader, MiningOptions, Path]) -> None:
        self._pool, self._arguments = pool, arguments
        self._future = pool._schedule(arguments)

    def result(self) -> ItemOutcome:
        """Wait for the outcome. If a worker dies, hangs or fails, the outcome is a refused file.

        Raises:
            OSError: the worker cannot write its spool file; the disk may be full.
            DataError: the pool was stopped.
        """
        item = self._arguments[1]
        attempt = 1
        while True:
            failure = self._wait_for_failure()
            if failure is None:
                self._pool._reset_broken()
                return self._future.result()
            if isinstance(failure, FutureTimeoutError):
                detail = f"more than timeout_s={self._pool._timeout_s:g}"
                return ItemOutcome([refuse_file(item, "timeout", detail)])
            if isinstance(failure, BrokenProcessPool):  # this file did not cause it
                self._future = self._pool._schedule(self._arguments)
                continue
            if not isinstance(failure, ProcessExpired):
                if isinstance(failure, OSError):
                    raise failure
                # For example, the outcome cannot be pickled.
                return ItemOutcome([refuse_file(item, "failed", describe_failure(failure))])
            if attempt == _ATTEMPTS:
                detail = f"exit code {failure.exitcode}, {_ATTEMPTS} times"
                return ItemOutcome([refuse_file(item, "worker_died", detail)])
            self._future = self._pool._schedule(self._arguments)
            attempt += 1

    def _wait_for_failure(self) -> BaseException | None:
        """Wait for the worker in short steps, because the futures of a stopped pool never end."""
        while True:
            try:
                return self._future.exception(timeout=_POLL_S)
            except FutureTimeoutError:
                if not self._future.done() and self._pool._stopped.is_set():
                    raise DataError("stopped early") from None


def _start_worker(memory_gib: float) -> None:
    """Set up a worker: OpenCV uses one thread, because the pool already uses all cores, and memory is limited."""
    cv2.setNumThreads(1)
    if memory_gib and sys.platform == "linux":
        # Only private memory is limited: libraries reserve address space that they never use.
        limit = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
