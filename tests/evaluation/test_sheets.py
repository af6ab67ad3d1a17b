from __future__ import annotations

import numpy as np
import pytest

from mimicbrush.data.pair import Pair
from mimicbrush.evaluation.heldout.pairs_sheet import make_pairs_sheet
from mimicbrush.ops.contact_sheet import (
    SheetRow,
    contact_sheet,
    fit_cell,
    sheet_size,
)
from mimicbrush.ops.plot import plot_matches


def test_a_sheet_has_the_stated_size_and_shows_its_cells() -> None:
    red = np.full((30, 40, 3), (255, 0, 0), np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    rows = [SheetRow("first", [red, mask]), SheetRow("second", [None, red])]
    sheet = contact_sheet("A title", ["one", "two\nlines"], rows, cell_px=64)
    assert sheet.shape[1::-1] == sheet_size("A title", ["one", "two\nlines"], 2, cell_px=64)
    assert np.sum((sheet == (255, 0, 0)).all(axis=2)) == 2 * 64 * 48


def test_a_long_title_is_not_cut() -> None:
    title = "a rather long title " * 10
    assert sheet_size(title, ["one"], 1)[0] > sheet_size("short", ["one"], 1)[0] + 500


@pytest.mark.parametrize("shape", [(7, 7, 3), (300, 200, 3), (16, 48)])
def test_cells_are_square_and_hold_the_whole_image(shape: tuple[int, ...]) -> None:
    cell = fit_cell(np.zeros(shape, np.uint8), 96)
    assert cell.shape == (96, 96, 3)
    assert np.sum(cell == 0) / 3 == pytest.approx(96 * 96 * min(shape[:2]) / max(shape[:2]), rel=0.03)


def test_matches_are_drawn_between_both_images() -> None:
    a, b = np.zeros((50, 60, 3), np.uint8), np.zeros((100, 60, 3), np.uint8)
    points = np.array([[10.0, 25.0]], np.float32)
    panel = plot_matches(a, b, points, points * 2, height_px=100)
    assert panel.shape == (100, 120 + 6 + 60, 3)
    assert panel[50, 30:140].max(axis=1).min() > 0  # the line runs through both images, at their middle height
    assert not np.array_equal(panel, plot_matches(a, b, points[:0], points[:0], height_px=100))


def test_a_sheet_of_pairs(rendered: list[Pair]) -> None:
    sheet = make_pairs_sheet(rendered, max_pairs=3)
    assert sheet.dtype == np.uint8
    assert sheet.shape[0] > 2 * 220
    with pytest.raises(ValueError, match="no pairs"):
        make_pairs_sheet([])
