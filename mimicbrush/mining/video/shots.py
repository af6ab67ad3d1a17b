"""Detection of cuts between shots. `pair_selection` refuses pairs across a cut."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector

#: The detector needs a frame rate for its time codes, but only frame numbers are used here.
_ANY_RATE = 25.0


class ShotDetector:
    """Detector of cuts that reads a clip once, with the adaptive detector of PySceneDetect.

    It compares the change at each frame with the changes at the neighbouring frames, so that a fast camera motion is
    not detected as a cut. So it decides about a frame only two frames later (`num_decided`).

    Args:
        cut_ratio: smallest ratio of the change at a cut to the changes at its neighbours.
        min_cut: smallest change at a cut, 0..255.
    """

    def __init__(self, cut_ratio: float, min_cut: float) -> None:
        self._detector = AdaptiveDetector(adaptive_threshold=cut_ratio, min_content_val=min_cut, min_scene_len=1)
        self._num_frames = 0
        self._cuts: list[int] = []

    def add(self, thumbnail: np.ndarray) -> None:
        """Add the next frame: (h, w, 3) uint8 RGB, the same size for all frames."""
        code = FrameTimecode(self._num_frames, _ANY_RATE)
        self._cuts += [cut.frame_num for cut in self._detector.process_frame(code, thumbnail[..., ::-1])]
        self._num_frames += 1

    @property
    def num_decided(self) -> int:
        """Number of frames, from the first, whose shot is decided: later frames cannot change it."""
        return max(0, self._num_frames - self._detector.event_buffer_length)

    def shot_of(self, number: int) -> int:
        """Return the number of the shot of a frame, from 0."""
        return bisect_right(self._cuts, number)
