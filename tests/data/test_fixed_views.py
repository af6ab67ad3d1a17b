"""`data.fixed_views`: each pair has K augmentations, which take turns, and depend on nothing but the pair."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from mimicbrush.data.batch import collate_samples
from mimicbrush.data.dataset import FixedViewDataset, PairDataset, Sample
from mimicbrush.data.manifest import PairTable
from mimicbrush.data.options import DataOptions
from mimicbrush.data.pair_sources import PairSource, load_pair_sources
from mimicbrush.data.sampler import FixedViews
from mimicbrush.errors import InputError
from mimicbrush.types import TrainBatch

SIZE_PX, COUNT = 32, 3


def options_of(mined: Path, **more: object) -> DataOptions:
    return DataOptions(root=str(mined), heldout_ratio=0.0, fixed_views=COUNT, **more)  # type: ignore[arg-type]


def dataset_of(mined: Path, seed: int = 0, unrelated: float = 0.0, **more: object) -> PairDataset:
    options = options_of(mined, **more)
    pair_sources = load_pair_sources(options)
    return PairDataset(pair_sources, SIZE_PX, options, seed=seed, num_matches=8, unrelated_ratio=unrelated)


def content(sample: object) -> bytes:
    assert isinstance(sample, Sample) and sample.matches is not None
    places = (sample.matches.source_xy, sample.matches.reference_xy)
    return b"".join(each.tobytes() for each in (sample.source, sample.reference, sample.mask, *places))


def test_rows_and_views_are_one_to_one() -> None:
    fixed = FixedViews([4, 1, 7], 3)
    places = [fixed.locate(row) for row in range(len(fixed))]
    assert len(set(places)) == len(fixed) == 36
    assert [fixed.row(*place) for place in places] == list(range(36))
    assert places[0] == (0, 0, 0) and places[14] == (1, 0, 2) and places[-1] == (2, 6, 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_views_of_a_pair_take_turns_and_are_the_same_for_every_seed(mined: Path, seed: int) -> None:
    dataset, rows = (
        dataset_of(mined, seed),
        FixedViewDataset(load_pair_sources(options_of(mined)), SIZE_PX, options_of(mined)),
    )
    # The matches of the rows are as many as data.num_matches; here only pixels are compared.
    known = {(row.source.tobytes(), row.mask.tobytes()) for row in map(rows.__getitem__, range(len(rows)))}
    assert len(known) == len(rows)  # no two views are alike
    videos = len(dataset.pair_sources[0].pairs)
    seen: dict[int, list[tuple[int, bytes]]] = defaultdict(list)
    keys = set()
    number = 0
    while min(map(len, seen.values()), default=0) < COUNT + 1 or len(seen) < videos:
        component, item, epoch = dataset.mixture.locate_in_epoch(number)
        if component == 0:
            sample = dataset[number]
            assert isinstance(sample, Sample) and (sample.source.tobytes(), sample.mask.tobytes()) in known
            seen[item].append((epoch, content(sample)))
            keys.add(sample.key)
        number += 1
    assert len(keys) == sum(map(len, seen.values()))  # noise and drops go on changing
    for views in seen.values():
        for epoch, view in views:
            for other_epoch, other in views:
                assert (view == other) == (epoch % COUNT == other_epoch % COUNT)


def test_without_fixed_views_no_augmentation_comes_twice(mined: Path) -> None:
    options = dataclasses.replace(options_of(mined), fixed_views=0)
    dataset = PairDataset(load_pair_sources(options), SIZE_PX, options, seed=0, num_matches=8)
    assert len({content(dataset[number]) for number in range(60)}) == 60


def test_an_unrelated_reference_is_that_of_a_fixed_view(mined: Path) -> None:
    plain, unrelated = dataset_of(mined), dataset_of(mined, unrelated=0.5)
    options = options_of(mined)
    rows = FixedViewDataset(load_pair_sources(options), SIZE_PX, options)
    references = {row.reference.tobytes() for row in map(rows.__getitem__, range(len(rows)))}
    changed = 0
    for number in range(20):
        one, other = plain[number], unrelated[number]
        assert isinstance(one, Sample) and isinstance(other, Sample) and other.matches is not None
        assert np.array_equal(one.source, other.source) and np.array_equal(one.mask, other.mask)
        assert other.reference.tobytes() in references
        if not np.array_equal(one.reference, other.reference):
            changed += 1
            assert len(other.matches.source_xy) == 0
    assert 4 < changed < 16


def test_rendered_on_the_device_views_are_as_fixed(mined: Path) -> None:
    here, there = (dataset_of(mined, augment_on=place) for place in ("cpu", "device"))
    one, other = (collate_samples([dataset[n] for n in range(4)]).to("cpu") for dataset in (here, there))
    assert isinstance(one, TrainBatch) and isinstance(other, TrainBatch)
    assert (one.source - other.source).abs().mean() < 0.02 and (one.mask == other.mask).all()


@pytest.mark.parametrize("augment_on", ["cpu", "device"])
def test_a_pair_that_cannot_be_read_is_a_blank_row_with_a_reason(mined: Path, augment_on: str) -> None:
    options = options_of(mined, augment_on=augment_on)
    [videos, *_] = load_pair_sources(options)
    table = videos.pairs._table
    place = table.schema.get_field_index("a_length")
    lengths = table["a_length"].to_pylist()
    damaged = PairTable(
        table.set_column(place, table.schema.field(place), [[0, *lengths[1:]]]),
        videos.pairs._root,
        None,
        videos.pairs._rows,
    )
    rows = FixedViewDataset([PairSource("damaged", damaged, videos.weight)], SIZE_PX, options)
    samples = [rows[row] for row in range(2 * COUNT)]
    assert [sample.key for sample in samples] == [-1] * COUNT + [0] * COUNT
    assert all(len(sample.faults) == (sample.key < 0) for sample in samples)
    assert "a_length=0" in samples[0].faults[0]
    assert len(collate_samples(samples).faults) == COUNT


def test_encoded_views_need_their_number() -> None:
    with pytest.raises(InputError, match=r"data\.fixed_views=K"):
        DataOptions(root="pairs", encoded_views="views")
