"""Formats that raw videos come in, each made by a real encoder: the frames are those that were encoded."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from mining_inputs import moving_camera, write_clip

from mimicbrush.mining.refusals import UntrustedFileError
from mimicbrush.mining.video.strict_reader import PyAVReader

QUIET = "log-level=none"
SIZE_PX = (160, 96)
REALTIME = {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "0"}
FORMATS = {
    "H.264, B-frames, open GOP": (".mp4", "libx264", "yuv420p", {"x264-params": "open-gop=1:keyint=8:bframes=3"}),
    "H.264, baseline": (".mov", "libx264", "yuv420p", {"profile": "baseline"}),
    "H.264, several slices": (".mp4", "libx264", "yuv420p", {"x264-params": "slices=4"}),
    "H.264, interlaced": (".mp4", "libx264", "yuv420p", {"x264-params": "interlaced=1"}),
    "H.264, 4:2:2": (".mp4", "libx264", "yuv422p", {}),
    "H.264, 4:4:4": (".mkv", "libx264", "yuv444p", {}),
    "H.264, 10 bit": (".mkv", "libx264", "yuv420p10le", {}),
    "HEVC, open GOP": (".mp4", "libx265", "yuv420p", {"x265-params": f"open-gop=1:keyint=8:bframes=3:{QUIET}"}),
    "HEVC, 10 bit": (".mp4", "libx265", "yuv420p10le", {"x265-params": QUIET}),
    "HEVC, 10 bit 4:2:2": (".mkv", "libx265", "yuv422p10le", {"x265-params": QUIET}),
    "HEVC with image hashes": (".mp4", "libx265", "yuv420p", {"x265-params": f"hash=1:{QUIET}"}),
    "HEVC, grey": (".mp4", "libx265", "gray", {"x265-params": QUIET}),
    "AV1": (".mp4", "libsvtav1", "yuv420p", {"preset": "10", "crf": "20", "svtav1-params": "lp=1"}),
    "AV1, 10 bit": (".webm", "libsvtav1", "yuv420p10le", {"preset": "10", "crf": "20", "svtav1-params": "lp=1"}),
    "VP9": (".webm", "libvpx-vp9", "yuv420p", REALTIME),
    "VP9, hidden frames": (".mkv", "libvpx-vp9", "yuv420p", {**REALTIME, "deadline": "good", "lag-in-frames": "9"}),
    "VP9 in MP4": (".mp4", "libvpx-vp9", "yuv444p", REALTIME),
    "VP8, hidden frames": (
        ".webm",
        "libvpx",
        "yuv420p",
        {**REALTIME, "b": "3M", "lag-in-frames": "9"},
    ),
    "MPEG-4, B-frames": (".avi", "mpeg4", "yuv420p", {"qscale": "3", "bf": "2"}),
    "FFV1": (".mkv", "ffv1", "yuv420p", {}),
    "Motion JPEG": (".avi", "mjpeg", "yuvj420p", {"qscale": "3"}),
}


def encode(
    path: Path,
    frames: list[np.ndarray],
    encoder: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    *,
    ticks: list[int] | None = None,
    pixel_aspect: Fraction | None = None,
    rotation: int = 0,
) -> Path:
    """Write frames at 24 fps, or at the given milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=24)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.options = {"crf": "16", "preset": "veryfast", **(options or {})}
        if encoder not in ("libx264", "libx265"):
            stream.options = options or {}
        stream.codec_context.thread_count = 1
        if ticks:
            stream.codec_context.time_base = Fraction(1, 1000)
        if pixel_aspect:
            stream.sample_aspect_ratio = pixel_aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for number, frame in enumerate(frames):
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if ticks:
                image.pts, image.time_base = ticks[number], Fraction(1, 1000)
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))
    return path


def read(path: Path) -> list[np.ndarray]:
    return [frame.to_rgb() for frame in PyAVReader().frames(path)]


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * float(np.log10(255**2 / max(np.mean(np.square(a.astype(float) - b)), 1e-9)))


@pytest.mark.parametrize("name", FORMATS)
def test_frames_are_those_that_were_encoded(tmp_path: Path, name: str) -> None:
    suffix, encoder, pix_fmt, options = FORMATS[name]
    frames = moving_camera(20, SIZE_PX)
    if pix_fmt == "gray":
        frames = [cv2.cvtColor(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB) for frame in frames]
    result = read(encode(tmp_path / f"clip{suffix}", frames, encoder, pix_fmt, options))
    assert len(result) == len(frames)
    for number, image in enumerate(result):
        own_db = psnr_db(image, frames[number])
        assert own_db > 28
        # The camera moves by less than a pixel a frame: the neighbours are near, and the right one is nearest.
        assert own_db > max(psnr_db(image, frames[other]) for other in (number - 1, number - 2))


@pytest.mark.parametrize("name", ["H.264, B-frames, open GOP", "HEVC, 10 bit 4:2:2", "VP9", "MPEG-4, B-frames"])
def test_images_equal_those_of_opencv(tmp_path: Path, name: str) -> None:
    suffix, encoder, pix_fmt, options = FORMATS[name]
    path = encode(tmp_path / f"clip{suffix}", moving_camera(12, SIZE_PX), encoder, pix_fmt, options)
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    for image in read(path):
        done, expected = video.read()
        assert done
        # Two versions of the same conversion to RGB, with and without dithering of 10 bits.
        assert np.abs(image.astype(int) - cv2.cvtColor(expected, cv2.COLOR_BGR2RGB)).max() <= 6
    video.release()


@pytest.mark.parametrize(("suffix", "encoder", "options"), [(".mp4", "libx264", {}), (".webm", "libvpx-vp9", REALTIME)])
def test_variable_frame_rate(tmp_path: Path, suffix: str, encoder: str, options: dict[str, str]) -> None:
    gaps = [40, 40, 7, 500, 33, 33, 33, 1200, 20, 41]
    ticks = [0, *itertools.accumulate(gaps)]
    path = encode(tmp_path / f"clip{suffix}", moving_camera(len(ticks)), encoder, options=options, ticks=ticks)
    times_s = [frame.time_s for frame in PyAVReader().frames(path)]
    np.testing.assert_allclose(times_s, np.array(ticks) / 1000, atol=1e-3)


@pytest.mark.parametrize(
    ("encoder", "pix_fmt", "options"), [("libx264", "yuv444p", {}), ("libvpx-vp9", "yuv420p", REALTIME)]
)
def test_odd_sizes(tmp_path: Path, encoder: str, pix_fmt: str, options: dict[str, str]) -> None:
    frames = moving_camera(4, (99, 67))
    result = read(encode(tmp_path / "clip.mkv", frames, encoder, pix_fmt, options))
    assert all(psnr_db(image, frame) > 30 for image, frame in zip(result, frames, strict=True))


@pytest.mark.parametrize(("encoder", "options"), [("libx264", {}), ("libvpx-vp9", REALTIME)])
@pytest.mark.parametrize("rotation", [90, 270])
def test_rotation_with_pixels_that_are_not_square(
    tmp_path: Path, encoder: str, options: dict[str, str], rotation: int
) -> None:
    """An anamorphic image is stretched, then turned; nothing but the encoder's noise is lost."""
    frames = moving_camera(3, (128, 96))
    squeezed = [cv2.resize(frame, (96, 96), interpolation=cv2.INTER_AREA) for frame in frames]
    path = encode(
        tmp_path / "clip.mp4", squeezed, encoder, options=options, pixel_aspect=Fraction(4, 3), rotation=rotation
    )
    for image, frame in zip(read(path), frames, strict=True):
        assert image.shape == (128, 96, 3)
        assert psnr_db(image, np.rot90(frame, rotation // 90)) > 24


def test_narrow_pixels_gain_lines_and_count_for_the_limit(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mkv", moving_camera(2, (96, 64)), pixel_aspect=Fraction(1, 2))
    assert read(path)[0].shape == (128, 96, 3)
    with pytest.raises(UntrustedFileError) as error:
        list(PyAVReader(max_pixels=96 * 64).frames(path))
    assert error.value.reason == "too_large"


def test_edit_lists_hide_no_frame(tmp_path: Path) -> None:
    """Frames are counted in the stream, so that a number means the same frame whatever shows the file."""
    source = write_clip(tmp_path / "clip.mp4", moving_camera(24))
    trimmed = tmp_path / "trimmed.mp4"
    with av.open(str(source)) as file, av.open(str(trimmed), "w") as target:
        stream = target.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(video=0):
            if packet.size:
                packet.pts -= 5 * 512  # shown before 0: the muxer writes an edit list that skips them
                packet.dts -= 5 * 512
                packet.stream = stream
                target.mux(packet)
    assert b"elst" in trimmed.read_bytes()
    assert len(read(trimmed)) == 24


def test_the_best_of_several_streams_is_read(shared: Path) -> None:
    """`nasa.mp4` holds the same video in two sizes, and more. OpenCV reads the smaller, which comes first."""
    path = shared / "data/videos/nasa.mp4"
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    for frame in itertools.islice(PyAVReader().frames(path), 3):
        assert frame.to_rgb().shape == (270, 480, 3)
        _, smaller = video.read()
        reduced = cv2.resize(frame.to_rgb(), smaller.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert psnr_db(reduced, cv2.cvtColor(smaller, cv2.COLOR_BGR2RGB)) > 26
    video.release()
