from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import warm_scripts
from mining_inputs import moving_camera, tree, write_clip, write_clips

from mimicbrush.data.manifest import read_rows
from mimicbrush.errors import DataError, InputError
from mimicbrush.mining import executors, shards
from mimicbrush.mining.executors import Resources
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.plan import Item
from mimicbrush.mining.run import mine_folder
from mimicbrush.mining.verify.folder import verify_folder
from mimicbrush.mining.video.strict_reader import PyAVReader, VideoFrame
from mimicbrush.mining.worker_pool import WorkerPool

ROOT = Path(__file__).parents[2]
OPTIONS = MiningOptions(pairs_per_clip=2, inputs_per_shard=1)


def reasons(output: Path) -> dict[str, str]:
    rows = read_rows(output, ["source_path", "reason"])
    return dict(zip(rows["source_path"].to_pylist(), rows["reason"].to_pylist(), strict=True))


class DiesOnce(PyAVReader):
    """Is killed at its first try of a file, as by someone who ends a process on the machine."""

    def frames(self, path: Path) -> Iterator[VideoFrame]:
        try:
            path.with_suffix(".tried").touch(exist_ok=False)
        except FileExistsError:
            yield from super().frames(path)
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_from_outside_costs_nothing(tmp_path: Path) -> None:
    write_clips(tmp_path / "in", 2)
    mine_folder(tmp_path / "in", tmp_path / "killed", OPTIONS, progress=False, reader=DiesOnce())
    mine_folder(tmp_path / "in", tmp_path / "straight", OPTIONS, progress=False)
    assert len(list((tmp_path / "in").glob("*.tried"))) == 2
    parts = {name for name in tree(tmp_path / "straight") if name.startswith(("manifest", "shards", "audit"))}
    assert {name: tree(tmp_path / "killed")[name] for name in parts} == {
        name: tree(tmp_path / "straight")[name] for name in parts
    }


class Greedy(PyAVReader):
    """Wants more memory than there may be, at one file."""

    def frames(self, path: Path) -> Iterator[VideoFrame]:
        if path.name == "clip1.mp4":
            np.ones(2**31, np.uint8)
        yield from super().frames(path)


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is Linux's")
def test_a_file_that_needs_too_much_memory_costs_itself(tmp_path: Path) -> None:
    write_clips(tmp_path / "in", 3)
    resources = Resources(workers=1, memory_gib=1.5)
    mine_folder(tmp_path / "in", tmp_path / "out", OPTIONS, resources=resources, progress=False, reader=Greedy())
    assert reasons(tmp_path / "out") == {"clip0.mp4": "", "clip1.mp4": "out_of_memory", "clip2.mp4": ""}


def test_a_full_disk_is_said_and_what_was_done_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clips(tmp_path / "in", 2)
    write_aside = shards.write_aside

    def full(path: Path, write: Callable[[Path], object]) -> None:
        if path.name == "part-000001.parquet":
            raise OSError(28, "No space left on device")
        write_aside(path, write)

    monkeypatch.setattr(shards, "write_aside", full)
    with pytest.raises(DataError, match=r"shard 1 cannot be written .* the disk is full\. Finished shards are kept"):
        mine_folder(tmp_path / "in", tmp_path / "out", OPTIONS, resources=Resources(workers=1), progress=False)
    assert [path.name for path in (tmp_path / "out/markers").iterdir()] == ["shard-000000.json"]
    assert not list((tmp_path / "out").rglob("*.tmp"))
    monkeypatch.setattr(shards, "write_aside", write_aside)
    summary = mine_folder(tmp_path / "in", tmp_path / "out", OPTIONS, progress=False).summary
    assert summary is not None and summary.accepted == 2


def test_a_cluster_that_does_not_answer_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise ConnectionError(f"nobody at {options['address']}")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=refuse))
    with pytest.raises(InputError, match=r"^ray_address=a:1: cannot connect to a cluster there \(nobody at a:1\)$"):
        list(executors._run_ray([], Resources(ray_address="a:1")))


def test_ray_gets_two_shards_a_core_and_each_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a Ray of which none, one or several tasks have ended whenever it is asked."""
    rng, running, most = random.Random(0), set(), []

    class Task:
        def remote(self, job: int, *_: float) -> int:
            running.add(job)
            most.append(len(running))
            return job

    def wait(references: list[int], num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        ended = rng.sample(references, rng.choice([0, 1, num_returns // 2]))
        running.difference_update(ended)
        return ended, [each for each in references if each not in ended]

    fake = SimpleNamespace(
        is_initialized=lambda: True,
        remote=lambda **_: lambda function: Task(),
        cluster_resources=lambda: {"CPU": 3.0},
        wait=wait,
        get=lambda job: job % 2 == 0,
        exceptions=SimpleNamespace(RayTaskError=RuntimeError),
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    found = list(executors._run_ray(list(range(40)), Resources()))
    assert sorted(found) == [(job, job % 2 == 0) for job in range(40)]
    assert max(most) == 6 and most[:6] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_ray_gives_the_bytes_of_the_local_engine(tmp_path: Path) -> None:
    write_clips(tmp_path / "in", 5)
    (tmp_path / "in/damaged.mp4").write_bytes((tmp_path / "in/clip0.mp4").read_bytes()[:-100])
    # In a process of its own: Ray counts as absent in this one.
    environment = {**os.environ, "PYTHONPATH": ""}
    for engine in ("local", "ray"):
        command = [sys.executable, str(ROOT / "scripts/mine_pairs.py"), f"input={tmp_path / 'in'}"]
        command += [f"output={tmp_path / engine}", f"engine={engine}", "inputs_per_shard=2", "progress=false"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "6 inputs = 5 accepted + 0 rejected + 1 quarantined" in done.stdout
    assert tree(tmp_path / "local") == tree(tmp_path / "ray")


KILLS = 50


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_kills_that_hit_mining_end_in_the_same_bytes(tmp_path: Path) -> None:
    """Each kill finds a shard that is begun and not finished; every fifth hits a worker, which the run survives."""
    for number in range(24):
        write_clip(tmp_path / f"in/clip{number:02d}.mp4", moving_camera(60, (160, 120), seed=number % 8))
    options = MiningOptions(inputs_per_shard=3, pairs_per_clip=8)
    mine_folder(tmp_path / "in", tmp_path / "straight", options, progress=False)
    expected = tree(tmp_path / "straight")
    script = tmp_path / "mine_it.py"
    script.write_text(MINE_IT)
    command = [sys.executable, str(script), str(tmp_path / "in")]

    rng, kills, finished, markers_before = random.Random(0), 0, 0, 0
    output = tmp_path / "out0"
    while kills < KILLS:
        process = warm_scripts.Popen([*command, str(output)], stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            wait_for_a_shard(output, process)
            time.sleep(rng.uniform(0.0, 0.3))
            if kills % 5 == 4 and unfinished(output) and kill_a_worker(process, rng):
                kills += 1
                time.sleep(rng.uniform(0.0, 0.3))
            process.send_signal(signal.SIGKILL)
            if process.wait() == -signal.SIGKILL and unfinished(output):  # what it left is there: it was hit at it
                kills += 1
            assert process.wait() in (0, -signal.SIGKILL)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers
        markers = len(list((output / "markers").glob("*.json"))) if output.exists() else 0
        assert markers >= markers_before, "a finished shard was lost"
        markers_before = markers
        if markers == 8:  # all of it is done: on with an empty folder
            finished += 1
            assert warm_scripts.run([*command, str(output)]).returncode == 0
            assert tree(output) == expected
            output, markers_before = tmp_path / f"out{finished}", 0
    assert warm_scripts.run([*command, str(output)]).returncode == 0
    assert tree(output) == expected
    assert verify_folder(output, progress=False).faults == []


#: Mines as the command does. Its workers are forked, which takes no second each.
MINE_IT = """
import multiprocessing, sys
from pathlib import Path
from mimicbrush.mining.executors import Resources
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.run import mine_folder
forked = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda kind: forked
options = MiningOptions(inputs_per_shard=3, pairs_per_clip=8)
mine_folder(Path(sys.argv[1]), Path(sys.argv[2]), options, resources=Resources(workers=2), progress=False)
"""


def unfinished(output: Path) -> bool:
    """Whether a shard is begun and has no marker."""
    begun = {path.name.split("-")[1] for path in output.glob("spool-*.tmp")}
    return any(not (output / f"markers/shard-{number}.json").exists() for number in begun)


def wait_for_a_shard(output: Path, process: warm_scripts.Popen) -> None:
    deadline = time.monotonic() + 60
    while not unfinished(output) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def workers_of(pid: int) -> list[psutil.Process]:
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


def spawned_here() -> list[psutil.Process]:
    return [child for child in workers_of(os.getpid()) if "spawn_main" in " ".join(child.cmdline())]


def kill_a_worker(process: warm_scripts.Popen, rng: random.Random) -> bool:
    """Kill one of the processes that read files, if there is one."""
    try:
        workers = workers_of(process.pid)
        if not workers:
            return False
        rng.choice(workers).kill()
    except psutil.NoSuchProcess:
        return False
    return True


@pytest.mark.usefixtures("spawned_workers")
def test_workers_that_die_before_they_read_cost_nothing_but_a_new_pool(tmp_path: Path) -> None:
    """A pool that lost all its workers while no file was with them is given up by its library."""
    write_clips(tmp_path / "in", 2)
    with WorkerPool(1, 60.0, 0.0) as readers:
        items = [Item(f"clip{n}.mp4", "video", (tmp_path / f"in/clip{n}.mp4").stat().st_size) for n in range(2)]
        for number, item in enumerate(items):
            pending = readers.submit(tmp_path / "in", item, PyAVReader(), OPTIONS, tmp_path / f"{number}.bin")
            if number == 0:
                deadline = time.monotonic() + 30
                while not (started := spawned_here()) and time.monotonic() < deadline:
                    time.sleep(0.01)
                for worker in started:  # still importing
                    worker.kill()
            assert pending.result().files[0].rows[0]["status"] == "pair"
