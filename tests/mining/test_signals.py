"""HDR and interlaced videos: noted, counted, and converted, kept or left out as the options say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mining_inputs import moving_camera, write_clip

from mimicbrush.cli.mine import report
from mimicbrush.data.manifest import PLAN_NAME, read_rows
from mimicbrush.errors import InputError
from mimicbrush.mining.executors import Resources
from mimicbrush.mining.options import HDR, INTERLACED, MiningOptions
from mimicbrush.mining.plan import Item, add_earlier_options, make_plan
from mimicbrush.mining.run import mine_folder
from mimicbrush.mining.verify.folder import verify_folder
from mimicbrush.mining.video.conversions import deinterlace, tone_map
from mimicbrush.mining.video.other_readers import DecordReader, TorchCodecReader, open_reader
from mimicbrush.mining.video.strict_reader import PyAVReader
from mimicbrush.mining.worker import MinedFile, mine_item

TRANSFERS = {"PQ": 16, "HLG": 18}
SIZE_PX = (96, 64)
#: From the primaries of BT.709 to those of BT.2020 (BT.2087).
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])


def to_hdr(pixels: np.ndarray, transfer: str) -> np.ndarray:
    """What an HDR video stores for (..., 3) colours of sRGB whose white is the diffuse white of HDR: 0..1 (BT.2100)."""
    value = pixels / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4) @ TO_BT2020.T
    nits = 203 * linear
    if transfer == "PQ":
        power = (nits / 10_000) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    luma = nits @ [0.2627, 0.6780, 0.0593] / 1000
    scene = nits / 1000 * np.maximum(luma, 1e-12)[..., None] ** (1 / 1.2 - 1)
    logarithm = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-12)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), logarithm)


def hdr_frame(pixels: np.ndarray, transfer: str, pixel_format: str) -> av.VideoFrame:
    codes = np.ascontiguousarray(np.rint(to_hdr(pixels, transfer) * 65535).astype(np.uint16))
    frame = av.VideoFrame.from_ndarray(codes, format="rgb48le").reformat(format=pixel_format, dst_colorspace=9)
    frame.color_trc, frame.color_primaries, frame.colorspace, frame.color_range = TRANSFERS[transfer], 9, 9, 1
    return frame


def write_signal(path: Path, frames: Sequence[np.ndarray], *, transfer: str = "", encoder: str = "libx264") -> Path:
    """An HDR clip; or, without a transfer, an interlaced one, each of whose frames holds fields of two of `frames`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=24)
        (stream.width, stream.height), stream.pix_fmt = SIZE_PX, "yuv420p10le" if transfer else "yuv420p"
        stream.codec_context.thread_count = 1
        if transfer:
            stream.options = {"crf": "10", "preset": "ultrafast" if encoder == "libx264" else "12"}
            stream.codec_context.color_trc, stream.codec_context.color_primaries = TRANSFERS[transfer], 9
            stream.codec_context.colorspace, stream.codec_context.color_range = 9, 1
            images = [hdr_frame(frame, transfer, "yuv420p10le") for frame in frames]
        else:
            stream.options = {"flags": "+ildct+ilme", "crf": "10", "preset": "ultrafast", "x264-params": "tff=1"}
            if encoder == "mpeg2video":
                stream.options = {"flags": "+ildct+ilme", "qscale": "2"}
            images = []
            for first, second in zip(frames[::2], frames[1::2], strict=False):
                woven = first.copy()
                woven[1::2] = second[1::2]
                images.append(av.VideoFrame.from_ndarray(woven, format="rgb24"))
        for image in images:
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))
    return path


def fast_camera(num_frames: int) -> list[np.ndarray]:
    """A camera that moves by three pixels a frame, so that two fields differ."""
    return moving_camera(num_frames * 5, SIZE_PX)[::5]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    write_clip(folder / "plain.mp4", moving_camera(48, SIZE_PX))
    write_signal(folder / "pq.mp4", moving_camera(48, SIZE_PX, seed=1), transfer="PQ")
    write_signal(folder / "hlg.mkv", moving_camera(48, SIZE_PX, seed=2), transfer="HLG")
    write_signal(folder / "interlaced.mkv", moving_camera(96, SIZE_PX, seed=3))
    return folder


def mine(clips: Path, name: str, tmp_path: Path, options: MiningOptions) -> MinedFile:
    reader = open_reader("pyav", tone_map=options.hdr == "tone_map", deinterlace=options.interlaced == "deinterlace")
    item = Item(name, "video", (clips / name).stat().st_size)
    (mined,) = mine_item(clips, item, reader, options, tmp_path / "spool").files
    return mined


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(((a.astype(float) - b) ** 2).mean()))


@given(st.sampled_from(["PQ", "HLG"]), st.integers(0, 2**32 - 1))
def test_colours_below_white_are_those_of_sdr(transfer: str, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 220, (8, 8, 3), np.uint8)
    shown = tone_map(hdr_frame(pixels, transfer, "gbrp12le" if seed % 2 else "yuv444p12le"), transfer)
    assert np.abs(shown.astype(int) - pixels).max() <= 4  # of 255: a saturated colour in 12 bits of YUV


@pytest.mark.parametrize("transfer", ["PQ", "HLG"])
def test_light_above_white_is_ordered_and_keeps_its_hue(transfer: str) -> None:
    codes = np.linspace(0, 65535, 256).astype(np.uint16)[None, :, None].repeat(3, 2).repeat(2, 0)
    codes[1, :, 2] = 0  # yellow
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(codes), format="rgb48le")
    frame.color_primaries = 1
    grey, yellow = tone_map(frame, transfer)
    assert (np.diff(grey.astype(int), axis=0) >= 0).all() and grey[0].max() == 0 and grey[-1].min() >= 250
    assert len(np.unique(grey[grey > 240])) >= 8  # what is brighter than white is not all the same
    assert np.abs(yellow[:, 0].astype(int) - yellow[:, 1]).max() <= 1 and yellow[:, 2].max() == 0


@pytest.mark.slow
def test_it_agrees_with_ffmpeg_below_white() -> None:
    pixels = np.random.default_rng(0).integers(60, 200, (16, 16, 3), np.uint8)
    frame = hdr_frame(pixels, "PQ", "yuv444p12le")
    frame.pts, frame.time_base = 0, Fraction(1, 24)
    graph = av.filter.Graph()
    chain = [graph.add_buffer(width=16, height=16, format=frame.format, time_base=frame.time_base)]
    options = "out_primaries=bt709:out_transfer=iec61966-2-1:intent=relative_colorimetric"
    for name, text in (("scale", options), ("format", "rgb24"), ("buffersink", "")):
        chain.append(graph.add(name, text))
        chain[-2].link_to(chain[-1])
    graph.configure()
    graph.push(frame)
    differences = np.abs(tone_map(frame, "PQ").astype(int) - graph.pull().to_ndarray())
    assert differences.mean() < 4 and differences.max() < 20  # FFmpeg interpolates in a small table


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p10le", "yuv411p", "gray"])
def test_deinterlacing_gives_the_first_field_whole(pixel_format: str) -> None:
    first, second = fast_camera(8)[0], fast_camera(8)[7]
    grey = [np.repeat(cv2.cvtColor(each, cv2.COLOR_RGB2GRAY)[..., None], 3, 2) for each in (first, second)]
    woven = grey[0].copy()
    woven[1::2] = grey[1][1::2]
    frame = av.VideoFrame.from_ndarray(woven, format="rgb24").reformat(format=pixel_format)
    frame.pts, frame.time_base = 5, Fraction(1, 24)
    whole = deinterlace(frame).to_ndarray(format="rgb24")
    assert difference(whole, grey[0]) < 8 < 25 < difference(woven, grey[0])


@pytest.mark.parametrize("transfer", ["PQ", "HLG"])
@pytest.mark.parametrize("encoder", ["libx264", "libsvtav1"])
def test_the_reader_notes_and_converts_hdr(encoder: str, transfer: str, tmp_path: Path) -> None:
    frames = moving_camera(6, SIZE_PX)
    path = write_signal(tmp_path / "hdr.mp4", frames, transfer=transfer, encoder=encoder)
    assert PyAVReader().scan(path).transfer == transfer
    for number, (mapped, kept) in enumerate(
        zip(PyAVReader(tone_map=True).frames(path), PyAVReader().frames(path), strict=True)
    ):
        assert mapped.transfer == kept.transfer == transfer and not mapped.is_interlaced
        assert difference(mapped.to_rgb(), frames[number]) < 12 < 20 < difference(kept.to_rgb(), frames[number])


@pytest.mark.parametrize("encoder", ["libx264", "mpeg2video"])
def test_the_reader_notes_and_deinterlaces_frames(encoder: str, tmp_path: Path) -> None:
    frames = fast_camera(12)
    path = write_signal(tmp_path / "fields.mkv", frames, encoder=encoder)
    assert PyAVReader().scan(path).is_interlaced
    for number, (whole, kept) in enumerate(
        zip(PyAVReader(deinterlace=True).frames(path), PyAVReader().frames(path), strict=True)
    ):
        assert whole.is_interlaced and kept.is_interlaced and whole.transfer == ""
        fields = frames[2 * number : 2 * number + 2]  # which of them is the earlier one, the encoder decides
        assert min(difference(whole.to_rgb(), field) for field in fields) < 13
        assert min(difference(kept.to_rgb(), field) for field in fields) > 18


@pytest.mark.parametrize("reader", [DecordReader, TorchCodecReader])
def test_what_is_converted_is_read_by_pyav_whatever_the_reader(reader: type[DecordReader], tmp_path: Path) -> None:
    hdr = write_signal(tmp_path / "hdr.mp4", moving_camera(3, SIZE_PX), transfer="HLG")
    fields = write_signal(tmp_path / "fields.mkv", fast_camera(6))
    for path, scanner in ((hdr, PyAVReader(tone_map=True)), (fields, PyAVReader(deinterlace=True))):
        frames = zip(reader(scanner).frames(path), scanner.frames(path), strict=True)
        assert all(np.array_equal(a.to_rgb(), b.to_rgb()) for a, b in frames)


@pytest.mark.parametrize(("name", "word", "note"), [
    ("pq.mp4", "hdr", "HDR (PQ): tone-mapped"),
    ("hlg.mkv", "hdr", "HDR (HLG): tone-mapped"),
    ("interlaced.mkv", "interlaced", "interlaced (48 of 48 frames): deinterlaced"),
])  # fmt: skip
def test_each_choice_is_noted_in_the_rows(name: str, word: str, note: str, clips: Path, tmp_path: Path) -> None:
    rows = mine(clips, name, tmp_path, MiningOptions()).rows
    assert {(row["status"], row["detail"]) for row in rows} == {("pair", note)}
    kept = mine(clips, name, tmp_path, MiningOptions(**{word: "keep"})).rows
    assert {(row["status"], row["detail"]) for row in kept} == {("pair", f"{note.split(': ')[0]}: kept as it is")}
    (skipped,) = mine(clips, name, tmp_path, MiningOptions(**{word: "skip"})).rows
    assert (skipped["status"], skipped["reason"]) == ("rejected", word)
    assert f"{word}=keep to accept it" in skipped["detail"]
    (refused,) = mine(clips, name, tmp_path, MiningOptions(min_frames=1000)).rows
    assert refused["reason"] == "too_short" and refused["detail"].startswith(f"{note}; 48 frames")


def test_a_plain_video_has_no_note(clips: Path, tmp_path: Path) -> None:
    strict = MiningOptions(hdr="skip", interlaced="skip")
    assert all(row["detail"] == "" for row in mine(clips, "plain.mp4", tmp_path, strict).rows)


def test_summary_and_report_count_them(clips: Path, tmp_path: Path) -> None:
    options = MiningOptions(pairs_per_clip=2, interlaced="skip")
    mined = mine_folder(clips, tmp_path / "out", options, resources=Resources(workers=1), progress=False)
    assert mined.summary is not None and mined.summary.signals == {"hdr": 2, "interlaced": 1}
    assert (mined.summary.accepted, mined.summary.reasons) == (3, {"interlaced": 1})
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["signals"] == mined.summary.signals
    assert not verify_folder(tmp_path / "out", progress=False).faults
    said = report(mined, tmp_path / "out")
    assert "2 videos are HDR: hdr=tone_map" in said and "1 videos are interlaced: interlaced=skip" in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert "HDR videos: 2 (<code>hdr=tone_map</code>)" in page
    assert "Interlaced videos: 1 (<code>interlaced=skip</code>)" in page
    assert set(read_rows(tmp_path / "out", ["detail"])["detail"].to_pylist()) >= {"HDR (PQ): tone-mapped", ""}


def test_a_folder_of_an_earlier_version_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    options = MiningOptions(pairs_per_clip=2)
    assert add_earlier_options(tmp_path, options) == (options, [])  # nothing is there yet
    plan = json.loads(make_plan(tmp_path, tmp_path, [], options).to_json())
    (tmp_path / PLAN_NAME).write_text(json.dumps(plan))
    assert add_earlier_options(tmp_path, options) == (options, [])
    for name in ("hdr", "interlaced"):
        del plan["options"][name]
    (tmp_path / PLAN_NAME).write_text(json.dumps(plan))
    earlier, notes = add_earlier_options(tmp_path, options)
    assert earlier == replace(options, hdr="keep", interlaced="keep")
    assert make_plan(tmp_path, tmp_path, [], earlier).options == plan["options"]  # it still counts as the same
    # And nobody is left to think that a video was converted.
    assert [note.split(" by an earlier")[0] for note in notes] == [
        f"hdr=tone_map is not possible here: {tmp_path} was started with hdr=keep",
        f"interlaced=deinterlace is not possible here: {tmp_path} was started with interlaced=keep",
    ]
    assert add_earlier_options(tmp_path, earlier) == (earlier, [])


@pytest.mark.parametrize("name", ["hdr", "interlaced"])
def test_other_choices_are_errors(name: str) -> None:
    choices = ", ".join(HDR if name == "hdr" else INTERLACED)
    for value, typed in (("", ""), ("tonemap", "tonemap"), (None, "null"), (True, "true"), (1, "1")):
        with pytest.raises(InputError, match=f"{name}={typed}: expected one of {choices}"):
            MiningOptions(**{name: value})
