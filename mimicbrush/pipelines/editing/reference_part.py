"""Finds the part of a reference that an edit attended to, for a second edit with this part (paper, limitations)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from mimicbrush.ops.correspondence import Correspondence
from mimicbrush.ops.crops import Box, centre_interval

#: All of these are *ours*: the paper only advises to crop the reference by hand. A place is a connected region whose
#: attention is at least `place_ratio` of its maximum. The best place must have `least_share` of all attention. Its box
#: is widened by `margin_ratio` on every side, and to at least `least_side_ratio` of the reference's long side. It must
#: not be larger than `largest_ratio` of the reference, because such a crop would hardly show more details.
CHOICES = {
    "place_ratio": 0.25, "least_share": 0.3, "margin_ratio": 0.25, "least_side_ratio": 0.25, "largest_ratio": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class ReferencePart:
    """A part of the reference, with its attention.

    Attributes:
        box: the part, in pixels of the reference.
        share: share of the attention with peaks inside the reference whose peaks are in this part, 0..1.
        places: number of separate places with much attention; this part is the place with the most.
    """

    box: Box
    share: float
    places: int


def find_attended_part(correspondence: Correspondence, area: Box) -> ReferencePart | None:
    """Find the part of the reference for a second edit.

    The attention of each masked token is counted at the token of the reference where it peaks. Neighbouring tokens form
    a place; the place with the most attention is taken.

    Args:
        correspondence: correspondence of an edit.
        area: the box of the reference that this edit got, all of it or a crop.

    Returns:
        None if there is no such part: the attention is spread over many places, is all on the padding, or is on most of
        the reference.
    """
    # 1. The attention that each token of the reference got.
    x0, y0, x1, y1 = area
    width, height, token_px = x1 - x0, y1 - y0, correspondence.reference_token_px
    rows, columns = math.ceil(height / token_px), math.ceil(width / token_px)
    weights, at = correspondence.share * correspondence.focus, correspondence.reference_xy - (x0, y0)
    inside = ((at >= 0) & (at < (width, height))).all(axis=1)
    column, row = (at / token_px).astype(int).T
    attention = np.zeros((rows, columns), np.float32)
    np.add.at(attention, (row[inside], column[inside]), weights[inside])
    total = float(attention.sum())
    if total <= 0:
        return None

    # 2. The place with the most attention.
    smooth = cv2.GaussianBlur(attention, (0, 0), 1, borderType=cv2.BORDER_CONSTANT)
    is_place = (smooth >= CHOICES["place_ratio"] * smooth.max()).astype(np.uint8)
    count, number, stats, _ = cv2.connectedComponentsWithStats(is_place, connectivity=8)
    shares = np.bincount(number.ravel(), attention.ravel(), count) / total
    shares[0] = 0  # label 0: tokens that belong to no place
    best = int(shares.argmax())
    if shares[best] < CHOICES["least_share"]:
        return None

    # 3. The box around this place.
    left, top, across, down = stats[best, :4] * token_px
    least = CHOICES["least_side_ratio"] * max(width, height)
    low_x, high_x = _widen_interval(left, across, least, width)
    low_y, high_y = _widen_interval(top, down, least, height)
    if (high_x - low_x) * (high_y - low_y) > CHOICES["largest_ratio"] * width * height:
        return None
    box = x0 + low_x, y0 + low_y, x0 + high_x, y0 + high_y
    return ReferencePart(box, float(shares[best]), count - 1)


def _widen_interval(start: float, length: float, least: float, limit: int) -> tuple[int, int]:
    """Widen an interval by the margin, to at least `least` px, inside 0..limit."""
    side = math.ceil(max((1 + 2 * CHOICES["margin_ratio"]) * length, least))
    return centre_interval(math.floor(start), math.ceil(start + length), side, limit)
