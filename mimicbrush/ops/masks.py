"""What is to be repainted: masks as (S, S) uint8, 1 = repaint."""

from __future__ import annotations

import numpy as np


def sift_grid_mask(
    points: np.ndarray,
    size_px: int,
    rng: np.random.Generator,
    *,
    cells: tuple[int, int] = (3, 10),
    matched: float = 0.75,
    unmatched: float = 0.50,
) -> np.ndarray:
    """The paper's mask for video pairs (Sec. 3.3): an N x N grid whose cells are masked at random.

    Args:
        points: (K, 2) matched keypoints (x, y) in canvas pixels; those off the canvas do not count.
        size_px: side of the square canvas.
        rng: source of randomness.
        cells: smallest and largest N, drawn uniformly, both included.
        matched: probability for a cell that holds a matched point.
        unmatched: probability for any other cell.

    Returns:
        (S, S) uint8. Never empty and never full (*ours*: a sample without a hole, or without anything
        around it, teaches nothing): one random cell is then turned.
    """
    low, high = cells
    n = int(rng.integers(low, high + 1))
    column, row = np.floor((points.T + 0.5) * n / size_px).astype(int)
    on_canvas = (column >= 0) & (column < n) & (row >= 0) & (row < n)
    has_match = np.zeros((n, n), bool)
    has_match[row[on_canvas], column[on_canvas]] = True
    masked = rng.random((n, n)) < np.where(has_match, matched, unmatched)
    turned = divmod(int(rng.integers(n * n)), n)
    if masked.all() or not masked.any():
        masked[turned] ^= True
    cell_of_pixel = ((np.arange(size_px) + 0.5) * n / size_px).astype(int)
    return masked[np.ix_(cell_of_pixel, cell_of_pixel)].astype(np.uint8)


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest box (left, top, right, bottom; right and bottom excluded) around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
