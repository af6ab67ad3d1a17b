from __future__ import annotations

from collections import Counter

import pytest

from mimicbrush.data.sampler import PairMixture, RankBatches
from mimicbrush.errors import DataError


@pytest.mark.parametrize("ratio", [0.7, 0.3, 1 / 3, 0.999])
def test_the_mixture_holds_for_every_prefix(ratio: float) -> None:
    mixture = PairMixture([50, 20], [ratio, 1 - ratio], seed=0)
    videos = 0
    for n in range(1, 5001):
        videos += mixture.locate(n - 1)[0] == 0
        assert abs(videos - ratio * n) <= 1, n


def test_three_sources_keep_their_shares() -> None:
    mixture = PairMixture([10, 10, 10], [0.5, 0.3, 0.2], seed=0)
    counts = Counter(mixture.locate(n)[0] for n in range(1000))
    assert counts[0] == 500 and abs(counts[1] - 300) <= 2 and abs(counts[2] - 200) <= 2


def test_every_item_comes_once_per_epoch_in_a_new_order() -> None:
    mixture = PairMixture([7], [1.0], seed=0)
    epochs = [[mixture.locate(epoch * 7 + n)[1] for n in range(7)] for epoch in range(6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3


def test_far_sample_numbers_are_found_at_once() -> None:
    assert PairMixture([5, 3], [0.7, 0.3], seed=0).locate(10**12)[0] in (0, 1)


def test_steps_take_the_same_samples_for_any_ranks_and_micro_batches() -> None:
    for world_size, micro_batches, batch_size in [(1, 1, 8), (2, 1, 4), (4, 2, 1), (8, 1, 1), (1, 4, 2)]:
        ranks = [list(RankBatches(3, 5, batch_size, micro_batches, rank, world_size)) for rank in range(world_size)]
        assert all(len(batches) == len(RankBatches(3, 5, batch_size, micro_batches)) for batches in ranks)
        for step in range(2):
            part = slice(step * micro_batches, (step + 1) * micro_batches)
            taken = sorted(n for batches in ranks for batch in batches[part] for n in batch)
            assert taken == list(range((3 + step) * 8, (4 + step) * 8))


@pytest.mark.parametrize(("lengths", "weights"), [([], []), ([0], [1.0]), ([3], [0.0])])
def test_nothing_to_mix_is_an_error(lengths: list[int], weights: list[float]) -> None:
    with pytest.raises(DataError):
        PairMixture(lengths, weights, seed=0)
