"""Cost of choosing pairs: candidates tried by rank or in order, and SIFT on smaller images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
from measurements.harness import Case
from measurements.samples import REAL_CLIPS, clips_in, one_core

if TYPE_CHECKING:
    from mimicbrush.mining.options import MiningOptions
    from mimicbrush.mining.pair_selection import ChosenPair, Selection
    from mimicbrush.mining.video.strict_reader import VideoFrame

#: Clips of fixed cameras, in which little can be matched, and of smaller frames; left out where they are absent.
OTHER_CLIPS = [REAL_CLIPS[0].with_name(name) for name in ("bottle.mp4", "car.mp4", "nasa.mp4", "pancake.mkv")]
#: Long sides at which SIFT looks, besides the default.
SIDES_PX = (448, 320)
#: Of the pairs of the default, at a smaller size.
LEAST_YIELD = 0.95
#: Of the masks that are compared.
MASK_SIDE_PX = 512

Select = Callable[["Iterable[VideoFrame]", "MiningOptions"], "Selection"]
#: (number of the clip, first frame, second frame) -> pair.
Pairs = dict[tuple[int, int, int], "ChosenPair"]


def mining_choice() -> Iterator[Case]:
    """all of mining but the writing: pairs tried by rank against as they come; SIFT at smaller sizes, what is kept"""
    with tempfile.TemporaryDirectory() as name, one_core():
        clips = [*sorted(clips_in(Path(name) / "clips").iterdir()), *(clip for clip in OTHER_CLIPS if clip.is_file())]
        yield from choice_cases(clips)


def choice_cases(clips: Sequence[Path], sides_px: Sequence[int] = SIDES_PX) -> Iterator[Case]:
    """Ours by the defaults and at smaller sizes, each against `select_as_they_come` by the defaults."""
    from mimicbrush.mining.options import MiningOptions
    from mimicbrush.mining.pair_selection import select_pairs

    default = MiningOptions()
    peer = partial(choose, clips, default, select_as_they_come)
    common = {"rounds": 1, "items": len(clips), "counts": {}, "cpu_time": True}
    yield Case("by rank", partial(choose, clips, default, select_pairs), peer, 0.0, **common)
    expected = dict(_by_place(clips, default))
    for side_px in sides_px:
        options = MiningOptions(match_side_px=side_px)
        found = dict(_by_place(clips, options))
        kept = (lambda found=found: np.float64(len(found) / len(expected))), (lambda: np.float64(1))
        yield Case(
            f"match_side_px={side_px}",
            partial(choose, clips, options, select_pairs),
            peer,
            1 - LEAST_YIELD,
            equality=kept,
            figures=partial(compare_pairs, expected, found),
            **common,
        )


def choose(clips: Sequence[Path], options: MiningOptions, select: Select) -> list[bytes | np.ndarray]:
    """JPEGs and matches of all pairs."""
    pairs = (pair for clip in clips for pair in _select(clip, options, select))
    return [part for pair in pairs for part in (pair.a_jpeg, pair.b_jpeg, pair.a_points, pair.b_points)]


def _select(clip: Path, options: MiningOptions, select: Select) -> list[ChosenPair]:
    from mimicbrush.mining.video.strict_reader import PyAVReader

    return select(PyAVReader().frames(clip), options).pairs


def _by_place(clips: Sequence[Path], options: MiningOptions) -> Iterator[tuple[tuple[int, int, int], ChosenPair]]:
    from mimicbrush.mining.pair_selection import select_pairs

    for number, clip in enumerate(clips):
        for pair in _select(clip, options, select_pairs):
            yield (number, pair.a_frame, pair.b_frame), pair


def compare_pairs(expected: Pairs, found: Pairs) -> dict[str, float]:
    """What is kept of the expected pairs, and how far the grid masks agree under the same random numbers."""
    from mimicbrush.ops.counter_rng import generator
    from mimicbrush.ops.masks import sift_grid_mask

    def mask(pair: ChosenPair, number: int) -> np.ndarray:
        scale = MASK_SIDE_PX / np.array([pair.width_px, pair.height_px])
        return sift_grid_mask((pair.a_points + 0.5) * scale - 0.5, MASK_SIDE_PX, generator(number))

    same = sorted(found.keys() & expected.keys())
    both = [(mask(expected[place], number), mask(found[place], number)) for number, place in enumerate(same)]
    return {
        "pairs_default": len(expected),
        "pairs": len(found),
        "pairs_of_same_frames": len(same),
        "matches_kept": float(np.mean([len(found[place].a_points) / len(expected[place].a_points) for place in same])),
        "mask_iou": float(np.mean([(one & other).sum() / (one | other).sum() for one, other in both])),
        "mask_equal_area": float(np.mean([one == other for one, other in both])),
    }


def select_as_they_come(frames: Iterable[VideoFrame], options: MiningOptions) -> Selection:
    """The loop that people write, with the same pairs: each is compared and matched once both frames are there.

    A pair is passed over only if a better one is already taken. SSIM is scikit-image's function, and the second best
    of all rows and columns of distances is found.
    """
    from mimicbrush.mining import pair_selection
    from mimicbrush.mining.pair_selection import Candidate
    from mimicbrush.mining.video.shots import ShotDetector
    from mimicbrush.ops import keypoints
    from mimicbrush.ops.similarity import ssim_luma

    class AsTheyCome(pair_selection._Search):
        def consider(self, candidate: Candidate, shots: ShotDetector) -> None:
            super().consider(candidate, shots)
            *earlier, (shot, latest) = self.window if self.window else [(-1, None)]
            if latest is candidate:
                least_s = self.options.min_gap_s - pair_selection._TIME_TOLERANCE_S
                for a_shot, a in earlier:
                    if a_shot == shot and candidate.time_s - a.time_s >= least_s:
                        self._offer(a, candidate)

        def _pair_oldest(self) -> None:
            self.window.popleft()

    functions = {"_Search": AsTheyCome, "luma_statistics": lambda thumbnail: thumbnail, "ssim_statistics": ssim_luma}
    with (
        mock.patch.multiple(pair_selection, **functions),
        mock.patch.object(keypoints, "_find_mutual_matches", find_by_partition),
    ):
        return pair_selection.select_pairs(frames, options)


def find_by_partition(a: np.ndarray, b: np.ndarray, max_ratio: float) -> np.ndarray:
    """(M, 2) int: rows of mutual best matches that pass the ratio test both ways, most distinctive first."""
    if min(len(a), len(b)) < 2:
        return np.zeros((0, 2), np.int64)
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * (a @ b.T)
    best_b, best_a = squared.argmin(1), squared.argmin(0)
    two_b = np.partition(squared, 1, axis=1)[:, :2]
    two_a = np.partition(squared, 1, axis=0)[:2].T[best_b]
    second = np.minimum(two_b[:, 1], two_a[:, 1])
    keep = np.flatnonzero((best_a[best_b] == np.arange(len(a))) & (two_b[:, 0] < max_ratio**2 * second))
    keep = keep[np.argsort(two_b[keep, 0] / second[keep], kind="stable")]
    return np.stack([keep, best_b[keep]], axis=1)
