"""Checks of the packets and frames of a video stream, for any decoder.

Refuses as:

* "damaged": a packet or frame has its corrupt flag set, or a packet breaks the rules of its format (`containers`).
* "bad_timestamps": a frame has no time, or its time is not after that of the frame before.
* "size_changes": a frame has another size than the first.
* "too_large", "too_long": more pixels or seconds than the limits.
* "missing_packets": fewer packets than in the index (frames that an AVI marks as dropped do not count), or the video
  ends earlier than declared.
* "missing_frames": the numbers of frames and of packets differ.
* "no_video": a stream without a frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av

from mimicbrush.mining.refusals import UntrustedFileError
from mimicbrush.mining.video.avi import count_dropped_frames
from mimicbrush.mining.video.containers import build_packet_check

#: VP8 stores invisible frames in separate packets; in all other codecs, each packet is a frame.
_CODECS_WITH_HIDDEN_FRAMES = frozenset({"vp8"})


@dataclass(frozen=True)
class StreamLimits:
    """Limits of a stream, see `PyAVReader`."""

    max_pixels: int
    max_duration_s: float
    tail_tolerance_s: float

    def check_size(self, width: int, height: int) -> None:
        """Refuse images above the limit."""
        if width * height > self.max_pixels:
            raise UntrustedFileError("too_large", f"{width} x {height} px, more than {self.max_pixels} pixels")


class StreamChecks:
    """Checks of one pass over one stream: of each packet, of each frame, and at the end."""

    def __init__(self, stream: av.VideoStream, limits: StreamLimits) -> None:
        self.stream = stream
        self.limits = limits
        self.find_packet_fault = build_packet_check(stream.codec_context.name, stream.codec_context.extradata)
        self.num_packets = 0
        self.num_frames = 0
        self.first_pts = 0
        self.last_pts = 0
        self.end_pts = 0
        self.size: tuple[int, int] | None = None

    def check_packet(self, packet: av.Packet) -> None:
        """Count a packet and check its flag and bytes (the empty one at the end only flushes the decoder)."""
        if packet.size == 0:
            return
        self.num_packets += 1
        if packet.is_corrupt:
            raise UntrustedFileError("damaged", f"packet {self.num_packets - 1} is flagged as corrupt")
        fault = self.find_packet_fault(bytes(packet))
        if fault:
            raise UntrustedFileError("damaged", f"packet {self.num_packets - 1}: {fault}")

    def check_frame(self, frame: av.VideoFrame) -> float:
        """Check a frame against those before it, and return its time in seconds since the first."""
        number = self.num_frames
        if frame.is_corrupt:
            raise UntrustedFileError("damaged", f"frame {number} is flagged as corrupt")
        # AVI stores no presentation times, only the order of decoding.
        pts = frame.pts if frame.pts is not None else frame.dts
        if pts is None:
            raise UntrustedFileError("bad_timestamps", f"frame {number} has no timestamp")
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
        self.limits.check_size(frame.width, frame.height)
        self.last_pts = pts
        self.end_pts = pts + (frame.duration or 0)
        self.num_frames += 1
        time_s = float((pts - self.first_pts) * self.stream.time_base)
        if time_s > self.limits.max_duration_s:
            raise UntrustedFileError("too_long", f"more than {self.limits.max_duration_s:g} s")
        return time_s

    def check_end(self, container: av.container.InputContainer) -> None:
        """Check after the last frame that no packet and no frame is missing."""
        if self.num_packets == 0 or self.num_frames == 0:
            raise UntrustedFileError("no_video", "the video stream has no frame")
        declared = self.stream.frames
        if declared > self.num_packets and container.format.name == "avi":
            declared -= count_dropped_frames(Path(container.name), self.stream.index)
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
    """Return the declared duration: that of the stream's tag (Matroska), or of a container with only this stream."""
    tag = stream.metadata.get("DURATION", "")
    parts = tag.split(":")
    if len(parts) == 3:
        try:
            return int(parts[0]) * 3600 + int(parts[1]) * 60 + float(parts[2])
        except ValueError:
            pass  # the tag may be any text; the duration of the container is used instead
    if container.duration is None or len(container.streams) > 1:
        return None
    return container.duration / av.time_base
