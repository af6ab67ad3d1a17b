"""Opens decoders that report all faults that they can find, unlike FFmpeg by default.

Refuses an HEVC video as "damaged" if two ways of decoding it give different frames. Errors of the decoders themselves
are handled in `strict_reader`.
"""

from __future__ import annotations

import av
import numpy as np

from mimicbrush.mining.refusals import UntrustedFileError

#: FFmpeg's own VP9 decoder overlooks most damage that the reference decoder reports.
_VP9_DECODER = "libvpx-vp9"


def open_strict_decoder(stream: av.VideoStream) -> av.VideoCodecContext:
    """Open the stream's decoder, or a stricter one, with all fault detection turned into errors."""
    decoder = stream.codec_context
    if decoder.name == "vp9" and _VP9_DECODER in av.codecs_available:
        decoder = _create_decoder(stream, _VP9_DECODER)
    # "aggressive" also checks for unused bits at the end of a slice, a frequent sign of damage; "crccheck" checks the
    # checksums of images, which few HEVC encoders write.
    decoder.options = {"err_detect": "explode+aggressive+crccheck"}
    # Several threads would report an error some frames late, and the pool already uses all cores.
    decoder.thread_count = 1
    return decoder


class SecondDecoder:
    """A second decoder of HEVC that starts each row of blocks at the entry point in the slice header.

    The first decoder continues where the row before ended. In an intact stream, both positions are the same. After a
    flipped bit they differ; FFmpeg reports neither this nor a slice that ends too early. Streams without entry points
    (for wavefront parallel processing, which x265 uses by default) are decoded in the same way by both.
    """

    def __init__(self, stream: av.VideoStream) -> None:
        self.decoder = _create_decoder(stream, "hevc")
        self.decoder.thread_type = "SLICE"
        self.decoder.thread_count = 2
        self.num_frames = 0

    def check(self, packet: av.Packet | None, frames: list[av.VideoFrame]) -> None:
        """Decode a packet again, and compare with the `frames` of the first decoder.

        Raises:
            UntrustedFileError: "damaged" if the images differ.
        """
        others = self.decoder.decode(packet)
        if len(others) != len(frames):
            raise UntrustedFileError("damaged", f"two ways of decoding disagree after frame {self.num_frames}")
        for frame, other in zip(frames, others, strict=True):
            if not _are_equal(frame, other):
                raise UntrustedFileError("damaged", f"two ways of decoding disagree about frame {self.num_frames}")
            self.num_frames += 1


def open_second_decoder(stream: av.VideoStream) -> SecondDecoder | None:
    """Open a second decoder for HEVC; None for other codecs, for which there is no second way."""
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
    """Return the samples of a plane, (height, width in bytes) uint8, without the padding of its lines."""
    lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return lines[: plane.height, : plane.width * sample_bytes]
