"""Geometry of a sample: one 3 x 3 matrix and one warp. Pixel centres are at whole numbers (OpenCV).

A matrix maps (x, y, 1) of the image to (x, y, 1) of the canvas. Keypoints and masks go through the same
matrix as the pixels, so they stay exact under any composition.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from mimicbrush.ranges import check_options, number, numbers


@dataclass
class GeometryRanges:
    """Ranges of the random geometry. The paper names the kinds (Sec. 3.3) but no ranges: these are ours.

    Attributes:
        flip_probability: probability of a horizontal flip.
        rotation_deg: largest angle, either way.
        scale: smallest and largest factor about the canvas centre, log-uniform.
        projective_intensity: corners move by up to 0.4 x intensity of the side (released data utilities).
        identity_probability: probability that an image gets none of the three above, as at inference (not in the
            paper).
    """

    flip_probability: float = number(0.5, at_least=0, at_most=1)
    rotation_deg: float = number(20.0, at_least=0, at_most=180)
    scale: tuple[float, float] = numbers((0.8, 1.25), at_least=0.01, at_most=100)
    projective_intensity: float = number(0.25, at_least=0, at_most=1)
    identity_probability: float = number(0.0, at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_options(self, "data.geometry.")


def resize_matrix(ratio_x: float, ratio_y: float) -> np.ndarray:
    """Build the matrix that scales by these factors with pixel *edges* kept in place: (3, 3) float64."""
    return np.array([[ratio_x, 0, (ratio_x - 1) / 2], [0, ratio_y, (ratio_y - 1) / 2], [0, 0, 1]], np.float64)


def letterbox_matrix(width_px: int, height_px: int, size_px: int) -> np.ndarray:
    """Build the matrix of `ops.canvas.letterbox`, without its rounding: long side to `size_px`, centred."""
    ratio = size_px / max(width_px, height_px)
    shift = np.eye(3)
    shift[0, 2] = (size_px - width_px * ratio) / 2
    shift[1, 2] = (size_px - height_px * ratio) / 2
    return shift @ resize_matrix(ratio, ratio)


def random_matrix(
    ranges: GeometryRanges, size_px: int, rng: np.random.Generator, flip: bool | None = None
) -> np.ndarray:
    """Sample flip, rotation, scale and projection about the centre of a square canvas: (3, 3) float64.

    Args:
        ranges: what may happen, and how much.
        size_px: side of the canvas.
        rng: random numbers. It is advanced equally whatever `flip` says.
        flip: decides the flip from outside (to share it between source and reference); None samples it.
    """
    sampled_flip = rng.random() < ranges.flip_probability
    angle = np.deg2rad(rng.uniform(-ranges.rotation_deg, ranges.rotation_deg))
    scale = np.exp(rng.uniform(np.log(ranges.scale[0]), np.log(ranges.scale[1])))
    offsets = rng.uniform(-1, 1, (4, 2)) * 0.4 * ranges.projective_intensity * size_px
    if ranges.identity_probability and rng.random() < ranges.identity_probability:
        angle, scale, offsets = 0.0, 1.0, np.zeros((4, 2))
    # The matrix is projection @ (rotation, scale and mirror, about the centre of the canvas).
    mirror = -1.0 if (sampled_flip if flip is None else flip) else 1.0
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.array([[cos * mirror, -sin, 0], [sin * mirror, cos, 0], [0, 0, 1]])
    centre = (size_px - 1) / 2
    to_centre = np.array([[1, 0, -centre], [0, 1, -centre], [0, 0, 1]])
    return projective_matrix(offsets, size_px) @ np.linalg.inv(to_centre) @ turn @ to_centre


def projective_matrix(offsets_px: np.ndarray, size_px: int) -> np.ndarray:
    """Build the projection that moves the canvas corners (clockwise from top left) by (4, 2) offsets in pixels."""
    last = size_px - 1
    corners = np.array([[0, 0], [last, 0], [last, last], [0, last]], np.float32)
    return cv2.getPerspectiveTransform(corners, corners + offsets_px.astype(np.float32))


def transform_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Map (K, 2) points (x, y) through a (3, 3) matrix -> (K, 2) float32."""
    if len(points) == 0:
        return np.zeros((0, 2), np.float32)
    return cv2.perspectiveTransform(points.reshape(-1, 1, 2).astype(np.float64), matrix)[:, 0].astype(np.float32)


def is_inside(points: np.ndarray, size_px: int) -> np.ndarray:
    """Say which of (K, 2) points (x, y) lie on a square canvas of this side: (K,) bool."""
    return np.all((points > -0.5) & (points < size_px - 0.5), axis=1)


def warp_to_canvas(image: np.ndarray, matrix: np.ndarray, size_px: int, fill: int) -> np.ndarray:
    """Warp an image onto a square canvas through a matrix: (H, W[, 3]) uint8 -> (S, S[, 3]) uint8.

    Where the matrix shrinks by two or more, the image is first reduced (`reduce_to_fit`).
    """
    image, matrix = reduce_to_fit(image, matrix)
    return cv2.warpPerspective(
        image,
        matrix,
        (size_px, size_px),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(fill,) * 3,
    )


def reduce_to_fit(image: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduce an image that the matrix shrinks by two or more: bilinear sampling alone would alias.

    Args:
        image: (H, W[, 3]) uint8.
        matrix: (3, 3), from its pixels to the canvas.

    Returns:
        The image reduced by area averaging (or itself) and the matrix from its pixels to the same canvas.
    """
    shrink = shrink_factor(matrix, image.shape[1], image.shape[0])
    if shrink < 2:
        return image, matrix
    height, width = (max(1, round(side / shrink)) for side in image.shape[:2])
    matrix = matrix @ np.linalg.inv(resize_matrix(width / image.shape[1], height / image.shape[0]))
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), matrix


def shrink_factor(matrix: np.ndarray, width: int, height: int) -> float:
    """Measure how many pixels of the image fall on one canvas pixel (per side) at the image's centre."""
    centre = np.array([[(width - 1) / 2, (height - 1) / 2]])
    probes = centre + np.array([[0, 0], [1, 0], [0, 1]])
    origin, right, down = transform_points(probes, matrix).astype(np.float64)
    (a, b), (c, d) = right - origin, down - origin
    area = abs(a * d - b * c)
    return float(area**-0.5) if area > 0 else 1.0
