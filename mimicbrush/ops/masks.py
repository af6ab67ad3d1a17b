"""Mask strategies: what is to be repainted, as (S, S) uint8, 1 = repaint. None is ever empty or full.

(*Ours*: a sample with nothing to repaint, or with nothing around it, teaches nothing.)

Which of them a sample gets, and the mask of a photograph's segments, is decided in `data.transforms`; masks of a user's
own function come from `data.custom_masks`.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """Sample the paper's mask for video pairs (Sec. 3.3): an N x N grid whose cells are masked at random.

    Args:
        points: (K, 2) matched keypoints (x, y) in canvas pixels; those off the canvas do not count.
        size_px: side of the square canvas.
        rng: random numbers.
        cells: smallest and largest N, sampled uniformly, both included.
        matched: probability for a cell that holds a matched point.
        unmatched: probability for any other cell.

    Returns:
        (S, S) uint8. Where all or none of the cells came out masked, one random cell is turned.
    """
    n = _sample_grid_size(cells, rng)
    # P(cell is masked) = 0.75 where the reference is known to show it, else 0.50: the model gets both cells that it can
    # look up and cells that it must make up (paper Sec. 3.3).
    has_match = count_points_per_cell(points, size_px, n) > 0
    return _grid_mask(np.where(has_match, matched, unmatched), size_px, rng)


def random_grid_mask(
    size_px: int, rng: np.random.Generator, *, cells: tuple[int, int] = (3, 10), probability: float = 0.50
) -> np.ndarray:
    """Sample the grid without matches: one probability for every cell (paper Table 3); else as `sift_grid_mask`."""
    n = _sample_grid_size(cells, rng)
    return _grid_mask(np.full((n, n), probability), size_px, rng)


def fullest_grid_mask(
    points: np.ndarray,
    size_px: int,
    rng: np.random.Generator,
    *,
    cells: tuple[int, int] = (3, 10),
    num_fullest: int = 5,
    fullest: float = 0.7,
    others: float = 0.3,
) -> np.ndarray:
    """Sample the grid of the released data utilities: cells with the most keypoints are masked more often.

    Differs from them in that cells with equally many points are ranked at random, not as a partial sort leaves
    them, and in that the cells cover the canvas where N does not divide its side.

    Args:
        points: (K, 2) keypoints (x, y) of the image, in canvas pixels; those off the canvas do not count.
        size_px: side of the square canvas.
        rng: random numbers.
        cells: smallest and largest N, sampled uniformly, both included.
        num_fullest: how many cells count as the fullest.
        fullest: probability for these.
        others: probability for any other cell.

    Returns:
        (S, S) uint8; see `sift_grid_mask`.
    """
    n = _sample_grid_size(cells, rng)
    counts = count_points_per_cell(points, size_px, n).ravel()
    ranked = np.lexsort((rng.random(n * n), -counts))  # fullest first; the random key breaks ties
    probabilities = np.full(n * n, others)
    probabilities[ranked[:num_fullest]] = fullest
    return _grid_mask(probabilities.reshape(n, n), size_px, rng)


def box_mask(
    size_px: int,
    rng: np.random.Generator,
    *,
    sides: tuple[float, float] = (0.4, 0.9),
    area: float | None = None,
) -> np.ndarray:
    """Sample a single box somewhere on the canvas (paper Table 3, released data utilities).

    Args:
        size_px: side of the square canvas, S.
        rng: random numbers.
        sides: smallest and largest side over S; each side is sampled by itself (released data utilities).
        area: area of the box over that of the canvas. The width is then sampled within `sides` so that the height
            lies within them, too; None leaves both free.

    Returns:
        (S, S) uint8.

    Raises:
        ValueError: no box with sides in this range has this area.
    """
    low, high = sides
    if area is None:
        width, height = rng.uniform(low, high, 2)
    else:
        if not low * low <= area <= high * high:
            raise ValueError(f"no box with sides from {low} to {high} covers {area} of the canvas")
        width = rng.uniform(max(low, area / high), min(high, area / low))
        height = area / width
    # At most one pixel less than the canvas: a range up to 1 must leave something around the box.
    width_px, height_px = (max(1, min(size_px - 1, round(side * size_px))) for side in (width, height))
    left, top = (int(rng.integers(size_px - side + 1)) for side in (width_px, height_px))
    mask = np.zeros((size_px, size_px), np.uint8)
    mask[top : top + height_px, left : left + width_px] = 1
    return mask


def unite_masks(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Unite one or more (H, W) masks of 0 and 1: (H, W) uint8."""
    return np.maximum.reduce(list(masks))


def dilate_mask(mask: np.ndarray, radius_px: int) -> np.ndarray:
    """Grow a mask of 0 and 1 by a disc: (H, W) uint8; 0 px leaves it as it is."""
    if radius_px < 1:
        return mask
    import cv2  # slow, and nothing else here needs it: checking the boxes of a list of edits goes without

    side = 2 * radius_px + 1
    return cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))


def count_points_per_cell(points: np.ndarray, size_px: int, n: int) -> np.ndarray:
    """Count (K, 2) points (x, y) in each cell of an n x n grid over the canvas: (n, n) int, row first."""
    column, row = np.floor((points.T + 0.5) * n / size_px).astype(int)
    on_canvas = (column >= 0) & (column < n) & (row >= 0) & (row < n)
    return np.bincount(row[on_canvas] * n + column[on_canvas], minlength=n * n).reshape(n, n)


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Find the smallest box (left, top, right, bottom; right and bottom excluded) around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _sample_grid_size(cells: tuple[int, int], rng: np.random.Generator) -> int:
    low, high = cells
    return int(rng.integers(low, high + 1))


def _grid_mask(probabilities: np.ndarray, size_px: int, rng: np.random.Generator) -> np.ndarray:
    """(n, n) probabilities -> (S, S) uint8, cell by cell."""
    n = len(probabilities)
    masked = (rng.random((n, n)) < probabilities).astype(np.uint8)
    flipped_cell = divmod(int(rng.integers(n * n)), n)  # sampled always, so that later random numbers do not move
    if masked.all() or not masked.any():
        masked[flipped_cell] ^= 1
    # The cell under each pixel's centre: so the cells cover the canvas where n does not divide its side, too.
    cell_of_pixel = ((np.arange(size_px) + 0.5) * n / size_px).astype(int)
    return masked[:, cell_of_pixel][cell_of_pixel]
