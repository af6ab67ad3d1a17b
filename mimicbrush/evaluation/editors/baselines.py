"""Three ways to fill a hole that need no model: a model that does not beat them has learnt little."""

from __future__ import annotations

import cv2
import numpy as np

from mimicbrush.ops.geometry import reduce_to_fit
from mimicbrush.ops.keypoints import Features, find_homography, sift_features
from mimicbrush.ops.masks import mask_box

#: How far around a pixel OpenCV looks for known ones.
INPAINT_RADIUS_PX = 5
#: How far a match may lie from the homography: this part of the image's longer side, within bounds in pixels.
RANSAC_RATIO, RANSAC_PX = 0.01, (1.0, 3.0)


def copy_in_place(source: np.ndarray, mask: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The reference's pixels at the same place: (S, S, 3), (S, S), (S, S, 3) -> (S, S, 3) uint8."""
    return np.where(mask[..., None] > 0, reference, source)


def opencv_inpaint(source: np.ndarray, mask: np.ndarray, area: np.ndarray) -> np.ndarray:
    """The hole filled from its surroundings by OpenCV (Telea 2004).

    Only the image itself is worked on: the white padding around it would bleed into the hole.

    Args:
        source: (S, S, 3) uint8.
        mask: (S, S), 1 = hole.
        area: (S, S), 1 where the canvas shows the image; a rectangle.

    Returns:
        (S, S, 3) uint8.
    """
    left, top, right, bottom = mask_box(area)
    hole = np.ascontiguousarray(mask[top:bottom, left:right] > 0, np.uint8)
    filled = source.copy()
    image = np.ascontiguousarray(source[top:bottom, left:right])
    filled[top:bottom, left:right] = cv2.inpaint(image, hole, INPAINT_RADIUS_PX, cv2.INPAINT_TELEA)
    return filled


def sift_homography(
    source: np.ndarray,
    mask: np.ndarray,
    reference: np.ndarray,
    area: np.ndarray,
    reference_area: np.ndarray | None = None,
) -> np.ndarray:
    """The hole filled with the reference as one plane: SIFT matches, a RANSAC homography, the reference warped.

    What a classical method makes of the task. It is exact where one plane, or a turning camera, explains both images;
    where the reference shows another thing, or the same one in another shape, it finds no homography or a wrong one.
    Where the warped reference shows nothing, and everywhere if too few matches agree (`find_homography`), the hole is
    filled by `opencv_inpaint`.

    Args:
        source: (S, S, 3) uint8; pixels of the hole are not looked at.
        mask: (S, S), 1 = hole.
        reference: (H, W, 3) uint8, of any size.
        area: (S, S), 1 where the canvas shows the image; a rectangle.
        reference_area: (H, W), 1 where the reference is an image and no padding; None: everywhere.

    Returns:
        (S, S, 3) uint8; outside of the hole the source.
    """
    hole = mask > 0
    inpainted = opencv_inpaint(source, mask, area)
    whole = np.full(reference.shape[:2], 255, np.uint8)
    if reference_area is not None:
        whole *= reference_area > 0
    matrix = _reference_to_source(inpainted, hole, reference, whole, area)
    if matrix is None:
        return inpainted
    height, width = hole.shape
    reference, to_source = reduce_to_fit(reference, matrix)
    warped = cv2.warpPerspective(reference, to_source, (width, height), flags=cv2.INTER_LINEAR)
    whole, to_source = reduce_to_fit(whole, matrix)
    is_shown = cv2.warpPerspective(whole, to_source, (width, height), flags=cv2.INTER_LINEAR) == 255
    filled = np.where((hole & is_shown)[..., None], warped, source)
    return opencv_inpaint(filled, (hole & ~is_shown).astype(np.uint8), area)


def _reference_to_source(
    inpainted: np.ndarray, hole: np.ndarray, reference: np.ndarray, whole: np.ndarray, area: np.ndarray
) -> np.ndarray | None:
    """The homography (3, 3) between them, of features outside of the hole only; what fills it gives none.

    Features of the reference count where `whole` is not 0.
    """
    left, top, right, bottom = mask_box(area)
    found = sift_features(np.ascontiguousarray(inpainted[top:bottom, left:right]))
    points = found.points + np.array([left, top], np.float32)
    x, y = points.round().astype(int).T
    is_seen = ~hole[y.clip(0, hole.shape[0] - 1), x.clip(0, hole.shape[1] - 1)]
    seen = Features(points[is_seen], found.descriptors[is_seen])
    there = sift_features(reference)
    x, y = there.points.round().astype(int).T
    is_shown = whole[y.clip(0, whole.shape[0] - 1), x.clip(0, whole.shape[1] - 1)] > 0
    there = Features(there.points[is_shown], there.descriptors[is_shown])
    threshold_px = float(np.clip(RANSAC_RATIO * max(right - left, bottom - top), *RANSAC_PX))
    return find_homography(there, seen, threshold_px)
