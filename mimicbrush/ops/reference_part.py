"""Which part of a reference an edit looked at: what a second, closer look is to be at (paper, limitations)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from mimicbrush.ops.correspondence import Correspondence
from mimicbrush.ops.crops import Box

# All of these are *ours*: the paper only advises to crop the reference by hand.
#: A place is where attention is at least so much of what it is at the peak.
_PLACE_RATIO = 0.25
#: Of what a place measures, added on every side; and its least side over the reference's long one.
_MARGIN_RATIO, _LEAST_SIDE_RATIO = 0.25, 0.25
#: A closer look at more than this of the reference shows hardly more than the first one did.
_LARGEST_RATIO = 0.5


@dataclass(frozen=True)
class ReferencePart:
    """A part of the reference.

    Attributes:
        box: of it, in pixels of the reference.
        share: of the hole's attention that goes there, in 0..1; attention to padding does not count.
        places: how many separate places of the reference got a good part of the attention; this is the one with most.
    """

    box: Box
    share: float
    places: int


def looked_at(found: Correspondence, area: Box) -> ReferencePart | None:
    """The part of the reference that is worth a closer look.

    Each token of the hole counts at the place where its attention peaks, by how much went there. Neighbouring places
    are one; of several, the one with most is taken.

    Args:
        found: of an edit.
        area: the part of the reference that it was given, all of it or a crop.

    Returns:
        None where there is no such part: attention is spread over most of the reference, or was on the padding.
    """
    # 1. How much attention each token of the reference got.
    x0, y0, x1, y1 = area
    width, height, token_px = x1 - x0, y1 - y0, found.reference_token_px
    rows, columns = math.ceil(height / token_px), math.ceil(width / token_px)
    column, row = np.floor((found.reference_xy - (x0, y0)) / token_px).astype(int).T
    weights = found.share * found.focus
    inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    attention = np.zeros((rows, columns), np.float32)
    np.add.at(attention, (row[inside], column[inside]), weights[inside])
    total = float(attention.sum())
    if total <= 0:
        return None

    # 2. Places, and the one with most.
    smooth = cv2.GaussianBlur(attention, (0, 0), 1, borderType=cv2.BORDER_CONSTANT)
    is_place = (smooth >= _PLACE_RATIO * smooth.max()).astype(np.uint8)
    count, number, stats, _ = cv2.connectedComponentsWithStats(is_place, connectivity=8)
    shares = np.bincount(number.ravel(), attention.ravel(), count)
    shares[0] = 0  # what is no place
    best = int(shares.argmax())
    left, top, across, down = stats[best, :4] * token_px

    # 3. The box around it.
    least = _LEAST_SIDE_RATIO * max(width, height)
    low_x, high_x = _widened(left, left + across, least, width)
    low_y, high_y = _widened(top, top + down, least, height)
    box = x0 + low_x, y0 + low_y, x0 + high_x, y0 + high_y
    if (high_x - low_x) * (high_y - low_y) > _LARGEST_RATIO * width * height:
        return None
    return ReferencePart(box, float(shares[best]) / total, count - 1)


def _widened(low: float, high: float, least: float, limit: int) -> tuple[int, int]:
    side = max((1 + 2 * _MARGIN_RATIO) * (high - low), least)
    middle = (low + high) / 2
    return max(0, math.floor(middle - side / 2)), min(limit, math.ceil(middle + side / 2))
