from __future__ import annotations

import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, rgb2lab

from mimicbrush.ops.contact_sheet import fit_cell
from mimicbrush.ops.plot import RIM_COLOUR, mark_mask

COLOURS = [(0, 0, 0), (255, 255, 255), (128, 128, 128), (95, 95, 95), (185, 185, 185), (140, 140, 140), (200, 30, 160)]


def hole_of(side: int) -> np.ndarray:
    mask = np.zeros((side * 3 // 4, side), np.uint8)
    mask[side // 4 : side // 2, side // 4 : side * 3 // 4] = 1
    return mask


@pytest.mark.parametrize("side", [64, 320, 1500])
@pytest.mark.parametrize("colour", COLOURS)
def test_a_hole_is_seen_in_any_image_at_the_size_of_a_sheet(colour: tuple[int, int, int], side: int) -> None:
    """A CIEDE2000 difference above 10 is seen at a glance; of two greys far apart one differs from any image."""
    mask = hole_of(side)
    marked = mark_mask(np.full((*mask.shape, 3), colour, np.uint8), mask)
    inside = fit_cell(mask * np.uint8(255), 144)[..., 0] > 250
    cell = fit_cell(marked, 144)[inside] / 255
    differs = deltaE_ciede2000(rgb2lab(cell[None])[0], rgb2lab(np.array([[colour]]) / 255)[0])
    assert (differs > 10).mean() > 0.4
    luma = cell @ (0.299, 0.587, 0.114)
    assert np.quantile(luma, 0.9) - np.quantile(luma, 0.1) > 0.2  # the stripes are not blurred away


def test_nothing_but_the_hole_is_changed_and_its_rim_is_closed() -> None:
    mask = hole_of(64)
    image = np.random.default_rng(0).integers(0, 256, (*mask.shape, 3), np.uint8)
    before = image.copy()
    marked = mark_mask(image, mask)
    assert np.array_equal(image, before)
    assert np.array_equal(marked[mask == 0], image[mask == 0])
    assert (marked[16:32, 16] == RIM_COLOUR).all() and (marked[16, 16:48] == RIM_COLOUR).all()
    assert not (marked[20:28, 20:44] == RIM_COLOUR).all(axis=2).any()


def test_all_of_an_image_or_none_can_be_marked() -> None:
    image = np.zeros((48, 64, 3), np.uint8)
    assert np.array_equal(mark_mask(image, np.zeros((48, 64), np.uint8)), image)
    assert mark_mask(image, np.ones((48, 64), np.uint8)).min() >= 90
