"""Strict reading of videos: every frame is right, or the file is refused with a reason.

Decoders conceal damage: they repeat, invent or drop frames and report success. A pair made of an invented
frame teaches nonsense, so a file with one detected fault gives no pair at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import av
import numpy as np

from mimicbrush.mining.containers import check_whole, nal_check
from mimicbrush.mining.reasons import UntrustedFileError

#: Demuxers that read one self-contained file. Others (playlists, concat, devices) can open further files.
FORMATS = "mov,matroska,avi"
#: VP8 keeps its invisible frames in packets of their own; elsewhere a packet is a frame.
_CODECS_WITH_HIDDEN_FRAMES = frozenset({"vp8"})
#: Quarter turns counter-clockwise, the way `numpy.rot90` turns.
_QUARTER_DEGREES = 90
#: (height, width) in px of the pictures that cuts are told by.
THUMBNAIL_SIZE = (36, 64)


@dataclass(frozen=True)
class VideoFrame:
    """One decoded frame; the conversion to RGB happens on demand, since most frames are only passed over.

    Attributes:
        number: in order of showing, from 0.
        time_s: since the first frame.
        to_rgb: gives (H, W, 3) uint8, upright; to be called before the next frame is asked for.
        to_thumbnail: gives `THUMBNAIL_SIZE` uint8 RGB, stretched and not turned, to tell cuts by; likewise.
    """

    number: int
    time_s: float
    to_rgb: Callable[[], np.ndarray]
    to_thumbnail: Callable[[], np.ndarray]


class FrameReader(Protocol):
    """Reads a video once, in order, strictly."""

    @property
    def name(self) -> str:
        """Library and version, as stored in the manifest."""

    def frames(self, path: Path) -> Iterator[VideoFrame]:
        """All frames of the best video stream.

        Raises:
            UntrustedFileError: at any time until the iterator's end; what was yielded before is then void.
        """


@dataclass(frozen=True)
class PyAVReader:
    """The default reader: FFmpeg through PyAV, with all its fault detection turned into errors.

    Attributes:
        max_pixels: of one frame, width times height.
        max_duration_s: of the stream.
        tail_tolerance_s: how much earlier than declared a stream may end where no frame count is stored.
    """

    max_pixels: int = 35_389_440
    max_duration_s: float = 14_400.0
    tail_tolerance_s: float = 0.25

    @property
    def name(self) -> str:
        """See `FrameReader`."""
        return f"pyav {av.__version__}"

    def frames(self, path: Path) -> Iterator[VideoFrame]:
        """See `FrameReader`."""
        # Edit lists may cut what is shown; without them every stored packet comes, and can be counted.
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file", "ignore_editlist": "1"}
        check_whole(path)
        try:
            with av.open(str(path.absolute()), options=options, metadata_errors="replace") as container:
                yield from self._stream_frames(container)
        except av.error.FFmpegError as error:
            raise UntrustedFileError("damaged", f"FFmpeg: {error.strerror or error}") from error
        except (UnicodeError, OverflowError) as error:
            raise UntrustedFileError("damaged", f"senseless header: {error}") from error

    def _stream_frames(self, container: av.container.InputContainer) -> Iterator[VideoFrame]:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise UntrustedFileError("no_video", "the file holds no video stream that can be decoded")
        self._check_size(stream.codec_context.width, stream.codec_context.height)
        # "aggressive" also minds bits that are left over at the end of a slice, where damage often shows.
        stream.codec_context.options = {"err_detect": "explode+aggressive"}
        # Several threads would report an error some frames late, and the pool already fills the cores.
        stream.codec_context.thread_count = 1
        checks = _StreamChecks(stream, self)
        for packet in container.demux(stream):
            checks.packet(packet)
            for frame in stream.decode(packet):
                time_s = checks.frame(frame)
                yield VideoFrame(
                    checks.num_frames - 1, time_s, partial(_upright_rgb, frame), partial(_thumbnail, frame)
                )
        checks.end(container)

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise UntrustedFileError("too_large", f"{width} x {height} px, more than {self.max_pixels} pixels")


class _StreamChecks:
    """What must hold of the packets and frames of one stream; lives as long as one pass."""

    def __init__(self, stream: av.VideoStream, limits: PyAVReader) -> None:
        self.stream = stream
        self.limits = limits
        self.nal_fault = nal_check(stream.codec_context.name, stream.codec_context.extradata)
        self.num_packets = 0
        self.num_frames = 0
        self.first_pts = 0
        self.last_pts = 0
        self.end_pts = 0
        self.size: tuple[int, int] | None = None

    def packet(self, packet: av.Packet) -> None:
        """Count a packet and look at its flag (the empty one at the end only flushes the decoder)."""
        if packet.size == 0:
            return
        self.num_packets += 1
        if packet.is_corrupt:
            raise UntrustedFileError("damaged", f"packet {self.num_packets - 1} is flagged as corrupt")
        fault = self.nal_fault(bytes(packet))
        if fault:
            raise UntrustedFileError("damaged", f"packet {self.num_packets - 1}: {fault}")

    def frame(self, frame: av.VideoFrame) -> float:
        """Check a frame against the ones before it; its time in seconds since the first."""
        number = self.num_frames
        if frame.is_corrupt:
            raise UntrustedFileError("damaged", f"frame {number} is flagged as corrupt")
        # AVI stores no presentation times, only the order of decoding.
        pts = frame.pts if frame.pts is not None else frame.dts
        if pts is None:
            raise UntrustedFileError("bad_timestamps", f"frame {number} has no time")
        if number and pts <= self.last_pts:
            raise UntrustedFileError(
                "bad_timestamps", f"frame {number} is at tick {pts}, the one before at {self.last_pts}"
            )
        if self.size is None:
            self.first_pts = pts
        elif self.size != (frame.width, frame.height):
            raise UntrustedFileError(
                "size_changes", f"frame {number} is {frame.width} x {frame.height} px, not {self.size}"
            )
        self.size = frame.width, frame.height
        self.limits._check_size(frame.width, frame.height)
        self.last_pts = pts
        self.end_pts = pts + (frame.duration or 0)
        self.num_frames += 1
        time_s = float((pts - self.first_pts) * self.stream.time_base)
        if time_s > self.limits.max_duration_s:
            raise UntrustedFileError("too_long", f"more than {self.limits.max_duration_s:g} s")
        return time_s

    def end(self, container: av.container.InputContainer) -> None:
        """After the last frame: is all there that the container and the packets promised?"""
        if self.num_packets == 0 or self.num_frames == 0:
            raise UntrustedFileError("no_video", "the video stream has no frame")
        declared = self.stream.frames
        if declared and declared != self.num_packets:
            raise UntrustedFileError("missing_packets", f"{self.num_packets} packets, the index counts {declared}")
        hidden = self.stream.codec_context.name in _CODECS_WITH_HIDDEN_FRAMES
        if self.num_frames != self.num_packets and not hidden:
            raise UntrustedFileError("missing_frames", f"{self.num_frames} frames from {self.num_packets} packets")
        if not declared:
            self._check_tail(container)

    def _check_tail(self, container: av.container.InputContainer) -> None:
        declared_s = _declared_duration_s(self.stream, container)
        if declared_s is None:
            return
        end_s = float(self.end_pts * self.stream.time_base)
        if end_s < declared_s - self.limits.tail_tolerance_s:
            raise UntrustedFileError("missing_packets", f"the video ends at {end_s:.2f} s of {declared_s:.2f} s")


def _declared_duration_s(stream: av.VideoStream, container: av.container.InputContainer) -> float | None:
    """How long the stream says it is: by its DURATION tag (Matroska), else by the container of only it."""
    tag = stream.metadata.get("DURATION", "")
    parts = tag.split(":")
    if len(parts) == 3:
        try:
            return int(parts[0]) * 3600 + int(parts[1]) * 60 + float(parts[2])
        except ValueError:
            pass  # a free text field; the container's duration is asked instead
    if container.duration is None or len(container.streams) > 1:
        return None
    return container.duration / av.time_base


def _upright_rgb(frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3) uint8, turned as the rotation metadata of phones asks."""
    rgb = frame.to_ndarray(format="rgb24", threads=1)
    quarters = round(frame.rotation / _QUARTER_DEGREES) % 4
    return np.ascontiguousarray(np.rot90(rgb, quarters))


def _thumbnail(frame: av.VideoFrame) -> np.ndarray:
    height, width = THUMBNAIL_SIZE
    small = frame.reformat(width=width, height=height, format="rgb24", interpolation="FAST_BILINEAR", threads=1)
    return small.to_ndarray()
