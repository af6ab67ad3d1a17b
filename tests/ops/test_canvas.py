from __future__ import annotations

import numpy as np
import pytest
import torch

from mimicbrush.ops.canvas import blank_mask, crop_back, letterbox, letterbox_mask, paste_back, to_tensor, to_uint8


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 64), (64, 40), (100, 30)])
def test_crop_back_undoes_letterbox(height: int, width: int) -> None:
    y, x = np.mgrid[:height, :width]
    image = np.stack([y * 2, x * 2, y + x], axis=2).astype(np.uint8)  # smooth: survives two resizings
    square = letterbox(image, 128, 255)
    assert square.shape == (128, 128, 3)
    back = crop_back(square, height, width)
    assert np.abs(back[3:-3, 3:-3].astype(int) - image[3:-3, 3:-3]).max() <= 4


def test_pixels_outside_the_soft_mask_are_the_sources_own() -> None:
    rng = np.random.default_rng(0)
    source, result = rng.integers(0, 256, (2, 60, 80, 3), np.uint8)
    mask = np.zeros((60, 80), np.uint8)
    mask[20:40, 30:50] = 255
    pasted = paste_back(result, source, mask)
    near = np.zeros((60, 80), bool)
    near[10:50, 20:60] = True
    assert np.array_equal(pasted[~near], source[~near])
    assert np.array_equal(pasted[30, 40], result[30, 40])


def test_blank_is_black_in_the_hole_and_nothing_elsewhere() -> None:
    source, mask = torch.rand(2, 3, 8, 8) * 2 - 1, torch.zeros(2, 1, 8, 8)
    mask[:, :, :4] = 1
    blanked = blank_mask(source, mask)
    assert torch.all(blanked[:, :, :4] == -1) and torch.equal(blanked[:, :, 4:], source[:, :, 4:])


def test_tensors_round_trip_exactly() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert np.array_equal(to_uint8(to_tensor(images)), images)


def test_mask_threshold_is_the_released_one() -> None:
    levels = np.full((8, 8), 128, np.uint8)
    assert letterbox_mask(levels, 8).sum() == 0
    assert letterbox_mask(levels + 1, 8).sum() == 64
