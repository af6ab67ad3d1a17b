from __future__ import annotations

import numpy as np

from mimicbrush.ops.masks import box_mask, dilate_mask, fullest_grid_mask, mask_box, random_grid_mask, sift_grid_mask


def test_matched_cells_are_masked_three_times_in_four_and_others_half_of_the_time() -> None:
    rng = np.random.default_rng(0)
    point = np.array([[10.0, 10.0]])  # in the first cell of every grid
    samples = [sift_grid_mask(point, 90, rng, cells=(5, 5)) for _ in range(4000)]
    matched = np.mean([mask[10, 10] for mask in samples])
    unmatched = np.mean([mask[50, 50] for mask in samples])
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


def test_the_random_grid_is_the_sift_grid_with_equal_probabilities() -> None:
    points = np.random.default_rng(1).uniform(0, 64, (30, 2))
    for seed in range(50):
        grids = [np.random.default_rng(seed) for _ in range(2)]
        with_points = sift_grid_mask(points, 64, grids[0], matched=0.25, unmatched=0.25)
        assert np.array_equal(with_points, random_grid_mask(64, grids[1], probability=0.25))


def test_the_fullest_cells_are_masked_at_seven_tenths_and_others_at_three() -> None:
    rng = np.random.default_rng(0)
    cells = np.array([[0, 0], [1, 2], [4, 4], [3, 0], [2, 2]])  # column, row
    points = np.concatenate([np.repeat(cells * 20.0 + 10, 3, axis=0), [[90.0, 10.0], [500.0, 10.0]]])
    samples = np.mean([fullest_grid_mask(points, 100, rng, cells=(5, 5)) for _ in range(3000)], axis=0)[10::20, 10::20]
    fullest = np.zeros((5, 5), bool)
    fullest[cells[:, 1], cells[:, 0]] = True
    assert np.abs(samples[fullest] - 0.7).max() < 0.035 and np.abs(samples[~fullest] - 0.3).max() < 0.035


def test_boxes_have_the_sides_and_the_area_asked_for() -> None:
    rng = np.random.default_rng(0)
    free = [box_mask(200, rng) for _ in range(400)]
    fixed = [box_mask(200, rng, area=0.5) for _ in range(400)]
    for mask in free + fixed:
        left, top, right, bottom = mask_box(mask)
        assert mask.sum() == (right - left) * (bottom - top)
        assert all(80 <= side <= 180 for side in (right - left, bottom - top))
    assert all(abs(mask.mean() - 0.5) < 0.005 for mask in fixed)
    assert abs(np.mean([mask.mean() for mask in free]) - 0.65**2) < 0.03  # sides uniform and independent: 4 errors
    assert {mask_box(mask)[0] == 0 for mask in free} == {True, False}
    assert not box_mask(8, rng, sides=(1.0, 1.0)).all()


def test_dilation_grows_by_the_radius() -> None:
    mask = np.zeros((41, 41), np.uint8)
    mask[20, 20] = 1
    y, x = np.mgrid[:41, :41]
    distance = np.hypot(x - 20, y - 20)
    grown = dilate_mask(mask, 6)
    assert grown[distance <= 5].all() and not grown[distance > 7].any() and grown[20, 26] == 1
    assert dilate_mask(mask, 0) is mask
