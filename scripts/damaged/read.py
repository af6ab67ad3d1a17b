"""Read damaged clips in worker processes and judge each frame; for `compare_readers.py` and tests."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from damaged.make import Damaged
from pebble import ProcessExpired, ProcessPool

from mimicbrush.errors import DataError
from mimicbrush.mining.video.strict_reader import FrameReader, PyAVReader

#: The peers, each as it is used commonly: with its defaults, but one thread.
READERS = ("decord", "opencv")
VISIBLE_DB = 30.0
#: A frame is another one if it looks like that one, and not because both look alike.
_ANOTHER_DB, _ANOTHER_MARGIN_DB = 35.0, 3.0
_READ_PER_WORKER = 60


@dataclass
class Reading:
    """What one reader made of one file.

    Attributes:
        outcome: see `compare_readers.OUTCOMES`.
        detail: the error, or which frame is wrong.
        num_frames: that were accepted.
        num_visible: of these, how many are below `VISIBLE_DB`.
        worst_db: the lowest PSNR, 100 where nothing differs.
    """

    kind: str
    file: str
    reader: str
    outcome: str
    detail: str = ""
    num_frames: int = 0
    num_visible: int = 0
    worst_db: float = 100.0


def write_truth(clip: Path, folder: Path) -> None:
    """The frames of an undamaged clip, (N, H, W, 3) uint8, to be mapped into memory by the workers."""
    frames = [frame.to_rgb() for frame in PyAVReader().frames(clip)]
    np.save(folder / f"{clip.name}.npy", np.stack(frames))


def read_all(
    reader: str,
    ours: FrameReader,
    clips: list[Path],
    files: list[Damaged],
    truth: Path,
    *,
    workers: int,
    timeout_s: float,
    memory_gib: float,
) -> list[Reading]:
    """Every file through one reader; as many readings as files, whatever becomes of the workers.

    Args:
        reader: "ours" or one of `READERS`.
        ours: what "ours" is.
        clips: undamaged; read first, for false alarms.
        files: damaged.
        truth: folder of `write_truth`.
        workers: processes.
        timeout_s: for one file.
        memory_gib: address space of a worker.
    """
    cases = [Damaged("undamaged", clip, clip, True) for clip in clips] + files
    pool = ProcessPool(
        max_workers=workers,
        max_tasks=_READ_PER_WORKER,
        context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=[memory_gib],
    )
    readings = []
    with pool:
        futures = [pool.schedule(read_one, args=[reader, ours, case, truth], timeout=timeout_s) for case in cases]
        for case, future in zip(cases, futures, strict=True):
            failure = future.exception()
            if failure is None:
                readings.append(future.result())
            elif isinstance(failure, FutureTimeoutError):
                readings.append(Reading(case.kind, case.path.name, reader, "hung"))
            elif isinstance(failure, ProcessExpired):
                readings.append(Reading(case.kind, case.path.name, reader, "crashed", f"exit code {failure.exitcode}"))
            else:
                raise failure
    return readings


def _start_worker(memory_gib: float) -> None:
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the libraries of decord and OpenCV report every fault there
    cv2.setNumThreads(1)


def read_one(reader: str, ours: FrameReader, case: Damaged, truth: Path) -> Reading:
    """Read one file to its end and judge what came."""
    expected = np.load(truth / f"{case.origin.name}.npy", mmap_mode="r")
    reading = Reading(case.kind, case.path.name, reader, "right")
    try:
        frames = _ours(ours, case.path) if reader == "ours" else _PEERS[reader](case.path)
        for frame in frames:
            _judge(frame, expected, reading)
    except MemoryError:
        return Reading(case.kind, case.path.name, reader, "memory")
    except (DataError, RuntimeError, cv2.error) as error:
        return Reading(case.kind, case.path.name, reader, "refused", str(error)[:200])
    if reading.num_frames == 0:
        return Reading(case.kind, case.path.name, reader, "refused", "no frame")
    if not case.is_video:
        reading.outcome, reading.detail = "wrong", "frames out of what is no video"
    elif reading.num_frames != len(expected):
        reading.outcome, reading.detail = "wrong", f"{reading.num_frames} frames of {len(expected)}"
    return reading


def _judge(frame: np.ndarray, expected: np.ndarray, reading: Reading) -> None:
    """Count one frame and note the worst that can be said of the clip."""
    number = reading.num_frames
    reading.num_frames += 1
    if number >= len(expected) or frame.shape != expected.shape[1:]:
        reading.outcome, reading.detail = "wrong", f"frame {number} is not in the undamaged clip"
        reading.num_visible += 1
        return
    own_db = psnr_db(frame, expected[number])
    reading.worst_db = round(min(reading.worst_db, own_db), 2)
    if own_db < VISIBLE_DB:
        reading.num_visible += 1
        if reading.outcome == "right":
            reading.outcome, reading.detail = "visible", f"from frame {number} on"
    if own_db < 45.0 and (other := _another(frame, expected, number, own_db)) is not None:
        reading.outcome, reading.detail = "wrong", f"frame {number} is frame {other}"


def _another(frame: np.ndarray, expected: np.ndarray, number: int, own_db: float) -> int | None:
    """The number of the frame that this one looks like rather than like its own."""
    few = frame[::4, ::4]
    best = max(range(len(expected)), key=lambda other: psnr_db(few, expected[other, ::4, ::4]))
    if best == number:
        return None
    best_db = psnr_db(frame, expected[best])
    return best if best_db > max(_ANOTHER_DB, own_db + _ANOTHER_MARGIN_DB) else None


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Of two uint8 images of one shape; 100 where they are equal."""
    error = float(np.mean(np.square(a.astype(np.float32) - b)))
    return 100.0 if error == 0 else 10 * float(np.log10(255**2 / error))


def _ours(reader: FrameReader, path: Path) -> Iterator[np.ndarray]:
    for frame in reader.frames(path):
        yield frame.to_rgb()


def _decord(path: Path) -> Iterator[np.ndarray]:
    import decord

    try:
        video = decord.VideoReader(str(path), num_threads=1)
        for _ in range(len(video)):
            yield video.next().asnumpy()
    except (decord.DECORDError, StopIteration, AssertionError) as error:
        raise DataError(str(error)) from error


def _opencv(path: Path) -> Iterator[np.ndarray]:
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    while True:
        done, frame = video.read()
        if not done:
            return
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


_PEERS = {"decord": _decord, "opencv": _opencv}
