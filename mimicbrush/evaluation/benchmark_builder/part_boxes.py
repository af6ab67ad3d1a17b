"""Boxes of a part that two images of one thing both show: many SIFT matches lie inside."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from mimicbrush.evaluation.benchmark_builder.materials import RatioBox
from mimicbrush.ops.keypoints import Features, match_features, sift_features
from mimicbrush.ops.similarity import phase_signature

#: A part box from matches: its sides over those of the image (*ours*; the boxes placed by hand have 0.1 to 0.5).
PART_SIDE_RATIO = 0.35
#: A box that fewer matches lie in says little about what both images show.
MIN_PART_MATCHES = 4
#: Matches that moved further than this part of the long side belong to what moves, or to a camera that does.
_MOVED_RATIO = 0.02
#: Matching is done at this size: SIFT on a large photograph takes seconds.
_MATCH_LONG_SIDE_PX = 640


@dataclass(frozen=True)
class MatchFeatures:
    """Features of an image that tell what it shares with others.

    Attributes:
        size: (width, height) in px at which the features were found.
        features: SIFT.
        signatures: (2, 32, 17), of the image and of the mirrored one, see `ops.similarity.phase_signature`.
    """

    size: tuple[int, int]
    features: Features
    signatures: np.ndarray


def reduce_for_matching(image: np.ndarray) -> np.ndarray:
    """Reduce an image to the size at which it is matched: (H, W, 3) uint8, long side 640 px or less."""
    scale = min(1.0, _MATCH_LONG_SIDE_PX / max(image.shape[:2]))
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else image


def extract_match_features(image: np.ndarray) -> MatchFeatures:
    """Extract the features of an image, (H, W, 3) uint8 RGB of any size."""
    small = reduce_for_matching(image)
    signatures = np.stack([phase_signature(view) for view in (image, image[:, ::-1])])
    return MatchFeatures((small.shape[1], small.shape[0]), sift_features(small), signatures)


def find_matched_boxes(source: MatchFeatures, reference: MatchFeatures) -> tuple[RatioBox, RatioBox] | None:
    """Match two images, and find the boxes with the most SIFT matches, see `find_best_boxes`."""
    points = match_features(source.features, reference.features)
    return find_best_boxes(*points, source.size, reference.size)


def find_best_boxes(
    a_points: np.ndarray, b_points: np.ndarray, a_size: tuple[int, int], b_size: tuple[int, int] | None = None
) -> tuple[RatioBox, RatioBox] | None:
    """Find the box of `PART_SIDE_RATIO` with the most matches in the source, and the box of their partners.

    Where enough matches moved, only these count: what stands still before a fixed camera is copied, not imitated.

    Args:
        a_points, b_points: (K, 2) matches (x, y) in px.
        a_size, b_size: (width, height) of the images; b's is a's where it is not given.

    Returns:
        Ratio boxes; None with fewer than `MIN_PART_MATCHES` matches in every box.
    """
    sizes = [np.array(size, np.float64) for size in (a_size, b_size or a_size)]
    a, b = ((points.reshape(-1, 2) + 0.5) / size for points, size in zip((a_points, b_points), sizes, strict=True))
    moved = np.abs(a - b).max(axis=1) > _MOVED_RATIO if len(a) else np.zeros(0, bool)
    if moved.sum() >= MIN_PART_MATCHES:
        a, b = a[moved], b[moved]
    corners = np.linspace(0, 1 - PART_SIDE_RATIO, 27)
    left, top = (each.ravel() for each in np.meshgrid(corners, corners))
    inside = (
        (a[:, 0] >= left[:, None])
        & (a[:, 0] < left[:, None] + PART_SIDE_RATIO)
        & (a[:, 1] >= top[:, None])
        & (a[:, 1] < top[:, None] + PART_SIDE_RATIO)
    )
    counts = inside.sum(axis=1)
    # Of the boxes with the most, the one in whose middle they lie.
    fullest = np.flatnonzero(counts == counts.max())
    if counts[fullest[0]] < MIN_PART_MATCHES:
        return None
    middles = np.stack([left[fullest], top[fullest]], axis=1) + PART_SIDE_RATIO / 2
    means = np.stack([a[inside[number]].mean(axis=0) for number in fullest])
    best = fullest[int(np.abs(middles - means).sum(axis=1).argmin())]
    partners = b[inside[best]]
    half = np.maximum((partners.max(axis=0) - partners.min(axis=0)) / 2, PART_SIDE_RATIO / 4)
    middle = (partners.max(axis=0) + partners.min(axis=0)) / 2
    low, high = np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)
    own = float(left[best]), float(top[best])
    return (
        (own[0], own[1], own[0] + PART_SIDE_RATIO, own[1] + PART_SIDE_RATIO),
        (float(low[0]), float(low[1]), float(high[0]), float(high[1])),
    )
