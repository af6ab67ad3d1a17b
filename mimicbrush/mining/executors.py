"""Mines shards in processes of this machine or on a Ray cluster. Both give the same bytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mimicbrush.errors import DataError, InputError, install_command
from mimicbrush.io.text import make_storable
from mimicbrush.mining.shards import ShardJob, mine_shard
from mimicbrush.mining.worker_pool import WorkerPool
from mimicbrush.ranges import WORKERS_RANGE, check_options, number, word

ENGINES = ("local", "ray")
#: Shards submitted to Ray for each core of the cluster, so that no core waits and the queue stays short.
_SHARDS_AHEAD = 2
#: Time between two calls that collect finished shards: a call takes longer, the more shards it waits for.
_COLLECT_S = 0.5


@dataclass(frozen=True)
class Resources:
    """Resources that mining may use. They do not change the pairs.

    Attributes:
        engine: where shards are mined: in processes of this machine, or on a Ray cluster; one of `ENGINES`.
        workers: processes that read files; with a local Ray, the cores that it gets.
        timeout_s: time limit for one file.
        memory_gib: memory limit of one worker; 0: no limit.
        ray_address: address of a Ray cluster ("auto": the cluster of this machine); "": start one on this machine.
    """

    engine: str = word("local", ENGINES)
    workers: int = number(2, WORKERS_RANGE)
    timeout_s: float = number(1800.0, above=0, at_most=10**7)
    memory_gib: float = number(8.0, at_least=0, at_most=2**20, note="0: no limit")
    ray_address: str = ""

    def __post_init__(self) -> None:
        check_options(self)
        if self.engine == "ray" and importlib.util.find_spec("ray") is None:
            raise InputError(
                f"engine=ray needs the package ray. To install it: {install_command('ray')}; or use engine=local"
            )


def run_shards(jobs: Sequence[ShardJob], resources: Resources) -> Generator[tuple[ShardJob, bool]]:
    """Mine shards, and yield each when it ends: (job, False if the shard was already done).

    Raises:
        DataError: see `mine_shard`; finished shards are kept.
    """
    return (_run_local if resources.engine == "local" else _run_ray)(jobs, resources)


def _run_local(jobs: Sequence[ShardJob], resources: Resources) -> Generator[tuple[ShardJob, bool]]:
    """Mine shards in this machine: each thread mines a shard, and the processes of the pool read its files."""
    with WorkerPool(resources.workers, resources.timeout_s, resources.memory_gib) as pool:
        threads = ThreadPoolExecutor(resources.workers)
        try:
            futures = {threads.submit(mine_shard, job, pool): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            # Threads that wait for a file end when the pool is stopped.
            for future in futures:
                future.cancel()
            pool.stop()
            threads.shutdown()


def _run_ray(jobs: Sequence[ShardJob], resources: Resources) -> Generator[tuple[ShardJob, bool]]:
    """Mine each shard as a Ray task; each Ray worker has one process of its own that reads files."""
    import ray

    started = not ray.is_initialized()
    if started:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if resources.ray_address:
            try:
                ray.init(address=resources.ray_address, **quiet)
            except Exception as error:  # many types: no cluster, another version of Ray, an invalid address
                reason = make_storable(str(error))
                raise InputError(
                    f"ray_address={resources.ray_address}: cannot connect to a cluster there ({reason})"
                ) from error
        else:  # start a cluster that listens only on this machine
            ray.init(num_cpus=resources.workers, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    # If a worker or a node of the cluster dies, Ray mines the shard again.
    remote = ray.remote(num_cpus=1, max_retries=-1)(_mine_on_ray)
    try:
        cores = int(ray.cluster_resources().get("CPU", 1))
        waiting: dict[Any, ShardJob] = {}
        ahead = iter(jobs)
        while True:
            while len(waiting) < _SHARDS_AHEAD * cores and (job := next(ahead, None)) is not None:
                waiting[remote.remote(job, resources.timeout_s, resources.memory_gib)] = job
            if not waiting:
                return
            for reference in ray.wait(list(waiting), num_returns=len(waiting), timeout=_COLLECT_S)[0]:
                try:
                    was_mined = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, DataError) else error from error
                yield waiting.pop(reference), was_mined
    finally:
        if started:
            ray.shutdown()


def _mine_on_ray(job: ShardJob, timeout_s: float, memory_gib: float) -> bool:
    return mine_shard(job, _pool_of_this_process(timeout_s, memory_gib))


@lru_cache(maxsize=1)
def _pool_of_this_process(timeout_s: float, memory_gib: float) -> WorkerPool:
    return WorkerPool(1, timeout_s, memory_gib)
