"""`data.num_references`: the references after the first are other frames of the shot, and never the source."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from toy_data import jpeg

from mimicbrush.data.batch import DecodedBatch, collate_samples
from mimicbrush.data.dataset import PairDataset, Sample
from mimicbrush.data.manifest import PairTable, read_manifest
from mimicbrush.data.options import DataOptions
from mimicbrush.data.other_references import ShotFrames
from mimicbrush.data.pair_sources import load_pair_sources
from mimicbrush.data.sampler import RankBatches
from mimicbrush.data.schema import SCHEMA, manifest_row
from mimicbrush.errors import DataError, InputError
from mimicbrush.ops.color_jitter import JitterRanges
from mimicbrush.ops.geometry import GeometryRanges
from mimicbrush.types import TrainBatch

SIZE = 16
UNMOVED = GeometryRanges(flip_probability=0, rotation_deg=0, scale=(1, 1), projective_intensity=0)
STILL = {"geometry": UNMOVED, "jitter": JitterRanges(0, 0, 0, 0)}
#: (video, first frame, last frame). Frames 0..60 of "long" are in one shot: 30 is in two pairs, 20..50 spans both.
PAIRS = [("long", 0, 30), ("long", 30, 60), ("long", 20, 50), ("long", 100, 130), ("other", 10, 40), ("other", 25, 55)]
SHOT, ALONE = [0, 20, 30, 50, 60], [100, 130]


@cache
def frame_image(video: str, frame: int) -> np.ndarray:
    """Texture that differs between frames, around a level that names the frame: (16, 16, 3) uint8."""
    frame = 0 if frame == 50 else frame  # frame 50 shows what frame 0 did
    seed = int(hashlib.sha256(f"{video} {frame}".encode()).hexdigest()[:8], 16)
    return np.random.default_rng(seed).integers(0, 255, (SIZE, SIZE, 1), np.uint8).repeat(3, axis=2)


def write_folder(root: Path) -> Path:
    for folder in ("shards", "manifest"):
        (root / folder).mkdir(parents=True)
    store, rows = bytearray(), []
    for number, (video, first, last) in enumerate(PAIRS):
        values = {}
        for side, frame in (("a", first), ("b", last)):
            data = jpeg(frame_image(video, frame))
            values |= {f"{side}_offset": len(store), f"{side}_length": len(data), f"{side}_frame": frame}
            values[f"{side}_sha256"] = hashlib.sha256(data).hexdigest()
            store += data
        common = {"status": "pair", "kind": "video", "store": "mined", "file": "shards/one.tar", "ssim": 0.5}
        origin = {"source_path": f"{video}.mp4", "source_hash": hashlib.sha256(video.encode()).hexdigest()}
        sizes = {"width_px": SIZE, "height_px": SIZE, "pair_id": f"{video}-{number}"}
        rows.append(manifest_row(**common, **origin, **sizes, **values))
    image = jpeg(frame_image("still", 1))
    rows.append(manifest_row(status="pair", kind="image", store="mined", file="shards/one.tar", width_px=SIZE,
                             height_px=SIZE, source_path="still.jpg", pair_id="still", a_offset=len(store),
                             a_length=len(image), source_hash=hashlib.sha256(b"still").hexdigest()))  # fmt: skip
    (root / "shards" / "one.tar").write_bytes(bytes(store) + image)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), root / "manifest" / "one.parquet")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("other_references") / "mined")


def options_of(folder: Path, count: int, **more: object) -> DataOptions:
    chosen = {"heldout_ratio": 0.0, "video_ratio": 1.0, **STILL, **more}
    return DataOptions(root=str(folder), num_references=count, **chosen)  # type: ignore[arg-type]


def dataset_of(folder: Path, count: int, unrelated: float = 0.0, **more: object) -> PairDataset:
    options = options_of(folder, count, **more)
    return PairDataset(load_pair_sources(options), SIZE, options, seed=5, num_matches=4, unrelated_ratio=unrelated)


def name_of(image: np.ndarray) -> tuple[str, int]:
    """Name the frame that a rendered, unmoved image shows."""
    known = {(video, frame) for video, *frames in PAIRS for frame in frames} | {("still", 1)}
    distances = {each: np.abs(frame_image(*each).astype(int) - image).mean() for each in sorted(known)}
    best = min(distances, key=distances.__getitem__)
    assert distances[best] < 12
    return best


def shots_of(pairs: PairTable) -> ShotFrames:
    return ShotFrames(*map(pairs.column, ("source_key", "a_frame", "b_frame")))


def test_pairs_that_overlap_are_of_one_shot(folder: Path) -> None:
    pairs = read_manifest(folder)
    shots = shots_of(pairs)
    assert [list(shots.find(item)) for item in range(4)] == [SHOT, SHOT, SHOT, ALONE]
    assert [list(shots.find(item)) for item in (4, 5)] == [[10, 25, 40, 55]] * 2
    assert shots.find(6) == {}  # a photograph
    for item in range(6):
        for frame, (row, side) in shots.find(item).items():
            assert shots.number_of(row, side) == frame and pairs[row].source_hash == pairs[item].source_hash
    touching = shots_of(pairs.where(np.arange(len(pairs)) < 2))  # 0..30 and 30..60 share a frame
    assert list(touching.find(0)) == list(touching.find(1)) == [0, 30, 60]
    selected = pairs.where(np.array([False, True, False, True, False, True, True]))
    assert [list(shots_of(selected).find(item)) for item in range(3)] == [[30, 60], ALONE, [25, 55]]


def test_references_are_other_frames_of_the_shot_and_never_the_source(folder: Path) -> None:
    """Frame 50 looks like frame 0: where one is the source, the other is no reference of it, though its number is."""
    pairs = read_manifest(folder)
    dataset, single = dataset_of(folder, 3), dataset_of(folder, 1)
    seen = set()
    for number in range(24):
        sample, one = dataset[number], single[number]
        assert isinstance(sample, Sample) and isinstance(one, Sample)
        for name in ("source", "reference", "mask"):  # nothing else about a sample depends on the other references
            assert np.array_equal(getattr(sample, name), getattr(one, name))
        assert one.other_references == () and len(sample.other_references) == 2
        source, first = name_of(sample.source), name_of(sample.reference)
        others = [name_of(image) for image in sample.other_references]
        item = dataset.mixture.locate(number)[1]
        video = Path(pairs[item].source_path).stem
        assert source not in others and {each[0] for each in others} == {video}
        if video == "long" and item == 3:
            assert others == [first, first]  # no other frame of this shot: another augmentation of the reference
        else:
            assert first not in others or 0 in (source[1], first[1])  # 50 and 0 look alike
            seen.update((source, each) for each in others)
    assert len(seen) > 10


def test_the_source_of_one_pair_is_no_reference_although_another_pair_has_it(folder: Path) -> None:
    """Frame 30 ends the pair (0, 30) and begins (30, 60): as the source, it must not come in by the other pair."""
    dataset = dataset_of(folder, 4)
    thirty = [sample for sample in map(dataset.__getitem__, range(30)) if name_of(sample.source) == ("long", 30)]
    assert len(thirty) > 2
    assert all(("long", 30) not in map(name_of, (each.reference, *each.other_references)) for each in thirty)


def test_a_photograph_gets_further_augmentations_of_itself(folder: Path) -> None:
    dataset = dataset_of(folder, 3, video_ratio=0.0, geometry=GeometryRanges(), jitter=JitterRanges())
    sample = dataset[0]
    assert isinstance(sample, Sample)
    contents = {image.tobytes() for image in (sample.source, sample.reference, *sample.other_references)}
    assert len(contents) == 4
    still = dataset_of(folder, 3, video_ratio=0.0)[0]
    assert isinstance(still, Sample) and {name_of(image) for image in still.other_references} == {("still", 1)}


@pytest.mark.parametrize("fixed_views", [0, 2])
def test_unrelated_references_are_all_of_the_other_video(folder: Path, fixed_views: int) -> None:
    dataset = dataset_of(folder, 3, unrelated=0.5, fixed_views=fixed_views)
    num_unrelated = 0
    for sample in map(dataset.__getitem__, range(16)):
        assert isinstance(sample, Sample) and sample.matches is not None
        images = (sample.source, sample.reference, *sample.other_references)
        source, *references = (name_of(image)[0] for image in images)
        assert len(set(references)) == 1
        num_unrelated += references[0] != source
    assert 2 < num_unrelated < 14


def test_fixed_views_fix_all_references(folder: Path) -> None:
    seeds = [
        PairDataset(load_pair_sources(options), SIZE, options, seed=seed)
        for options in [options_of(folder, 3, fixed_views=1, geometry=GeometryRanges())]
        for seed in (0, 1)
    ]
    contents = []
    for dataset in seeds:
        of_item = {}
        for number in range(12):
            sample = dataset[number]
            assert isinstance(sample, Sample)
            views = b"".join(image.tobytes() for image in (sample.source, *sample.other_references))
            assert of_item.setdefault(dataset.mixture.locate(number)[1], views) == views
        contents.append(of_item)
    assert contents[0] == contents[1] and len(contents[0]) == len(PAIRS)


def test_encoded_views_hold_one_reference(folder: Path) -> None:
    with pytest.raises(InputError, match=r"one reference for each view, but data\.num_references=2"):
        options_of(folder, 2, fixed_views=1, encoded_views="somewhere")
    for count in (0, 5):
        with pytest.raises(InputError, match=r"data\.num_references"):
            options_of(folder, count)


def test_flips_are_shared_by_all_references(folder: Path) -> None:
    mirror = dataclasses.replace(UNMOVED, flip_probability=0.5)
    flips = {}
    for share in (True, False):
        dataset = dataset_of(folder, 3, geometry=mirror, share_flips=share)
        views = [dataset._sample_views(0, number % len(PAIRS), number, 0) for number in range(12)]
        flips[share] = {
            frozenset(view.is_mirrored for view in (each.source, each.reference, *each.other_references))
            for each in views
        }
    assert flips[True] == {frozenset({True}), frozenset({False})} and frozenset({True, False}) in flips[False]


def test_both_ways_of_rendering_and_any_split_give_the_same_batch(folder: Path) -> None:
    more = {"geometry": GeometryRanges(), "jitter": JitterRanges(0, 0, 0, 0)}
    here, there = (dataset_of(folder, 3, augment_on=place, **more) for place in ("cpu", "device"))
    batch, decoded = (collate_samples([each[number] for number in range(4)]) for each in (here, there))
    assert isinstance(batch, TrainBatch) and isinstance(decoded, DecodedBatch)
    cpu = torch.device("cpu")
    rendered = decoded.to(cpu)
    assert batch.other_references is not None and rendered.other_references is not None
    assert batch.other_references.shape == rendered.other_references.shape == (4, 2, 3, SIZE, SIZE)
    assert (batch.references - rendered.references).abs().max() < 0.03
    assert torch.equal(batch.references[:, 0], batch.reference) and batch.references.shape[1] == 3
    moved = batch.to(cpu)
    assert moved.other_references is not None and torch.equal(moved.other_references, batch.other_references)
    for rank in range(2):  # two processes make the same samples as one
        (numbers,) = RankBatches(0, 1, 2, rank=rank, world_size=2)
        part = collate_samples([here[number] for number in numbers])
        assert isinstance(part, TrainBatch) and torch.equal(part.references, batch.references[2 * rank : 2 * rank + 2])
    single = collate_samples([dataset_of(folder, 1)[0]])
    assert isinstance(single, TrainBatch) and single.other_references is None
    assert single.references.shape == (1, 1, 3, SIZE, SIZE)


def test_a_damaged_frame_costs_the_samples_that_it_is_in(tmp_path: Path) -> None:
    """The frame of another pair is damaged: the sample is replaced as a whole, and its fault is named."""
    root = write_folder(tmp_path / "mined")
    pairs = read_manifest(root)
    offset, length = pairs[1].b_span  # type: ignore[misc]  # frame 60, in this pair alone
    with (root / "shards" / "one.tar").open("r+b") as file:
        file.seek(offset)
        file.write(bytes(length))
    one, three = (dataset_of(root, count) for count in (1, 4))
    unlike = [n for n in range(40) if one.mixture.locate(n)[1] in (0, 2)]  # their own frames are whole
    assert all(not one[n].faults for n in unlike)
    faults = [fault for n in unlike for fault in three[n].faults]
    assert faults and all(f"pair {pairs[1].pair_id}" in fault for fault in faults)
    (root / "shards" / "one.tar").unlink()
    with pytest.raises(DataError, match="consecutive pairs"):
        three[0]
