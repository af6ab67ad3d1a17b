"""What is mined: the options that decide the content of a mined folder."""

from __future__ import annotations

from dataclasses import dataclass

from mimicbrush.data.schema import MAX_POINT_SIDE_PX, STILL_SSIM
from mimicbrush.ranges import check_options, check_order, number, word

READERS = ("pyav", "decord", "torchcodec")
HDR = ("tone_map", "keep", "skip")
INTERLACED = ("deinterlace", "keep", "skip")


@dataclass(frozen=True)
class MiningOptions:
    """Options of mining; none of them is published (paper Sec. 3.3 says only that SSIM bounds both ends).

    Attributes:
        reader: what decodes videos, one of `READERS`.
        hdr: what to do with HDR videos (PQ, HLG), one of `HDR`: convert them to SDR, take their numbers as they are,
            which looks flat, or reject them.
        interlaced: what to do with interlaced videos, one of `INTERLACED`: make whole images of their frames, keep the
            comb of two fields, or reject them.
        candidate_interval_s: a frame is considered about this often.
        min_gap_s: smallest time between the two frames of a pair.
        max_gap_s: largest time between the two frames of a pair.
        min_frames: a clip of fewer frames is a fragment, and is rejected.
        min_ssim: smallest SSIM of a pair (`mimicbrush.ops.similarity.SSIM_DEFINITION`). It is low, and only keeps noise
            out: across a pan of a camera over fine texture we measured 0.09..0.3. Training can raise it
            (`data.min_ssim`).
        max_ssim: largest SSIM of a pair. Above it, the two frames are a still image. Training can lower it
            (`data.max_ssim`).
        cut_ratio: a shot ends where a frame differs from the one before `cut_ratio` times as much as its neighbours
            do, and by `min_cut` (PySceneDetect's adaptive detector). No pair crosses a cut.
        min_cut: smallest difference of two frames (0..255) that can be a cut, see `cut_ratio`.
        min_contrast: standard deviation of the luma (0..255) below which a frame is called flat.
        min_sharpness: a frame below this `mimicbrush.ops.similarity.sharpness` is called blurred.
        min_sharpness_ratio: a frame below this share of the median sharpness of the candidates in reach (`max_gap_s`)
            is called blurred, too.
        match_side_px: SIFT looks at frames reduced to this long side, about what training sees. A smaller one is
            faster and finds fewer matches.
        min_matches: SIFT matches that a pair must have. Unrelated photographs have 0, seldom 5.
        pairs_per_clip: largest number of pairs of a clip; they are spread over it.
        max_side_px: longer stored frames are reduced (photographs are not stored, but read where they lie).
        jpeg_quality: JPEG quality of stored frames.
        refused_per_clip: number of refused pairs of a clip that are kept as thumbnails for the report.
        copy_images: store photographs and their segments in the shards, too, so that the mined folder is
            complete without its input.
        max_segments: largest number of segments of a photograph; the largest segments are kept.
        min_segment_ratio: smallest area of a segment over the area of the photograph.
        max_segment_ratio: largest area of a segment over the area of the photograph.
        max_file_bytes: larger files are refused (tars excepted).
        max_image_bytes: larger photographs, and files of segments, are refused, loose or in a tar.
        max_pixels: frames and photographs of more pixels are refused.
        max_duration_s: longer videos are refused.
        inputs_per_shard: how many files of the input make one shard.
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
    max_side_px: int = number(1024, at_least=1, at_most=MAX_POINT_SIDE_PX, note="what the manifest can hold")
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
        """Refuse values of another type, and such as could never give a pair.

        Raises:
            InputError: names the option and what was given.
        """
        check_options(self)
        check_order(
            self,
            "",
            ("min_gap_s", "max_gap_s"),
            ("min_ssim", "max_ssim"),
            ("min_segment_ratio", "max_segment_ratio"),
        )
