from __future__ import annotations

import numpy as np
import pytest

from mimicbrush.errors import InputError
from mimicbrush.ops.canvas import crop_back, letterbox
from mimicbrush.ops.crops import Placement, crop_box, square_around
from mimicbrush.ops.masks import mask_box


@pytest.mark.parametrize("size_px", [16, 64, 512])
def test_a_square_holds_the_hole_and_lies_in_the_image(size_px: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(40, 400, 2)
        mask = np.zeros((height, width), bool)
        y, x = rng.integers(0, height), rng.integers(0, width)
        mask[y : y + rng.integers(1, 200), x : x + rng.integers(1, 200)] = True
        left, top, right, bottom = square_around(mask, size_px)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        x0, y0, x1, y1 = mask_box(mask)
        assert left <= x0 and top <= y0 and right >= x1 and bottom >= y1
        # Square, unless the image is too small; never magnified, unless the image is too small.
        side = max(right - left, bottom - top)
        assert (right - left in (side, width)) and (bottom - top in (side, height))
        assert side >= min(size_px, max(height, width))
        # Room for the soft edge of the paste-back, where the image has it.
        assert x0 - left >= min(x0, 10) or right == width or left == 0


def test_a_box_must_lie_in_its_image() -> None:
    image = np.zeros((10, 20, 3), np.uint8)
    assert crop_box(image, (5, 0, 20, 10), "reference").shape == (10, 15, 3)
    for box in ((0, 0, 21, 10), (5, 5, 5, 8), (-1, 0, 4, 4), (6, 2, 4, 8)):
        with pytest.raises(InputError, match="not a box inside the reference, which is 20 x 10 px"):
            crop_box(image, box, "reference")


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64)])
def test_a_placement_undoes_the_letterbox(shape: tuple[int, int]) -> None:
    # A white dot, through the letterbox and back by the placement.
    image = np.zeros((*shape, 3), np.uint8)
    image[20:24, 36:40] = 255
    canvas = letterbox(image, 128, 0)[..., 0].astype(float)
    rows, columns = np.indices(canvas.shape)
    centre = np.array([(columns * canvas).sum(), (rows * canvas).sum()]) / canvas.sum() + 0.5
    box = (100, 200, 100 + shape[1], 200 + shape[0])  # a crop of something larger
    np.testing.assert_allclose(Placement(box, 128).to_image(centre), [100 + 38, 200 + 22], atol=0.6)
    # And the same way back as the image's.
    assert crop_back(letterbox(image, 128, 0), *shape)[22, 38].min() > 200
