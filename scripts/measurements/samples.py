"""What a training sample costs the loader: matches that were stored against matches that are found again each time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from measurements.harness import Case, Side

if TYPE_CHECKING:
    from mimicbrush.data.options import DataOptions
    from mimicbrush.data.pair import Pair
    from mimicbrush.data.transforms import SampleTransform, SampleViews

ROOT = Path(__file__).parents[2]
#: Clips of 1280 x 720 px; where they are absent, clips of the same size are rendered.
REAL_CLIPS = [ROOT.parent / "shared" / "data" / "videos" / f"{name}.mp4" for name in ("coffee", "cups", "dog")]
SIZE_PX = 512
#: Samples that one run of a side makes.
ITEMS = 16

#: What the images of a pair are read with: a, b.
Frames = Callable[["Pair"], tuple[np.ndarray, np.ndarray]]


def samples() -> Iterator[Case]:
    """a training sample at 512 px, strong augmentation, one core: against SIFT online, on JPEG pairs and on video"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clips = clips_in(folder / "clips")
        mined = mined_folder(clips, folder / "mined")
        yield from sample_cases(mined, clips, SIZE_PX, ITEMS)


def clips_in(folder: Path, width_px: int = 1280) -> Path:
    """A folder with real clips, or with rendered ones of this width where there are none."""
    from mimicbrush.synthetic.clips import TRAIN_PHOTOGRAPHS, ClipSpec, write_clip

    folder.mkdir()
    if all(clip.is_file() for clip in REAL_CLIPS):
        for clip in REAL_CLIPS:
            shutil.copy(clip, folder)
        return folder
    print("the real clips are missing; rendered clips are used instead")
    for name in TRAIN_PHOTOGRAPHS[:2]:
        spec = ClipSpec(name, seconds=4, width_px=width_px, height_px=width_px * 9 // 16 // 2 * 2)
        write_clip(folder / f"{Path(name).stem}.mp4", spec)
    return folder


def mined_folder(clips: Path, output: Path) -> Path:
    """Mine with the defaults."""
    from mimicbrush.mining.executors import Resources
    from mimicbrush.mining.options import MiningOptions
    from mimicbrush.mining.run import mine_folder

    mine_folder(clips, output, MiningOptions(), resources=Resources(workers=os.cpu_count() or 1), progress=False)
    return output


def sample_cases(mined: Path, clips: Path, size_px: int, items: int) -> Iterator[Case]:
    """Both comparisons, from the same code for decoding, augmentation and masks.

    Args:
        mined: pairs of the clips.
        clips: the folder that was mined.
        size_px: of the canvas.
        items: samples of one run.
    """
    rematched = with_matches_of_the_jpegs(mined)
    with one_core():
        ours, peer = side(rematched, size_px, items), side(rematched, size_px, items, frames_of_jpegs)
        yield Case("JPEG pairs, SIFT online", ours, peer, 0.0, 3, items=items, counts=COUNTS)
        ours, peer = side(mined, size_px, items), side(mined, size_px, items, frames_of_clips(mined, clips))
        # A JPEG has lost something, so the images differ a little; what is masked must not.
        masks = (lambda: [made[-1] for made in ours()]), (lambda: [made[-1] for made in peer()])
        yield Case("video, SIFT online", ours, peer, 0.0, 3, equality=masks, items=items, counts=COUNTS)


def side(mined: Path, size_px: int, items: int, frames: Frames | None = None) -> Side:
    """Samples 0 to `items`, each as (source, reference, mask); with `frames`, matches are found online.

    The loader's default options: `configs/data/augmentation/strong.yaml` holds the same ranges.
    """
    from mimicbrush.data.dataset import PairDataset
    from mimicbrush.data.options import DataOptions
    from mimicbrush.data.pair_sources import load_pair_sources

    options = DataOptions(root=str(mined), video_ratio=1.0, heldout_ratio=0.0)
    dataset = PairDataset(load_pair_sources(options), size_px, options, seed=0)
    if frames is not None:
        dataset.transform = online_view_maker(size_px, options, frames)

    def make() -> list[tuple[np.ndarray, ...]]:
        made = [dataset[number] for number in range(items)]
        return [(sample.source, sample.reference, sample.mask) for sample in made]

    return make


def online_view_maker(size_px: int, options: DataOptions, frames: Frames) -> SampleTransform:
    """Finds the matches of a pair anew for every sample, as the miner does, and goes on as ours does."""
    import cv2

    from mimicbrush.data.pair import Pair
    from mimicbrush.data.transforms import SampleTransform

    @dataclass(frozen=True)
    class Held(Pair):
        """A pair that holds its decoded images; a JPEG is decoded again where it may be smaller."""

        images: dict = field(default_factory=dict)

        def read(self, span: tuple[int, int], reduce: int = 1) -> np.ndarray:
            if reduce == 1:
                return self.images[span]
            if frames is frames_of_jpegs:
                return super().read(span, reduce)
            height, width = (-(-length // reduce) for length in self.size_px)
            return cv2.resize(self.images[span], (width, height), interpolation=cv2.INTER_AREA)

    class Online(SampleTransform):
        def __call__(self, pair: Pair, rng: np.random.Generator) -> SampleViews:
            a, b = frames(pair)
            values = {each.name: getattr(pair, each.name) for each in fields(pair)}
            values["a_points"], values["b_points"] = online_matches(a, b)
            return super().__call__(Held(**values, images={pair.a_span: a, pair.b_span: b}), rng)

    return Online(size_px, options)


def online_matches(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The miner's matches of two frames of stored size, (K, 2) float32 each, rounded as a manifest stores them."""
    from mimicbrush.data.schema import pack_points, unpack_points
    from mimicbrush.mining.jpeg import shrink_to_side
    from mimicbrush.mining.options import MiningOptions
    from mimicbrush.ops.keypoints import Features, match_features, sift_features

    def features(image: np.ndarray) -> Features:
        reduced = shrink_to_side(image, MiningOptions.match_side_px)
        TALLY["sift_mpx"] += reduced.shape[0] * reduced.shape[1] / 1e6
        found = sift_features(reduced)
        ratio = np.array(image.shape[1::-1]) / reduced.shape[1::-1]
        return Features(((found.points + 0.5) * ratio - 0.5).astype(np.float32), found.descriptors)

    matched = match_features(features(a), features(b))
    first, second = (unpack_points(np.array(pack_points(points), np.uint16)) for points in matched)
    return first, second


def frames_of_jpegs(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """The two stored images, whole."""
    return pair.read_a(), pair.read_b()


def frames_of_clips(mined: Path, clips: Path) -> Frames:
    """Decodes the two frames of a pair from its clip, each from the key frame before it.

    Args:
        mined: says when they are shown.
        clips: the folder that was mined.
    """
    import av

    from mimicbrush.data.manifest import read_rows
    from mimicbrush.mining.jpeg import shrink_to_side
    from mimicbrush.mining.options import MiningOptions

    rows = read_rows(mined, ["pair_id", "a_time_s", "b_time_s"]).to_pylist()
    times = {row["pair_id"]: (row["a_time_s"], row["b_time_s"]) for row in rows}

    def frames(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        found = []
        with av.open(str(clips / pair.source_path)) as container:
            stream = container.streams.video[0]
            for time_s in times[pair.pair_id]:
                pts = (stream.start_time or 0) + round(time_s / stream.time_base)
                container.seek(pts, stream=stream)
                for frame in container.decode(stream):
                    TALLY["decoded_mpx"] += frame.width * frame.height / 1e6
                    if frame.pts >= pts:
                        found.append(shrink_to_side(frame.to_ndarray(format="rgb24"), MiningOptions.max_side_px))
                        break
        a, b = found
        return a, b

    return frames


def with_matches_of_the_jpegs(mined: Path) -> Path:
    """A copy of a mined folder whose matches were found in the stored images, not in the frames before.

    A JPEG has lost something; so SIFT finds other points in it, and the peer's masks could not equal ours.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mimicbrush.data.manifest import INDEX_NAME, list_manifest_parts, read_manifest, write_index
    from mimicbrush.data.schema import pack_points

    copy = mined.with_name(mined.name + "-rematched")
    shutil.copytree(mined, copy, ignore=shutil.ignore_patterns("markers"))  # they have the hashes of the parts
    found = {pair.pair_id: online_matches(*frames_of_jpegs(pair)) for pair in read_manifest(mined)}
    for part in list_manifest_parts(copy):
        table = pq.read_table(part)
        ids = table["pair_id"].to_pylist()
        for number, name in enumerate(("a_points", "b_points")):
            points = [pack_points(found[key][number]) if key else [] for key in ids]
            place = table.schema.get_field_index(name)
            table = table.set_column(place, table.schema.field(place), pa.array(points, table.schema.field(place).type))
        pq.write_table(table, part)
    write_index(copy, copy / INDEX_NAME)
    return copy


#: What was decoded and searched; counted in runs that are not timed.
TALLY: Counter[str] = Counter()


def _count(name: str) -> Callable[[Side], float]:
    def count(work: Side) -> float:
        from mimicbrush.data import pair

        decode = pair.decode_jpeg

        def counting(data: bytes, reduce: int = 1, size_px: tuple[int, int] | None = None) -> np.ndarray:
            image = decode(data, reduce, size_px)
            TALLY["decoded_mpx"] += image.shape[0] * image.shape[1] / 1e6
            return image

        TALLY.clear()
        pair.decode_jpeg = counting
        try:
            work()
        finally:
            pair.decode_jpeg = decode
        return TALLY[name]

    return count


COUNTS = {name: _count(name) for name in ("decoded_mpx", "sift_mpx")}


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process, with all its threads, on one core, where the system can (Linux)."""
    import cv2
    import torch

    threads = cv2.getNumThreads(), torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        cv2.setNumThreads(threads[0])
        torch.set_num_threads(threads[1])
        if cores:
            os.sched_setaffinity(0, cores)
