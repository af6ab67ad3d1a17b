"""Selection of pairs of frames from a video.

It takes one pass and bounded memory: only the candidates of the last `max_gap_s` seconds are held as pixels, and the
chosen pairs as JPEGs. The length of the clip need not be known: one pair is kept per stretch of time. When there are
too many stretches, neighbours are merged and the length of a stretch doubles.

Each admissible pair of a stretch is equally likely: the one with the lowest rank, a hash of its two frame numbers, is
kept. A frame waits until all its partners are known, and tries them by rank. After its first admissible pair, its
other pairs are neither compared nor matched.

A frame is refused as "too_small", "flat" or "blurred" (`_Search._find_fault`); a pair as "across_cut"
(`_Search._pair_oldest`), "too_similar", "too_different" or "few_matches" (`_Search._admit`). A clip without a pair
gets the commonest of these reasons, or "too_short".
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mimicbrush.mining.jpeg import encode_jpeg, shrink_to_side
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.report.audit import RefusedExample, make_thumbnail
from mimicbrush.mining.video.shots import ShotDetector
from mimicbrush.mining.video.strict_reader import VideoFrame
from mimicbrush.ops.counter_rng import mix
from mimicbrush.ops.keypoints import Features, match_features, sift_features
from mimicbrush.ops.similarity import (
    SSIM_WINDOW_PX,
    LumaStatistics,
    luma_statistics,
    sharpness,
    ssim_statistics,
    ssim_thumbnail,
)

#: Frame times are rounded to ticks of the container, so times are compared with a tolerance.
_TIME_TOLERANCE_S = 1e-3


class Candidate:
    """A frame that may become half of a pair; costly things are computed at most once, and only if needed.

    Args:
        number, time_s: number and time of the frame.
        image: (H, W, 3) uint8 RGB as it will be stored.
        options: how frames are stored and matched.
    """

    def __init__(self, number: int, time_s: float, image: np.ndarray, options: MiningOptions) -> None:
        self.number = number
        self.time_s = time_s
        self.image = image
        self._options = options
        self.thumbnail = ssim_thumbnail(image)

    @cached_property
    def sharpness(self) -> float:
        """Sharpness of the stored image, see `mimicbrush.ops.similarity.sharpness`."""
        return sharpness(self.image)

    @cached_property
    def statistics(self) -> LumaStatistics:
        """Statistics of the thumbnail for SSIM, see `mimicbrush.ops.similarity.luma_statistics`."""
        return luma_statistics(self.thumbnail)

    @cached_property
    def features(self) -> Features:
        """SIFT features of the frame, found in a reduced image, with points in stored pixels."""
        reduced = shrink_to_side(self.image, self._options.match_side_px)
        ratio = np.array(self.image.shape[1::-1]) / reduced.shape[1::-1]
        features = sift_features(reduced)
        return Features(((features.points + 0.5) * ratio - 0.5).astype(np.float32), features.descriptors)

    @cached_property
    def jpeg(self) -> bytes:
        """The JPEG bytes of the image, as they go into the shard."""
        return encode_jpeg(self.image, self._options.jpeg_quality)


@dataclass(frozen=True)
class ChosenPair:
    """A pair as it is stored: two JPEGs of one size and (K, 2) float32 points in their pixels."""

    a_frame: int
    b_frame: int
    a_time_s: float
    b_time_s: float
    a_jpeg: bytes
    b_jpeg: bytes
    a_points: np.ndarray
    b_points: np.ndarray
    ssim: float
    width_px: int
    height_px: int


@dataclass
class Stopwatch:
    """The time that each step took for one clip.

    Attributes:
        seconds: step -> seconds.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time of a block to a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] += time.perf_counter() - start

    def timed_frames(self, frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
        """Yield the frames, and add the wait for each to the step "decode"."""
        iterator = iter(frames)
        while True:
            with self.timed("decode"):
                frame = next(iterator, None)
            if frame is None:
                return
            yield frame


@dataclass(frozen=True)
class Selection:
    """The pairs of one clip, and examples of refused ones.

    Attributes:
        pairs: the chosen pairs, in order of time.
        reason: a key of `refusals.REJECTED` if there are no pairs, else "".
        detail: what was tried, as text for people.
        refused: examples of refused pairs.
        num_frames: number of frames of the clip.
        num_compared: number of pairs whose SSIM was computed.
        seconds: step -> seconds; the only value that can differ between two runs on the same clip.
    """

    pairs: list[ChosenPair]
    reason: str
    detail: str
    refused: list[RefusedExample]
    num_frames: int
    num_compared: int
    seconds: dict[str, float]


def select_pairs(
    frames: Iterable[VideoFrame], options: MiningOptions, span_s: tuple[float, float] = (0.0, math.inf)
) -> Selection:
    """Choose up to `pairs_per_clip` pairs, spread over the clip; the same frames give the same pairs.

    Args:
        frames: all of the clip, in order.
        options: which frames and pairs are admissible.
        span_s: only frames in this range (start, end) form pairs. The others are still decoded, because a fault
            anywhere makes the whole file suspect.

    Raises:
        UntrustedFileError: the reader raised it, at any frame; the clip is then not used at all.
    """
    watch = Stopwatch()
    search = _Search(options, watch)
    shots = ShotDetector(options.cut_ratio, options.min_cut)
    undecided: deque[Candidate] = deque()  # the detector has not yet decided in which shot these are
    num_frames, next_s, end_s = 0, 0.0, 0.0
    for frame in watch.timed_frames(frames):
        num_frames += 1
        end_s = frame.time_s
        with watch.timed("shots"):
            shots.add(frame.to_thumbnail())
        is_inside = span_s[0] - _TIME_TOLERANCE_S <= frame.time_s <= span_s[1] + _TIME_TOLERANCE_S
        if is_inside and frame.time_s >= next_s - _TIME_TOLERANCE_S:
            steps = int((frame.time_s + _TIME_TOLERANCE_S) / options.candidate_interval_s)
            next_s = (steps + 1) * options.candidate_interval_s
            with watch.timed("decode"):
                image = shrink_to_side(frame.to_rgb(), options.max_side_px)
            undecided.append(Candidate(frame.number, frame.time_s, image, options))
        while undecided and undecided[0].number < shots.num_decided:
            search.consider(undecided.popleft(), shots)
    for candidate in undecided:
        search.consider(candidate, shots)
    if num_frames < options.min_frames:
        detail = f"{num_frames} frames, fewer than min_frames={options.min_frames}"
        return Selection([], "too_short", detail, [], num_frames, len(search.ssims), dict(watch.seconds))
    return search.result(num_frames, end_s)


class _Search:
    """The pairs chosen so far: at most one per stretch of time, in at most 2 `pairs_per_clip` stretches."""

    def __init__(self, options: MiningOptions, watch: Stopwatch) -> None:
        self.options = options
        self.watch = watch
        self.stretch_s = options.candidate_interval_s
        self.window: deque[tuple[int, Candidate]] = deque()  # (shot, candidate) within reach
        self.stretches: dict[int, tuple[int, ChosenPair]] = {}  # number of the stretch -> (rank, pair)
        self.refusals: Counter[str] = Counter()
        self.examples: dict[str, tuple[int, RefusedExample]] = {}  # reason -> the one of lowest rank
        self.ssims: list[float] = []

    def consider(self, candidate: Candidate, shots: ShotDetector) -> None:
        """Add a candidate, and decide about the earlier ones that are now out of reach."""
        shot = shots.shot_of(candidate.number)
        while self.window and candidate.time_s - self.window[0][1].time_s > self.options.max_gap_s + _TIME_TOLERANCE_S:
            self._pair_oldest()
        fault = self._find_fault(candidate, [each for each_shot, each in self.window if each_shot == shot])
        if fault:
            self._refuse(fault, candidate)
            return
        self.window.append((shot, candidate))

    def _pair_oldest(self) -> None:
        """Take the oldest candidate out of the window, and try it with each later one there, lowest rank first."""
        shot, a = self.window.popleft()
        later = [
            each for each in self.window if each[1].time_s - a.time_s >= self.options.min_gap_s - _TIME_TOLERANCE_S
        ]
        for b_shot, b in sorted(later, key=lambda each: mix(a.number, each[1].number)):
            if b_shot != shot:
                self._refuse("across_cut", a, b)
            else:
                self._offer(a, b)

    def _find_fault(self, candidate: Candidate, neighbours: list[Candidate]) -> str:
        """Why a frame cannot be half of any pair; "" if it can."""
        if min(candidate.thumbnail.shape) < SSIM_WINDOW_PX:
            return "too_small"
        if candidate.thumbnail.std() < self.options.min_contrast:
            return "flat"
        with self.watch.timed("sharpness"):
            median = float(np.median([each.sharpness for each in neighbours])) if neighbours else 0.0
            least = max(self.options.min_sharpness, self.options.min_sharpness_ratio * median)
            return "blurred" if candidate.sharpness < least else ""

    def _offer(self, a: Candidate, b: Candidate) -> None:
        """Keep this pair if it is admissible and its rank is lower than that of the pair kept for its stretch."""
        rank = mix(a.number, b.number)
        stretch = int((a.time_s + _TIME_TOLERANCE_S) / self.stretch_s)
        if stretch in self.stretches and self.stretches[stretch][0] <= rank:
            return
        pair = self._admit(a, b)
        if pair is None:
            return
        self.stretches[stretch] = rank, pair
        while len(self.stretches) > 2 * self.options.pairs_per_clip:
            self._merge_stretches()

    def _admit(self, a: Candidate, b: Candidate) -> ChosenPair | None:
        """Compare and match two frames; None, with the refusal counted, if they are not admissible."""
        with self.watch.timed("ssim"):
            ssim = ssim_statistics(a.statistics, b.statistics)
        self.ssims.append(ssim)
        if not self.options.min_ssim <= ssim <= self.options.max_ssim:
            self._refuse("too_similar" if ssim > self.options.max_ssim else "too_different", a, b, ssim)
            return None
        with self.watch.timed("sift"):
            a_points, b_points = match_features(a.features, b.features)
        if len(a_points) < self.options.min_matches:
            self._refuse("few_matches", a, b, ssim, len(a_points))
            return None
        height, width = a.image.shape[:2]
        with self.watch.timed("jpeg"):
            a_jpeg, b_jpeg = a.jpeg, b.jpeg
        return ChosenPair(
            a_frame=a.number,
            b_frame=b.number,
            a_time_s=a.time_s,
            b_time_s=b.time_s,
            a_jpeg=a_jpeg,
            b_jpeg=b_jpeg,
            a_points=a_points,
            b_points=b_points,
            ssim=ssim,
            width_px=width,
            height_px=height,
        )

    def _refuse(
        self, reason: str, a: Candidate, b: Candidate | None = None, ssim: float = float("nan"), num_matches: int = -1
    ) -> None:
        """Count a refusal, and keep one example of each reason: the one whose hash is lowest."""
        self.refusals[reason] += 1
        b_frame = -1 if b is None else b.number
        rank = mix(a.number, b_frame)
        if reason in self.examples and self.examples[reason][0] <= rank:
            return
        image = make_thumbnail(a.image) if b is None else np.hstack([make_thumbnail(a.image), make_thumbnail(b.image)])
        self.examples[reason] = rank, RefusedExample(reason, a.number, b_frame, ssim, num_matches, image)

    def _merge_stretches(self) -> None:
        """Double the length of a stretch; of two merged ones, the pair with the lower rank is kept."""
        self.stretch_s *= 2
        merged: dict[int, tuple[int, ChosenPair]] = {}
        for stretch, entry in sorted(self.stretches.items(), key=lambda item: item[1][0]):
            merged.setdefault(stretch // 2, entry)
        self.stretches = merged

    def result(self, num_frames: int, end_s: float) -> Selection:
        """Return the chosen pairs, at most `pairs_per_clip` and spread evenly, or why there are none."""
        while self.window:
            self._pair_oldest()
        pairs = [self.stretches[stretch][1] for stretch in sorted(self.stretches)]
        most = self.options.pairs_per_clip
        if len(pairs) > most:
            pairs = [pairs[i * len(pairs) // most] for i in range(most)]
        reason, detail = ("", self._describe_tries()) if pairs else self._explain_none(num_frames, end_s)
        by_count = sorted(self.examples.values(), key=lambda entry: (-self.refusals[entry[1].reason], entry[1].reason))
        refused = [example for _, example in by_count[: self.options.refused_per_clip]]
        return Selection(pairs, reason, detail, refused, num_frames, len(self.ssims), dict(self.watch.seconds))

    def _explain_none(self, num_frames: int, end_s: float) -> tuple[str, str]:
        if not self.refusals:
            gaps = f"{self.options.min_gap_s:g}..{self.options.max_gap_s:g} s"
            return "too_short", f"{num_frames} frames in {end_s:.2f} s: none are {gaps} apart"
        return max(sorted(self.refusals), key=lambda word: self.refusals[word]), self._describe_tries()

    def _describe_tries(self) -> str:
        if not self.refusals:
            return ""
        counts = ", ".join(f"{word} {count}" for word, count in sorted(self.refusals.items()))
        span = f"; SSIM {min(self.ssims):.3f}..{max(self.ssims):.3f}" if self.ssims else ""
        return f"refused: {counts}{span}"
