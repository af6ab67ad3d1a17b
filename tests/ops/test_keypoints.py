from __future__ import annotations

import cv2
import numpy as np
import pytest
from toy_data import photograph

from mimicbrush.ops.keypoints import find_homography, match_features, match_keypoints, sift_features


def project(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    homogeneous = np.c_[points, np.ones(len(points))] @ matrix.T
    return homogeneous[:, :2] / homogeneous[:, 2:]


def test_matches_lie_where_a_known_homography_puts_them() -> None:
    image = photograph("astronaut.png")
    matrix = np.array([[0.9, -0.15, 60], [0.12, 0.95, -20], [1e-4, -5e-5, 1]])
    a, b = match_keypoints(image, cv2.warpPerspective(image, matrix, (512, 512)))
    difference = project(a, matrix) - b
    distance = np.linalg.norm(difference, axis=1)
    assert len(a) > 200
    assert a.dtype == b.dtype == np.float32
    assert distance.max() < 3.5
    assert np.median(distance) < 0.3
    # Half a pixel of bias would be the sign of another convention of pixel centres.
    assert np.abs(difference.mean(axis=0)).max() < 0.08


def test_a_homography_is_found_and_none_between_unrelated_or_empty_images() -> None:
    image = photograph("astronaut.png")
    matrix = np.array([[0.9, -0.15, 60], [0.12, 0.95, -20], [1e-4, -5e-5, 1]])
    a, b = sift_features(image), sift_features(cv2.warpPerspective(image, matrix, (512, 512)))
    found = find_homography(a, b)
    assert found is not None
    corners = np.array([[0, 0], [511, 0], [511, 511], [0, 511]], float)
    assert np.abs(project(corners, found) - project(corners, matrix)).max() < 1.5
    nothing = sift_features(np.full((64, 96, 3), 90, np.uint8))
    for name in ("coffee.png", "chelsea.png", "brick.png", "gravel.png", "page.png"):
        assert find_homography(a, sift_features(photograph(name))) is None, name
    assert find_homography(a, nothing) is find_homography(nothing, nothing) is None


@pytest.mark.parametrize("width", [96, 160])
def test_a_thumbnail_gives_enough_matches(width: int) -> None:
    small = cv2.resize(photograph("astronaut.png"), (width, width * 2 // 3), interpolation=cv2.INTER_AREA)
    a, b = match_keypoints(small[:, :-6], small[:, 6:])
    assert len(a) >= 50
    np.testing.assert_allclose(np.median(a - b, axis=0), [6, 0], atol=0.05)


def test_a_moving_thing_before_a_fixed_camera_keeps_its_matches() -> None:
    background = photograph("coffee.png")[:300, :400].copy()
    thing = photograph("astronaut.png")[60:160, 160:260]
    first, second = background.copy(), background.copy()
    first[100:200, 50:150] = thing
    second[150:250, 250:350] = thing
    a, b = match_keypoints(first, second)
    moved = np.linalg.norm(b - a - [200, 50], axis=1) < 1
    still = np.linalg.norm(b - a, axis=1) < 1
    assert moved.sum() >= 15
    assert still.sum() >= 15
    assert (moved | still).mean() > 0.9


def test_unrelated_and_empty_images_do_not_match() -> None:
    unrelated = match_keypoints(photograph("astronaut.png"), photograph("coffee.png"))
    empty = match_keypoints(np.full((64, 96, 3), 90, np.uint8), photograph("coffee.png"))
    assert len(unrelated[0]) < 8
    assert empty[0].shape == empty[1].shape == (0, 2)


def test_the_same_input_gives_the_same_matches_on_any_number_of_threads() -> None:
    image = photograph("chelsea.png")
    before = cv2.getNumThreads()
    results = []
    try:
        for threads in (1, 2):
            cv2.setNumThreads(threads)
            results.append(match_keypoints(image, image[3:, 5:]))
    finally:
        cv2.setNumThreads(before)
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_the_caps_hold() -> None:
    features = sift_features(photograph("astronaut.png"), max_keypoints=100)
    a, b = match_features(features, features, max_matches=20)
    assert len(features.points) == len(features.descriptors) == 100
    assert len(a) == 20
    np.testing.assert_array_equal(a, b)
