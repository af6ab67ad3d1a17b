"""A small sheet for people: a few large pairs with a mask over what moved, and where the model looked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from scipy.spatial import cKDTree

from mimicbrush.data.pair import Pair
from mimicbrush.evaluation.heldout.samples import EvalSample, SamplePlan, load_sample
from mimicbrush.evaluation.heldout.scoring import find_area_boxes
from mimicbrush.ops import canvas
from mimicbrush.ops.contact_sheet import SheetRow, cell_corner, cell_fit, contact_sheet, fit_cell
from mimicbrush.ops.correspondence import Correspondence, PlacePair, choose_place_pairs, plot_place_pairs
from mimicbrush.ops.plot import mark_mask

SHOWCASE_CELL_PX, SHOWCASE_ROWS = 220, 3
SHOWCASE_COLUMNS = ("source\n(hole in stripes)", "reference", "result", "target")
#: A mask covers so many neighbouring matches. This part of them must move alike. For that they may differ by so much,
#: over their own move and over the image's long side.
_GROUP, _AGREEING, _ALIKE, _ALIKE_RATIO = 16, 0.7, 0.25, 0.01
#: Over the long side: what a mask covers around its matches, and its least height and width.
_MARGIN_RATIO, _LEAST_RATIO = 0.05, 0.24
#: Marks in a row; more could not be told apart in cells of this size.
_MARKS = 4


@dataclass(frozen=True)
class MovedMask:
    """A mask over what moved.

    Attributes:
        mask: (H, W) uint8, 255 = repaint, of the pair's first image.
        moved_ratio: how far what it covers moved from one image to the other, over their long side.
        against_ratio: how far of that against the median of all matches: large over things, 0 where the camera moved.
    """

    mask: np.ndarray
    moved_ratio: float
    against_ratio: float


def find_moved_mask(pair: Pair) -> MovedMask | None:
    """Find where neighbouring matches moved farthest together, over the image and against the rest of it.

    Copying the reference in place is wrong there. A function of the stored matches alone.

    Returns:
        None where no matches lie together and move alike, as in a photograph.
    """
    height, width = pair.size_px
    long_side = max(height, width)
    points = pair.a_points.astype(np.float64)
    moves = pair.b_points.astype(np.float64) - points
    count = min(_GROUP, len(points))
    if count < 3:
        return None
    groups = cKDTree(points).query(points, k=count)[1]  # (K, count)
    middle = np.median(moves[groups], axis=1)  # (K, 2)
    length = np.linalg.norm(middle, axis=1)
    allowed = _ALIKE * length + _ALIKE_RATIO * long_side
    against = np.linalg.norm(middle - np.median(moves, axis=0), axis=1)
    alike = np.linalg.norm(moves[groups] - middle[:, None], axis=-1) <= allowed[:, None]  # (K, count)
    score = np.where(alike.mean(axis=1) >= _AGREEING, length + against, 0)
    best = int(score.argmax())
    if not score[best]:
        return None
    covered = points[groups[best]][alike[best]]
    mask = cv2.fillConvexPoly(
        np.zeros((height, width), np.uint8), cv2.convexHull(covered.round().astype(np.int32)), 255
    )
    margin = round(_MARGIN_RATIO * long_side)
    mask = cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * margin + 1, 2 * margin + 1)))
    x, y, w, h = cv2.boundingRect(mask)
    least = round(_LEAST_RATIO * long_side)
    if min(w, h) < least:
        axes = max(w, least) // 2, max(h, least) // 2
        cv2.ellipse(mask, (x + w // 2, y + h // 2), axes, 0, 0, 360, 255, -1)
    return MovedMask(mask, float(length[best]) / long_side, float(against[best]) / long_side)


def find_farthest_moved(pairs: Iterable[Pair]) -> list[tuple[Pair, MovedMask]]:
    """Find for each video the pair in which something moved farthest, and its mask; the farthest first."""
    candidates = [(pair, moved) for pair in pairs if (moved := find_moved_mask(pair)) is not None]
    candidates.sort(key=lambda row: (-row[1].moved_ratio - row[1].against_ratio, row[0].pair_id))
    of_source: dict[str, tuple[Pair, MovedMask]] = {}
    for pair, moved in candidates:
        of_source.setdefault(pair.source_hash, (pair, moved))
    return list(of_source.values())


def choose_showcase_pairs(plans: Sequence[SamplePlan], most: int = SHOWCASE_ROWS) -> list[tuple[SamplePlan, MovedMask]]:
    """Choose the pairs in which things moved farthest, each of another video; no result plays a part.

    Args:
        plans: that are evaluated.
        most: how many at most.
    """
    plan_of = {plan.pair.pair_id: plan for plan in plans}
    chosen = find_farthest_moved(plan.pair for plan in plans)[:most]
    return [(plan_of[pair.pair_id], moved) for pair, moved in chosen]


def load_showcase_sample(plan: SamplePlan, moved: MovedMask, size_px: int, seed: int) -> EvalSample:
    """Load the sample of a pair, see `load_sample`, with this mask in place of the evaluation's own."""
    return replace(load_sample(plan, "natural", size_px, seed), mask=canvas.letterbox_mask(moved.mask, size_px))


@dataclass(frozen=True)
class ShowcaseRow:
    """A row of the showcase: one edit.

    Attributes:
        caption: a few words.
        source, mask: (H, W, 3) and (H, W) uint8, not 0 = repaint.
        reference: (H', W', 3) uint8.
        others: further images, such as result and target.
        correspondence: where the masked pixels came from, in pixels of source and reference; None: no lines.
    """

    caption: str
    source: np.ndarray
    mask: np.ndarray
    reference: np.ndarray
    others: Sequence[np.ndarray]
    correspondence: Correspondence | None = None


def make_showcase_row(
    caption: str, sample: EvalSample, result: np.ndarray, correspondence: Correspondence | None
) -> ShowcaseRow:
    """Cut source, first reference, result and target of a natural sample out of their padding."""
    (x0, y0, x1, y1), (u0, v0, u1, v1), _ = find_area_boxes(sample, "natural")
    source, mask, painted = (image[y0:y1, x0:x1] for image in (sample.source, sample.mask, result))
    if correspondence is not None:
        correspondence = correspondence.select_reference(0)
        correspondence = replace(
            correspondence,
            source_xy=correspondence.source_xy - (x0, y0),
            reference_xy=correspondence.reference_xy - (u0, v0),
        )
    return ShowcaseRow(caption, source, mask, sample.reference[v0:v1, u0:u1], [painted, source], correspondence)


def make_showcase_sheet(
    title: str, columns: Sequence[str], rows: Sequence[ShowcaseRow], cell_px: int = SHOWCASE_CELL_PX
) -> np.ndarray:
    """Make the sheet: large cells, masks in stripes, a few lines from masked places to those of the reference.

    Args:
        title, columns: see `contact_sheet`; the first two columns are source and reference.
        rows: one each.
        cell_px: side of a cell.

    Returns:
        (H, W, 3) uint8.
    """
    laid_out = []
    for row in rows:
        is_masked = fit_cell(np.where(row.mask > 0, np.uint8(255), np.uint8(0)), cell_px)[..., 0] > 127
        left, top, width, height = cell_fit(row.mask.shape, cell_px)
        inside = np.zeros_like(is_masked)
        inside[top : top + height, left : left + width] = True
        source = mark_mask(fit_cell(row.source, cell_px, smooth=True), is_masked & inside)
        others = [fit_cell(image, cell_px, smooth=True) for image in (row.reference, *row.others)]
        laid_out.append(SheetRow(row.caption, [source, *others]))
    sheet = contact_sheet(title, columns, laid_out, cell_px)
    for number, row in enumerate(rows):
        source_at, reference_at = (cell_corner(title, columns, number, column, cell_px) for column in (0, 1))
        sheet = plot_place_pairs(sheet, _choose_marks(row, cell_px), source_at, reference_at)
    return sheet


def _choose_marks(row: ShowcaseRow, cell_px: int) -> list[PlacePair]:
    """Choose the places that lines join, in pixels of the two cells."""
    places = row.correspondence
    if places is None:
        return []
    left, top, width, height = cell_fit(row.source.shape, cell_px)
    u, v, wide, high = cell_fit(row.reference.shape, cell_px)
    marks = choose_place_pairs(
        places.source_xy * (width / row.source.shape[1], height / row.source.shape[0]),
        places.reference_xy * (wide / row.reference.shape[1], high / row.reference.shape[0]),
        places.focus,
        (width, height),
        (wide, high),
        most=_MARKS,
    )
    return [mark.shift((left, top), (u, v)) for mark in marks]
