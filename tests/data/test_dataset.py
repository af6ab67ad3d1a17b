from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from toy_data import jpeg, photograph, write_mined_folder

from mimicbrush.data.batch import collate_samples
from mimicbrush.data.dataset import PairDataset
from mimicbrush.data.manifest import PairTable, read_manifest, split_pairs
from mimicbrush.data.options import DataOptions, MaskOptions
from mimicbrush.data.pair import Pair, decode_jpeg
from mimicbrush.data.pair_sources import PairSource, split_by_kind
from mimicbrush.data.schema import manifest_row
from mimicbrush.errors import DataError
from mimicbrush.ops.canvas import letterbox
from mimicbrush.ops.color_jitter import JitterRanges
from mimicbrush.ops.geometry import GeometryRanges

STILL = {
    "geometry": GeometryRanges(flip_probability=0, rotation_deg=0, scale=(1, 1), projective_intensity=0),
    "jitter": JitterRanges(0, 0, 0, 0),
}


@pytest.fixture(scope="module")
def pairs(mined: Path) -> PairTable:
    return read_manifest(mined)


def dataset_of(pairs: PairTable, size_px: int, options: DataOptions, seed: int = 0) -> PairDataset:
    return PairDataset(split_by_kind(pairs, options), size_px, options, seed=seed)


def test_batches_are_as_documented(pairs: PairTable) -> None:
    dataset = dataset_of(pairs, 32, DataOptions(), seed=1)
    batch = collate_samples([dataset[n] for n in range(20)])
    assert batch.source.shape == batch.reference.shape == (20, 3, 32, 32)
    assert batch.mask.shape == (20, 1, 32, 32) and set(batch.mask.unique().tolist()) == {0.0, 1.0}
    assert batch.source.min() >= -1 and batch.source.max() <= 1
    assert all(0 < mask.mean() < 1 for mask in batch.mask)


def test_without_augmentation_a_sample_is_the_stored_pair(pairs: PairTable) -> None:
    videos = [pair for pair in pairs if pair.kind == "video"]
    dataset = dataset_of(pairs, 160, DataOptions(video_ratio=1.0, **STILL))
    for n in range(6):
        sample = dataset[n]
        pair = videos[dataset.mixture.locate(n)[1]]
        stored = [letterbox(image, 160, 255) for image in (pair.read_a(), pair.read_b())]
        found = [np.array_equal(sample.source, image) for image in stored]
        assert sum(found) == 1
        assert np.array_equal(sample.reference, stored[1 - found.index(True)])


@pytest.mark.parametrize(("width", "height"), [(427, 241), (854, 480), (333, 500)])
def test_matched_points_go_where_their_pixels_go(tmp_path: Path, width: int, height: int) -> None:
    """A red spot on grey, at sizes that no reduction while decoding divides: the hole must be where it went."""
    spot = (width * 0.5, height * 0.55)
    image = np.full((height, width, 3), 128, np.uint8)
    cv2.circle(image, (round(spot[0]), round(spot[1])), width // 20, (255, 0, 0), -1)
    data = jpeg(image)
    (tmp_path / "shard.tar").write_bytes(data)
    points = np.array([spot], np.float32)
    pair = Pair("p", "video", "v", "h", (height, width), tmp_path / "shard.tar", (0, len(data)), (0, len(data)),
                points, points, 0.5, None, (-1, -1), np.zeros(0, int), np.zeros(0))  # fmt: skip
    mask = MaskOptions(cells=(8, 8), matched=1.0, unmatched=0.0)
    options = DataOptions(video_ratio=1.0, jitter=JitterRanges(0, 0, 0, 0), mask=mask)
    dataset = PairDataset([PairSource("v", [pair], 1.0)], 64, options, seed=0)
    assert dataset.transform(pair, np.random.default_rng(0)).source.pixels.shape[1] < width / 2
    found = []
    for n in range(40):
        sample = dataset[n]
        redness = sample.source[..., 0].astype(float) - sample.source[..., 1]
        if redness.max() > 60 and sample.mask.mean() <= 1 / 64:
            y, x = (np.average(axis, weights=redness.clip(0)) for axis in np.mgrid[:64, :64])
            masked_y, masked_x = (axis[sample.mask > 0].mean() for axis in np.mgrid[:64, :64])
            found.append(max(abs(y - masked_y), abs(x - masked_x)))
    assert len(found) > 20
    assert np.mean(np.array(found) < 5) > 0.9, found  # half a cell, and a pixel of rounding


def test_the_segment_of_an_image_is_masked_where_it_went(pairs: PairTable) -> None:
    dataset = dataset_of(pairs, 64, DataOptions(video_ratio=0.0, **STILL))
    y, x = np.mgrid[:64, :64]
    disc = (x - 32) ** 2 + (y - 32) ** 2 < 15**2
    assert dataset[0].mask[disc].mean() > 0.95
    assert 0.15 < dataset[0].mask.mean() < 0.25  # pi / 16


def test_flips_are_shared_if_asked_for(pairs: PairTable) -> None:
    videos = pairs.where(pairs.column("kind") == "video")[:1]
    geometry = GeometryRanges(rotation_deg=0, scale=(1, 1), projective_intensity=0)
    options = DataOptions(video_ratio=1.0, geometry=geometry, jitter=JitterRanges(0, 0, 0, 0))

    def is_flipped(image: np.ndarray) -> bool:
        plain = [letterbox(p, 160, 255) for p in (videos[0].read_a(), videos[0].read_b())]
        return not any(np.array_equal(image, p) for p in plain)

    for share, expected in ((True, {0}), (False, {0, 1})):
        dataset = dataset_of(videos, 160, dataclasses.replace(options, share_flips=share))
        samples = [dataset[n] for n in range(20)]
        assert {abs(is_flipped(s.source) - is_flipped(s.reference)) for s in samples} == expected


def test_truncated_jpegs_and_missing_shards_are_named(tmp_path: Path) -> None:
    root = write_mined_folder(tmp_path / "pairs")
    pair = read_manifest(root)[-2]
    shard = root / "shards" / "shard-000000.tar"
    full, (offset, length) = shard.read_bytes(), pair.a_span
    shard.write_bytes(full[: offset + length - 50] + bytes(50) + full[offset + length :])
    with pytest.raises(DataError, match=rf"pair {pair.pair_id}: bytes .* are not a complete JPEG"):
        pair.read_a()
    shard.write_bytes(full[: offset + length - 50])
    with pytest.raises(DataError, match=rf"pair {pair.pair_id}: bytes .* end after {length - 50}"):
        pair.read_a()
    shard.unlink()
    with pytest.raises(DataError, match="cannot read"):
        pair.read_a()


def test_reduced_decoding_is_the_image_made_smaller() -> None:
    image = photograph("coffee.png")
    full, half = (decode_jpeg(jpeg(image), reduce) for reduce in (1, 2))
    assert half.shape == (200, 300, 3)
    averaged = full.reshape(200, 2, 300, 2, 3).mean(axis=(1, 3))
    assert np.abs(averaged - half).mean() < 1.5


def test_manifests_that_cannot_be_trusted(tmp_path: Path, pairs: PairTable) -> None:
    with pytest.raises(DataError, match="has no mined pairs"):
        read_manifest(tmp_path)
    root = write_mined_folder(tmp_path / "pairs")
    part = root / "manifest" / "part-000000.parquet"
    table = pq.read_table(part)
    pq.write_table(table.replace_schema_metadata({b"mimicbrush_schema_version": b"99"}), part)
    with pytest.raises(DataError, match="schema version 99"):
        read_manifest(root)
    escaping = table.set_column(
        table.schema.get_field_index("file"), "file", [["../../elsewhere.tar"] * len(table)]
    ).replace_schema_metadata(table.schema.metadata)
    pq.write_table(escaping, part)
    with pytest.raises(DataError, match="outside"):
        read_manifest(root)[0]
    with pytest.raises(KeyError, match="not in the manifest schema"):
        manifest_row(misspelt=1)


def test_splits_are_disjoint_complete_and_by_source(pairs: PairTable) -> None:
    train, heldout = split_pairs(pairs, "train"), split_pairs(pairs, "heldout")
    assert sorted(p.pair_id for p in [*train, *heldout]) == sorted(p.pair_id for p in split_pairs(pairs, "all"))
    assert not {p.source_hash for p in train} & {p.source_hash for p in heldout}
    assert len({p.source_hash for p in heldout if p.kind == "video"}) >= 2
    assert len(split_pairs(pairs, "heldout", heldout_ratio=0)) == 0
