"""Which part of a reference was looked at, of attention that is known."""

from __future__ import annotations

import numpy as np
import pytest

from mimicbrush.ops.correspondence import Correspondence
from mimicbrush.ops.crops import Box
from mimicbrush.pipelines.editing.reference_part import ReferencePart, find_attended_part

AREA: Box = (0, 0, 640, 480)
TOKEN_PX = 20.0


def attention(*places: tuple[Box, float], tokens: int = 400) -> Correspondence:
    """To places (x0, y0, x1, y1), evenly, so many tokens each with this share of their attention."""
    rng = np.random.default_rng(0)
    xy = [rng.uniform(box[:2], box[2:], (tokens, 2)) for box, _ in places]
    share = [np.full(tokens, weight) for _, weight in places]
    count = tokens * len(places)
    return Correspondence(
        source_xy=rng.uniform(0, 100, (count, 2)).astype(np.float32),
        reference_xy=np.concatenate(xy).astype(np.float32),
        share=np.concatenate(share).astype(np.float32),
        focus=np.full(count, 0.5, np.float32),
        source_token_px=8.0,
        reference_token_px=TOKEN_PX,
    )


def part_of(found: Correspondence, area: Box = AREA) -> ReferencePart:
    part = find_attended_part(found, area)
    assert part is not None
    return part


def holds(outer: Box, inner: Box) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and outer[2] >= inner[2] and outer[3] >= inner[3]


def test_a_small_part_is_found_with_a_margin() -> None:
    place = (100, 200, 260, 320)
    part = part_of(attention((place, 0.4)))
    assert holds(part.box, place) and holds(AREA, part.box)
    assert part.places == 1 and part.share == pytest.approx(1, abs=0.02)
    assert part.box[2] - part.box[0] < 2 * 160 + 2 * TOKEN_PX


def test_of_several_the_one_with_most_attention_is_taken() -> None:
    weak, strong = (40, 40, 160, 160), (420, 280, 560, 420)
    part = part_of(attention((weak, 0.3), (strong, 0.4)))
    assert part.places == 2 and part.share == pytest.approx(4 / 7, abs=0.03)
    assert holds(part.box, strong) and part.box[0] > weak[2]


@pytest.mark.parametrize(("x", "y"), [(300, 100), (3, 3), (638, 478), (3, 300)])
def test_what_one_token_saw_is_no_smaller_than_a_quarter(x: int, y: int) -> None:
    part = part_of(attention(((x, y, x + 1, y + 1), 0.4), tokens=1))
    assert part.box[2] - part.box[0] == part.box[3] - part.box[1] == 160
    assert holds(part.box, (x, y, x + 1, y + 1)) and holds(AREA, part.box)


@pytest.mark.parametrize(
    "found",
    [
        *(attention((AREA, 0.4), tokens=tokens) for tokens in (20, 60, 200, 4000)),  # scattered, spread
        attention(((700, 100, 800, 200), 0.4)),  # on the padding
        attention(((100, 481, 200, 489), 0.4)),  # on the padding, just below
        attention(((100, 100, 200, 200), 0.0)),  # to the own tokens alone
    ],
)
def test_where_there_is_nothing_to_zoom_into(found: Correspondence) -> None:
    assert find_attended_part(found, AREA) is None


def test_it_stays_within_the_crop_that_was_given() -> None:
    area = (300, 100, 620, 340)
    for place in ((300, 100, 360, 160), (560, 280, 620, 340), (400, 200, 460, 260)):
        box = part_of(attention((place, 0.4), ((0, 0, 280, 90), 0.9)), area).box
        assert holds(area, box) and holds(box, place)
