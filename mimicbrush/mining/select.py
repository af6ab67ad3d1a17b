"""Which two frames of a video make a pair.

One pass, bounded memory: only the candidates of the last `max_gap_s` seconds are held as pixels, and chosen
pairs as JPEGs. The length of the clip need not be known: chosen pairs are kept one per stretch of time, and
when there are too many stretches, neighbours merge and the stretch doubles.

Among the admissible pairs of a stretch each is equally likely, by a hash of the two frame numbers. The hash
is known before anything is computed, so a pair that could not win is neither compared nor matched.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.reader import VideoFrame
from mimicbrush.ops.keypoints import Features, match_features, sift_features
from mimicbrush.ops.randomness import mix
from mimicbrush.ops.similarity import ssim_luma, ssim_thumbnail

_SSIM_WINDOW_PX = 11
#: Frame times are rounded to ticks of the container, so the grid of candidates needs some play.
_TIME_PLAY_S = 1e-3


class Candidate:
    """A frame that may become half of a pair; what is costly is computed at most once, and only if needed."""

    def __init__(self, number: int, time_s: float, image: np.ndarray, jpeg_quality: int) -> None:
        self.number = number
        self.time_s = time_s
        self.image = image  # (H, W, 3) uint8 RGB as it will be stored
        self._jpeg_quality = jpeg_quality
        self.thumbnail = ssim_thumbnail(image)

    @cached_property
    def features(self) -> Features:
        """SIFT features in stored pixels."""
        return sift_features(self.image)

    @cached_property
    def jpeg(self) -> bytes:
        """The picture as it goes into the shard."""
        return encode_jpeg(self.image, self._jpeg_quality)


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


@dataclass(frozen=True)
class Selection:
    """What a clip gave.

    Attributes:
        pairs: in order of time.
        reason: a key of `reasons.REJECTED` where there are no pairs, else "".
        detail: what was tried, for a person to read.
    """

    pairs: list[ChosenPair]
    reason: str
    detail: str


def select_pairs(frames: Iterable[VideoFrame], options: MiningOptions) -> Selection:
    """Choose up to `pairs_per_clip` pairs, spread over the clip; the same frames give the same pairs.

    Raises:
        UntrustedFileError: what the reader raises, at any time; nothing of the clip is then used.
    """
    search = _Search(options)
    window: deque[Candidate] = deque()
    num_frames, next_s, end_s = 0, 0.0, 0.0
    for frame in frames:
        num_frames += 1
        end_s = frame.time_s
        if frame.time_s < next_s - _TIME_PLAY_S:
            continue
        steps = int((frame.time_s + _TIME_PLAY_S) / options.candidate_interval_s)
        next_s = (steps + 1) * options.candidate_interval_s
        image = stored_size(frame.to_rgb(), options.max_side_px)
        candidate = Candidate(frame.number, frame.time_s, image, options.jpeg_quality)
        if min(candidate.thumbnail.shape) < _SSIM_WINDOW_PX:
            search.tried["too_small"] += 1
            continue  # to the end all the same: the file must prove that it can be trusted
        if candidate.thumbnail.std() < options.min_contrast:
            search.tried["flat"] += 1
            continue
        while window and candidate.time_s - window[0].time_s > options.max_gap_s + _TIME_PLAY_S:
            window.popleft()
        for earlier in window:
            if candidate.time_s - earlier.time_s >= options.min_gap_s - _TIME_PLAY_S:
                search.offer(earlier, candidate)
        window.append(candidate)
    if num_frames < options.min_frames:
        return Selection([], "too_short", f"{num_frames} frames, fewer than min_frames={options.min_frames}")
    return search.result(num_frames, end_s)


class _Search:
    """The pairs chosen so far: at most one per stretch of time, of at most twice as many as are wanted."""

    def __init__(self, options: MiningOptions) -> None:
        self.options = options
        self.stretch_s = options.candidate_interval_s
        self.slots: dict[int, tuple[int, ChosenPair]] = {}
        self.tried: Counter[str] = Counter()
        self.ssims: list[float] = []

    def offer(self, a: Candidate, b: Candidate) -> None:
        """Take this pair if it is admissible and its rank beats that of its stretch."""
        rank = mix(a.number, b.number)
        slot = int((a.time_s + _TIME_PLAY_S) / self.stretch_s)
        if slot in self.slots and self.slots[slot][0] <= rank:
            return
        pair = self._admit(a, b)
        if pair is None:
            return
        self.slots[slot] = rank, pair
        while len(self.slots) > 2 * self.options.pairs_per_clip:
            self._merge()

    def _admit(self, a: Candidate, b: Candidate) -> ChosenPair | None:
        ssim = ssim_luma(a.thumbnail, b.thumbnail)
        self.ssims.append(ssim)
        if ssim > self.options.max_ssim:
            self.tried["too_similar"] += 1
            return None
        if ssim < self.options.min_ssim:
            self.tried["too_different"] += 1
            return None
        a_points, b_points = match_features(a.features, b.features)
        if len(a_points) < self.options.min_matches:
            self.tried["few_matches"] += 1
            return None
        height, width = a.image.shape[:2]
        return ChosenPair(
            a_frame=a.number,
            b_frame=b.number,
            a_time_s=a.time_s,
            b_time_s=b.time_s,
            a_jpeg=a.jpeg,
            b_jpeg=b.jpeg,
            a_points=a_points,
            b_points=b_points,
            ssim=ssim,
            width_px=width,
            height_px=height,
        )

    def _merge(self) -> None:
        self.stretch_s *= 2
        merged: dict[int, tuple[int, ChosenPair]] = {}
        for slot, entry in sorted(self.slots.items(), key=lambda item: item[1][0]):
            merged.setdefault(slot // 2, entry)
        self.slots = merged

    def result(self, num_frames: int, end_s: float) -> Selection:
        """The chosen pairs, thinned evenly to the number wanted, or why there are none."""
        pairs = [self.slots[slot][1] for slot in sorted(self.slots)]
        wanted = self.options.pairs_per_clip
        if len(pairs) > wanted:
            pairs = [pairs[i * len(pairs) // wanted] for i in range(wanted)]
        if pairs:
            return Selection(pairs, "", "")
        if not self.tried:
            gaps = f"{self.options.min_gap_s:g}..{self.options.max_gap_s:g} s"
            return Selection([], "too_short", f"{num_frames} frames in {end_s:.2f} s: none are {gaps} apart")
        reason = max(sorted(self.tried), key=lambda word: self.tried[word])
        counts = ", ".join(f"{word} {count}" for word, count in sorted(self.tried.items()))
        span = f"; SSIM {min(self.ssims):.3f}..{max(self.ssims):.3f}" if self.ssims else ""
        return Selection([], reason, f"tried: {counts}{span}")


def stored_size(image: np.ndarray, max_side_px: int) -> np.ndarray:
    """The picture with its long side at most `max_side_px`: reduced by INTER_AREA, or itself."""
    height, width = image.shape[:2]
    scale = max_side_px / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """(H, W, 3) uint8 RGB to the bytes of a JPEG file."""
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"OpenCV could not encode a picture of shape {image.shape}")
    return bytes(data)
