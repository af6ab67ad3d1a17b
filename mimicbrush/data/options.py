"""Options of the training data. No heavy import here: the command line reads this before anything else."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from mimicbrush.errors import InputError
from mimicbrush.ops.color_jitter import JitterRanges
from mimicbrush.ops.geometry import GeometryRanges
from mimicbrush.ranges import REFERENCES_RANGE, check_options, check_order, number, numbers, suggest, word

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

    segment_ratio: tuple[float, float] = numbers((0.0, 1.0), at_least=0, at_most=1)
    count: tuple[int, int] = numbers((1, 1), at_least=1)
    dilation: tuple[float, float] = numbers((0.0, 0.0), at_least=0, at_most=1)
    mask_ratio: tuple[float, float] = numbers((0.01, 0.9), at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_options(self, "data.mask.segments.")


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
        probability: random_grid: probability that a cell is masked.
        box_sides: box: smallest and largest side over that of the canvas (released data utilities).
        box_area: box: its area over that of the canvas; None leaves it to the sides.
        num_fullest: orb_grid: how many cells count as the fullest.
        fullest: orb_grid: probability that one of these is masked.
        others: orb_grid: the same for any other cell.
        segments: segment.
    """

    strategy: str = "sift_grid"
    image_strategy: str = "segment"
    # One cell could only be all or nothing.
    cells: tuple[int, int] = numbers((3, 10), at_least=2, at_most=1000)
    matched: float = number(0.75, at_least=0, at_most=1)
    unmatched: float = number(0.50, at_least=0, at_most=1)
    probability: float = number(0.50, at_least=0, at_most=1)
    box_sides: tuple[float, float] = numbers((0.4, 0.9), above=0, at_most=1)
    box_area: float | None = number(None, above=0, at_most=1, whole=False, null="left to data.mask.box_sides")
    num_fullest: int = number(5, at_least=0)
    fullest: float = number(0.7, at_least=0, at_most=1)
    others: float = number(0.3, at_least=0, at_most=1)
    segments: SegmentOptions = field(default_factory=SegmentOptions)

    def __post_init__(self) -> None:
        for name, strategies, why in (
            ("strategy", VIDEO_STRATEGIES, "a video has no segments"),
            ("image_strategy", IMAGE_STRATEGIES, "a photograph has no stored matches"),
        ):
            value = getattr(self, name)
            if value not in strategies and not _NAMES_A_FUNCTION.match(value):
                known = value in VIDEO_STRATEGIES + IMAGE_STRATEGIES
                meant = f" ({why})" if known else suggest(value, strategies)
                raise InputError(
                    f"data.mask.{name}={value}: must be one of {', '.join(strategies)}, or module:function{meant}"
                )
        check_options(self, "data.mask.")
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
        root: a folder made by mimicbrush mine.
        kind: "video" or "image": which of its pairs to take.
        weight: share of the samples, relative to the others'.
        input_root: as in `DataOptions`.
    """

    root: str = ""
    kind: str = word("video", KINDS)
    weight: float = number(1.0, above=0)
    input_root: str = ""


@dataclass
class DataOptions:
    """Options of the training data: which pairs, and what happens to them on the way.

    Attributes:
        root: a folder made by mimicbrush mine: the simple form, for one folder.
        input_root: where the mined photographs lie, if they have moved since; "" is where they were mined.
        video_ratio: part of the samples that come from video pairs; the rest are images (paper Sec. 4.1).
        sources: name -> options: the general form, for any number of them, in place of `root` and `video_ratio`.
        heldout_ratio: part of the source files that is never trained on, chosen by their hash.
        min_ssim: pairs with a lower SSIM are not used. It can only narrow the band of mining.
        max_ssim: pairs with a higher SSIM are not used. It can only narrow the band of mining.
        geometry: random geometry, sampled for source and reference independently.
        jitter: random colour, likewise.
        share_flips: flip source and reference together (ours: users of the released model complain of
            mirrored results).
        mask: what is masked.
        fixed_views: number of augmentations of each pair (*ours*). They take turns from epoch to epoch, and are the
            same for every seed; 0 (paper): a new one each time.
        encoded_views: a folder made by mimicbrush encode-views, which holds the fixed views as the frozen encoders see
            them; "": the run encodes by itself.
        augment_on: "cpu" renders in the loader's processes; "device" lets them decode only, and jitters and warps
            whole batches where the model is. Same parameters, same samples up to rounding.
        max_bad_ratio: unreadable pairs are replaced, counted and named; above this part of the samples the run stops
            (a few are always allowed, see `training.guards.BadSamples`).
        num_workers: loader processes of each process of the run; 0: none.
        loader_timeout_s: if a loader process gives no batch for so long, the run saves and ends; with `num_workers=0`
            this is not checked.
        num_references: references of each sample (*ours*; the paper has one). Those after the first are other frames of
            the same shot. If it has no other frame, the first one is augmented again.
        num_matches: largest number of matches of a sample that `train.correspondence_weight` uses; of more, a random
            part is used.
    """

    root: str = ""
    input_root: str = ""
    video_ratio: float = number(0.7, at_least=0, at_most=1)
    sources: dict[str, PairSourceOptions] = field(default_factory=dict)
    heldout_ratio: float = number(0.1, at_least=0, at_most=1)
    min_ssim: float = number(-1.0, at_least=-1, at_most=1)
    max_ssim: float = number(1.0, at_least=-1, at_most=1)
    geometry: GeometryRanges = field(default_factory=GeometryRanges)
    jitter: JitterRanges = field(default_factory=JitterRanges)
    share_flips: bool = False
    mask: MaskOptions = field(default_factory=MaskOptions)
    fixed_views: int = number(0, at_least=0, at_most=10**6, note="0: a new augmentation each time")
    encoded_views: str = ""
    augment_on: str = word("cpu", ("cpu", "device"))
    max_bad_ratio: float = number(0.01, at_least=0, at_most=1)
    num_workers: int = number(2, at_least=0, at_most=4096)
    loader_timeout_s: float = number(600.0, above=0)
    num_references: int = number(1, REFERENCES_RANGE)
    num_matches: int = number(64, at_least=1, at_most=4096)

    def __post_init__(self) -> None:
        check_options(self, "data.")
        check_order(self, "data.", ("min_ssim", "max_ssim"))
        if self.encoded_views and not self.fixed_views:
            raise InputError(
                f"data.encoded_views={self.encoded_views} holds fixed views, and data.fixed_views=0 makes a new "
                "augmentation each time; give the data.fixed_views=K of that folder"
            )
        if self.encoded_views and self.num_references > 1:
            raise InputError(
                f"data.encoded_views={self.encoded_views} holds one reference for each view, and "
                f"data.num_references={self.num_references}; set data.num_references=1, or leave data.encoded_views out"
            )
        if self.sources and self.root:
            raise InputError(
                f"data.root={self.root} and data.sources ({', '.join(self.sources)}) are both given; with data.sources "
                "every source names its own root: leave data.root and data.video_ratio out"
            )
        for name, component in self.sources.items():
            check_options(component, f"data.sources.{name}.")
            if not component.root:
                raise InputError(f"data.sources.{name}.root is not set; it names a folder of mined pairs")
