from __future__ import annotations

import pickle
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimicbrush.data.sampler import PairMixture, RankBatches
from mimicbrush.errors import DataError

WEIGHTS = st.one_of(
    st.floats(1e-4, 1e3),
    st.decimals("0.01", 1, places=2).map(float),
    st.integers(1, 10**9).map(float),
    st.sampled_from([1.0, 1 / 3, 0.1, 1e-3]),  # many equal ones are due at once
)


def shares_of(weights: list[float]) -> list[Fraction]:
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


@given(st.lists(WEIGHTS, min_size=2, max_size=6), st.integers(0, 3000))
def test_every_prefix_has_each_source_less_than_one_sample_off_its_share(weights: list[float], start: int) -> None:
    shares, mixture = shares_of(weights), PairMixture([10**9] * len(weights), weights, seed=0)
    items: list[set[int]] = [set() for _ in weights]
    for n in range(400 if start % 2 else start):
        component, item = mixture.locate(n)
        assert item not in items[component]  # each of its items once, so it is the next one of an order
        items[component].add(item)
        assert all(abs(len(seen) - share * (n + 1)) < 1 for seen, share in zip(items, shares, strict=True)), n
    # A process that begins later, or elsewhere, finds the same.
    fresh = pickle.loads(pickle.dumps(PairMixture([10**9] * len(weights), weights, seed=0)))
    assert fresh.locate(start) == mixture.locate(start)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.4, 0.3, 0.2, 0.1], [5, 3, 3, 2, 1, 1]])
def test_a_mixture_repeats_when_all_shares_are_whole(weights: list[float]) -> None:
    mixture = PairMixture([10**9] * len(weights), weights, seed=0)
    period = max(share.denominator for share in shares_of(weights))
    order = [mixture.locate(n)[0] for n in range(3 * period)]
    assert order == 3 * order[:period]
    counts = Counter(order[:period])
    assert [counts[i] for i in range(len(weights))] == [share * period for share in shares_of(weights)]


def test_seven_tenths_are_63_of_90_samples_and_the_first_source_comes_when_it_is_due() -> None:
    mixture = PairMixture([100, 100], [0.7, 0.3], seed=0)
    order = [mixture.locate(n)[0] for n in range(1000)]
    assert order[:90].count(0) == 63  # 62 where 0.7 * 90 is a float below 63
    assert [order[:n].count(0) for n in range(1001)] == [7 * n // 10 for n in range(1001)]


def test_every_item_comes_once_per_epoch_in_a_new_order() -> None:
    mixture = PairMixture([7], [1.0], seed=0)
    epochs = [[mixture.locate(epoch * 7 + n)[1] for n in range(7)] for epoch in range(6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3


def test_far_sample_numbers_are_found_at_once() -> None:
    assert PairMixture([5, 3], [0.7, 0.3], seed=0).locate(10**12)[0] in (0, 1)
    assert PairMixture([5, 3, 1], [0.7, 0.2, 0.1], seed=0).locate(10**15)[0] in (0, 1, 2)


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
