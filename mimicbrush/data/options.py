"""Choices about the training data. No heavy import here: the command line reads this before anything else."""

from __future__ import annotations

from dataclasses import dataclass, field

from mimicbrush.ops.geometry import GeometryRanges
from mimicbrush.ops.photometric import JitterRanges


@dataclass
class MaskOptions:
    """The grid mask of video pairs (paper Sec. 3.3).

    Attributes:
        cells: smallest and largest N of the N x N grid.
        matched: probability that a cell with a matched SIFT point is masked.
        unmatched: the same for any other cell. Equal to `matched`, it is the random grid of the ablation.
    """

    cells: tuple[int, int] = (3, 10)
    matched: float = 0.75
    unmatched: float = 0.50


@dataclass
class DataOptions:
    """Which pairs are trained on, and what happens to them on the way.

    Attributes:
        root: a folder made by scripts/mine_pairs.py.
        video_ratio: part of the samples that come from video pairs; the rest are images (paper Sec. 4.1).
        heldout_ratio: part of the source files that is never trained on, chosen by their hash.
        min_ssim, max_ssim: a narrower band than at mining; pairs outside it are not used.
        geometry: random geometry, drawn for source and reference independently.
        jitter: random colour, likewise.
        share_flips: flip source and reference together (ours: users of the released model complain of
            mirrored results).
        mask: for video pairs; images are masked by one of their segments.
        num_workers: loader processes per rank.
    """

    root: str
    video_ratio: float = 0.7
    heldout_ratio: float = 0.1
    min_ssim: float = -1.0
    max_ssim: float = 1.0
    geometry: GeometryRanges = field(default_factory=GeometryRanges)
    jitter: JitterRanges = field(default_factory=JitterRanges)
    share_flips: bool = False
    mask: MaskOptions = field(default_factory=MaskOptions)
    num_workers: int = 2
