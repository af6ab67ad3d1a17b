"""What mining costs: one strict pass against cold seeks, where the time goes, and what a second worker brings.

`mining_choice` has the rest: how pairs are chosen.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from measurements.harness import Case, Side
from measurements.samples import REAL_CLIPS, clips_in, one_core

if TYPE_CHECKING:
    import numpy as np

    from mimicbrush.mining.options import MiningOptions
    from mimicbrush.mining.pair_selection import Selection

#: x264's default distance of key frames, and that of most clips on the web.
GOP = 250
CLIP_S, FPS, SIZE_PX = 10, 30, (1280, 720)


def mining() -> Iterator[Case]:
    """reading a clip with a key frame every 250 frames: one strict pass against cold seeks; costs; a second worker"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = write_clip(folder / "gop250.mp4")
        with one_core():
            yield from reading_cases(clip)
        for workers, seconds in scaling(clips_in(folder / "clips", SIZE_PX[0]), folder):
            print(f"{'workers=' + str(workers):>22}  {seconds:.2f} s for the clips of `samples`, start-up included")


def reading_cases(clip: Path) -> Iterator[Case]:
    """The frames of the pairs that are kept, and of all pairs that are compared on the way."""
    from mimicbrush.mining.options import MiningOptions
    from mimicbrush.mining.pair_selection import select_pairs
    from mimicbrush.mining.video.strict_reader import PyAVReader

    options = MiningOptions()
    selection = select_pairs(PyAVReader().frames(clip), options)
    kept = [number for pair in selection.pairs for number in (pair.a_frame, pair.b_frame)]

    def figures() -> dict[str, object]:
        total = sum(selection.seconds.values())
        shares = {f"{step}_share": seconds / total for step, seconds in selection.seconds.items()}
        per_pair = {f"{step}_ms": 1e3 * selection.seconds[step] / selection.num_compared for step in ("ssim", "sift")}
        return {"mined_s": total, **shares, **per_pair}

    for case, numbers, more in (
        (f"{len(selection.pairs)} pairs kept", kept, figures),
        (f"{selection.num_compared} pairs compared", compared_frames(selection, options), dict),
    ):
        ours, peer = FramesInOnePass(clip, numbers), FramesByColdSeeks(clip, numbers)
        counts = {"decoded_frames": decoded_frames}
        yield Case(case, ours, peer, 0.0, 3, counts=counts, figures=more)


def write_clip(path: Path) -> Path:
    """Ten seconds of 1280 x 720 px with a key frame every `GOP` frames: of a real clip, else of a rendered one."""
    import av

    options = {"g": str(GOP), "keyint_min": str(GOP), "sc_threshold": "0", "preset": "fast", "threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options | {"x264-params": "asm=avx2"})
        stream.width, stream.height, stream.pix_fmt = *SIZE_PX, "yuv420p"
        for image in islice(_images(), CLIP_S * FPS):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def _images() -> Iterator[np.ndarray]:
    import av

    from mimicbrush.synthetic.clips import ClipSpec, render_frames

    width, height = SIZE_PX
    if not REAL_CLIPS[-1].is_file():
        print("the real clips are missing; a rendered clip is used instead")
        yield from render_frames(ClipSpec("coffee.png", seconds=CLIP_S, fps=FPS, width_px=width, height_px=height))
        return
    with av.open(str(REAL_CLIPS[-1])) as container:
        for frame in container.decode(video=0):
            yield frame.reformat(width=width, height=height, format="rgb24").to_ndarray()


class FramesInOnePass:
    """Ours: all frames are decoded and checked, those asked for are converted and reduced to the stored size."""

    def __init__(self, clip: Path, numbers: Sequence[int]) -> None:
        self.clip, self.numbers, self.num_decoded = clip, numbers, 0

    def __call__(self) -> list[np.ndarray]:
        """(H, W, 3) uint8 each, at the stored size."""
        from mimicbrush.mining.jpeg import shrink_to_side
        from mimicbrush.mining.options import MiningOptions
        from mimicbrush.mining.video.strict_reader import PyAVReader

        wanted, found = set(self.numbers), {}
        self.num_decoded = 0
        for frame in PyAVReader().frames(self.clip):
            self.num_decoded += 1
            if frame.number in wanted:
                found[frame.number] = shrink_to_side(frame.to_rgb(), MiningOptions.max_side_px)
        return [found[number] for number in self.numbers]


class FramesByColdSeeks:
    """The loop that people write: for every frame open, seek to the key frame before it, and decode up to it."""

    def __init__(self, clip: Path, numbers: Sequence[int]) -> None:
        self.clip, self.numbers, self.num_decoded = clip, numbers, 0

    def __call__(self) -> list[np.ndarray]:
        """(H, W, 3) uint8 each, at the stored size."""
        self.num_decoded = 0
        return [self._frame(number) for number in self.numbers]

    def _frame(self, number: int) -> np.ndarray:
        import av

        from mimicbrush.mining.jpeg import shrink_to_side
        from mimicbrush.mining.options import MiningOptions

        with av.open(str(self.clip)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            pts = round(number / FPS / stream.time_base)
            container.seek(pts, stream=stream)
            for frame in container.decode(stream):
                self.num_decoded += 1
                if frame.pts >= pts:
                    return shrink_to_side(frame.to_ndarray(format="rgb24"), MiningOptions.max_side_px)
        raise AssertionError(f"{self.clip} has no frame {number}")


def decoded_frames(side: Side) -> float:
    """How many frames one run decodes."""
    assert isinstance(side, FramesInOnePass | FramesByColdSeeks)
    side()
    return side.num_decoded


def compared_frames(selection: Selection, options: MiningOptions) -> list[int]:
    """Frame numbers a, b, a, b, ... of as many pairs as were compared, drawn at random from the candidates."""
    from mimicbrush.ops.counter_rng import generator

    step = round(options.candidate_interval_s * FPS)
    reach = int(options.max_gap_s / options.candidate_interval_s)
    num_candidates, rng = selection.num_frames // step, generator(0)
    numbers: list[int] = []
    for _ in range(selection.num_compared):
        a = int(rng.integers(num_candidates - 1))
        b = int(rng.integers(a + 1, min(num_candidates, a + 1 + reach)))
        numbers += [a * step, b * step]
    return numbers


def scaling(clips: Path, folder: Path) -> Iterator[tuple[int, float]]:
    """(workers, seconds) of mining the same clips with one and with two workers; the same bytes are asserted."""
    from mimicbrush.mining.executors import Resources
    from mimicbrush.mining.options import MiningOptions
    from mimicbrush.mining.run import mine_folder

    for clip in list(clips.iterdir()):  # an even number of shards
        shutil.copy(clip, clip.with_stem(clip.stem + "-again"))
    shards: list[list[bytes]] = []
    for workers in (1, 2):
        output = folder / f"mined{workers}"
        start = time.perf_counter()
        mine_folder(
            clips, output, MiningOptions(inputs_per_shard=1), resources=Resources(workers=workers), progress=False
        )
        yield workers, time.perf_counter() - start
        shards.append([path.read_bytes() for path in sorted((output / "shards").iterdir())])
    assert shards[0] == shards[1], "other bytes with two workers"
