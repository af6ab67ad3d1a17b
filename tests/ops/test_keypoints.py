from __future__ import annotations

import cv2
import numpy as np
import pytest
from toy_data import photograph

from mimicbrush.ops import keypoints
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


def match_plainly(a: np.ndarray, b: np.ndarray) -> list[tuple[int, int]]:
    """Mutual best matches that pass the ratio test both ways, by sorting whole rows and columns of distances."""
    squared = ((a[:, None].astype(np.int64) - b[None]) ** 2).sum(-1)
    found = []
    for row, column in enumerate(squared.argmin(1)):
        second = min(np.sort(squared[row])[1], np.sort(squared[:, column])[1])
        if squared[:, column].argmin() == row and squared[row, column] < 0.75**2 * second:
            found.append((np.float32(squared[row, column]) / np.float32(second), row, column))
    return [(row, column) for _, row, column in sorted(found)]


def test_matches_are_those_of_sorted_distances() -> None:
    image = photograph("astronaut.png")
    matrix = np.array([[0.9, -0.15, 60], [0.12, 0.95, -20], [1e-4, -5e-5, 1]])
    a, b = (sift_features(each, 250).descriptors for each in (image, cv2.warpPerspective(image, matrix, (512, 512))))
    extremes = np.array([np.full(128, 255), np.zeros(128)], np.float32)
    a, b = np.concatenate([a, extremes, a[:9], extremes[:1]]), np.concatenate([b, extremes, b[:5]])  # also ties
    found = keypoints._find_mutual_matches(a, b, 0.75)
    assert len(found) > 50
    assert found.tolist() == [list(pair) for pair in match_plainly(a, b)]


def test_a_fundamental_matrix_is_passed_over_only_where_it_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    found = cv2.findFundamentalMat
    sought = []
    monkeypatch.setattr(cv2, "findFundamentalMat", lambda *given: sought.append(len(given[0])) or found(*given))
    for num_on_plane, num_others in ((40, 0), (40, 8), (40, 9), (10, 60), (4, 60)):
        points = rng.uniform(0, 500, (num_on_plane + num_others, 2)).astype(np.float32)
        depths = np.r_[np.ones(num_on_plane), rng.uniform(0.3, 3, num_others)]
        moved = points + (depths[:, None] * [30, 5]).astype(np.float32)  # a camera that moves past a wall and things
        fast = keypoints._find_largest_motion(points, moved, 1.0)
        _, mask = cv2.findHomography(points, moved, cv2.RANSAC, 1.0, maxIters=2000, confidence=0.999)
        _, lines = found(points, moved, cv2.FM_RANSAC, 1.0, 0.999, 2000)
        wins = lines.sum() > 1.2 * mask.sum() or mask.sum() < 5
        np.testing.assert_array_equal(fast, (lines if wins else mask).ravel() > 0)
        assert bool(sought) == (len(points) > 1.2 * mask.sum())
        sought.clear()


def test_the_caps_hold() -> None:
    features = sift_features(photograph("astronaut.png"), max_keypoints=100)
    a, b = match_features(features, features, max_matches=20)
    assert len(features.points) == len(features.descriptors) == 100
    assert len(a) == 20
    np.testing.assert_array_equal(a, b)
