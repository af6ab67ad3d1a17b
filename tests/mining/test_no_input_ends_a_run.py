"""Whatever an input holds, `mine_item` gives rows that can be stored, and never an error."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mining_inputs import moving_camera, photograph_with_segments, write_clip, write_photograph, write_tar

from mimicbrush.data.schema import SCHEMA
from mimicbrush.mining import worker
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.plan import find_item
from mimicbrush.mining.refusals import QUARANTINED, REJECTED
from mimicbrush.mining.video.strict_reader import PyAVReader, VideoFrame
from mimicbrush.mining.worker import describe_failure, mine_item
from mimicbrush.ops.rle import SegmentError, decode_segment, run_lengths

OPTIONS = MiningOptions(pairs_per_clip=2)
JPEG, SEGMENTS = photograph_with_segments()
ANNOTATION = json.dumps(SEGMENTS).encode()
BOTH = {"jpg": JPEG, "json": ANNOTATION}
HEIGHT, WIDTH = 80, 96

#: Numbers that break what is written without them in mind.
numbers = st.one_of(
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, HEIGHT, WIDTH, HEIGHT * WIDTH, 10**4299, -(10**4299), True, False, float(HEIGHT)]),
    st.floats(),
)
texts = st.text(st.characters(codec=None, categories=None), max_size=30)
json_values = st.recursive(
    st.one_of(st.none(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)
counts = st.one_of(json_values, st.lists(numbers, max_size=6), st.text("0123PQRSTabclmno~@ ", max_size=40))
segmentations = st.fixed_dictionaries({"size": st.one_of(st.just([HEIGHT, WIDTH]), json_values), "counts": counts})


def mine(root: Path, name: str, reader: Any = None, spool: Path | None = None) -> dict[str, tuple[str, str]]:
    """path -> (reason, detail) of what one input gives; each row is one that the manifest can hold."""
    item = find_item(root / name, root)
    assert item is not None
    outcome = mine_item(root, item, reader or PyAVReader(), OPTIONS, spool or root / "spool")
    rows = [row | {"pair_id": ""} for file in outcome.files for row in file.rows]
    stored = pa.Table.from_pylist(rows, SCHEMA)
    stored.validate(full=True)
    for row in stored.to_pylist():
        words = {"pair": {""}, "rejected": set(REJECTED), "quarantined": set(QUARANTINED)}[row["status"]]
        assert row["reason"] in words
        assert row["detail"].isprintable() and len(row["detail"]) <= 500
    assert rows, "every input has a row"
    return {row["source_path"]: (row["reason"], row["detail"]) for row in stored.to_pylist()}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    (root / "a.jpg").write_bytes(JPEG)
    return root


def mine_annotation(root: Path, annotation: bytes) -> tuple[str, str]:
    (root / "a.json").write_bytes(annotation)
    return mine(root, "a.jpg")["a.jpg"]


@given(segmentation=segmentations)
def test_any_run_lengths_are_a_mask_or_a_reason(photographs: Path, segmentation: Any) -> None:
    annotation = json.dumps({"annotations": [{"segmentation": segmentation}]}).encode()
    reason, _ = mine_annotation(photographs, annotation)
    assert reason in ("", "no_segment", "bad_segment")
    try:
        mask = decode_segment(segmentation, HEIGHT, WIDTH)
    except SegmentError:
        assert reason == "bad_segment"
    else:
        assert mask.shape == (HEIGHT, WIDTH) and mask.sum() == sum(run_lengths(segmentation, HEIGHT, WIDTH)[1::2])


@given(value=json_values, depth=st.integers(0, 3))
def test_any_json_is_refused_for_its_layout(photographs: Path, value: Any, depth: int) -> None:
    layout = [value, {"annotations": value}, {"annotations": [value]}, {"annotations": [{"segmentation": value}]}][
        depth
    ]
    reason, _ = mine_annotation(photographs, json.dumps(layout).encode())
    assert reason in ("bad_json", "no_segment", "bad_segment")


@given(st.binary(min_size=1, max_size=60), st.integers(0, len(ANNOTATION)), st.integers(0, 30))
def test_any_bytes_in_place_of_some_are_a_reason_or_the_same_segments(
    photographs: Path, data: bytes, at: int, length: int
) -> None:
    reason, _ = mine_annotation(photographs, ANNOTATION[:at] + data + ANNOTATION[at + length :])
    assert reason in ("", "bad_json", "bad_segment", "no_segment")


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        (b'{"size":[80,96],"counts":[%s]}' % b",".join([b"9" * 4300] * 9), "bad_segment"),
        (b'{"size":[80,96],"counts":[%s]}' % (b"9" * 5000), "bad_json"),
        (b'{"size":[80,96],"counts":[1e999]}', "bad_segment"),
        (b'{"size":[80,96],"counts":[NaN, Infinity]}', "bad_segment"),
        (b'{"size":[80.0,96],"counts":"o"}', "bad_segment"),
        (b'{"size":%s,"counts":"o"}' % (b"[" * 900 + b"]" * 900), "bad_segment"),
        (b"[" * 10**6, "bad_json"),
        (b'{"size":[80,96],"counts":"%s"}' % (b"0" * 10**6), "bad_segment"),
        (b'{"size":[80,96],"counts":"\\ud800\\u0000"}', "bad_segment"),
    ],
    ids=["sum", "number", "1e999", "NaN", "real size", "deep size", "deep", "runs of nothing", "surrogate"],
)
def test_json_bombs(photographs: Path, segmentation: bytes, reason: str) -> None:
    annotation = b'{"annotations":[{"segmentation":%s}]}' % segmentation
    assert mine_annotation(photographs, annotation)[0] == reason


class Raising(PyAVReader):
    """Fails at every file with one error."""

    error: BaseException = ValueError()

    def frames(self, path: Path) -> Iterator[VideoFrame]:
        yield from ()
        raise type(self).error


class UnprintableError(Exception):
    def __str__(self) -> str:
        return str(10**5000)


@given(text=texts, kind=st.sampled_from([ValueError, KeyError, RuntimeError, RecursionError, AssertionError, OSError]))
def test_any_error_is_a_reason_that_names_its_type(photographs: Path, text: str, kind: type[Exception]) -> None:
    (photographs / "a.mp4").write_bytes(b"clip")
    Raising.error = kind(text)
    reason, detail = mine(photographs, "a.mp4", Raising())["a.mp4"]
    assert reason == "failed" and detail.startswith(kind.__name__)


def test_errors_without_a_text_and_with_an_address_are_described() -> None:
    assert describe_failure(UnprintableError()) == "UnprintableError"
    assert describe_failure(ValueError("<object at 0x7f00aabbccdd>")) == "ValueError: <object at 0x...>"
    assert describe_failure(PermissionError(13, "Permission denied", "/data/a.mp4")).endswith("Permission denied")


@pytest.mark.parametrize("error", [MemoryError(), av.error.MemoryError(12, "x")])
def test_an_error_of_memory_has_its_word(error: Exception, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"clip")
    Raising.error = error
    assert mine(tmp_path, "a.mp4", Raising())["a.mp4"][0] == "out_of_memory"


def test_a_spool_file_that_cannot_be_written_is_no_fault_of_the_input(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", moving_camera())
    with pytest.raises(OSError, match="No space left"):
        mine(tmp_path, "a.mp4", spool=Path("/dev/full"))


class Unconvertible(PyAVReader):
    """Gives frames of a format that FFmpeg stores, decodes, and cannot turn into RGB."""

    def frames(self, path: Path) -> Iterator[VideoFrame]:
        frame = av.VideoFrame(64, 48, "gray32le")
        for number in range(48):
            to_rgb = partial(frame.to_ndarray, format="rgb24")
            yield VideoFrame(number, number / 24, to_rgb, to_rgb)


def test_a_pixel_format_that_ffmpeg_cannot_convert_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"clip")
    reason, detail = mine(tmp_path, "a.mp4", Unconvertible())["a.mp4"]
    assert reason == "damaged" and detail.startswith("FFmpeg: ")


class Swapping(PyAVReader):
    """Somebody replaces the clip while it is read."""

    def frames(self, path: Path) -> Iterator[VideoFrame]:
        yield from super().frames(path)
        (path.parent / "other.mp4").replace(path)


class Writing(PyAVReader):
    """Somebody writes into the clip while it is read, and its length stays."""

    def frames(self, path: Path) -> Iterator[VideoFrame]:
        yield from super().frames(path)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("reader", [Swapping(), Writing()])
def test_a_clip_that_is_replaced_while_it_is_read_gives_no_pair(reader: PyAVReader, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", moving_camera())
    other = tmp_path / "other.mp4"
    other.write_bytes(path.read_bytes()[:-1] + b"x")
    os.utime(other, ns=(path.stat().st_mtime_ns, path.stat().st_mtime_ns))
    assert mine(tmp_path, "a.mp4")["a.mp4"][0] == ""
    assert mine(tmp_path, "a.mp4", reader)["a.mp4"][0] == "changed"


def test_a_tar_that_is_replaced_while_it_is_read_gives_no_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": JPEG, "a.json": ANNOTATION})
    write_tar(tmp_path / "other.tar", {"b.jpg": JPEG, "b.json": ANNOTATION})
    read = worker.segmented_images.read_segmented_image

    def swap(*arguments: Any) -> Any:
        (tmp_path / "other.tar").replace(tmp_path / "a.tar")
        return read(*arguments)

    monkeypatch.setattr(worker.segmented_images, "read_segmented_image", swap)
    assert mine(tmp_path, "a.tar") == {"a.tar": ("changed", "it was replaced or written to while it was read")}


def test_an_error_at_one_photograph_of_a_tar_costs_only_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs = {f"{number}.{suffix}": data for number in range(3) for suffix, data in BOTH.items()}
    write_tar(tmp_path / "a.tar", photographs)
    read, calls = worker.segmented_images.read_segmented_image, []

    def fail_once(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("\ud800")
        return read(*arguments)

    monkeypatch.setattr(worker.segmented_images, "read_segmented_image", fail_once)
    found = mine(tmp_path, "a.tar")
    assert [reason for reason, _ in found.values()] == ["", "failed", ""]


def test_upper_case_names_are_a_photograph_too(tmp_path: Path) -> None:
    write_photograph(tmp_path, "A")
    (tmp_path / "A.jpg").rename(tmp_path / "A.JPG")
    (tmp_path / "A.json").rename(tmp_path / "A.JSON")
    assert mine(tmp_path, "A.JPG")["A.JPG"][0] == ""


@pytest.mark.parametrize("kind", ["avi", "ts"])
def test_what_ffmpeg_reads_without_a_warning(kind: str, tmp_path: Path) -> None:
    frames = moving_camera()
    path = tmp_path / "a.avi" if kind == "avi" else tmp_path / "a.mp4"
    with av.open(str(path), "w", format="avi" if kind == "avi" else "mpegts") as container:
        stream = container.add_stream("mpeg4" if kind == "avi" else "libx264", rate=24)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for number, frame in enumerate(frames):
            if kind == "avi" and number % 10 == 7:
                continue
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            image.pts, image.time_base = number, Fraction(1, 24)
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))
    reason, detail = mine(tmp_path, path.name)[path.name]
    if kind == "avi":
        assert b"00dc\0\0\0\0" in path.read_bytes()
        assert reason == ""
        whole = path.read_bytes()
        at = whole.index(b"00dc", whole.index(b"00dc", whole.index(b"movi")) + 4)
        for place, damage in ((at, b"JUNK"), (at + 4, bytes(4))):  # a frame that is no dropped one
            path.write_bytes(whole[:place] + damage + whole[place + 4 :])
            assert mine(tmp_path, path.name)[path.name][0] in ("missing_packets", "damaged")
    else:
        assert (reason, "MPEG transport stream" in detail) == ("other_format", True)


def test_a_tar_header_is_a_reason_or_harmless_wherever_it_is_changed(tmp_path: Path) -> None:
    _mine_changed_tars(tmp_path, range(100, 512, 31))


@pytest.mark.slow
def test_a_tar_header_is_a_reason_or_harmless_at_every_byte(tmp_path: Path) -> None:
    _mine_changed_tars(tmp_path, range(0, 3 * 512, 3))


def _mine_changed_tars(folder: Path, places: range) -> None:
    """With the header's checksum mended, as somebody with bad intent would."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (("x" * 101 + ".jpg", JPEG), ("x" * 101 + ".json", ANNOTATION)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    original = data.getvalue()
    for place in places:
        for value in (0xFF, 0x80, 0x00, 0x35):
            changed = bytearray(original)
            changed[place] = value
            start = place // 512 * 512
            header = changed[start : start + 512]
            if place < 512 or place >= 1024:
                total = sum(header[:148]) + 8 * 32 + sum(header[156:])
                changed[start + 148 : start + 156] = b"%06o\0 " % total
            (folder / "a.tar").write_bytes(changed)
            mine(folder, "a.tar")
