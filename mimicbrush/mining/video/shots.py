"""Detection of cuts between shots. `pair_selection` refuses pairs across a cut."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector

#: Frames are numbered, not timed: the detector compares neighbours and asks for no rate.
_ANY_RATE = 25.0


class ShotDetector:
    """Detector of cuts that reads a clip once, by PySceneDetect's adaptive detector.

    It compares each change with those of its neighbours, so that a camera that moves fast is no cut. So it
    decides about a frame only two frames later (`num_decided`).

    Args:
        cut_ratio: how many times as much as its neighbours a change must be.
        min_cut: and how much at least, 0..255.
    """

    def __init__(self, cut_ratio: float, min_cut: float) -> None:
        self._detector = AdaptiveDetector(adaptive_threshold=cut_ratio, min_content_val=min_cut, min_scene_len=1)
        self._num_frames = 0
        self._cuts: list[int] = []

    def add(self, thumbnail: np.ndarray) -> None:
        """Take the next frame: (h, w, 3) uint8 RGB, of one size throughout."""
        code = FrameTimecode(self._num_frames, _ANY_RATE)
        self._cuts += [cut.frame_num for cut in self._detector.process_frame(code, thumbnail[..., ::-1])]
        self._num_frames += 1

    @property
    def num_decided(self) -> int:
        """How many frames, from the first, have a shot that no later frame can change."""
        return max(0, self._num_frames - self._detector.event_buffer_length)

    def shot_of(self, number: int) -> int:
        """Return the number of the shot that a frame lies in, from 0."""
        return bisect_right(self._cuts, number)
