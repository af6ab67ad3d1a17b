from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mining_inputs import moving_camera, write_clip

from mimicbrush.mining.refusals import UntrustedFileError
from mimicbrush.mining.video.strict_reader import PyAVReader

FAST_START = {"movflags": "+faststart"}


def read(path: Path, reader: PyAVReader | None = None) -> list[tuple[int, float, np.ndarray]]:
    return [(frame.number, frame.time_s, frame.to_rgb()) for frame in (reader or PyAVReader()).frames(path)]


def refusal(path: Path, reader: PyAVReader | None = None) -> str:
    with pytest.raises(UntrustedFileError) as error:
        read(path, reader)
    assert error.value.detail
    return error.value.reason


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", moving_camera(), muxer=FAST_START)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi"])
def test_all_frames_come_in_order_with_their_times(tmp_path: Path, suffix: str) -> None:
    frames = moving_camera(30)
    read_frames = read(write_clip(tmp_path / f"clip{suffix}", frames))
    assert [number for number, _, _ in read_frames] == list(range(30))
    np.testing.assert_allclose([time for _, time, _ in read_frames], np.arange(30) / 24, atol=1.5e-3)
    for (_, _, image), frame in zip(read_frames, frames, strict=True):
        assert image.shape == frame.shape
        assert np.abs(image.astype(int) - frame).mean() < 8


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_metadata_is_applied(tmp_path: Path, degrees: int) -> None:
    frames = moving_camera(3)
    _, _, image = read(write_clip(tmp_path / "turned.mp4", frames, rotation=degrees))[0]
    expected = np.rot90(frames[0], degrees // 90)
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < 8


@pytest.mark.parametrize("muxer", [FAST_START, {}], ids=["index first", "index last"])
@pytest.mark.parametrize("missing", [1, 40, 0.5])
def test_a_clip_cut_short_is_found_out(tmp_path: Path, muxer: dict[str, str], missing: float) -> None:
    path = write_clip(tmp_path / "clip.mp4", moving_camera(), muxer=muxer)
    data = path.read_bytes()
    path.write_bytes(data[: -missing if isinstance(missing, int) else int(len(data) * missing)])
    assert refusal(path) in {"damaged", "missing_packets"}


@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
def test_other_containers_cut_short_are_found_out(tmp_path: Path, suffix: str) -> None:
    path = write_clip(tmp_path / f"clip{suffix}", moving_camera())
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(path) == "missing_packets"


@pytest.mark.parametrize("where", [0.3, 0.6, 0.97])
def test_lost_blocks_are_found_out_wherever_they_are(tmp_path: Path, clip: Path, where: float) -> None:
    data = bytearray(clip.read_bytes())
    start = int(len(data) * where)
    data[start : start + 64] = bytes(64)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(data)
    assert refusal(damaged) in {"damaged", "missing_frames"}


@pytest.mark.parametrize(("num_flips", "least"), [(1, 5), (4, 18), (16, 20)])
def test_flipped_bits_are_found_out_unless_few(tmp_path: Path, clip: Path, num_flips: int, least: int) -> None:
    """One flipped bit can give another valid stream, which no decoder can tell; a handful rarely does."""
    data, rng, refused = clip.read_bytes(), np.random.default_rng(3), 0
    flipped = tmp_path / "flipped.mp4"
    for _ in range(20):
        copy = bytearray(data)
        for _ in range(num_flips):
            copy[int(rng.integers(2500, len(data)))] ^= 1 << int(rng.integers(8))
        flipped.write_bytes(copy)
        try:
            read(flipped)
        except UntrustedFileError:
            refused += 1
    assert refused >= least


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"just a line of text\n" * 50, "damaged"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nCLIP\n#EXT-X-ENDLIST\n", "other_format"),
        (b"ffconcat version 1.0\nfile 'CLIP'\n", "damaged"),
        (bytes(5000), "damaged"),
    ],
    ids=["empty", "text", "playlist", "concat", "zeros"],
)
def test_what_is_no_video_is_refused_and_opens_no_other_file(
    tmp_path: Path, clip: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(content.replace(b"CLIP", str(clip).encode()))
    assert refusal(path) == reason


def test_limits(clip: Path) -> None:
    assert refusal(clip, PyAVReader(max_pixels=96 * 64 - 1)) == "too_large"
    assert refusal(clip, PyAVReader(max_duration_s=1.0)) == "too_long"
    assert refusal(clip.with_name("absent.mp4")) == "unreadable"


def test_real_clips_are_whole_and_the_broken_one_is_not(shared: Path) -> None:
    for name in ("h265.mp4", "nasa.mp4", "pancake.mkv", "car.mp4"):
        assert sum(1 for _ in PyAVReader().frames(shared / "data/videos" / name)) >= 10
    assert refusal(shared / "data/broken/corrupted.mp4") == "damaged"
