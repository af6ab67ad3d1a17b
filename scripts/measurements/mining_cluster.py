"""Time that a cluster takes to mine many clips. The cost of a clip is measured, the cluster is simulated."""

from __future__ import annotations

import heapq
import itertools
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from measurements.harness import Counted
from measurements.samples import clips_in, one_core

CLIPS = 100_000
SHARD_SIZES = (1, 4, 16, 64)
#: How many times every part of the manifest is there when the end of a run is timed.
FINISH_COPIES = 100


@dataclass(frozen=True)
class Cost:
    """What mining takes, in seconds of a processor and megabytes; measured by `measure_cost`.

    Attributes:
        clip_s: of each measured clip.
        read_mb, written_mb: of a clip.
        shard_s: of a shard, besides its clips: its files are written and hashed.
        start_s: of a worker, before its first clip.
        finish_clip_s, finish_shard_s: of a clip, and of a shard, at the end and on one machine: index, summary, report.
    """

    clip_s: tuple[float, ...]
    read_mb: float
    written_mb: float
    shard_s: float
    start_s: float
    finish_clip_s: float
    finish_shard_s: float

    def draw_clips(self, number: int, rng: np.random.Generator) -> np.ndarray:
        """Draw the seconds of clips from the log-normal distribution that the measured ones suggest."""
        logs = np.log(self.clip_s)
        return rng.lognormal(logs.mean(), max(logs.std(), 1e-9), number)


@dataclass(frozen=True)
class Cluster:
    """A cluster that is assumed; nothing of it is measured.

    Attributes:
        workers: cores, each with one reader process.
        workers_per_node: they are lost together.
        slow_share, slow_factor: so many nodes take so many times as long (stragglers).
        node_losses_per_hour: of one node. Its unfinished shards begin again, and it is back after `restart_s`.
        hangs_per_clip: so many clips hang until `timeout_s`.
        store_mb_per_s: of the store, shared by all that run.
        driver_s: that the one process which hands out shards needs for each.
        shards_ahead: handed out per core.
    """

    workers: int = 1000
    workers_per_node: int = 8
    slow_share: float = 0.05
    slow_factor: float = 3.0
    node_losses_per_hour: float = 0.0
    restart_s: float = 120.0
    hangs_per_clip: float = 0.0
    timeout_s: float = 1800.0
    store_mb_per_s: float = 5000.0
    driver_s: float = 0.002
    shards_ahead: int = 2


@dataclass
class Outcome:
    """What a simulated run did.

    Attributes:
        finished: shard -> how many times it ended; 1 each.
        wall_s: until the last one ended.
        useful_s, lost_s: time that workers spent on shards that ended, and on tries that were lost.
        lost_tries: tries of a shard that ended with their node.
    """

    finished: Counter[int] = field(default_factory=Counter)
    wall_s: float = 0.0
    useful_s: float = 0.0
    lost_s: float = 0.0
    lost_tries: int = 0


def simulate(clip_s: Sequence[float], per_shard: int, cost: Cost, cluster: Cluster, seed: int) -> Outcome:
    """Mine clips on a simulated cluster, as `mimicbrush.mining.executors` does on Ray.

    A shard is a task for one core. The driver hands out `shards_ahead` per core and one more for each that ends. A
    shard whose node is lost is queued again, for as long as it takes.

    Args:
        clip_s: seconds of a processor, of each clip.
        per_shard: clips of a shard, as `inputs_per_shard`.
        cost: of everything else.
        cluster: what runs it.
        seed: of slow and lost nodes, and of hangs.
    """
    return _Simulation(clip_s, per_shard, cost, cluster, seed).run()


class _Simulation:
    """Events in order of time: "submit" (a shard), "free" (a worker), "end" (a try), "loss" (a node)."""

    def __init__(self, clip_s: Sequence[float], per_shard: int, cost: Cost, cluster: Cluster, seed: int) -> None:
        self.cluster, self.cost = cluster, cost
        self.rng = np.random.default_rng(seed)
        self.shards = [np.asarray(clip_s[start : start + per_shard]) for start in range(0, len(clip_s), per_shard)]
        self.hangs = [self.rng.binomial(len(shard), cluster.hangs_per_clip) for shard in self.shards]
        nodes = -(-cluster.workers // cluster.workers_per_node)
        self.speed = np.where(self.rng.random(nodes) < cluster.slow_share, cluster.slow_factor, 1.0)
        self.generation = [0] * nodes  # a try of an earlier one was lost
        self.outcome = Outcome()
        self.events: list[tuple[float, int, str, int, int]] = []  # s, order, kind, of what, generation
        self.num_events = 0
        self.queue: deque[int] = deque()
        self.idle: deque[int] = deque()
        self.running: dict[int, tuple[int, float]] = {}  # worker -> shard, start
        self.next_shard, self.driver_free_s = 0, 0.0

    def run(self) -> Outcome:
        """Run until every shard has ended."""
        for _ in range(self.cluster.shards_ahead * self.cluster.workers):
            self._hand_out(0.0)
        for worker in range(self.cluster.workers):
            self._add(self.cost.start_s, "free", worker, 0)
        for node in range(len(self.generation)):
            self._schedule_loss(node, 0.0)
        while len(self.outcome.finished) < len(self.shards):
            now, _, kind, who, generation = heapq.heappop(self.events)
            getattr(self, f"_on_{kind}")(now, who, generation)
            while self.queue and self.idle:
                self._start(now, self.idle.popleft(), self.queue.popleft())
        return self.outcome

    def _add(self, time_s: float, kind: str, who: int, generation: int) -> None:
        heapq.heappush(self.events, (time_s, self.num_events, kind, who, generation))
        self.num_events += 1

    def _node(self, worker: int) -> int:
        return worker // self.cluster.workers_per_node

    def _hand_out(self, now: float) -> None:
        """The driver's turn: one shard after the other."""
        if self.next_shard < len(self.shards):
            self.driver_free_s = max(self.driver_free_s, now) + self.cluster.driver_s
            self._add(self.driver_free_s, "submit", self.next_shard, 0)
            self.next_shard += 1

    def _on_submit(self, now: float, shard: int, _: int) -> None:
        self.queue.append(shard)

    def _on_free(self, now: float, worker: int, generation: int) -> None:
        if generation == self.generation[self._node(worker)]:
            self.idle.append(worker)

    def _start(self, now: float, worker: int, shard: int) -> None:
        node, clips = self._node(worker), self.shards[shard]
        megabytes = len(clips) * (self.cost.read_mb + self.cost.written_mb)
        self.running[worker] = shard, now
        copy_s = megabytes * len(self.running) / self.cluster.store_mb_per_s
        work_s = (clips.sum() + self.cost.shard_s) * self.speed[node] + self.hangs[shard] * self.cluster.timeout_s
        self._add(now + copy_s + work_s, "end", worker, self.generation[node])

    def _on_end(self, now: float, worker: int, generation: int) -> None:
        if generation != self.generation[self._node(worker)]:
            return
        shard, start = self.running.pop(worker)
        self.outcome.finished[shard] += 1
        self.outcome.useful_s += now - start
        self.outcome.wall_s = now
        self.idle.append(worker)
        self._hand_out(now)

    def _schedule_loss(self, node: int, now: float) -> None:
        if self.cluster.node_losses_per_hour:
            self._add(now + self.rng.exponential(3600 / self.cluster.node_losses_per_hour), "loss", node, 0)

    def _on_loss(self, now: float, node: int, _: int) -> None:
        self.generation[node] += 1
        first = node * self.cluster.workers_per_node
        workers = range(first, min(first + self.cluster.workers_per_node, self.cluster.workers))
        self.idle = deque(worker for worker in self.idle if worker not in workers)
        back_s = now + self.cluster.restart_s
        for worker in workers:
            if worker in self.running:
                shard, start = self.running.pop(worker)
                self.queue.append(shard)
                self.outcome.lost_s += now - start
                self.outcome.lost_tries += 1
            self._add(back_s + self.cost.start_s, "free", worker, self.generation[node])
        self._schedule_loss(node, back_s)


def measure_cost(clips: Path, folder: Path) -> Cost:
    """Mine each clip of a folder on one core, and see what it takes.

    Args:
        clips: the folder.
        folder: to write to.
    """
    from mimicbrush.mining.executors import Resources
    from mimicbrush.mining.options import MiningOptions
    from mimicbrush.mining.pair_selection import select_pairs
    from mimicbrush.mining.run import mine_folder
    from mimicbrush.mining.video.strict_reader import PyAVReader

    options, paths = MiningOptions(inputs_per_shard=1), sorted(clips.iterdir())
    seconds = []
    with one_core():
        for clip in paths:
            start = time.process_time()
            select_pairs(PyAVReader().frames(clip), options)
            seconds.append(time.process_time() - start)
    mined = folder / "mined"
    start = time.process_time()
    mine_folder(clips, mined, options, resources=Resources(workers=1), progress=False)
    main_s = time.process_time() - start
    written = sum(path.stat().st_size for part in ("shards", "manifest", "audit") for path in (mined / part).iterdir())
    few_s = time_finish(mined, folder / "few", 1, len(paths))
    loose_s = time_finish(mined, folder / "loose", FINISH_COPIES, 1)
    packed_s = time_finish(mined, folder / "packed", FINISH_COPIES, FINISH_COPIES * len(paths))
    return Cost(
        clip_s=tuple(seconds),
        read_mb=statistics.mean(clip.stat().st_size for clip in paths) / 1e6,
        written_mb=written / len(paths) / 1e6,
        shard_s=max(0.0, main_s - few_s) / len(paths),
        start_s=time_start(),
        finish_clip_s=(packed_s - few_s) / ((FINISH_COPIES - 1) * len(paths)),
        finish_shard_s=(loose_s - packed_s) / (FINISH_COPIES * len(paths) - 1),
    )


def time_start() -> float:
    """Seconds of a processor for a process that can read files."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import mimicbrush.mining.worker"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def time_finish(mined: Path, folder: Path, copies: int, per_part: int) -> float:
    """Seconds of a processor for index, summary and report of a folder in which every part is there several times.

    Args:
        mined: a mined folder.
        folder: the larger one, to be made.
        copies: how many times; each copy names other videos.
        per_part: so many old parts are one new part.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mimicbrush.data.manifest import INDEX_NAME, PLAN_NAME, write_index
    from mimicbrush.io.hashing import hash_file
    from mimicbrush.mining.report.page import write_mining_report
    from mimicbrush.mining.summary import SUMMARY_NAME, summarise_manifest

    shutil.copytree(mined, folder, ignore=shutil.ignore_patterns("manifest", "markers", INDEX_NAME))
    for name in ("manifest", "markers"):
        (folder / name).mkdir()
    parts = [pq.read_table(part) for part in sorted((mined / "manifest").iterdir())]
    tables = []
    for copy, part in itertools.product(range(copies), parts):
        table = part
        for name in ("source_path", "source_hash"):
            values = [f"{copy:08x}{text[8:]}" for text in part[name].to_pylist()]
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
        tables.append(table.cast(part.schema))
    for number, start in enumerate(range(0, len(tables), per_part)):
        path = folder / "manifest" / f"part-{number:06d}.parquet"
        pq.write_table(pa.concat_tables(tables[start : start + per_part]), path)
        marker = {"part_sha256": hash_file(path), "ignored": {}}
        (folder / "markers" / f"shard-{number:06d}.json").write_text(json.dumps(marker))
    options = json.loads((folder / PLAN_NAME).read_text())["options"]
    start = time.process_time()
    write_index(folder, folder / INDEX_NAME)
    (folder / SUMMARY_NAME).write_text(summarise_manifest(folder, {}, options).to_json())
    write_mining_report(folder)
    return time.process_time() - start


def mining_cluster() -> Iterator[Counted]:
    """what 100,000 clips take on a simulated cluster of 1,000 workers, from the measured cost of a clip"""
    with tempfile.TemporaryDirectory() as name:
        cost = measure_cost(clips_in(Path(name) / "clips"), Path(name))
    yield Counted("the cost of a clip", lambda: asdict(cost) | {"mean_s": float(cost.draw_clips(CLIPS, _rng()).mean())})
    calm = Cluster()
    rough = replace(calm, node_losses_per_hour=0.5, hangs_per_clip=1e-4)
    for case, cluster in (
        ("no failures", calm),
        ("failures", rough),
        ("failures, timeout_s=120", replace(rough, timeout_s=120.0)),
    ):
        for per_shard in SHARD_SIZES:
            figures = partial(describe_run, cost, per_shard, cluster)
            yield Counted(f"{case}, inputs_per_shard={per_shard}", figures)


def describe_run(cost: Cost, per_shard: int, cluster: Cluster, seeds: int = 5) -> dict[str, object]:
    """Simulate some runs of 100,000 clips, and give the medians of what they took."""
    runs = []
    for seed in range(seeds):
        runs.append(simulate(cost.draw_clips(CLIPS, _rng(seed)), per_shard, cost, cluster, seed))
        assert set(runs[-1].finished.values()) == {1}, "a shard ended twice"
    return {
        "wall_s": float(statistics.median(run.wall_s for run in runs)),
        "longest_wall_s": float(max(run.wall_s for run in runs)),
        "busy_share": float(statistics.median(run.useful_s / (run.wall_s * cluster.workers) for run in runs)),
        "lost_share": float(statistics.median(run.lost_s / (run.useful_s + run.lost_s) for run in runs)),
        "lost_tries": statistics.median(run.lost_tries for run in runs),
        "finish_s": cost.finish_clip_s * CLIPS + cost.finish_shard_s * -(-CLIPS // per_shard),
    }


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, 1])
