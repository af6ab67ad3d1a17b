"""Ours and a peer, interleaved in one process: equal results asserted, medians compared, named counts beside them.

A measurement is a function without arguments that returns or yields cases. Its docstring is its line of the help. It
may build what it needs before its first case; a generator can clear that away again after its last.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mimicbrush.errors import MimicBrushError

#: Does the work once, and returns what must be equal: an array, a tensor, bytes or a text, or a sequence of these.
Side = Callable[[], Any]
#: Runs a side once, and says how much of something that took.
Count = Callable[[Side], float]
Measurement = Callable[[], Iterable["Case"]]


def count_flops(work: Side) -> int:
    """FLOP of matrix products, convolutions and attention; on the meta device nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


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


def compare(case: Case, rounds: int) -> dict[str, object]:
    """Run both sides in turn and compare medians.

    Returns:
        Name -> figure; ratios are peer over ours.

    Raises:
        MimicBrushError: the results differ by more than the tolerance: then no speed is worth reporting.
    """
    results = case.ours(), case.peer()  # also the warm-up
    on_gpu = bool(getattr(results[0], "is_cuda", False))
    if case.equality:
        results = case.equality[0](), case.equality[1]()
    difference = largest_difference(*results)
    if not difference <= case.tolerance:
        raise MimicBrushError(
            f"{case.case}: ours and the peer differ by {difference:.3g}, allowed are {case.tolerance:.3g}"
        )
    counted = _counted(case)
    seconds, memory = _timed(case, rounds, on_gpu)
    own, others = (statistics.median(times) / case.items for times in seconds)
    return {
        "case": case.case,
        "time_ratio": others / own,
        **{f"{name}_ratio": peer / own for name, (own, peer) in counted.items() if own},
        **_full_size_ratio(case, counted),
        "max_abs_diff": difference,
        "ours_ms": own * 1e3,
        "peer_ms": others * 1e3,
        **{f"{side}_{name}": count for name, both in counted.items() for side, count in _named(both)},
        "items": case.items,
        "rounds": rounds,
        **memory,
        **case.figures(),
    }


def largest_difference(ours: Any, peer: Any) -> float:
    """The largest absolute difference of two results, infinite where they are not of one form."""
    if isinstance(ours, bytes | str):
        return 0.0 if ours == peer else float("inf")
    if isinstance(ours, Sequence):
        if not isinstance(peer, Sequence) or len(ours) != len(peer):
            return float("inf")
        return max(map(largest_difference, ours, peer), default=0.0)
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


def _timed(case: Case, rounds: int, on_gpu: bool) -> tuple[tuple[list[float], list[float]], dict[str, float]]:
    """Seconds of every run of ours and of the peer, and the peak memory of both on a GPU."""
    import torch

    seconds: tuple[list[float], list[float]] = ([], [])
    peaks = [0, 0]
    for _ in range(rounds):
        for number, side in enumerate((case.ours, case.peer)):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            side()
            if on_gpu:
                torch.cuda.synchronize()
                peaks[number] = torch.cuda.max_memory_allocated()
            seconds[number].append(time.perf_counter() - start)
    memory = {"ours_peak_gib": peaks[0] / 2**30, "peer_peak_gib": peaks[1] / 2**30} if on_gpu else {}
    return seconds, memory
