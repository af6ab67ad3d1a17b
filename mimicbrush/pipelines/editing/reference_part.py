"""Find the part of a reference that an edit looked at, for a second, closer look (paper, limitations)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from mimicbrush.ops.correspondence import Correspondence
from mimicbrush.ops.crops import Box, centre_interval

#: All of these are *ours*: the paper only advises to crop the reference by hand. A place is where attention is at least
#: `place_ratio` of what it is at the peak. The best one must have `least_share` of all; what it measures is widened by
#: `margin_ratio` on every side, to `least_side_ratio` of the reference's long side or more, and must not be more than
#: `largest_ratio` of the reference: a closer look at that would show hardly more than the first one did.
CHOICES = {
    "place_ratio": 0.25, "least_share": 0.3, "margin_ratio": 0.25, "least_side_ratio": 0.25, "largest_ratio": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class ReferencePart:
    """Part of the reference, with its attention.

    Attributes:
        box: of it, in pixels of the reference.
        share: of the attention that peaked within the reference, what peaked here, in 0..1.
        places: how many separate places of the reference got a good part of the attention; this is the one with most.
    """

    box: Box
    share: float
    places: int


def find_attended_part(correspondence: Correspondence, area: Box) -> ReferencePart | None:
    """Find the part of the reference that is worth a closer look.

    Each masked token counts at the place where its attention peaks, by how much went there. Neighbouring places
    are one; of several, the one with most is taken.

    Args:
        correspondence: of an edit.
        area: the part of the reference that it was given, all of it or a crop.

    Returns:
        None where there is no such part: attention is spread or scattered, all of it on the padding, or on most of
        the reference.
    """
    # 1. How much attention each token of the reference got.
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

    # 2. Places, and the one with most.
    smooth = cv2.GaussianBlur(attention, (0, 0), 1, borderType=cv2.BORDER_CONSTANT)
    is_place = (smooth >= CHOICES["place_ratio"] * smooth.max()).astype(np.uint8)
    count, number, stats, _ = cv2.connectedComponentsWithStats(is_place, connectivity=8)
    shares = np.bincount(number.ravel(), attention.ravel(), count) / total
    shares[0] = 0  # what is no place
    best = int(shares.argmax())
    if shares[best] < CHOICES["least_share"]:
        return None

    # 3. The box around it.
    left, top, across, down = stats[best, :4] * token_px
    least = CHOICES["least_side_ratio"] * max(width, height)
    low_x, high_x = _widened(left, across, least, width)
    low_y, high_y = _widened(top, down, least, height)
    if (high_x - low_x) * (high_y - low_y) > CHOICES["largest_ratio"] * width * height:
        return None
    box = x0 + low_x, y0 + low_y, x0 + high_x, y0 + high_y
    return ReferencePart(box, float(shares[best]), count - 1)


def _widened(start: float, length: float, least: float, limit: int) -> tuple[int, int]:
    side = math.ceil(max((1 + 2 * CHOICES["margin_ratio"]) * length, least))
    return centre_interval(math.floor(start), math.ceil(start + length), side, limit)
