"""A small sheet for people: a few pairs with a hole over what moved, large, and where the model looked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from scipy.spatial import cKDTree

from mimicbrush.data.pair import Pair
from mimicbrush.evaluation.heldout.samples import EvalSample, SamplePlan, load_sample
from mimicbrush.evaluation.heldout.scoring import area_boxes
from mimicbrush.ops import canvas
from mimicbrush.ops.contact_sheet import SheetRow, cell_corner, cell_fit, contact_sheet, fit_cell
from mimicbrush.ops.correspondence import Correspondence, PlacePair, choose_place_pairs, plot_place_pairs
from mimicbrush.ops.plot import mark_mask

SHOWCASE_CELL_PX, SHOWCASE_ROWS = 220, 3
SHOWCASE_COLUMNS = ("source\n(hole in stripes)", "reference", "result", "target")
#: Of a hole: how many neighbouring matches it covers, which part of these must move alike, and how far, over their own
#: move and over the image's long side, they may differ for that.
_GROUP, _AGREEING, _ALIKE, _ALIKE_RATIO = 16, 0.7, 0.25, 0.01
#: Over the long side: what a hole covers around its matches, and its least height and width.
_MARGIN_RATIO, _LEAST_RATIO = 0.05, 0.24
#: Marks in a row; more could not be told apart in cells of this size.
_MARKS = 4


@dataclass(frozen=True)
class MovedHole:
    """A hole over what moved.

    Attributes:
        mask: (H, W) uint8, 255 = repaint, of the pair's first image.
        moved_ratio: how far what it covers moved from one image to the other, over their long side.
        against_ratio: how far of that against the median of all matches: large over things, 0 where the camera moved.
    """

    mask: np.ndarray
    moved_ratio: float
    against_ratio: float


def hole_over_what_moved(pair: Pair) -> MovedHole | None:
    """Put a hole where neighbouring matches moved farthest together, over the image and against the rest of it.

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
    return MovedHole(mask, float(length[best]) / long_side, float(against[best]) / long_side)


def find_farthest_moved(pairs: Iterable[Pair]) -> list[tuple[Pair, MovedHole]]:
    """Of each source the pair in which something moved farthest, and its hole; the farthest first."""
    found = [(pair, hole) for pair in pairs if (hole := hole_over_what_moved(pair)) is not None]
    found.sort(key=lambda row: (-row[1].moved_ratio - row[1].against_ratio, row[0].pair_id))
    of_source: dict[str, tuple[Pair, MovedHole]] = {}
    for pair, hole in found:
        of_source.setdefault(pair.source_hash, (pair, hole))
    return list(of_source.values())


def choose_rows(plans: Sequence[SamplePlan], most: int = SHOWCASE_ROWS) -> list[tuple[SamplePlan, MovedHole]]:
    """The pairs in which things moved farthest, each of another source: never by what a model makes of them.

    Args:
        plans: that are evaluated.
        most: how many at most.
    """
    plan_of = {plan.pair.pair_id: plan for plan in plans}
    chosen = find_farthest_moved(plan.pair for plan in plans)[:most]
    return [(plan_of[pair.pair_id], hole) for pair, hole in chosen]


def load_row(plan: SamplePlan, hole: MovedHole, size_px: int, seed: int) -> EvalSample:
    """The sample of a pair as `load_sample` has it, with this hole in place of the evaluation's own."""
    return replace(load_sample(plan, "natural", size_px, seed), mask=canvas.letterbox_mask(hole.mask, size_px))


@dataclass(frozen=True)
class ShowcaseRow:
    """One edit.

    Attributes:
        caption: a few words.
        source, mask: (H, W, 3) and (H, W) uint8, not 0 = hole.
        reference: (H', W', 3) uint8.
        others: further images, such as result and target.
        correspondence: where the hole looked, in pixels of source and reference; None: no lines are drawn.
    """

    caption: str
    source: np.ndarray
    mask: np.ndarray
    reference: np.ndarray
    others: Sequence[np.ndarray]
    correspondence: Correspondence | None = None


def cut_row(caption: str, sample: EvalSample, result: np.ndarray, correspondence: Correspondence | None) -> ShowcaseRow:
    """Source, reference, result and target of a sample of the natural set, without the padding of their canvases."""
    (x0, y0, x1, y1), (u0, v0, u1, v1), _ = area_boxes(sample, "natural")
    source, mask, painted = (image[y0:y1, x0:x1] for image in (sample.source, sample.mask, result))
    if correspondence is not None:
        correspondence = replace(
            correspondence,
            source_xy=correspondence.source_xy - (x0, y0),
            reference_xy=correspondence.reference_xy - (u0, v0),
        )
    return ShowcaseRow(caption, source, mask, sample.reference[v0:v1, u0:u1], [painted, source], correspondence)


def showcase_sheet(
    title: str, columns: Sequence[str], rows: Sequence[ShowcaseRow], cell_px: int = SHOWCASE_CELL_PX
) -> np.ndarray:
    """Large cells, holes in stripes, and a few lines from each hole to the places of the reference that it looked at.

    Args:
        title, columns: see `contact_sheet`; the first two columns are source and reference.
        rows: one each.
        cell_px: side of a cell.

    Returns:
        (H, W, 3) uint8.
    """
    laid_out = []
    for row in rows:
        hole = fit_cell(np.where(row.mask > 0, np.uint8(255), np.uint8(0)), cell_px)[..., 0] > 127
        left, top, width, height = cell_fit(row.mask.shape, cell_px)
        inside = np.zeros_like(hole)
        inside[top : top + height, left : left + width] = True
        source = mark_mask(fit_cell(row.source, cell_px, smooth=True), hole & inside)
        others = [fit_cell(image, cell_px, smooth=True) for image in (row.reference, *row.others)]
        laid_out.append(SheetRow(row.caption, [source, *others]))
    sheet = contact_sheet(title, columns, laid_out, cell_px)
    for number, row in enumerate(rows):
        source_at, reference_at = (cell_corner(title, columns, number, column, cell_px) for column in (0, 1))
        sheet = plot_place_pairs(sheet, _marks(row, cell_px), source_at, reference_at)
    return sheet


def _marks(row: ShowcaseRow, cell_px: int) -> list[PlacePair]:
    """In pixels of the two cells."""
    found = row.correspondence
    if found is None:
        return []
    left, top, width, height = cell_fit(row.source.shape, cell_px)
    u, v, wide, high = cell_fit(row.reference.shape, cell_px)
    marks = choose_place_pairs(
        found.source_xy * (width / row.source.shape[1], height / row.source.shape[0]),
        found.reference_xy * (wide / row.reference.shape[1], high / row.reference.shape[0]),
        found.focus,
        (width, height),
        (wide, high),
        most=_MARKS,
    )
    return [mark.shift((left, top), (u, v)) for mark in marks]
