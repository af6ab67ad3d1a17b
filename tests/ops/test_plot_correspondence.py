from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFont

from mimicbrush.ops import correspondence
from mimicbrush.ops.correspondence import (
    LEGEND,
    MARK_PX,
    MARKS,
    MARKS_APART_PX,
    SURE_FOCUS,
    TITLE_PX,
    UNSURE_MARKS,
    Correspondence,
    choose_place_pairs,
    plot_correspondence,
    plot_place_pairs,
    tint_correspondence,
)


def found_in(grid: np.ndarray, token_px: float, focus: float = 1.0) -> Correspondence:
    """Tokens whose centres are given, and where each looks at the same place of a reference."""
    ones = np.ones(len(grid), np.float32)
    return Correspondence(grid, grid[::-1].copy(), ones, ones * focus, token_px, token_px)


def grid_and_mask() -> tuple[np.ndarray, Image.Image]:
    grid = np.stack(np.meshgrid(np.arange(110, 510, 20), np.arange(110, 310, 20)), axis=-1).reshape(-1, 2)
    mask = Image.new("L", (600, 400))
    mask.paste(255, (100, 100, 500, 300))
    return grid, mask


def test_a_large_image_is_plotted_as_it_would_be_at_the_panels_size() -> None:
    """And needs little more memory than itself: what is tinted and painted is small."""
    rng = np.random.default_rng(0)
    small = cv2.resize(rng.integers(0, 256, (10, 15, 3)).astype(np.uint8), (600, 400))
    grid, mask = grid_and_mask()
    large = Image.fromarray(small.repeat(8, axis=0).repeat(8, axis=1))
    large_mask = mask.resize(large.size, Image.Resampling.NEAREST)
    for plot in (plot_correspondence, tint_correspondence):
        expected = plot(
            Image.fromarray(small), mask, Image.fromarray(small), found_in(grid.astype(np.float32), 20), 400
        )
        tracemalloc.start()
        got = plot(large, large_mask, large, found_in((grid * 8).astype(np.float32), 160), 400)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10 * large.width * large.height  # bytes; with tints of full size it was more than 40
        images = [(got, expected)] if isinstance(got, Image.Image) else zip(got, expected, strict=True)
        for one, other in images:
            assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 2


def test_a_token_has_the_colour_of_the_place_it_looked_at() -> None:
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (10, 15, 3)).astype(np.uint8), (600, 400))
    grid, mask = grid_and_mask()
    shown = Image.fromarray(image)
    places, came = map(np.asarray, tint_correspondence(shown, mask, shown, found_in(grid.astype(np.float32), 20), 400))
    assert np.array_equal(came[:90], image[:90])  # outside of the hole nothing is painted
    pairs = zip(grid, grid[::-1], strict=True)
    marked = sum(np.abs(came[y, x].astype(int) - places[v, u]).max() > 2 for (x, y), (u, v) in pairs)
    assert marked <= 4 * MARKS  # under the numbers


def test_spread_attention_is_faded() -> None:
    grid = np.array([[20, 20], [40, 20], [60, 20]], np.float32)
    mask = Image.new("L", (80, 40))
    mask.paste(255, (10, 10, 70, 30))
    black = Image.new("RGB", (80, 40))
    _, image = tint_correspondence(black, mask, black, found_in(grid, 20, focus=0.0), 40)
    masked = np.asarray(image)[12:28, 12:68].reshape(-1, 3)
    assert (masked == 128).all(axis=1).mean() > 0.4  # grey, but for the marks


@pytest.mark.parametrize("seed", range(20))
def test_no_mark_lies_over_another(seed: int) -> None:
    """For any places: all in a clump, all over the images, or beyond them."""
    rng = np.random.default_rng(seed)
    sizes = [(int(rng.integers(40, 700)), int(rng.integers(40, 400))) for _ in range(2)]
    count, spread = int(rng.integers(1, 300)), rng.choice([0.02, 0.3, 1.2])
    places = [np.array(size) * (0.5 + spread * rng.uniform(-0.5, 0.5, (count, 2))) for size in sizes]
    focus = rng.uniform(0, 2 * SURE_FOCUS, count)
    marks = choose_place_pairs(*places, focus, *sizes)
    assert 1 <= len(marks) <= MARKS
    for name, (width, height) in zip(("source", "reference"), sizes, strict=True):
        ends = np.array([getattr(mark, name) for mark in marks])
        assert (ends >= MARK_PX).all() and (ends <= (width - 1 - MARK_PX, height - 1 - MARK_PX)).all()
        apart = np.linalg.norm(ends[:, None] - ends[None], axis=-1) + 1e9 * np.eye(len(ends))
        assert apart.min() >= MARKS_APART_PX  # the boxes of the discs are drawn in full, and one never touches another
    unsure = [mark for mark in marks if not mark.is_sure]
    assert len(unsure) <= UNSURE_MARKS
    assert not unsure or len(marks) <= UNSURE_MARKS  # they only fill up


def test_the_numbers_are_seen_whole() -> None:
    """Each disc has its colour all around its number: what is drawn later lies beside it."""
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 300, (200, 2))
    marks = choose_place_pairs(points, points[::-1], np.ones(200), (300, 300), (300, 300))
    plotted = plot_place_pairs(np.zeros((300, 620, 3), np.uint8), marks, (0, 0), (320, 0))
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1) * (MARK_PX - 3)
    seen = []
    for mark in marks:
        for x, y in (mark.source, np.add(mark.reference, (320, 0))):
            at = np.round(np.array([x, y]) + ring).astype(int)
            colours, counts = np.unique(plotted[at[:, 1], at[:, 0]], axis=0, return_counts=True)
            assert counts.max() >= 14  # a digit may reach that far at a point or two
            seen.append(tuple(colours[counts.argmax()]))
    assert seen[::2] == seen[1::2] and len(set(seen)) == len(marks) == MARKS  # one colour at both ends, no two alike


def test_places_off_the_reference_are_left_out() -> None:
    inside = np.full((3, 2), 50.0) + np.arange(3)[:, None] * 40
    marks = choose_place_pairs(
        inside, inside + np.array([[0, 0], [500, 0], [0, -300]]), np.ones(3), (200, 200), (200, 200)
    )
    assert [mark.source for mark in marks] == [(50.0, 50.0)]


def test_unsure_lines_are_thin() -> None:
    points = np.array([[30.0, 100.0]])
    black = np.zeros((200, 420, 3), np.uint8)
    painted = []
    for focus in (SURE_FOCUS, SURE_FOCUS - 0.01):
        (mark,) = choose_place_pairs(points, points, np.array([focus]), (200, 200), (200, 200))
        painted.append(int(plot_place_pairs(black, [mark], (0, 0), (220, 0))[:, 60:200].any(axis=2).sum()))
    assert 0 < painted[1] < painted[0] / 3


@pytest.mark.parametrize(("width", "height"), [(60, 400), (400, 400), (1600, 300)])
def test_the_legend_is_never_cut(width: int, height: int) -> None:
    font = ImageFont.load_default(correspondence._LEGEND_PX)
    image, mask = Image.new("RGB", (width, height)), Image.new("L", (width, height), 255)
    found = found_in(np.array([[width / 2, height / 2]], np.float32), 8, focus=0.1)
    plotted = plot_correspondence(image, mask, image, found, 200)
    lines = correspondence._wrap_text(LEGEND, plotted.width - 8)
    assert " ".join(lines) == LEGEND
    assert max(font.getlength(line) for line in lines) <= plotted.width - 8
    assert plotted.height >= TITLE_PX + 200 + len(lines) * 16
    below = np.asarray(plotted.convert("L"))[TITLE_PX + 200 :]
    assert below.min() < 60 and (below[:, -3:] == 255).all()


def test_a_strip_of_a_reference_makes_no_endless_sheet() -> None:
    grid, mask = grid_and_mask()
    found = found_in(grid.astype(np.float32), 20)
    sheet = plot_correspondence(Image.new("RGB", (600, 400)), mask, Image.new("RGB", (6000, 3)), found)
    assert sheet.width * sheet.height < 40_000 * 100
