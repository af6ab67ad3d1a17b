"""Decoders that report all faults that they can find, unlike the default ones of FFmpeg.

Refuses as "damaged" an HEVC video of which two ways of decoding give different frames. Errors of the decoders
themselves are refused in `strict_reader`.
"""

from __future__ import annotations

import av
import numpy as np

from mimicbrush.mining.refusals import UntrustedFileError

#: FFmpeg's own VP9 decoder overlooks most damage that the reference decoder reports.
_VP9_DECODER = "libvpx-vp9"


def open_strict_decoder(stream: av.VideoStream) -> av.VideoCodecContext:
    """Open a decoder of the stream, its own or another, with all fault detection turned into errors."""
    decoder = stream.codec_context
    if decoder.name == "vp9" and _VP9_DECODER in av.codecs_available:
        decoder = _create_decoder(stream, _VP9_DECODER)
    # "aggressive" also minds bits that are left over at the end of a slice, where damage often shows; "crccheck"
    # the checksums of images, which few HEVC encoders write.
    decoder.options = {"err_detect": "explode+aggressive+crccheck"}
    # Several threads would report an error some frames late, and the pool already fills the cores.
    decoder.thread_count = 1
    return decoder


class SecondDecoder:
    """A second decoder of HEVC that starts each row of blocks where the slice header says it begins.

    The first decoder goes on where the row before ended. In a sound stream both places are the same; behind a
    flipped bit they are not, and FFmpeg reports neither that nor a slice that ends too early. Streams without
    entry points (wavefront parallel processing, which x265 writes by default) are decoded alike by both.
    """

    def __init__(self, stream: av.VideoStream) -> None:
        self.decoder = _create_decoder(stream, "hevc")
        self.decoder.thread_type = "SLICE"
        self.decoder.thread_count = 2
        self.num_frames = 0

    def check(self, packet: av.Packet | None, frames: list[av.VideoFrame]) -> None:
        """Decode the packet that the first decoder made `frames` of, and compare.

        Raises:
            UntrustedFileError: "damaged" where the images differ.
        """
        others = self.decoder.decode(packet)
        if len(others) != len(frames):
            raise UntrustedFileError("damaged", f"two ways of decoding disagree after frame {self.num_frames}")
        for frame, other in zip(frames, others, strict=True):
            if not _are_equal(frame, other):
                raise UntrustedFileError("damaged", f"two ways of decoding disagree about frame {self.num_frames}")
            self.num_frames += 1


def open_second_decoder(stream: av.VideoStream) -> SecondDecoder | None:
    """Open a second decoder for HEVC; None for other codecs, which have nothing to compare."""
    return SecondDecoder(stream) if stream.codec_context.name == "hevc" else None


def _create_decoder(stream: av.VideoStream, name: str) -> av.VideoCodecContext:
    decoder = av.CodecContext.create(name, "r")
    decoder.extradata = stream.codec_context.extradata
    return decoder


def _are_equal(a: av.VideoFrame, b: av.VideoFrame) -> bool:
    if (a.width, a.height, a.format.name) != (b.width, b.height, b.format.name):
        return False
    sample_bytes = 1 if a.format.components[0].bits <= 8 else 2
    return all(
        np.array_equal(_samples(plane, sample_bytes), _samples(other, sample_bytes))
        for plane, other in zip(a.planes, b.planes, strict=True)
    )


def _samples(plane: av.VideoPlane, sample_bytes: int) -> np.ndarray:
    """(height, width in bytes) uint8, without what pads the lines."""
    lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return lines[: plane.height, : plane.width * sample_bytes]
