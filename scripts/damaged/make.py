"""Damaged clips by a seeded generator: undamaged clips in, files of one class of damage each out.

For `compare_readers.py` and for tests. The undamaged clips are made of real ones, short enough for hundreds of
damaged copies to be decoded within minutes: re-encoded at 320 px, and cut out of the original streams.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np

WIDTH_PX = 320
NUM_FRAMES = 72
#: Frames that are kept of an original stream: enough for damage to spread, few enough to be held at full size.
NUM_ORIGINAL_FRAMES = 40
FAST = {
    "libx264": {"preset": "veryfast", "crf": "23", "g": "24"},
    "libx265": {"preset": "ultrafast", "crf": "26", "x265-params": "keyint=24:log-level=none"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "32", "b": "0", "g": "24"},
    "libsvtav1": {"preset": "11", "crf": "35", "g": "24", "svtav1-params": "lp=1"},
    "mpeg4": {"qscale": "5", "g": "24", "bf": "2"},
}
_FAMILY = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9", "av1": "libsvtav1"}
#: Other formats that the clips are cast into, in turn.
_FURTHER = (("libvpx-vp9", ".webm"), ("libsvtav1", ".mp4"), ("libx265", ".mp4"), ("mpeg4", ".avi"), ("libx265", ".mkv"))


@dataclass(frozen=True)
class Damaged:
    """A damaged file.

    Attributes:
        kind: a key of `DAMAGES`.
        path: of the file.
        origin: the undamaged clip that it was made of.
        is_video: whether the file may give frames at all; a playlist may not.
    """

    kind: str
    path: Path
    origin: Path
    is_video: bool


def make_undamaged(folder: Path, output: Path, *, originals: bool = True) -> list[Path]:
    """Short clips made of those in a folder: the same codec, further codecs, and cuts of the original streams."""
    made = []
    for number, path in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        frames, codec, profile = _read_small(path)
        encoder = _FAMILY.get(codec, "libx264")
        options = {"profile": "baseline"} if profile == "Baseline" else {}
        made.append(encode(output / f"{path.stem}-small{path.suffix}", frames, encoder, options))
        other, suffix = _FURTHER[number % len(_FURTHER)]
        made.append(encode(output / f"{path.stem}-{other}{suffix}", frames, other, {}))
        if originals:
            made.append(_cut(path, output / f"{path.stem}-cut{path.suffix}"))
    return made


def _read_small(path: Path) -> tuple[list[np.ndarray], str, str]:
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        frames = []
        for frame in container.decode(stream):
            height = round(frame.height * WIDTH_PX / frame.width / 2) * 2
            frames.append(frame.to_ndarray(format="rgb24", width=WIDTH_PX, height=height))
            if len(frames) == NUM_FRAMES:
                break
        return frames, stream.codec_context.name, stream.codec_context.profile or ""


def encode(path: Path, frames: list[np.ndarray], encoder: str, options: dict[str, str]) -> Path:
    """Write (H, W, 3) frames at 24 fps, the index of an MP4 last, as encoders do unless told otherwise."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=24)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {**FAST[encoder], **options}
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def _cut(path: Path, output: Path) -> Path:
    """The first packets of the original stream, as they are."""
    with av.open(str(path)) as source, av.open(str(output), "w") as target:
        stream = source.streams.best("video")
        copy = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        # Leading packets may be shown after the cut: without them a frame would be missing.
        for packet in packets[:NUM_ORIGINAL_FRAMES]:
            packet.stream = copy
            target.mux(packet)
    return output


def make_damaged(clips: list[Path], output: Path, seed: int, repeats: dict[str, int]) -> list[Damaged]:
    """Damage each clip in each way.

    Args:
        clips: undamaged.
        output: an empty folder.
        seed: the same gives the same bytes.
        repeats: kind -> how many per clip, 1 where it is not named.
    """
    made = []
    for kind, damage in DAMAGES.items():
        for clip_number, clip in enumerate(clips):
            for repeat in range(repeats.get(kind, 1)):
                rng = np.random.default_rng([seed, list(DAMAGES).index(kind), clip_number, repeat])
                content, suffix, is_video = damage(clip, rng)
                path = output / f"{kind}-{clip.stem}-{repeat}{suffix or clip.suffix}"
                path.write_bytes(content)
                made.append(Damaged(kind, path, clip, is_video))
    return made


#: What a damage gives: the bytes, another suffix or "", and whether it may give frames.
_Made = tuple[bytes, str, bool]


def _span(rng: np.random.Generator, start: int, end: int, least: int, most: int) -> slice:
    """A random stretch within `start`..`end`, of `least` to `most` bytes."""
    length = int(min(rng.integers(least, most + 1), max(1, end - start)))
    begin = int(rng.integers(start, max(start + 1, end - length + 1)))
    return slice(begin, begin + length)


def _truncate(clip: Path, rng: np.random.Generator) -> _Made:
    data = clip.read_bytes()
    few = rng.random() < 0.3
    keep = len(data) - int(rng.integers(1, 64)) if few else int(len(data) * rng.uniform(0.02, 0.999))
    return data[:keep], "", True


def _break_header(clip: Path, rng: np.random.Generator) -> _Made:
    """Random bytes at the start, random bytes in the index, the index zeroed, or a box of another length."""
    data = bytearray(clip.read_bytes())
    index = _index_span(bytes(data))
    how = int(rng.integers(4))
    if how == 0:
        length = int(rng.integers(4, 65))
        data[:length] = rng.bytes(length)
    elif how == 1:
        part = _span(rng, index.start, index.stop, 16, 200)
        data[part] = rng.bytes(part.stop - part.start)
    elif how == 2:
        part = _span(rng, index.start, index.stop, 32, 400)
        data[part] = bytes(part.stop - part.start)
    else:
        data[index.start : index.start + 4] = rng.bytes(4)
    return bytes(data), "", True


def _index_span(data: bytes) -> slice:
    """Where the `moov` box of an MP4 lies, length and name included; of other containers the first 600 bytes."""
    name = data.rfind(b"moov")
    if data[4:8] != b"ftyp" or name < 4:
        return slice(0, min(600, len(data)))
    start = name - 4
    return slice(start, min(len(data), start + int.from_bytes(data[start:name], "big")))


def _media_span(data: bytes) -> slice:
    """Where the images lie: all but the index, roughly."""
    index = _index_span(data)
    return slice(index.stop, len(data)) if index.start < len(data) // 2 else slice(40, index.start)


def _playlist(clip: Path, rng: np.random.Generator) -> _Made:
    target = str(clip.resolve())
    texts = [
        f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:3.0,\n{target}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{target}'\n",
        f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=control:{target}\n",
        f"[playlist]\nFile1={target}\nNumberOfEntries=1\nVersion=2\n",
        f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        f'<Representation id="0" mimeType="video/mp4"><BaseURL>{target}</BaseURL></Representation></AdaptationSet>'
        f"</Period></MPD>\n",
    ]
    return texts[int(rng.integers(len(texts)))].encode(), (".mp4", ".mkv", ".avi")[int(rng.integers(3))], False


def _empty(_clip: Path, rng: np.random.Generator) -> _Made:
    return bytes(int(rng.integers(0, 2) * rng.integers(1, 9))), "", False


def _wrong_extension(clip: Path, rng: np.random.Generator) -> _Made:
    """Text, an image, an archive or a sound under .mp4; or the clip under another container's name."""
    how = int(rng.integers(6))
    if how == 0:
        return b"This is a line of text.\n" * 400, ".mp4", False
    if how in (1, 2):
        image = rng.integers(0, 256, (90, 160, 3), np.uint8)
        _, data = cv2.imencode(".jpg" if how == 1 else ".png", image)
        return bytes(data), ".mp4", False
    if how == 3:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.write(clip, clip.name)
        return archive.getvalue(), ".mp4", False
    if how == 4:
        samples = rng.integers(-9000, 9000, 8000, np.int16).tobytes()
        head = b"RIFF" + (36 + len(samples)).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
        form = bytes.fromhex("01000100401f0000803e000002001000")
        return head + form + b"data" + len(samples).to_bytes(4, "little") + samples, ".mp4", False
    return clip.read_bytes(), ".avi" if clip.suffix == ".mp4" else ".mp4", True


def _zero(clip: Path, rng: np.random.Generator) -> _Made:
    data = bytearray(clip.read_bytes())
    for _ in range(int(rng.integers(1, 4))):
        part = _span(rng, 0, len(data), 64, 4096)
        data[part] = bytes(part.stop - part.start)
    return bytes(data), "", True


def _flip(num_flips: int, *, index_only: bool = False) -> Callable[[Path, np.random.Generator], _Made]:
    def damage(clip: Path, rng: np.random.Generator) -> _Made:
        data = bytearray(clip.read_bytes())
        span = _index_span(bytes(data)) if index_only else slice(0, len(data))
        for position in rng.integers(span.start, span.stop, num_flips):
            data[position] ^= 1 << int(rng.integers(8))
        return bytes(data), "", True

    return damage


def _swap(clip: Path, rng: np.random.Generator) -> _Made:
    data = bytearray(clip.read_bytes())
    media = _media_span(bytes(data))
    length = int(rng.integers(64, max(65, min(4096, (media.stop - media.start) // 4))))
    first = int(rng.integers(media.start, media.stop - 2 * length))
    second = int(rng.integers(first + length, media.stop - length + 1))
    a, b = slice(first, first + length), slice(second, second + length)
    data[a], data[b] = data[b], data[a]
    return bytes(data), "", True


def _append(clip: Path, rng: np.random.Generator) -> _Made:
    data = clip.read_bytes()
    return data + (rng.bytes(int(rng.integers(1, 5000))) if rng.random() < 0.5 else data), "", True


def _duplicate(clip: Path, rng: np.random.Generator) -> _Made:
    """A chunk that comes twice, so that all behind it is shifted."""
    data = clip.read_bytes()
    part = _span(rng, 0, len(data), 16, 4096)
    return data[: part.stop] + data[part] + data[part.stop :], "", True


def _remove(clip: Path, rng: np.random.Generator) -> _Made:
    data = clip.read_bytes()
    part = _span(rng, 0, len(data), 16, 4096)
    return data[: part.start] + data[part.stop :], "", True


def _randomise(clip: Path, rng: np.random.Generator) -> _Made:
    data = bytearray(clip.read_bytes())
    media = _media_span(bytes(data))
    part = _span(rng, media.start, media.stop, 16, 1024)
    data[part] = rng.bytes(part.stop - part.start)
    return bytes(data), "", True


#: kind -> (an undamaged clip, randomness) -> the damaged bytes.
DAMAGES: dict[str, Callable[[Path, np.random.Generator], _Made]] = {
    "truncation": _truncate,
    "broken header": _break_header,
    "playlist": _playlist,
    "empty": _empty,
    "wrong extension": _wrong_extension,
    "zeroed blocks": _zero,
    "1 bit": _flip(1),
    "4 bits": _flip(4),
    "16 bits": _flip(16),
    "8 bits of index": _flip(8, index_only=True),
    "random block": _randomise,
    "swapped blocks": _swap,
    "repeated chunk": _duplicate,
    "removed chunk": _remove,
    "appended": _append,
}
