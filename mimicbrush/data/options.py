"""Options of the training data. No heavy import here: the command line reads this before anything else."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from mimicbrush.errors import InputError
from mimicbrush.ops.color_jitter import JitterRanges
from mimicbrush.ops.geometry import GeometryRanges

#: Ways to mask the two frames of a video, and a photograph.
VIDEO_STRATEGIES = ("sift_grid", "random_grid", "box", "orb_grid")
IMAGE_STRATEGIES = ("segment", "random_grid", "box", "orb_grid")
KINDS = ("video", "image")
_NAMES_A_FUNCTION = re.compile(r"[\w.]+:\w+$")


@dataclass
class SegmentOptions:
    """Options for masks from the segments of a photograph. The paper says "a SAM segment"; the ranges are *ours*.

    Attributes:
        segment_ratio: smallest and largest area of a segment over that of its image; others are not used.
        count: smallest and largest number of segments that are united.
        dilation: smallest and largest radius by which the mask grows, over the side of the canvas.
        mask_ratio: smallest and largest area of the finished mask over that of the canvas; where it lies outside,
            other segments and another geometry are sampled.
    """

    segment_ratio: tuple[float, float] = (0.0, 1.0)
    count: tuple[int, int] = (1, 1)
    dilation: tuple[float, float] = (0.0, 0.0)
    mask_ratio: tuple[float, float] = (0.01, 0.9)

    def __post_init__(self) -> None:
        for name in ("segment_ratio", "dilation", "mask_ratio"):
            _check_range(f"data.mask.segments.{name}", getattr(self, name), 0, 1)
        _check_range("data.mask.segments.count", self.count, 1, math.inf)


@dataclass
class MaskOptions:
    """Options of the masks: what is to be repainted (paper Sec. 3.3).

    Attributes:
        strategy: of video pairs: "sift_grid" (paper), "random_grid", "box", or "orb_grid" (released data utilities); or
            a function of your own, "module:function" (docs/extending.md).
        image_strategy: of photographs: "segment" (paper), "random_grid", "box" or "orb_grid"; or a function.
        cells: smallest and largest N of the N x N grid, in all three grids.
        matched: sift_grid: probability that a cell with a matched SIFT point is masked.
        unmatched: sift_grid: the same for any other cell; also where no segment of a photograph will do.
        probability: random_grid: of every cell.
        box_sides: box: smallest and largest side over that of the canvas (released data utilities).
        box_area: box: its area over that of the canvas; None leaves it to the sides.
        num_fullest: orb_grid: how many cells count as the fullest.
        fullest: orb_grid: probability that one of these is masked.
        others: orb_grid: the same for any other cell.
        segments: segment.
    """

    strategy: str = "sift_grid"
    image_strategy: str = "segment"
    cells: tuple[int, int] = (3, 10)
    matched: float = 0.75
    unmatched: float = 0.50
    probability: float = 0.50
    box_sides: tuple[float, float] = (0.4, 0.9)
    box_area: float | None = None
    num_fullest: int = 5
    fullest: float = 0.7
    others: float = 0.3
    segments: SegmentOptions = field(default_factory=SegmentOptions)

    def __post_init__(self) -> None:
        for name, strategies, why in (
            ("strategy", VIDEO_STRATEGIES, "a video has no segments"),
            ("image_strategy", IMAGE_STRATEGIES, "a photograph has no stored matches"),
        ):
            value = getattr(self, name)
            if value not in strategies and not _NAMES_A_FUNCTION.match(value):
                reason = f" ({why})" if value in VIDEO_STRATEGIES + IMAGE_STRATEGIES else ""
                names = ", ".join(strategies)
                raise InputError(f"data.mask.{name} must be one of {names}, or module:function; got {value!r}{reason}")
        for name in ("matched", "unmatched", "probability", "fullest", "others"):
            _check_range(f"data.mask.{name}", [getattr(self, name)], 0, 1)
        # One cell could only be all or nothing.
        _check_range("data.mask.cells", self.cells, 2, math.inf)
        _check_range("data.mask.box_sides", self.box_sides, 0, 1)
        low, high = self.box_sides
        if self.box_area is not None and not low * low <= self.box_area <= high * high:
            raise InputError(
                f"data.mask.box_area={self.box_area} cannot be met with data.mask.box_sides={list(self.box_sides)}; "
                f"it must be in {low * low:.3g}..{high * high:.3g}"
            )


@dataclass
class PairSourceOptions:
    """A mined folder, one of several to train on, see `DataOptions.sources`.

    Attributes:
        root: a folder made by scripts/mine_pairs.py.
        kind: "video" or "image": which of its pairs to take.
        weight: share of the samples, relative to the others'.
        input_root: as in `DataOptions`.
    """

    root: str = ""
    kind: str = "video"
    weight: float = 1.0
    input_root: str = ""


@dataclass
class DataOptions:
    """Options of the training data: which pairs, and what happens to them on the way.

    Attributes:
        root: a folder made by scripts/mine_pairs.py: the simple form, for one folder.
        input_root: where the mined photographs lie, if they have moved since; "" is where they were mined.
        video_ratio: part of the samples that come from video pairs; the rest are images (paper Sec. 4.1).
        sources: name -> options: the general form, for any number of them, in place of `root` and `video_ratio`.
        heldout_ratio: part of the source files that is never trained on, chosen by their hash.
        min_ssim, max_ssim: a narrower band than at mining; pairs outside it are not used.
        geometry: random geometry, sampled for source and reference independently.
        jitter: random colour, likewise.
        share_flips: flip source and reference together (ours: users of the released model complain of
            mirrored results).
        mask: what is masked.
        augment_on: "cpu" renders in the loader's processes; "device" lets them decode only, and jitters and warps
            whole batches where the model is. Same parameters, same samples up to rounding.
        max_bad_ratio: unreadable pairs are replaced, counted and named; above this part of the samples the run stops
            (a few are always allowed, see `training.guards.BadSamples`).
        num_workers: loader processes per rank.
        loader_timeout_s: so long a loader process may take for its next batch before the run saves and ends; where
            `num_workers` is 0, nothing watches.
        num_matches: the most matched points of a sample that `train.correspondence_weight` supervises, 1..4096; more
            are thinned at random.
    """

    root: str = ""
    input_root: str = ""
    video_ratio: float = 0.7
    sources: dict[str, PairSourceOptions] = field(default_factory=dict)
    heldout_ratio: float = 0.1
    min_ssim: float = -1.0
    max_ssim: float = 1.0
    geometry: GeometryRanges = field(default_factory=GeometryRanges)
    jitter: JitterRanges = field(default_factory=JitterRanges)
    share_flips: bool = False
    mask: MaskOptions = field(default_factory=MaskOptions)
    augment_on: str = "cpu"
    max_bad_ratio: float = 0.01
    num_workers: int = 2
    loader_timeout_s: float = 600.0
    num_matches: int = 64

    def __post_init__(self) -> None:
        for name in ("video_ratio", "heldout_ratio", "max_bad_ratio"):
            _check_range(f"data.{name}", [getattr(self, name)], 0, 1)
        if not 0 < self.loader_timeout_s < math.inf:
            raise InputError(f"data.loader_timeout_s must be above 0, and finite; got {self.loader_timeout_s}")
        if not 1 <= self.num_matches <= 4096:
            raise InputError(f"data.num_matches must be in 1..4096, got {self.num_matches}")
        if self.augment_on not in ("cpu", "device"):
            raise InputError(f"data.augment_on must be cpu or device, got {self.augment_on!r}")
        if self.sources and self.root:
            raise InputError(
                f"data.root={self.root} and data.sources ({', '.join(self.sources)}) are both given; with data.sources "
                "every source names its own root: leave data.root and data.video_ratio out"
            )
        for name, component in self.sources.items():
            if component.kind not in KINDS:
                raise InputError(f"data.sources.{name}.kind must be one of {', '.join(KINDS)}; got {component.kind!r}")
            if not component.root:
                raise InputError(f"data.sources.{name}.root is not set; it names a folder of mined pairs")
            if not 0 < component.weight < math.inf:
                raise InputError(f"data.sources.{name}.weight must be above 0, got {component.weight}")


def _check_range(name: str, values: Sequence[float], low: float, high: float) -> None:
    """All values must lie in low..high, in order."""
    if not (low <= values[0] <= values[-1] <= high and len(values) <= 2):
        limits = f"{low:g}..{high:g}" if math.isfinite(high) else f"{low:g} or more"
        order = ", the smaller first" if len(values) > 1 else ""
        given = list(values) if len(values) > 1 else values[0]
        raise InputError(f"{name} must be in {limits}{order}; got {given}")
