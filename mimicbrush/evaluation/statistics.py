"""Intervals for means over pairs. Pairs of one video are alike, so the bootstrap resamples videos, not pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mimicbrush.ops import counter_rng

RESAMPLES = 10_000
LEVEL = 0.95
#: With fewer sources a percentile bootstrap gives intervals that are too narrow: resamples of so few videos
#: vary less than other videos would. The bounds are reported all the same, with a caution.
MIN_SOURCES = 10
#: Rows of the resampling matrix that are held at once: bounds the memory for large collections.
_CHUNK = 1000


def bootstrap_by_cluster(
    values: np.ndarray,
    clusters: Sequence[str],
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Compute a percentile bootstrap interval of the mean, resampling clusters with replacement.

    Args:
        values: (n,) finite numbers, n >= 1.
        clusters: n names; values of one name are sampled together.
        seed: of the resampling.
        resamples: how many.
        level: of the interval, in 0..1.

    Returns:
        Lower and upper bound of the mean over all values, in the unit of the values.
    """
    _, cluster_of_value = np.unique(np.asarray(clusters), return_inverse=True)
    counts = np.bincount(cluster_of_value).astype(np.float64)
    sums = np.bincount(cluster_of_value, weights=values)
    rng = counter_rng.generator(seed, len(counts))
    means = []
    for start in range(0, resamples, _CHUNK):
        sampled = rng.integers(len(counts), size=(min(_CHUNK, resamples - start), len(counts)))
        means.append(sums[sampled].sum(axis=1) / counts[sampled].sum(axis=1))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
