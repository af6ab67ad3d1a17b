"""Options of the training data. This module imports nothing heavy: the command line reads it first."""

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
        segment_ratio: smallest and largest area of a segment, as a share of its image; other segments are not used.
        count: smallest and largest number of segments in a mask.
        dilation: smallest and largest radius by which the mask is dilated, as a share of the side of the canvas.
        mask_ratio: smallest and largest area of the final mask, as a share of the canvas. If a mask is smaller or
            larger, other segments and another geometry are sampled.
    """

    segment_ratio: tuple[float, float] = numbers((0.0, 1.0), at_least=0, at_most=1)
    count: tuple[int, int] = numbers((1, 1), at_least=1)
    dilation: tuple[float, float] = numbers((0.0, 0.0), at_least=0, at_most=1)
    mask_ratio: tuple[float, float] = numbers((0.01, 0.9), at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_options(self, "data.mask.segments.")


@dataclass
class MaskOptions:
    """Options of the masks, which choose the part to repaint (paper Sec. 3.3).

    Attributes:
        strategy: masks of video pairs: "sift_grid" (paper), "random_grid", "box", or "orb_grid" (released data
            utilities); or your own function as "module:function" (docs/extending.md).
        image_strategy: masks of photographs: "segment" (paper), "random_grid", "box" or "orb_grid"; or your own
            function.
        cells: smallest and largest N of the N x N grid (sift_grid, random_grid, orb_grid).
        matched: sift_grid: probability that a cell with a matched SIFT point is masked.
        unmatched: sift_grid: probability that any other cell is masked. It is also used if a photograph has no
            suitable segment.
        probability: random_grid: probability that a cell is masked.
        box_sides: box: smallest and largest side, as a share of the side of the canvas (released data utilities).
        box_area: box: area, as a share of the canvas; None: the sides decide.
        num_fullest: orb_grid: number of cells with the most ORB keypoints.
        fullest: orb_grid: probability that one of these cells is masked.
        others: orb_grid: probability that any other cell is masked.
        segments: options of "segment".
    """

    strategy: str = "sift_grid"
    image_strategy: str = "segment"
    # One cell could only be all or nothing.
    cells: tuple[int, int] = numbers((3, 10), at_least=2, at_most=1000)
    matched: float = number(0.75, at_least=0, at_most=1)
    unmatched: float = number(0.50, at_least=0, at_most=1)
    probability: float = number(0.50, at_least=0, at_most=1)
    box_sides: tuple[float, float] = numbers((0.4, 0.9), above=0, at_most=1)
    box_area: float | None = number(None, above=0, at_most=1, whole=False, null="data.mask.box_sides decides")
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
                    f"data.mask.{name}={value}: expected one of {', '.join(strategies)}, or module:function{meant}"
                )
        check_options(self, "data.mask.")
        low, high = self.box_sides
        if self.box_area is not None and not low * low <= self.box_area <= high * high:
            raise InputError(
                f"data.mask.box_area={self.box_area} is not possible with data.mask.box_sides={list(self.box_sides)}; "
                f"expected a number from {low * low:.3g} to {high * high:.3g}"
            )


@dataclass
class PairSourceOptions:
    """A mined folder to train on, one of several, see `DataOptions.sources`.

    Attributes:
        root: folder of mined pairs, made by `mimicbrush mine`.
        kind: which of its pairs to use: "video" or "image".
        weight: share of the samples, relative to the weights of the other sources.
        input_root: as in `DataOptions`.
    """

    root: str = ""
    kind: str = word("video", KINDS)
    weight: float = number(1.0, above=0)
    input_root: str = ""


@dataclass
class DataOptions:
    """Options of the training data: which pairs are used, and how they are augmented and masked.

    Attributes:
        root: folder of mined pairs, made by `mimicbrush mine`. For several folders, use `sources`.
        input_root: folder of the mined photographs, if they were moved; "": where they were mined.
        video_ratio: share of the samples that come from video pairs; the others come from photographs (paper Sec. 4.1).
        sources: name -> options of a source. Use this for several folders, instead of `root` and `video_ratio`.
        heldout_ratio: share of the source files that are never trained on, chosen by their hash.
        min_ssim: pairs with a lower SSIM are not used. Pairs that were not mined stay excluded.
        max_ssim: pairs with a higher SSIM are not used. Pairs that were not mined stay excluded.
        geometry: random geometry, sampled independently for source and reference.
        jitter: random colour changes, sampled independently for source and reference.
        share_flips: flip source and reference together (*ours*: users of the released model report mirrored results).
        mask: options of the masks.
        fixed_views: number of different augmentations of each pair (*ours*). They alternate from epoch to epoch, and
            are the same for every seed; 0 (paper): a new augmentation each time.
        encoded_views: folder made by `mimicbrush encode-views`, with the fixed views already encoded by the frozen
            networks; "": encode during training.
        augment_on: where images are augmented: "cpu" augments in the loader processes; "device" augments whole batches
            on the device of the model. Both give the same samples up to rounding.
        max_bad_ratio: largest share of samples whose pair cannot be read. Such pairs are replaced and listed; above
            this share the run stops (a few are always allowed, see `training.guards.BadSamples`).
        num_workers: loader processes for each process of the run; 0: none.
        loader_timeout_s: the run saves and stops if a loader process gives no batch for this time; with
            `num_workers=0`, this is not checked.
        num_references: references of each sample (*ours*; the paper has one). The second and further references are
            other frames of the same shot. If there are none, the first reference is augmented again.
        num_matches: largest number of matches of a sample that `train.correspondence_weight` uses; if there are more,
            a random subset is used.
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
                f"data.encoded_views={self.encoded_views} has fixed views, but data.fixed_views=0 makes a new "
                "augmentation each time; set data.fixed_views=K as for that folder"
            )
        if self.encoded_views and self.num_references > 1:
            raise InputError(
                f"data.encoded_views={self.encoded_views} has one reference for each view, but "
                f"data.num_references={self.num_references}; set data.num_references=1, or leave out data.encoded_views"
            )
        if self.sources and self.root:
            raise InputError(
                f"data.root={self.root} and data.sources ({', '.join(self.sources)}) are both given; with "
                "data.sources, every source has its own root: leave out data.root and data.video_ratio"
            )
        for name, component in self.sources.items():
            check_options(component, f"data.sources.{name}.")
            if not component.root:
                raise InputError(f"data.sources.{name}.root is not set; give a folder of mined pairs")
