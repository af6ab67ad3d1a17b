"""Options of mining, which decide the content of a mined folder."""

from __future__ import annotations

from dataclasses import dataclass

from mimicbrush.data.schema import MAX_POINT_SIDE_PX, STILL_SSIM
from mimicbrush.ranges import check_options, check_order, number, word

READERS = ("pyav", "decord", "torchcodec")
HDR = ("tone_map", "keep", "skip")
INTERLACED = ("deinterlace", "keep", "skip")


@dataclass(frozen=True)
class MiningOptions:
    """Options of mining. None of them is published: paper Sec. 3.3 only says that SSIM has two bounds.

    Attributes:
        reader: library that decodes videos, one of `READERS`.
        hdr: what to do with HDR videos (PQ, HLG), one of `HDR`: convert them to SDR, keep their values (such frames
            look flat), or reject them.
        interlaced: what to do with interlaced videos, one of `INTERLACED`: deinterlace their frames, keep frames with
            visible lines, or reject them.
        candidate_interval_s: time between the frames that are considered.
        min_gap_s: smallest time between the two frames of a pair.
        max_gap_s: largest time between the two frames of a pair.
        min_frames: clips with fewer frames are rejected.
        min_ssim: smallest SSIM of a pair (`mimicbrush.ops.similarity.SSIM_DEFINITION`). It is low and only
            excludes unrelated images: when a camera moves over fine texture, we measured 0.09 to 0.3. Training can
            use a higher one (`data.min_ssim`).
        max_ssim: largest SSIM of a pair. Above it, the two frames are almost equal. Training can use a lower one
            (`data.max_ssim`).
        cut_ratio: a shot ends at a frame that differs from the one before `cut_ratio` times as much as its neighbours
            do, and by at least `min_cut` (the adaptive detector of PySceneDetect). No pair spans a cut.
        min_cut: smallest difference of two frames (0 to 255) at a cut, see `cut_ratio`.
        min_contrast: smallest standard deviation of the luma (0 to 255); below, a frame is flat.
        min_sharpness: smallest `mimicbrush.ops.similarity.sharpness`; below, a frame is blurred.
        min_sharpness_ratio: a frame is also blurred below this share of the median sharpness of the candidates within
            `max_gap_s`.
        match_side_px: frames are reduced to this long side for SIFT, about the size that training uses. A smaller
            side is faster and finds fewer matches.
        min_matches: smallest number of SIFT matches of a pair. Unrelated photographs have 0, rarely 5.
        pairs_per_clip: largest number of pairs of a clip, spread over the clip.
        max_side_px: stored frames are reduced to this long side. Photographs are not stored, but read in place.
        jpeg_quality: JPEG quality of stored frames.
        refused_per_clip: number of refused pairs of a clip that the report shows as thumbnails.
        copy_images: also store photographs and their segments in the shards, so that the mined folder does not need
            its input.
        max_segments: largest number of segments of a photograph; the largest ones are kept.
        min_segment_ratio: smallest area of a segment, as a share of the photograph.
        max_segment_ratio: largest area of a segment, as a share of the photograph.
        max_file_bytes: larger files are refused, except tars.
        max_image_bytes: larger photographs and files of segments are refused, also inside a tar.
        max_pixels: frames and photographs with more pixels are refused.
        max_duration_s: longer videos are refused.
        inputs_per_shard: number of input files for each shard.
    """

    reader: str = word("pyav", READERS)
    hdr: str = word("tone_map", HDR)
    interlaced: str = word("deinterlace", INTERLACED)
    candidate_interval_s: float = number(0.5, above=0)
    min_gap_s: float = number(0.5, above=0)
    max_gap_s: float = number(4.0, above=0)
    min_frames: int = number(12, at_least=1)
    min_ssim: float = number(0.05, at_least=-1, at_most=1)
    max_ssim: float = number(STILL_SSIM, at_least=-1, at_most=1)
    cut_ratio: float = number(3.0, above=0)
    min_cut: float = number(15.0, at_least=0, at_most=255)
    min_contrast: float = number(4.0, at_least=0, at_most=255)
    min_sharpness: float = number(0.0015, at_least=0)
    min_sharpness_ratio: float = number(0.25, at_least=0)
    match_side_px: int = number(640, at_least=1, at_most=MAX_POINT_SIDE_PX)
    min_matches: int = number(6, at_least=0)
    pairs_per_clip: int = number(16, at_least=1)
    max_side_px: int = number(1024, at_least=1, at_most=MAX_POINT_SIDE_PX, note="the limit of the manifest")
    jpeg_quality: int = number(92, at_least=1, at_most=100)
    refused_per_clip: int = number(2, at_least=0)
    copy_images: bool = False
    max_segments: int = number(16, at_least=1)
    min_segment_ratio: float = number(0.01, at_least=0, at_most=1)
    max_segment_ratio: float = number(0.80, at_least=0, at_most=1)
    max_file_bytes: int = number(17_179_869_184, at_least=1)
    max_image_bytes: int = number(268_435_456, at_least=1)
    max_pixels: int = number(35_389_440, at_least=1)
    max_duration_s: float = number(14_400.0, above=0)
    inputs_per_shard: int = number(4, at_least=1)

    def __post_init__(self) -> None:
        """Refuse values of another type, and values that could never give a pair.

        Raises:
            InputError: an option is wrong; the message has its name and value.
        """
        check_options(self)
        check_order(
            self,
            "",
            ("min_gap_s", "max_gap_s"),
            ("min_ssim", "max_ssim"),
            ("min_segment_ratio", "max_segment_ratio"),
        )
