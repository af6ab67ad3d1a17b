"""Reads videos strictly: all frames are right, or the file is refused with a reason.

Decoders conceal damage: they repeat, invent or drop frames and report success. An invented frame would be wrong
training data, so a file with one detected fault gives no pair at all.

Refuses as:

* "damaged": FFmpeg reports an error when it opens, demuxes or decodes the file, or a header is invalid.
* "no_video": the file has no video stream that can be decoded.

The checks of `containers` are made before the file is opened, those of `decoders` and `stream_checks` during reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import av
import cv2
import numpy as np

from mimicbrush.mining.refusals import UntrustedFileError
from mimicbrush.mining.video.containers import check_container
from mimicbrush.mining.video.conversions import deinterlace, find_transfer, tone_map
from mimicbrush.mining.video.decoders import open_second_decoder, open_strict_decoder
from mimicbrush.mining.video.stream_checks import StreamChecks, StreamLimits

#: Demuxers that read one self-contained file. Others (playlists, concat, devices) can open further files.
VIDEO_FORMATS = "mov,matroska,avi"
#: Degrees of a quarter turn; turns are counter-clockwise, as in `numpy.rot90`.
_QUARTER_DEGREES = 90
#: (height, width) in px of the thumbnails for the detection of cuts.
THUMBNAIL_SIZE = (36, 64)


@dataclass(frozen=True)
class VideoFrame:
    """One decoded frame. It is converted to RGB on demand, because most frames are not used.

    Attributes:
        number: number in presentation order, from 0.
        time_s: time since the first frame.
        to_rgb: returns (H, W, 3) uint8, upright, with square pixels; call it before requesting the next frame.
        to_thumbnail: returns an image of `THUMBNAIL_SIZE`, uint8 RGB, stretched and not rotated, for the detection of
            cuts; call it before requesting the next frame.
        transfer: "PQ" or "HLG" for HDR, else "".
        is_interlaced: the frame was stored as two fields of different times.
    """

    number: int
    time_s: float
    to_rgb: Callable[[], np.ndarray]
    to_thumbnail: Callable[[], np.ndarray]
    transfer: str = ""
    is_interlaced: bool = False


class FrameReader(Protocol):
    """Protocol of a strict reader, which reads a video once, in order. It is pickled and sent to workers."""

    @property
    def name(self) -> str:
        """Library and version, as stored in the manifest."""

    def frames(self, path: Path) -> Iterator[VideoFrame]:
        """Yield all frames of the best video stream.

        Raises:
            UntrustedFileError: a fault was found, which may be at the end; do not use frames that were yielded before.
            MemoryError: there is not enough memory; the file may be right.
        """


@dataclass(frozen=True)
class DisplayShape:
    """Size, rotation and pixel shape for displaying the images of a stream.

    Attributes:
        width_px, height_px: size of the decoded images.
        quarter_turns: counter-clockwise, 0..3, from the rotation metadata that phones write.
        pixel_aspect: width of a pixel over its height.
    """

    width_px: int
    height_px: int
    quarter_turns: int
    pixel_aspect: Fraction

    @property
    def square_size(self) -> tuple[int, int]:
        """(width, height) with square pixels, before the rotation: the side that is too short is stretched."""
        aspect = self.pixel_aspect
        if aspect >= 1:
            return round(self.width_px * aspect), self.height_px
        return self.width_px, round(self.height_px / aspect)

    @property
    def shown_size(self) -> tuple[int, int]:
        """(width, height) of the upright image with square pixels."""
        width, height = self.square_size
        return (height, width) if self.quarter_turns % 2 else (width, height)


@dataclass(frozen=True)
class ScanResult:
    """Result of a strict scan of a clip.

    Attributes:
        times_s: time of each frame since the first.
        shape: shape of all frames.
        stream: number of the video stream in its file.
        transfer: see `VideoFrame`; that of the first HDR frame.
        is_interlaced: at least one frame is interlaced.
    """

    times_s: list[float]
    shape: DisplayShape
    stream: int
    transfer: str = ""
    is_interlaced: bool = False


class _Decoded(NamedTuple):
    """A checked frame as FFmpeg holds it."""

    frame: av.VideoFrame
    time_s: float
    shape: DisplayShape
    stream: int
    transfer: str


@dataclass(frozen=True)
class PyAVReader:
    """The default reader of videos: FFmpeg through PyAV, with all its fault detection turned into errors.

    Attributes:
        max_pixels: largest width times height of a frame, also after the stretch to square pixels.
        max_duration_s: longest duration of the stream.
        tail_tolerance_s: how much earlier than declared a stream may end, if the file stores no number of frames.
        decode_twice: decode HEVC in two ways and compare, see `SecondDecoder`.
        tone_map: convert HDR frames to SDR.
        deinterlace: deinterlace interlaced frames.
    """

    max_pixels: int = 35_389_440
    max_duration_s: float = 14_400.0
    tail_tolerance_s: float = 0.25
    decode_twice: bool = True
    tone_map: bool = False
    deinterlace: bool = False

    @property
    def name(self) -> str:
        """Version of PyAV, as stored in the manifest."""
        return f"pyav {av.__version__}"

    def frames(self, path: Path) -> Iterator[VideoFrame]:
        """Decode, check and yield all frames of the best video stream, see `FrameReader.frames`."""
        for number, decoded in enumerate(self._decode(path)):
            views = partial(self._convert_upright, decoded), partial(_convert_thumbnail, decoded.frame)
            yield VideoFrame(number, decoded.time_s, *views, decoded.transfer, bool(decoded.frame.interlaced_frame))

    def _convert_upright(self, decoded: _Decoded) -> np.ndarray:
        frame, shape = decoded.frame, decoded.shape
        if self.deinterlace and frame.interlaced_frame:
            frame = deinterlace(frame)
        if self.tone_map and decoded.transfer:
            rgb = tone_map(frame, decoded.transfer)
        else:
            rgb = frame.to_ndarray(format="rgb24", threads=1)
        return rotate_frame(stretch_to_square_pixels(rgb, shape.square_size), shape.quarter_turns)

    def scan(self, path: Path) -> ScanResult:
        """Decode and check the whole clip without converting its frames.

        Raises:
            UntrustedFileError, MemoryError: as `frames` does.
        """
        times_s: list[float] = []
        decoded, transfer, is_interlaced = None, "", False
        for decoded in self._decode(path):
            times_s.append(decoded.time_s)
            transfer = transfer or decoded.transfer
            is_interlaced |= bool(decoded.frame.interlaced_frame)
        assert decoded is not None, "a clip without frames is refused"
        return ScanResult(times_s, decoded.shape, decoded.stream, transfer, is_interlaced)

    def _decode(self, path: Path) -> Iterator[_Decoded]:
        # Edit lists may hide packets. They are ignored, so that all stored packets are read and counted.
        options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file", "ignore_editlist": "1"}
        check_container(path)
        try:
            with av.open(str(path.absolute()), options=options, metadata_errors="replace") as container:
                yield from self._decode_stream(container)
        except MemoryError:
            raise  # PyAV's MemoryError is also an FFmpegError; the file did not cause it
        except av.error.FFmpegError as error:
            raise UntrustedFileError("damaged", f"FFmpeg: {error.strerror or error}") from error
        except (UnicodeError, OverflowError) as error:
            raise UntrustedFileError("damaged", f"invalid header: {error}") from error

    def _decode_stream(self, container: av.container.InputContainer) -> Iterator[_Decoded]:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise UntrustedFileError("no_video", "the file has no video stream that can be decoded")
        limits = StreamLimits(self.max_pixels, self.max_duration_s, self.tail_tolerance_s)
        limits.check_size(stream.codec_context.width, stream.codec_context.height)
        decoder = open_strict_decoder(stream)
        second = open_second_decoder(stream) if self.decode_twice else None
        checks = StreamChecks(stream, limits)
        shape = None
        for packet in container.demux(stream):
            checks.check_packet(packet)
            decoder_input = packet if packet.size else None  # the empty packet at the end flushes the decoder
            frames = decoder.decode(decoder_input)
            if second is not None:
                second.check(decoder_input, frames)
            for frame in frames:
                time_s = checks.check_frame(frame)
                if shape is None:
                    shape = _read_shape(
                        stream, frame if decoder is stream.codec_context else _decode_own_frame(stream, packet)
                    )
                    limits.check_size(*shape.square_size)
                yield _Decoded(frame, time_s, shape, stream.index, find_transfer(frame, stream))
        checks.check_end(container)


def _decode_own_frame(stream: av.VideoStream, packet: av.Packet) -> av.VideoFrame:
    """Decode the first frame with the stream's own decoder: only this one knows the rotation in the container."""
    frames = stream.decode(packet)
    if not frames:
        raise UntrustedFileError("damaged", "two decoders disagree about the first frame")
    return frames[0]


def _read_shape(stream: av.VideoStream, frame: av.VideoFrame) -> DisplayShape:
    quarter_turns = round(frame.rotation / _QUARTER_DEGREES) % 4
    return DisplayShape(frame.width, frame.height, quarter_turns, stream.sample_aspect_ratio or Fraction(1))


def _convert_thumbnail(frame: av.VideoFrame) -> np.ndarray:
    height, width = THUMBNAIL_SIZE
    small = frame.reformat(width=width, height=height, format="rgb24", interpolation="FAST_BILINEAR", threads=1)
    return small.to_ndarray()


def stretch_to_square_pixels(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Stretch (H, W, 3) uint8 to `size` = (width, height); an image of this size is returned as is."""
    if rgb.shape[1::-1] == size:
        return rgb
    return cv2.resize(rgb, size, interpolation=cv2.INTER_CUBIC)


def rotate_frame(rgb: np.ndarray, quarter_turns: int) -> np.ndarray:
    """Rotate (H, W, 3) counter-clockwise by quarter turns."""
    return np.ascontiguousarray(np.rot90(rgb, quarter_turns))
