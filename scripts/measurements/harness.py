"""Ours and a peer, interleaved in one process: equal results asserted, medians compared, named counts beside them.

A measurement is a function without arguments that returns or yields cases. Its docstring is its line of the help. It
may build what it needs before its first case; a generator can clear that away again after its last.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from mimicbrush.errors import MimicBrushError

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

#: Does the work once, and returns what must be equal: an array, a tensor, bytes or a text, or a sequence of these.
Side = Callable[[], Any]
#: Runs a side once, and says how much of something that took.
Count = Callable[[Side], float]
Measurement = Callable[[], Iterable["Case | Counted"]]


def count_flops(work: Side) -> int:
    """FLOP of matrix products, convolutions and attention; on the meta device nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


Thing = TypeVar("Thing")


class Made(Generic[Thing]):
    """Something large that is made when it is first asked for, and can be dropped again.

    Args:
        make: makes it.
    """

    def __init__(self, make: Callable[[], Thing]) -> None:
        self._make = make
        self._thing: Thing | None = None

    def __call__(self) -> Thing:
        """Make it, unless that was done."""
        if self._thing is None:
            self._thing = self._make()
        return self._thing

    def drop(self) -> None:
        """Free what it holds."""
        self._thing = None
        free_memory()


def free_memory() -> None:
    """Collect what is no longer used, and give a GPU's memory back."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


@dataclass
class Case:
    """One comparison.

    Attributes:
        case: its name.
        ours, peer: the two sides.
        tolerance: the most that the results may differ.
        rounds: times that each side runs, unless told otherwise.
        flop_ratio_full_size: where the timed size is not the real one.
        equality: what is compared, where the timed results cannot be (half precision, lossy storage).
        items: samples, clips, ... that one run of a side is; times and counts are given per item.
        counts: name -> count, made of both sides in runs that are not timed.
        figures: further figures of the case, asked for after it was timed.
        cpu_time: also compare the time that this process computed, which other processes on the machine leave as it is.
    """

    case: str
    ours: Side
    peer: Side
    tolerance: float
    rounds: int
    flop_ratio_full_size: float | None = None
    equality: tuple[Side, Side] | None = None
    items: int = 1
    counts: Mapping[str, Count] = field(default_factory=lambda: {"flop": count_flops})
    figures: Callable[[], Mapping[str, object]] = dict
    cpu_time: bool = False


@dataclass
class Counted:
    """Something that is counted or timed by itself: no peer takes turns with it.

    Attributes:
        case: its name.
        figures: counts it, or times it.
    """

    case: str
    figures: Callable[[], Mapping[str, object]]


def compare(case: Case, rounds: int) -> dict[str, object]:
    """Run both sides in turn and compare medians.

    Returns:
        Name -> figure; ratios are peer over ours.

    Raises:
        MimicBrushError: the results differ by more than the tolerance: then no speed is worth reporting.
    """
    results = case.ours(), case.peer()  # also the warm-up
    if case.equality:
        with exact_float32():
            results = case.equality[0](), case.equality[1]()
    on_gpu = any(getattr(result, "is_cuda", False) for result in results)
    difference = check_equal(case.case, *results, case.tolerance)
    counted = _counted(case)
    seconds, cpu_seconds, memory = _timed(case, rounds, on_gpu)
    own, others = (statistics.median(times) / case.items for times in seconds)
    own_cpu, others_cpu = (statistics.median(times) / case.items for times in cpu_seconds)
    return {
        "case": case.case,
        "time_ratio": others / own,
        **({"cpu_time_ratio": others_cpu / own_cpu} if case.cpu_time else {}),
        **{f"{name}_ratio": peer / own for name, (own, peer) in counted.items() if own},
        **_full_size_ratio(case, counted),
        "max_abs_diff": difference,
        "ours_ms": own * 1e3,
        "peer_ms": others * 1e3,
        **({"ours_cpu_ms": own_cpu * 1e3, "peer_cpu_ms": others_cpu * 1e3} if case.cpu_time else {}),
        **{f"{side}_{name}": count for name, both in counted.items() for side, count in _named(both)},
        "items": case.items,
        "rounds": rounds,
        **memory,
        **case.figures(),
    }


@contextmanager
def exact_float32() -> Iterator[None]:
    """Let no convolution round its operands to 10 bits (TF32), as cuDNN does by default in float32 on a GPU.

    The kernels stay cuDNN's own: `flags` would turn all of cuDNN off where nothing else is said.
    """
    import torch

    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield


def check_equal(case: str, ours: Any, peer: Any, tolerance: float) -> float:
    """Return how far two results are apart.

    Raises:
        MimicBrushError: by more than the tolerance.
    """
    difference = largest_difference(ours, peer)
    if not difference <= tolerance:
        raise MimicBrushError(
            f"{case}: our result and that of the peer differ by {difference:.3g}, expected at most {tolerance:.3g}"
        )
    return difference


def largest_difference(ours: Any, peer: Any) -> float:
    """The largest absolute difference of two results, infinite where they are not of one form."""
    if isinstance(ours, bytes | str):
        return 0.0 if ours == peer else float("inf")
    if isinstance(ours, Sequence):
        if not isinstance(peer, Sequence) or len(ours) != len(peer):
            return float("inf")
        return max(map(largest_difference, ours, peer), default=0.0)
    import numpy as np  # not above: the GPU check starts without it, to say that it is absent

    left, right = (np.asarray(getattr(each, "cpu", lambda each=each: each)()) for each in (ours, peer))
    if left.shape != right.shape or left.dtype != right.dtype:
        return float("inf")
    return float(np.abs(left.astype(np.float64) - right.astype(np.float64)).max(initial=0.0))


def _counted(case: Case) -> dict[str, tuple[float, float]]:
    """Name -> how much an item takes: ours, peer."""
    return {name: (count(case.ours) / case.items, count(case.peer) / case.items) for name, count in case.counts.items()}


def _full_size_ratio(case: Case, counted: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    if "flop" not in counted:
        return {}
    own, peer = counted["flop"]
    return {"flop_ratio_full_size": case.flop_ratio_full_size or peer / own}


def _named(both: tuple[float, float]) -> Iterable[tuple[str, float]]:
    return zip(("ours", "peer"), both, strict=True)


#: Of every run of ours, and of the peer.
Seconds = tuple[list[float], list[float]]


def _timed(case: Case, rounds: int, on_gpu: bool) -> tuple[Seconds, Seconds, dict[str, float]]:
    """Seconds by the clock and of this process's computing, and the peak memory of both on a GPU."""
    seconds: Seconds = ([], [])
    cpu_seconds: Seconds = ([], [])
    peaks = [0.0, 0.0]
    for number in [0, 1] * rounds:
        clock, cpu_clock, peaks[number] = _run_once((case.ours, case.peer)[number], on_gpu)
        seconds[number].append(clock)
        cpu_seconds[number].append(cpu_clock)
    memory = {"ours_peak_gib": peaks[0], "peer_peak_gib": peaks[1]} if on_gpu else {}
    return seconds, cpu_seconds, memory


def time_alone(side: Side, items: int, on_gpu: bool, rounds: int) -> dict[str, float]:
    """Time a side that takes no turns with a peer, after a run that warms it up.

    Returns:
        Milliseconds of one item, median and largest; on a GPU also the peak memory in GiB.
    """
    free_memory()  # what was measured before is no part of the peak
    side()
    runs = [_run_once(side, on_gpu) for _ in range(rounds)]
    milliseconds = [1e3 * seconds / items for seconds, _, _ in runs]
    figures = {"ms": statistics.median(milliseconds), "slowest_ms": max(milliseconds), "items": items, "rounds": rounds}
    return {**figures, **({"peak_gib": runs[-1][2]} if on_gpu else {})}


def _run_once(side: Side, on_gpu: bool) -> tuple[float, float, float]:
    """Seconds by the clock, seconds of this process's computing, and the peak memory of a GPU in GiB."""
    import torch

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start, cpu_start = time.perf_counter(), time.process_time()
    side()
    if on_gpu:
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return seconds, cpu_seconds, torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0


@contextmanager
def memory_kept() -> Iterator[None]:
    """Let the C library keep freed memory, as PyTorch keeps that of a GPU, where it is glibc.

    By itself it gives large blocks back, and the system clears every page of them anew at the next use: half of the
    time of a VAE on images of 256 px.
    """
    is_glibc = platform.libc_ver()[0] == "glibc"
    libc = ctypes.CDLL(None) if is_glibc else None
    if libc is not None:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        if libc is not None:
            libc.mallopt(_M_MMAP_MAX, 65536)  # glibc's own values
            libc.mallopt(_M_TRIM_THRESHOLD, 128 * 1024)
            libc.malloc_trim(0)
