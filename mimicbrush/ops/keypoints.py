"""SIFT matches between two images: the points that say which places of a pair show the same thing.

The grid mask of training prefers cells with a match (paper Sec. 3.3); the paper does not publish its
matcher. Ours: ratio test, mutual best match, and a geometric check that several motions may share, because
an object that moves before a fixed camera is exactly what is worth imitating and fits no single model.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

#: A fundamental matrix needs 8 points, a homography 4; one more each, so that the model is also confirmed.
_MIN_FUNDAMENTAL = 9
_MIN_HOMOGRAPHY = 5
#: How many times as many matches a fundamental matrix must explain.
_CLEARLY_MORE = 1.2
_MAX_ITERATIONS = 2000
_CONFIDENCE = 0.999
#: Of Brown and Lowe's test of a homography: matches that must agree, and the share of all matches beyond them.
_SURE_MATCHES, _SURE_RATIO = 8.0, 0.3
_NO_POINTS = np.zeros((0, 2), np.float32)


@dataclass(frozen=True)
class Features:
    """SIFT features of one image.

    Attributes:
        points: (K, 2) float32 (x, y), pixels of the given image, pixel centres at whole numbers.
        descriptors: (K, 128) float32 holding whole numbers 0..255.
    """

    points: np.ndarray
    descriptors: np.ndarray


def sift_features(image: np.ndarray, max_keypoints: int = 2000, min_side_px: int = 256) -> Features:
    """Find SIFT features.

    Args:
        image: (H, W, 3) uint8 RGB.
        max_keypoints: the strongest are kept; time and memory of matching grow with the square.
        min_side_px: an image whose long side is smaller is enlarged first, because SIFT leaves out a border
            of 5 px per scale and finds little in a thumbnail.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    enlarge = max(1, -(-min_side_px // max(grey.shape)))
    if enlarge > 1:
        grey = cv2.resize(grey, None, fx=enlarge, fy=enlarge, interpolation=cv2.INTER_CUBIC)
    # Without the precise upscale, points are off by a quarter of a pixel.
    sift = cv2.SIFT.create(nfeatures=max_keypoints, enable_precise_upscale=True)
    keypoints, descriptors = sift.detectAndCompute(grey, None)
    if descriptors is None:
        return Features(_NO_POINTS, np.zeros((0, 128), np.float32))
    points = np.array([keypoint.pt for keypoint in keypoints], np.float32)
    points = (points + 0.5) / enlarge - 0.5
    # Equal scores at the cut can leave a few more than asked for.
    return Features(points[:max_keypoints].astype(np.float32), descriptors[:max_keypoints])


def match_features(
    a: Features,
    b: Features,
    max_ratio: float = 0.75,
    threshold_px: float = 3.0,
    max_motions: int = 3,
    max_matches: int = 1000,
) -> tuple[np.ndarray, np.ndarray]:
    """Match two images' features; the same input gives the same output, on any number of threads.

    Args:
        a: features of the first image.
        b: features of the second.
        max_ratio: Lowe's ratio test: best over second-best distance, in both directions.
        threshold_px: how far a match may lie from the motion that explains it.
        max_motions: how many motions (camera, then moving things) are looked for, one after the other.
        max_matches: more are thinned, the most distinctive (lowest ratio) stay.

    Returns:
        (K, 2) and (K, 2) float32 (x, y) in pixels, row k of one belongs to row k of the other.
    """
    pairs = _find_mutual_matches(a.descriptors, b.descriptors, max_ratio)
    points_a, points_b = a.points[pairs[:, 0]], b.points[pairs[:, 1]]
    agreed = _find_agreeing(points_a, points_b, threshold_px, max_motions)
    return points_a[agreed][:max_matches], points_b[agreed][:max_matches]


def match_keypoints(image_a: np.ndarray, image_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Match two (H, W, 3) uint8 RGB images by `sift_features` and `match_features` with their defaults."""
    return match_features(sift_features(image_a), sift_features(image_b))


def find_homography(a: Features, b: Features, threshold_px: float = 3.0, max_ratio: float = 0.75) -> np.ndarray | None:
    """Find the homography that most matches of two images agree on, if they are enough to trust it.

    Enough is more than 8 + 0.3 times all mutual matches, the test of Brown and Lowe ("Automatic panoramic image
    stitching using invariant features", 2007, Eq. 11 to 13): chance matches hardly ever pass it.

    Args:
        a: features of the first image.
        b: features of the second.
        threshold_px: how far from its place in the second image a match may come to lie.
        max_ratio: Lowe's ratio test, see `match_features`.

    Returns:
        (3, 3) float64, from pixels of the first to pixels of the second image; None: too few agree, or the plane
        would be seen edge on somewhere within the matched points.
    """
    pairs = _find_mutual_matches(a.descriptors, b.descriptors, max_ratio)
    points_a, points_b = a.points[pairs[:, 0]], b.points[pairs[:, 1]]
    if len(pairs) <= _SURE_MATCHES or not (_has_spread(points_a) and _has_spread(points_b)):
        return None
    matrix, mask = cv2.findHomography(
        points_a, points_b, cv2.RANSAC, threshold_px, maxIters=_MAX_ITERATIONS, confidence=_CONFIDENCE
    )
    if matrix is None or mask.sum() <= _SURE_MATCHES + _SURE_RATIO * len(pairs):
        return None
    depths = np.column_stack([points_a[mask.ravel() > 0], np.ones(int(mask.sum()))]) @ matrix[2]
    return matrix if (depths > 0).all() else None


def find_orb_points(image: np.ndarray, max_keypoints: int = 200, border_ratio: float = 50 / 512) -> np.ndarray:
    """Find ORB keypoints of one image, which the released data utilities count in the cells of their grid.

    Differs from them in that the border that is left out, 50 px there, follows the size of the image: a small
    one would have no keypoints at all.

    Args:
        image: (H, W, 3) uint8 RGB.
        max_keypoints: the strongest are kept (released: 200).
        border_ratio: width of that border over the shorter side.

    Returns:
        (K, 2) float32 (x, y), pixels of the image, pixel centres at whole numbers.
    """
    border = round(border_ratio * min(image.shape[:2]))
    orb = cv2.ORB.create(nfeatures=max_keypoints, edgeThreshold=border)
    keypoints = orb.detect(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None)
    return np.array([keypoint.pt for keypoint in keypoints], np.float32).reshape(-1, 2)


def _find_mutual_matches(a: np.ndarray, b: np.ndarray, max_ratio: float) -> np.ndarray:
    """(M, 2) int: rows of mutual best matches that pass the ratio test both ways, most distinctive first."""
    if min(len(a), len(b)) < 2:
        return np.zeros((0, 2), np.int64)
    # a**2 - 2 a b + b**2 in one product: whole numbers below 2**24, so exact in float32 in any order of summing.
    ones_a, ones_b = (np.ones((len(each), 1), np.float32) for each in (a, b))
    left = np.hstack([-2 * a, (a**2).sum(1, keepdims=True), ones_a])
    right = np.hstack([b, ones_b, (b**2).sum(1, keepdims=True)])
    squared = left @ right.T
    best_b, best_a = squared.argmin(1), squared.argmin(0)
    rows = np.flatnonzero(best_a[best_b] == np.arange(len(a)))
    columns = best_b[rows]
    best = squared[rows, columns]
    squared[rows, columns] = np.inf  # so that the least that is left is the second best
    second = np.minimum(squared[rows].min(1), squared[:, columns].min(0))
    keep = np.flatnonzero(best < max_ratio**2 * second)
    keep = keep[np.argsort(best[keep] / second[keep], kind="stable")]
    return np.stack([rows[keep], columns[keep]], axis=1)


def _find_agreeing(points_a: np.ndarray, points_b: np.ndarray, threshold_px: float, max_motions: int) -> np.ndarray:
    """(M,) bool: matches that some motion explains (RANSAC, then again on what it left over)."""
    agreed = np.zeros(len(points_a), bool)
    for _ in range(max_motions):
        rest = np.flatnonzero(~agreed)
        inliers = _find_largest_motion(points_a[rest], points_b[rest], threshold_px)
        if not inliers.any():
            break
        agreed[rest[inliers]] = True
    return agreed


def _find_largest_motion(points_a: np.ndarray, points_b: np.ndarray, threshold_px: float) -> np.ndarray:
    """(M,) bool: the inliers of a homography or a fundamental matrix, whichever explains clearly more."""
    none = np.zeros(len(points_a), bool)
    homography, fundamental = none, none
    if len(points_a) >= _MIN_HOMOGRAPHY and _has_spread(points_a) and _has_spread(points_b):
        # The classic estimators start their random numbers afresh in every call. (USAC, in OpenCV 5.0, stops
        # with a failed assertion on some point sets.)
        _, mask = cv2.findHomography(
            points_a, points_b, cv2.RANSAC, threshold_px, maxIters=_MAX_ITERATIONS, confidence=_CONFIDENCE
        )
        homography = none if mask is None else mask.ravel() > 0
        # A fundamental matrix is not looked for where it could not explain clearly more.
        could_win = homography.sum() < _MIN_HOMOGRAPHY or len(points_a) > _CLEARLY_MORE * homography.sum()
        if len(points_a) >= _MIN_FUNDAMENTAL and could_win:
            _, mask = cv2.findFundamentalMat(
                points_a, points_b, cv2.FM_RANSAC, threshold_px, _CONFIDENCE, _MAX_ITERATIONS
            )
            fundamental = none if mask is None else mask.ravel() > 0
    if homography.sum() < _MIN_HOMOGRAPHY:
        homography = none
    if fundamental.sum() < _MIN_FUNDAMENTAL:
        fundamental = none
    # A line constrains less than a point, so chance matches pass it more easily.
    return fundamental if fundamental.sum() > _CLEARLY_MORE * homography.sum() else homography


def _has_spread(points: np.ndarray) -> bool:
    """Whether there are four different places at all: RANSAC loops long over repeated points."""
    return len(np.unique(points.round(1), axis=0)) >= 4
