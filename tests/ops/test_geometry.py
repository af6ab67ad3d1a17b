from __future__ import annotations

import cv2
import numpy as np
import pytest

from mimicbrush.ops.canvas import letterbox
from mimicbrush.ops.geometry import (
    GeometryRanges,
    is_inside,
    letterbox_matrix,
    random_matrix,
    resize_matrix,
    transform_points,
    warp_to_canvas,
)


def _centroid(image: np.ndarray) -> np.ndarray:
    weight = image.astype(float)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    return np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()


@pytest.mark.parametrize("seed", range(20))
def test_points_go_where_the_pixels_go(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width, height, size = 300, 200, 256
    point = rng.uniform([100, 70], [200, 130])
    y, x = np.mgrid[:height, :width]
    blob = (255 * np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / (2 * 4.0**2))).astype(np.uint8)
    matrix = random_matrix(GeometryRanges(), size, rng) @ letterbox_matrix(width, height, size)
    expected = transform_points(point[None], matrix)[0]
    assert is_inside(expected[None], size)[0]
    assert np.linalg.norm(_centroid(warp_to_canvas(blob, matrix, size, fill=0)) - expected) < 0.35


@pytest.mark.parametrize(("width", "height"), [(256, 256), (256, 128), (128, 256), (512, 512)])
def test_letterbox_matrix_agrees_with_letterbox(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), np.uint8), (0, 0), 4)
    warped = warp_to_canvas(image, letterbox_matrix(width, height, 128), 128, fill=255)
    difference = np.abs(warped.astype(int) - letterbox(image, 128, 255))
    assert np.median(difference) <= 1 and np.mean(difference) < 1.5


def test_shrinking_warp_does_not_alias() -> None:
    stripes = np.zeros((512, 512), np.uint8)
    stripes[:, ::2] = 255  # bilinear sampling alone would keep black or white
    small = warp_to_canvas(stripes, resize_matrix(1 / 8, 1 / 8), 64, fill=0)
    assert np.all(np.abs(small[4:-4, 4:-4].astype(int) - 128) <= 4)


def test_reduced_decoding_leaves_the_geometry_where_it_is() -> None:
    centre = np.array([[100.0, 60.0]])
    full = letterbox_matrix(320, 240, 64)
    halved = full @ resize_matrix(2, 2)  # for an image decoded at half its size
    assert np.allclose(transform_points((centre + 0.5) / 2 - 0.5, halved), transform_points(centre, full))


def test_a_decided_flip_does_not_shift_the_other_samples() -> None:
    ranges = GeometryRanges()
    rngs = [np.random.default_rng(3) for _ in range(2)]
    plain, flipped = (random_matrix(ranges, 64, rng, flip) for rng, flip in zip(rngs, (False, True), strict=True))
    assert rngs[0].random() == rngs[1].random()
    assert np.linalg.det(plain) > 0 > np.linalg.det(flipped)


def test_some_images_keep_their_geometry_but_for_a_flip() -> None:
    ranges = GeometryRanges(identity_probability=0.3)
    mirror = np.array([[-1, 0, 63], [0, 1, 0], [0, 0, 1]])
    matrices = [random_matrix(ranges, 64, np.random.default_rng(seed)) for seed in range(1000)]
    kept = [sum(np.allclose(matrix, each, atol=1e-6) for matrix in matrices) for each in (np.eye(3), mirror)]
    assert 110 < kept[0] < 190 and 110 < kept[1] < 190
    always = [
        random_matrix(GeometryRanges(identity_probability=1.0), 64, np.random.default_rng(s), False) for s in (0, 1)
    ]
    assert np.allclose(always, np.eye(3), atol=1e-6)


def test_no_points_are_fine() -> None:
    assert transform_points(np.zeros((0, 2), np.float32), np.eye(3)).shape == (0, 2)
