"""The second and further references of a sample: other frames of the same shot (*ours*: the paper has one reference).

The manifest does not store shots. But both frames of a pair are in the same shot. So if the frame ranges of two pairs
of a video overlap, directly or through other pairs, these pairs are in the same shot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

from mimicbrush.data.schema import STILL_SSIM
from mimicbrush.data.transforms import ImageView, SampleTransform, Side
from mimicbrush.ops.similarity import SSIM_WINDOW_PX, ssim_luma, ssim_thumbnail

if TYPE_CHECKING:
    from mimicbrush.data.pair_sources import PairSource

#: Largest number of frames read for a sample: in a still shot, all of them are too similar to the source.
_MAX_FRAMES = 8
#: Number of bits of a frame number.
_FRAME_BITS = 32
_SIDES: tuple[Side, Side] = ("a", "b")


class ShotFrames:
    """Finds the frames of the same shot, for all pairs of a table.

    Args:
        keys: (N,) uint64, a number that identifies the video of each pair.
        a_frames, b_frames: (N,) numbers of the two frames of each pair in their video. They are negative for a
            photograph, which is a shot by itself.
    """

    def __init__(self, keys: np.ndarray, a_frames: np.ndarray, b_frames: np.ndarray) -> None:
        first, last = (np.clip(frames, -1, 2**31 - 1).astype(np.int64) for frames in (a_frames, b_frames))
        # 32 bits, as in `PairTable`, because each worker process has a copy.
        self._frames = np.stack([first, last]).astype(np.int32)
        order = np.lexsort((first, keys))
        keys, first, last = keys[order], first[order], last[order]
        # Each video gets its own range of numbers, so that a running maximum does not continue into the next video.
        start = np.cumsum(np.concatenate([[0], keys[1:] != keys[:-1]])) << _FRAME_BITS
        reach = np.maximum.accumulate(start + last)
        begins = np.concatenate([[True], start[1:] + first[1:] > reach[:-1]]) | (first < 0)
        self._rows = order.astype(np.int32)
        self._starts = np.append(np.flatnonzero(begins), len(order)).astype(np.int32)
        self._shots = np.empty(len(order), np.int32)
        self._shots[order] = np.cumsum(begins) - 1

    def find(self, item: int) -> dict[int, tuple[int, Side]]:
        """Find the frames in the shot of a pair: frame number -> (a pair that has this frame, its side), in order."""
        shot = self._shots[item]
        rows = self._rows[self._starts[shot] : self._starts[shot + 1]]
        frames, places = np.unique(self._frames[:, rows], return_index=True)
        found = zip(frames.tolist(), places.tolist(), strict=True)
        places_of = {frame: divmod(n, len(rows)) for frame, n in found if frame >= 0}
        return {frame: (int(rows[n]), _SIDES[side]) for frame, (side, n) in places_of.items()}

    def number_of(self, item: int, side: Side) -> int:
        """Return the number of a pair's frame; -1 for a photograph."""
        return int(self._frames[_SIDES.index(side), item])


class OtherReferences:
    """Sampler of the second and further references of a sample.

    Each is a frame of the same shot that is neither the source nor another reference of the sample, and that is not
    more similar to the source than the frames of a pair may be. If the shot has no such frame, or for a photograph, the
    first reference is used again, with another geometry and other colours.

    Args:
        pair_sources: where the pairs come from.
        transform: augments these references like the first one.
        count: number of references after the first.
    """

    def __init__(self, pair_sources: Sequence[PairSource], transform: SampleTransform, count: int) -> None:
        self.transform, self.count = transform, count
        self.tables = [source.pairs for source in pair_sources]
        columns = ("source_key", "a_frame", "b_frame")
        self.shots = [ShotFrames(*map(pairs.column, columns)) for pairs in self.tables] if count else []
        self.max_ssim = min(STILL_SSIM, transform.options.max_ssim)

    def sample(
        self, component: int, item: int, reference: ImageView, source: ImageView | None, rng: np.random.Generator
    ) -> tuple[ImageView, ...]:
        """Sample the second and further references of a sample.

        Args:
            component, item: index of the pair source, and index in it of the pair that the first reference comes from.
            reference: the first reference.
            source: the source, if it comes from the same pair; None if it comes from another video.
            rng: random numbers.

        Raises:
            DataError: a frame cannot be read.
        """
        if not self.count:
            return ()
        pairs, shots = self.tables[component], self.shots[component]
        flip = reference.is_mirrored if self.transform.options.share_flips else None
        frames = shots.find(item)
        for view in (reference, source):
            if view is not None:
                frames.pop(shots.number_of(item, view.side), None)
        places, found = list(frames.values()), list[ImageView]()
        for n in rng.permutation(len(places))[:_MAX_FRAMES]:
            if len(found) == self.count:
                break
            row, side = places[n]
            view = self.transform.read_frame(pairs[row], side, flip, rng)
            if source is None or compare_frames(view.pixels, source.pixels) <= self.max_ssim:
                found.append(view)
        while len(found) < self.count:
            found.append(self.transform.read_frame(pairs[item], reference.side, flip, rng))
        return tuple(found)


def compare_frames(one: np.ndarray, other: np.ndarray) -> float:
    """Compute the SSIM of two frames of one video, as close to the miner's value as their decoded sizes allow.

    Args:
        one, other: (H, W, 3) uint8, of any sizes.

    Returns:
        SSIM in -1..1; -1 if a frame is too small for the SSIM window.
    """
    small, large = sorted(map(ssim_thumbnail, (one, other)), key=lambda each: each.size)
    if min(small.shape) < SSIM_WINDOW_PX:
        return -1.0
    return ssim_luma(small, cv2.resize(large, small.shape[::-1], interpolation=cv2.INTER_AREA))
