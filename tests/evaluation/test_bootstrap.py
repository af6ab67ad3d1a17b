from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from mimicbrush.evaluation.statistics import bootstrap_by_cluster


def test_one_value_per_source_is_the_plain_bootstrap_of_scipy() -> None:
    values = np.random.default_rng(3).normal(1.0, 2.0, 40)
    low, high = bootstrap_by_cluster(values, [str(i) for i in range(40)], seed=0)
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=0)
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.04)


def test_copies_of_a_pair_narrow_nothing() -> None:
    values = np.random.default_rng(4).normal(0.0, 1.0, 12)
    names = [str(i) for i in range(12)]
    once = bootstrap_by_cluster(values, names, seed=0)
    often = bootstrap_by_cluster(np.repeat(values, 9), np.repeat(names, 9).tolist(), seed=0)
    assert often == pytest.approx(once)
    assert bootstrap_by_cluster(np.repeat(values, 9), [str(i) for i in range(108)], seed=0)[0] > once[0]


def test_large_sources_weigh_more() -> None:
    """The interval is that of the mean over pairs, not over sources."""
    values, names = np.array([1.0] * 97 + [0.0] * 3), ["large"] * 97 + ["a", "b", "c"]
    low, high = bootstrap_by_cluster(values, names, seed=0)
    assert low == 0.0
    assert high > 0.98


def test_one_source_gives_its_mean_twice_and_a_constant_gives_itself() -> None:
    assert bootstrap_by_cluster(np.array([1.0, 3.0]), ["a", "a"], seed=0) == (2.0, 2.0)
    assert bootstrap_by_cluster(np.full(6, 0.5), list("aabbcc"), seed=0) == (0.5, 0.5)


def test_same_seed_same_interval() -> None:
    values, names = np.random.default_rng(5).normal(0, 1, 10), list("abcdefghij")
    assert bootstrap_by_cluster(values, names, seed=1) == bootstrap_by_cluster(values, names, seed=1)
    assert bootstrap_by_cluster(values, names, seed=1) != bootstrap_by_cluster(values, names, seed=2)
