"""Readers by name. The optional libraries count as absent here; the slow test runs them where they are installed."""

from __future__ import annotations

import importlib.metadata
import os
import pickle
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from mining_inputs import moving_camera, write_clip

from mimicbrush.errors import InputError
from mimicbrush.mining.refusals import UntrustedFileError
from mimicbrush.mining.video.matroska import find_matroska_fault
from mimicbrush.mining.video.other_readers import DecordReader, TorchCodecReader, open_reader
from mimicbrush.mining.video.strict_reader import PyAVReader

#: Reads clips with both readers and prints a line per clip: the numbers of frames, the largest differences.
COMPARE = """
import sys
from pathlib import Path
import numpy as np
from mimicbrush.mining.video.other_readers import open_reader
other, *paths = sys.argv[1:]
for path in paths:
    pairs = zip(*(open_reader(name).frames(Path(path)) for name in ("pyav", other)), strict=True)
    worst = [0.0, 0]
    for number, (a, b) in enumerate(pairs, 1):
        worst[0] = max(worst[0], abs(a.time_s - b.time_s))
        worst[1] = max(worst[1], int(np.abs(a.to_rgb().astype(int) - b.to_rgb()).max()))
        assert a.number == b.number == number - 1
    print(number, *worst)
"""
#: Damaged and foreign files: what each reader says.
REFUSE = """
import sys
from pathlib import Path
from mimicbrush.mining.video.other_readers import open_reader
from mimicbrush.mining.refusals import UntrustedFileError
for path in sys.argv[2:]:
    try:
        print(sum(1 for _ in open_reader(sys.argv[1]).frames(Path(path))))
    except UntrustedFileError as error:
        print(error.reason)
"""


def test_the_default_is_named_and_takes_limits() -> None:
    assert open_reader("pyav") == PyAVReader()
    assert open_reader("pyav", max_pixels=5, max_duration_s=2.0) == PyAVReader(5, 2.0)
    assert open_reader("pyav").name == f"pyav {av.__version__}"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("opencv", ("reader=opencv", "pyav, decord, torchcodec")),
        ("decord", ("reader=decord", "reader=pyav", "pip install decord")),
        ("torchcodec", ("reader=torchcodec", "reader=pyav", "pip install '.[torchcodec]'")),
    ],
)
def test_what_is_unknown_or_absent_is_an_error_that_helps(name: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        open_reader(name)
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize("reader", [PyAVReader(7, 3.0), DecordReader(PyAVReader(7)), TorchCodecReader()])
def test_readers_travel_to_workers(reader: object) -> None:
    assert pickle.loads(pickle.dumps(reader)) == reader


def test_memory_that_is_short_does_not_accuse_the_file(tmp_path: Path) -> None:
    """FFmpeg's error for it is one of FFmpeg's errors, too; here a table of times asks for gigabytes."""
    path = write_clip(tmp_path / "clip.mp4", moving_camera(2))
    data = bytearray(path.read_bytes())
    data[data.index(b"stts") + 8] = 0x40
    path.write_bytes(data)
    with pytest.raises(MemoryError):
        list(PyAVReader().frames(path))


def test_every_byte_of_a_matroska_file_is_covered(tmp_path: Path) -> None:
    """Each byte changed in turn, in the clusters: its checksum tells. Elsewhere the structure may, too."""
    path = write_clip(tmp_path / "clip.mkv", moving_camera(6))
    assert find_matroska_fault(path) == ""
    data = path.read_bytes()
    start = data.rindex(b"\x1f\x43\xb6\x75")
    end = data.rindex(b"\x1c\x53\xbb\x6b")  # the index of clusters follows them
    changed = tmp_path / "changed.mkv"
    for position in np.random.default_rng(0).choice(np.arange(start, end), 60, replace=False):
        changed.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        assert find_matroska_fault(changed), position
        with pytest.raises(UntrustedFileError):
            list(PyAVReader().frames(changed))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decord", "torchcodec"])
def test_other_libraries_read_the_same_and_refuse_the_same(name: str, shared: Path, tmp_path: Path) -> None:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    clips = [str(shared / "data/videos" / clip) for clip in ("nasa.mp4", "pancake.mkv", "h265.mp4")]
    clips.append(str(write_clip(tmp_path / "turned.mp4", moving_camera(9), rotation=90)))
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(code: str, *arguments: str) -> list[str]:
        command = [sys.executable, "-c", code, name, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=plain).stdout.splitlines()

    assert run(COMPARE, *clips) == ["390 0.0 0", "310 0.0 0", "10 0.0 0", "9 0.0 0"]
    playlist = tmp_path / "playlist.mp4"
    playlist.write_text(f"ffconcat version 1.0\nfile '{clips[0]}'\n")
    refused = [str(shared / "data/broken/corrupted.mp4"), str(playlist), str(tmp_path / "absent.mp4")]
    assert run(REFUSE, *refused) == ["damaged", "damaged", "unreadable"]
