"""What mining costs: one strict pass against cold seeks, where the time goes, and what a second worker brings."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from mimicbrush.mining.engines import Resources
from mimicbrush.mining.jpeg import stored_size
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.reader import PyAVReader
from mimicbrush.mining.run import mine
from mimicbrush.mining.select import Selection
from mimicbrush.ops.randomness import generator

#: x264's default distance of key frames, and that of most clips on the web.
GOP = 250
CLIP_S, FPS = 10, 30


def write_clip(path: Path, source: Path | None) -> Path:
    """Ten seconds of 1280 x 720 px with a key frame every `GOP` frames, of a real clip or a rendered one."""
    options = {"g": str(GOP), "keyint_min": str(GOP), "sc_threshold": "0", "preset": "fast", "threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options | {"x264-params": "asm=avx2"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for image in _frames(source):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def _frames(source: Path | None):
    if source is None:
        from mimicbrush.evaluation.clips import ClipSpec, render_frames

        yield from render_frames(ClipSpec("coffee.png", seconds=CLIP_S, fps=FPS, width_px=1280, height_px=720))
        return
    with av.open(str(source)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number == CLIP_S * FPS:
                return
            yield frame.reformat(width=1280, height=720, format="rgb24").to_ndarray()


def read_in_one_pass(path: Path, numbers: Sequence[int]) -> list[np.ndarray]:
    """Ours: all frames are decoded and checked, those asked for converted; (H, W, 3) uint8 each."""
    wanted = set(numbers)
    found = {
        frame.number: stored_size(frame.to_rgb(), MiningOptions.max_side_px)
        for frame in PyAVReader().frames(path)
        if frame.number in wanted
    }
    return [found[number] for number in numbers]


def read_by_cold_seeks(path: Path, numbers: Sequence[int]) -> tuple[list[np.ndarray], int]:
    """The loop that people write: open, seek to the key frame before, decode up to the frame; for every frame.

    Returns:
        The pictures, and how many frames were decoded for them.
    """
    images, num_decoded = [], 0
    for number in numbers:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            pts = round(number / FPS / stream.time_base)
            container.seek(pts, stream=stream)
            for frame in container.decode(stream):
                num_decoded += 1
                if frame.pts >= pts:
                    images.append(stored_size(frame.to_ndarray(format="rgb24"), MiningOptions.max_side_px))
                    break
    return images, num_decoded


def compared_pairs(selection: Selection, options: MiningOptions) -> list[int]:
    """Frame numbers of as many pairs as were compared, drawn at random from the candidates; a, b, a, b, ..."""
    step = round(options.candidate_interval_s * FPS)
    candidates, rng, numbers = selection.num_frames // step, generator(0), []
    for _ in range(selection.num_compared):
        a = int(rng.integers(candidates - 1))
        b = int(rng.integers(a + 1, min(candidates, a + 1 + int(options.max_gap_s / options.candidate_interval_s))))
        numbers += [a * step, b * step]
    return numbers


def scaling(clips: Sequence[Path]) -> list[tuple[int, float]]:
    """(workers, seconds) of mining the same clips with one and with two workers; the same bytes are asserted."""
    times, shards = [], []
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "in"
        inputs.mkdir()
        for clip in clips:
            shutil.copy(clip, inputs)
        for workers in (1, 2):
            output = Path(folder) / f"out{workers}"
            start = time.perf_counter()
            mine(
                inputs, output, MiningOptions(inputs_per_shard=1), resources=Resources(workers=workers), progress=False
            )
            times.append((workers, time.perf_counter() - start))
            shards.append([path.read_bytes() for path in sorted((output / "shards").iterdir())])
    assert shards[0] == shards[1]
    return times
