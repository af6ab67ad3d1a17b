from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
from PIL import Image

from mimicbrush.ops.correspondence import TITLE_PX, Correspondence, draw_correspondence


def found_in(grid: np.ndarray, token_px: float) -> Correspondence:
    """Tokens whose centres are given, and where each looks at the same place of a reference."""
    ones = np.ones(len(grid), np.float32)
    return Correspondence(grid, grid[::-1].copy(), ones, ones, token_px, token_px)


def test_a_large_picture_is_drawn_as_it_would_be_at_the_panels_size() -> None:
    """And needs little more memory than itself: what is tinted and painted is small."""
    rng = np.random.default_rng(0)
    small = cv2.resize(rng.integers(0, 256, (10, 15, 3)).astype(np.uint8), (600, 400))
    grid = np.stack(np.meshgrid(np.arange(110, 510, 20), np.arange(110, 310, 20)), axis=-1).reshape(-1, 2)
    mask = Image.new("L", (600, 400))
    mask.paste(255, (100, 100, 500, 300))
    expected = draw_correspondence(
        Image.fromarray(small), mask, Image.fromarray(small), found_in(grid.astype(np.float32), 20), 400
    )
    large = Image.fromarray(small.repeat(8, axis=0).repeat(8, axis=1))
    large_mask = mask.resize(large.size, Image.Resampling.NEAREST)
    large_found = found_in((grid * 8).astype(np.float32), 160)
    tracemalloc.start()
    got = draw_correspondence(large, large_mask, large, large_found, 400)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * large.width * large.height  # bytes; with tints of full size it was more than 40
    difference = np.abs(np.asarray(got).astype(int) - np.asarray(expected))
    assert difference.max() <= 2

    first, second, third = np.split(np.asarray(expected)[TITLE_PX:], [608, 1216], axis=1)
    assert not first[101:299, 101:499].any() and np.array_equal(first[:90, :600], small[:90])
    assert np.array_equal(third[:90], small[:90])
    # A token has the colour of the place it looked at, as that is seen in the panel of the reference.
    pairs = zip(grid, grid[::-1], strict=True)
    marked = sum(np.abs(third[y, x].astype(int) - second[v, u]).max() > 2 for (x, y), (u, v) in pairs)
    assert marked <= 24  # under the numbers


def test_spread_attention_is_faded() -> None:
    grid = np.array([[20, 20], [40, 20], [60, 20]], np.float32)
    found = Correspondence(grid, grid, np.ones(3, np.float32), np.zeros(3, np.float32), 20, 20)
    mask = Image.new("L", (80, 40))
    mask.paste(255, (10, 10, 70, 30))
    picture = draw_correspondence(Image.new("RGB", (80, 40)), mask, Image.new("RGB", (80, 40)), found, 40)
    hole = np.asarray(picture)[TITLE_PX:, -80:][12:28, 12:68].reshape(-1, 3)
    assert (hole == 128).all(axis=1).mean() > 0.4  # grey, but for the marks
