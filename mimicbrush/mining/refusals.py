"""Reasons why a file gave no pair: fixed words, which are stored in the manifest and counted in the summary.

Where a file is refused, by the file of this package that decides it:

* Before it is opened: `plan` (outside_link, not_a_file, bad_name, unreadable) and `input_list` (absent, unknown_type).
* Its bytes: `worker` (changed, hash_mismatch, empty, too_large, unreadable, out_of_memory).
* A video: `video/containers`, `video/matroska` and `video/avi` (the container, other_format), `video/stream_checks`
  (packets, frames, times and sizes), `video/decoders` and `video/strict_reader` (errors of FFmpeg),
  `video/other_readers` (decord and torchcodec).
* A photograph or a tar: `segmented_images` (rotated, bad_json, bad_segment, bad_archive, ambiguous, bad_name, damaged,
  too_large).
* Its process: `worker_pool` (timeout, worker_died).
* Any other error while it is mined: `worker` and `worker_pool` (failed). So no file ends a run.
* Readable, but without a pair: `pair_selection` (videos), `video/signals` (hdr, interlaced) and `worker` (no_segment,
  no_photograph).
* The same bytes as an earlier file: `mimicbrush.data.manifest` (duplicate), which sees all shards at once.
"""

from __future__ import annotations

from mimicbrush.errors import DataError

#: Readable, but without a pair.
REJECTED = {
    "too_short": "fewer frames than min_frames, or no two candidates with a gap in the range",
    "too_small": "the SSIM window of 11 px does not fit",
    "flat": "the frames show almost nothing (black, one colour)",
    "blurred": "the frames are out of focus or blurred by motion",
    "across_cut": "there is a cut between the two frames in all tried pairs",
    "too_similar": "the tried pairs are above max_ssim (a still image)",
    "too_different": "the tried pairs are below min_ssim",
    "few_matches": "the tried pairs have fewer SIFT matches than min_matches",
    "hdr": "an HDR video (PQ, HLG), and hdr=skip",
    "interlaced": "a video with interlaced frames, and interlaced=skip",
    "no_segment": "no segment of the image has an area in the accepted range",
    "no_photograph": "a tar that has files, but no photograph with segments",
    "duplicate": "the same content as an earlier file",
}

#: Cannot be trusted.
QUARANTINED = {
    "damaged": "not a video or image of a known format, or there is an error when it is decoded",
    "other_format": "the content has an unsupported format (whatever the suffix is)",
    "no_video": "no video stream, or no frames in it",
    "missing_packets": "fewer packets than in the index, or the stream ends early",
    "missing_frames": "the numbers of decoded frames and of packets differ",
    "bad_timestamps": "timestamps of frames are missing, are repeated or go backwards",
    "size_changes": "the image size changes within the stream",
    "too_large": "more bytes or pixels than the limit",
    "too_long": "longer than the limit",
    "empty": "zero bytes",
    "unreadable": "the operating system cannot read it",
    "changed": "its size has changed since the run was planned, or it was replaced while it was read",
    "hash_mismatch": "its SHA-256 is not the one in the input list",
    "absent": "in the input list, but it does not exist",
    "unknown_type": "in the input list, but its suffix is not of a video, a photograph with segments, or a tar",
    "bad_name": "the name is not valid UTF-8, is too long, or cannot be the name of a file",
    "outside_link": "a symbolic link to a file outside the input folder, or a broken link",
    "not_a_file": "a folder, pipe, socket or device",
    "rotated": "a photograph rotated by its EXIF: it is not known whether its segments are rotated, too",
    "bad_json": "the JSON file of the image does not have the layout of SA-1B",
    "bad_segment": "the run lengths of a segment do not fit the image",
    "bad_archive": "a tar that is empty, damaged or ends early",
    "ambiguous": "a name that occurs twice in the tar: it is not known which photograph or segments are meant",
    "worker_died": "the worker process ended while reading this file",
    "timeout": "reading this file took longer than timeout_s",
    "out_of_memory": "reading this file needed more memory than is available",
    "failed": "this file triggers a bug in mimicbrush; please report it",
}


class UntrustedFileError(DataError):
    """A file that is quarantined.

    Attributes:
        reason: a key of `QUARANTINED`.
        detail: a description for users.
    """

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in QUARANTINED, reason
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
