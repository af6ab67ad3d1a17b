from __future__ import annotations

import numpy as np

from mimicbrush.ops.masks import mask_box, sift_grid_mask


def test_matched_cells_are_masked_three_times_in_four_and_others_half_of_the_time() -> None:
    rng = np.random.default_rng(0)
    point = np.array([[10.0, 10.0]])  # in the first cell of every grid
    draws = [sift_grid_mask(point, 90, rng, cells=(5, 5)) for _ in range(4000)]
    matched = np.mean([mask[10, 10] for mask in draws])
    unmatched = np.mean([mask[50, 50] for mask in draws])
    assert abs(matched - 0.75) < 0.03  # four standard errors
    assert abs(unmatched - 0.50) < 0.035


def test_grid_sizes_are_uniform_from_3_to_10() -> None:
    # With certain masking of all but unmatched cells, edges show N: count distinct column boundaries.
    rng = np.random.default_rng(0)
    counts = np.zeros(11, int)
    for _ in range(400):
        # A row every 120 px meets every row of cells, the smallest of which are 252 px high.
        mask = sift_grid_mask(np.zeros((0, 2)), 2520, rng, unmatched=0.5)[::120]
        changes = set(np.flatnonzero(np.any(np.diff(mask.astype(int), axis=1) != 0, axis=0)) + 1)
        fits = [n for n in range(3, 11) if changes <= {2520 * k // n for k in range(1, n)}]
        counts[min(fits)] += 1
    assert counts[3:].min() > 25 and counts[:3].sum() == 0


def test_never_empty_and_never_full() -> None:
    rng = np.random.default_rng(0)
    nothing = np.zeros((0, 2))
    for unmatched in (0.0, 1.0):
        for _ in range(50):
            mask = sift_grid_mask(nothing, 32, rng, unmatched=unmatched)
            assert 0 < mask.mean() < 1


def test_points_off_the_canvas_do_not_count() -> None:
    off = np.array([[-5.0, 3.0], [200.0, 3.0], [3.0, -7.0]])
    first = sift_grid_mask(off, 64, np.random.default_rng(5))
    second = sift_grid_mask(np.zeros((0, 2)), 64, np.random.default_rng(5))
    assert np.array_equal(first, second)


def test_mask_box() -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[4:9, 7:21] = 1
    assert mask_box(mask) == (7, 4, 21, 9)
