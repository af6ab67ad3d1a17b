"""Why a file gave no pair: a short fixed word each, stored in the manifest and counted in the summary.

Where a file is refused, by the file of this room that decides it:

* Before it is opened: `plan` (outside_link, not_a_file, bad_name, unreadable) and `input_list` (absent, unknown_type).
* Its bytes: `worker` (changed, hash_mismatch, empty, too_large, unreadable, out_of_memory).
* A video: `video/containers`, `video/matroska` and `video/avi` (the container, other_format), `video/stream_checks`
  (packets, frames, times and sizes), `video/decoders` and `video/strict_reader` (errors of FFmpeg),
  `video/other_readers` (decord and torchcodec).
* A photograph or a tar: `segmented_images` (rotated, bad_json, bad_segment, bad_archive, ambiguous, bad_name, damaged,
  too_large).
* Its process: `worker_pool` (timeout, worker_died).
* Any other error while it is worked on: `worker` and `worker_pool` (failed). So no file ends a run.
* Readable, but without a pair: `pair_selection` (videos), `video/signals` (hdr, interlaced) and `worker` (no_segment,
  no_photograph).
* The same bytes as an earlier file: `mimicbrush.data.manifest` (duplicate), which sees all shards at once.
"""

from __future__ import annotations

from mimicbrush.errors import DataError

#: Readable, but it holds no pair.
REJECTED = {
    "too_short": "fewer frames than min_frames, or no two candidates within the range of gaps",
    "too_small": "the SSIM window of 11 px does not fit",
    "flat": "the frames show almost nothing (black, one colour)",
    "blurred": "the frames are out of focus or blurred by motion",
    "across_cut": "in all pairs tried, a cut lies between the two frames",
    "too_similar": "the pairs tried lie above max_ssim (a still image)",
    "too_different": "the pairs tried lie below min_ssim",
    "few_matches": "the pairs tried have fewer SIFT matches than min_matches",
    "hdr": "an HDR video (PQ, HLG), and hdr=skip",
    "interlaced": "a video with interlaced frames, and interlaced=skip",
    "no_segment": "no segment of the image has an area in the accepted range",
    "no_photograph": "a tar that holds files, but no photograph beside its segments",
    "duplicate": "the same content as an earlier file",
}

#: Cannot be trusted.
QUARANTINED = {
    "damaged": "not a video or image of a known format, or decoding it reports an error",
    "other_format": "the content has a format that is not read (the suffix does not count)",
    "no_video": "no video stream, or one without frames",
    "missing_packets": "fewer packets than the index declares, or the stream ends early",
    "missing_frames": "the number of decoded frames is not the number of packets",
    "bad_timestamps": "times of frames are missing, are repeated or go backwards",
    "size_changes": "the image size changes within the stream",
    "too_large": "more bytes or pixels than the limit",
    "too_long": "longer than the limit",
    "empty": "zero bytes",
    "unreadable": "the operating system could not read it",
    "changed": "not the size it had when the run was planned, or replaced while it was read",
    "hash_mismatch": "not the SHA-256 that the input list gives",
    "absent": "named by the input list, but not there",
    "unknown_type": "named by the input list, but no video, photograph with segments, or tar by its suffix",
    "bad_name": "the name is not valid UTF-8, is too long, or cannot be the name of a file",
    "outside_link": "a symbolic link that leaves the input folder, or leads nowhere",
    "not_a_file": "a folder, pipe, socket or device",
    "rotated": "a photograph whose EXIF turns it: it is not known whether its segments are turned, too",
    "bad_json": "the file beside the image is not of the SA-1B layout",
    "bad_segment": "a segment's run lengths do not fit the image",
    "bad_archive": "a tar that is empty, damaged or ends early",
    "ambiguous": "a name that occurs twice in the tar: it is not known which photograph or segments are meant",
    "worker_died": "the worker process ended while reading this file",
    "timeout": "reading this file took longer than timeout_s",
    "out_of_memory": "reading this file needed more memory than there is",
    "failed": "the program has a fault that this file shows; please report it",
}


class UntrustedFileError(DataError):
    """A file that is to be quarantined.

    Attributes:
        reason: a key of `QUARANTINED`.
        detail: the same for a person to read.
    """

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in QUARANTINED, reason
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
