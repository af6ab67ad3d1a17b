"""What is mined: the options that decide the content of a mined folder."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mimicbrush.data.schema import MAX_POINT_SIDE_PX
from mimicbrush.errors import InputError

READERS = ("pyav", "decord", "torchcodec")
HDR = ("tone_map", "keep", "skip")
INTERLACED = ("deinterlace", "keep", "skip")


@dataclass(frozen=True)
class MiningOptions:
    """Options of mining; none of them is published (paper Sec. 3.3 says only that SSIM bounds both ends).

    Attributes:
        reader: of videos, one of `READERS`.
        hdr: what to do with HDR videos (PQ, HLG), one of `HDR`: convert them to SDR, take their numbers as they are,
            which looks flat, or reject them.
        interlaced: what to do with interlaced videos, one of `INTERLACED`: make whole images of their frames, keep the
            comb of two fields, or reject them.
        candidate_interval_s: a frame is considered about this often.
        min_gap_s, max_gap_s: how far apart in time the two frames of a pair may lie.
        min_frames: a clip of fewer frames is a fragment.
        min_ssim, max_ssim: the band of SSIM (`mimicbrush.ops.similarity.SSIM_DEFINITION`), wide: training narrows it
            (`data.min_ssim`, `data.max_ssim`). Above it a pair shows a still image. The lower end is only for
            noise: across a pan of a camera over fine texture we measured 0.09..0.3.
        cut_ratio, min_cut: a shot ends where a frame differs from the one before `cut_ratio` times as much as its
            neighbours do, and by `min_cut` (PySceneDetect's adaptive detector, 0..255). No pair crosses a cut.
        min_contrast: standard deviation of the luma (0..255) below which a frame is called flat.
        min_sharpness, min_sharpness_ratio: a frame is called blurred where its `mimicbrush.ops.similarity.sharpness`
            is below the first, or below the second times the median of the candidates in reach (`max_gap_s`).
        match_side_px: SIFT looks at frames reduced to this long side, about what training sees.
        min_matches: SIFT matches that a pair must have. Unrelated photographs have 0, seldom 5.
        pairs_per_clip: at most, spread over the clip.
        max_side_px: longer stored frames are reduced (photographs are not stored, but read where they lie).
        jpeg_quality: of stored frames.
        refused_per_clip: so many examples of refused pairs are kept as thumbnails for the report.
        copy_images: store photographs and their segments in the shards, too, so that the mined folder is
            complete without its input.
        max_segments: of one photograph; the largest are kept.
        min_segment_ratio, max_segment_ratio: area of a segment over the area of the photograph.
        max_file_bytes: larger files are refused (tars excepted).
        max_image_bytes: larger photographs, and files of segments, are refused, loose or in a tar.
        max_pixels: of one frame or photograph.
        max_duration_s: of a video.
        inputs_per_shard: how many files of the input make one shard.
    """

    reader: str = "pyav"
    hdr: str = "tone_map"
    interlaced: str = "deinterlace"
    candidate_interval_s: float = 0.5
    min_gap_s: float = 0.5
    max_gap_s: float = 4.0
    min_frames: int = 12
    min_ssim: float = 0.05
    max_ssim: float = 0.96
    cut_ratio: float = 3.0
    min_cut: float = 15.0
    min_contrast: float = 4.0
    min_sharpness: float = 0.0015
    min_sharpness_ratio: float = 0.25
    match_side_px: int = 640
    min_matches: int = 6
    pairs_per_clip: int = 16
    max_side_px: int = 1024
    jpeg_quality: int = 92
    refused_per_clip: int = 2
    copy_images: bool = False
    max_segments: int = 16
    min_segment_ratio: float = 0.01
    max_segment_ratio: float = 0.80
    max_file_bytes: int = 17_179_869_184
    max_image_bytes: int = 268_435_456
    max_pixels: int = 35_389_440
    max_duration_s: float = 14_400.0
    inputs_per_shard: int = 4

    def __post_init__(self) -> None:
        """Refuse values of another type, and such as could never give a pair.

        Raises:
            InputError: names the option and what was given.
        """
        if self.reader not in READERS:
            raise InputError(f"reader={self.reader}: there is no such reader; choose one of {', '.join(READERS)}")
        for name, choices in (("hdr", HDR), ("interlaced", INTERLACED)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name}={getattr(self, name)}: must be one of {', '.join(choices)}")
        if not isinstance(self.copy_images, bool):
            raise InputError(f"copy_images={self.copy_images}: must be true or false")
        for option in fields(self):
            if option.name not in ("reader", "hdr", "interlaced", "copy_images"):
                check_number(option.name, getattr(self, option.name), integer=isinstance(option.default, int))
        for low, high in (
            ("min_gap_s", "max_gap_s"),
            ("min_ssim", "max_ssim"),
            ("min_segment_ratio", "max_segment_ratio"),
        ):
            if not getattr(self, low) <= getattr(self, high):
                raise InputError(f"{low}={getattr(self, low)} is above {high}={getattr(self, high)}")
        for name in ("candidate_interval_s", "min_gap_s", "cut_ratio"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)} must be above 0")
        for name in (
            "pairs_per_clip",
            "max_side_px",
            "match_side_px",
            "max_segments",
            "inputs_per_shard",
            "max_pixels",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.refused_per_clip < 0:
            raise InputError(f"refused_per_clip={self.refused_per_clip} must be 0 or more")
        if self.max_side_px > MAX_POINT_SIDE_PX:
            raise InputError(f"max_side_px={self.max_side_px} is above {MAX_POINT_SIDE_PX}, what the manifest can hold")
        if not 1 <= self.jpeg_quality <= 100:
            raise InputError(f"jpeg_quality={self.jpeg_quality} is outside 1..100")


def check_number(name: str, value: object, *, integer: bool = False) -> None:
    """Refuse a value of an option that is no number, since a command line can give anything.

    Raises:
        InputError: names the option and what was given.
    """
    if isinstance(value, bool) or not isinstance(value, int if integer else int | float):
        raise InputError(f"{name}={value}: must be a {'whole ' if integer else ''}number")
