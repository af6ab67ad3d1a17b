"""Converts HDR frames to sRGB, and interlaced frames to whole images."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import av
import cv2
import numpy as np

#: Transfer functions of HDR, and primaries and matrices of colours, as numbered by ISO/IEC 23091-2.
_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
_BT709_PRIMARIES, _UNKNOWN_MATRIX, _BT2020_MATRIX = 1, 2, 9
#: Diffuse white of HDR in cd/m2, and the brightest that HLG shows on the display that it is mastered for (BT.2408).
_WHITE_NITS, _HLG_NITS = 203.0, 1000.0
#: From the primaries of BT.2020 to those of BT.709 and sRGB (BT.2087).
_BT2020_TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
_BT2020_LUMA = np.array([[0.2627, 0.6780, 0.0593]], np.float32)
#: Linear light up to this level (1: diffuse white) is kept; brighter light is compressed into the range from it to 1.
_KNEE = 0.75
_LEVELS = 4096


def find_transfer(frame: av.VideoFrame, stream: av.VideoStream) -> str:
    """Find how a frame stores light, from the frame or the container: "PQ" or "HLG" for HDR, "" for SDR."""
    return _HDR_TRANSFERS.get(int(frame.color_trc)) or _HDR_TRANSFERS.get(int(stream.codec_context.color_trc), "")


def deinterlace(frame: av.VideoFrame) -> av.VideoFrame:
    """Deinterlace a frame: keep the lines of one field, and estimate the others between them.

    FFmpeg's `estdif` needs only this frame, so any frame of a video can be deinterlaced alone.
    """
    graph = av.filter.Graph()
    any_time = Fraction(1, 1000)  # the last frames of a stream have no time base
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or any_time
    )
    chain = (source, graph.add("estdif", "mode=frame"), graph.add("buffersink"))
    for first, second in pairwise(chain):
        first.link_to(second)
    graph.configure()
    graph.push(frame)
    graph.push(None)
    whole = graph.pull()
    assert isinstance(whole, av.VideoFrame)
    return whole


def tone_map(frame: av.VideoFrame, transfer: str) -> np.ndarray:
    """Convert an HDR frame to SDR: (H, W, 3) uint8 in sRGB.

    Colours up to three quarters of diffuse white are those of an SDR video. Brighter ones are compressed by their
    largest channel, so that hues stay. (FFmpeg's filter for this needs `zscale`, which the builds of PyAV lack.)

    Args:
        frame: an HDR frame in any pixel format.
        transfer: "PQ" or "HLG".
    """
    if int(frame.colorspace) == _UNKNOWN_MATRIX:
        frame.colorspace = _BT2020_MATRIX
    stored = frame.to_ndarray(format="rgb48le", threads=1)
    light = _linear_light(transfer)[stored]
    # The display's gamma of 1.2 (BT.2100) is not in the curve, because it depends on all channels.
    if transfer == "HLG":
        luma = cv2.transform(light, _BT2020_LUMA)
        light *= (_HLG_NITS / _WHITE_NITS) * np.power(luma, np.float32(0.2))[..., None]
    if int(frame.color_primaries) != _BT709_PRIMARIES:
        light = cv2.transform(light, _BT2020_TO_BT709.astype(np.float32))
    np.maximum(light, 0, out=light)
    brightest = light.max(axis=2, keepdims=True)
    over = np.maximum(brightest - _KNEE, 0)
    room = 1 - _KNEE
    light *= np.where(over > 0, (_KNEE + room * over / (over + room)) / np.maximum(brightest, _KNEE), 1)
    return _srgb_levels()[np.rint(light * (_LEVELS - 1)).astype(np.uint16)]


@lru_cache(maxsize=2)
def _linear_light(transfer: str) -> np.ndarray:
    """Table of linear light for stored values, (65536,) float32 (BT.2100).

    PQ: relative to diffuse white; HLG: light of the scene, 0..1.
    """
    value = np.arange(2**16) / (2**16 - 1)
    if transfer == "HLG":
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        return np.where(value <= 0.5, value**2 / 3, (np.exp((value - c) / a) + b) / 12).astype(np.float32)
    power = value ** (1 / 78.84375)
    nits = 10_000 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
    return (nits / _WHITE_NITS).astype(np.float32)


@lru_cache(maxsize=1)
def _srgb_levels() -> np.ndarray:
    """Table of sRGB values for linear light in 0..1, (_LEVELS,) uint8."""
    light = np.arange(_LEVELS) / (_LEVELS - 1)
    curve = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * curve).astype(np.uint8)
