"""The showcase: a sheet of a few large edits whose masked content only the reference shows, with attended places."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import cv2
import numpy as np

from mimicbrush.data.pair import Pair
from mimicbrush.errors import DataError
from mimicbrush.evaluation.editors.baselines import opencv_inpaint
from mimicbrush.evaluation.heldout.samples import EvalSample, SamplePlan, load_sample
from mimicbrush.evaluation.heldout.scoring import find_area_boxes
from mimicbrush.ops import canvas
from mimicbrush.ops.contact_sheet import SheetRow, cell_corner, cell_fit, contact_sheet, fit_cell
from mimicbrush.ops.correspondence import Correspondence, PlacePair, choose_place_pairs, plot_place_pairs
from mimicbrush.ops.plot import mark_mask

SHOWCASE_CELL_PX, SHOWCASE_ROWS = 220, 3
SHOWCASE_COLUMNS = ("source\n(mask in stripes)", "reference", "result", "target")
#: Largest number of pairs whose frames are read for the choice; more would take minutes.
_MOST_EXAMINED = 200
#: Holes are compared in images with this long side, blurred over this many of their pixels, so that large shapes count
#: and texture does not.
_COARSE_PX, _BLUR_PX = 64, 9
#: Radius of a hole, and of the area whose matches are used, as shares of the long side.
_RADIUS_RATIO, _AROUND_RATIO = 0.12, 0.22
#: Number of holes that are tried for a pair; smallest number of matches in the hole, and around it, that fit one motion
#: (those around it show which part of the reference belongs there); smallest share of all these matches that must fit
#: it; and the tolerance in coarse pixels.
_TRIES, _LEAST_INSIDE, _LEAST_AROUND, _LEAST_FITTING, _FIT_PX = 40, 4, 12, 0.7, 1.0
#: Number of marks in a row; more marks could not be distinguished in cells of this size.
_MARKS = 4


@dataclass(frozen=True)
class ShowcaseHole:
    """A mask whose content the reference shows, and the surroundings do not.

    Attributes:
        mask: (H, W) uint8, 255 = repaint, of the pair's first image.
        margin: how much better the reference fills the hole when it is moved there by its matches, compared with
            inpainting and with copying it in place (the better of both): difference of the mean squared errors, of
            colours in 0..255. If it is large, only the matching part of the reference can fill the hole.
    """

    mask: np.ndarray
    margin: float


def find_showcase_hole(pair: Pair) -> ShowcaseHole | None:
    """Find the hole of a pair with the largest margin. The result depends only on its frames and stored matches.

    Returns:
        None if there is no place where enough matches have the same motion, for example in a photograph.
    """
    height, width = pair.size_px
    if len(pair.a_points) < _LEAST_INSIDE + _LEAST_AROUND:
        return None
    source, scale = _make_coarse(pair.read_a())
    reference, reference_scale = _make_coarse(pair.read_b())
    places, targets = pair.a_points * scale, pair.b_points * reference_scale  # (K, 2), coarse pixels
    size = source.shape[1::-1]
    in_place = cv2.resize(reference, size)
    radius, around = _RADIUS_RATIO * _COARSE_PX, _AROUND_RATIO * _COARSE_PX
    best_margin, best_place = 0.0, None
    for place in places[:: max(1, len(places) // _TRIES)]:
        if (place < radius).any() or (place > np.subtract(size, radius)).any():
            continue
        distance = np.linalg.norm(places - place, axis=1)
        near = distance < around
        is_inside = distance[near] < radius
        if is_inside.sum() < _LEAST_INSIDE or (~is_inside).sum() < _LEAST_AROUND:
            continue
        motion, fits = cv2.estimateAffinePartial2D(targets[near], places[near], ransacReprojThreshold=_FIT_PX)
        if motion is None:
            continue
        fits = np.ravel(fits) > 0
        few = (fits & is_inside).sum() < _LEAST_INSIDE or (fits & ~is_inside).sum() < _LEAST_AROUND
        if few or fits.mean() < _LEAST_FITTING:
            continue
        hole = _draw_disc(source.shape[:2], place, radius)
        is_hole = hole > 0
        if cv2.warpAffine(np.full(reference.shape[:2], 255, np.uint8), motion, size)[is_hole].min() < 255:
            continue  # the reference does not show all of the hole
        matching = cv2.warpAffine(reference, motion, size)
        guess = opencv_inpaint(source, hole, np.ones_like(hole))
        errors = [_compare_colours(image, source, is_hole) for image in (matching, guess, in_place)]
        margin = float(min(errors[1:]) - errors[0])
        if margin > best_margin:
            best_margin, best_place = margin, place
    if best_place is None:
        return None
    return ShowcaseHole(_draw_disc((height, width), best_place / scale, radius / scale), best_margin)


def _make_coarse(image: np.ndarray) -> tuple[np.ndarray, float]:
    """Reduce an image to the coarse long side; return it with its scale."""
    height, width = image.shape[:2]
    scale = _COARSE_PX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA), scale


def _compare_colours(image: np.ndarray, source: np.ndarray, is_hole: np.ndarray) -> float:
    """Compute the mean squared difference in the hole of colours averaged over neighbouring pixels."""
    difference = np.where(is_hole[..., None], image.astype(np.float32) - source, 0)
    return float(np.square(cv2.blur(difference, (_BLUR_PX, _BLUR_PX)))[is_hole].mean())


def _draw_disc(shape: tuple[int, int], centre: np.ndarray, radius: float) -> np.ndarray:
    """Draw a disc of 255 into zeros, (H, W) uint8."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    return np.where(np.hypot(x - centre[0], y - centre[1]) <= radius, np.uint8(255), np.uint8(0))


def find_showcase_holes(pairs: Iterable[Pair]) -> list[tuple[Pair, ShowcaseHole]]:
    """Find for each video the pair and the hole with the largest margin, sorted by it, the largest first."""
    candidates = []
    for pair in pairs:
        with suppress(DataError):  # a frame cannot be read; the evaluation reports this
            if (hole := find_showcase_hole(pair)) is not None:
                candidates.append((pair, hole))
    candidates.sort(key=lambda row: (-row[1].margin, row[0].pair_id))
    of_source: dict[str, tuple[Pair, ShowcaseHole]] = {}
    for pair, hole in candidates:
        of_source.setdefault(pair.source_hash, (pair, hole))
    return list(of_source.values())


def choose_showcase_pairs(
    plans: Sequence[SamplePlan], most: int = SHOWCASE_ROWS
) -> list[tuple[SamplePlan, ShowcaseHole]]:
    """Choose the pairs with the largest margins, each of another video. The results are not used for the choice.

    Args:
        plans: the evaluated samples; the first `_MOST_EXAMINED` are examined.
        most: largest number of pairs.
    """
    plan_of = {plan.pair.pair_id: plan for plan in plans[:_MOST_EXAMINED]}
    chosen = find_showcase_holes(plan.pair for plan in plan_of.values())[:most]
    return [(plan_of[pair.pair_id], hole) for pair, hole in chosen]


def load_showcase_sample(plan: SamplePlan, hole: ShowcaseHole, size_px: int, seed: int) -> EvalSample:
    """Load the sample of a pair, see `load_sample`, with this mask instead of that of the evaluation."""
    return replace(load_sample(plan, "natural", size_px, seed), mask=canvas.letterbox_mask(hole.mask, size_px))


@dataclass(frozen=True)
class ShowcaseRow:
    """A row of the showcase: one edit.

    Attributes:
        caption: short text above the row.
        source: (H, W, 3) uint8.
        mask: (H, W) uint8, not 0 = repaint.
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
    caption: str, sample: EvalSample, hole: ShowcaseHole, result: np.ndarray, correspondence: Correspondence | None
) -> ShowcaseRow:
    """Show an edit of a natural sample as users get it: pasted back into the source, at the size of its frames."""
    pair = sample.plan.pair
    source, reference = pair.read_a(), pair.read_b()
    height, width = source.shape[:2]
    enlarged = canvas.crop_back(result, height, width)
    pasted = canvas.paste_back(enlarged, source, hole.mask).round().astype(np.uint8)
    if correspondence is not None:
        area, reference_area, _ = find_area_boxes(sample, "natural")
        found = correspondence.select_reference(0)
        correspondence = replace(
            found,
            source_xy=_move_to_frame(found.source_xy, area, source),
            reference_xy=_move_to_frame(found.reference_xy, reference_area, reference),
        )
    return ShowcaseRow(caption, source, hole.mask, reference, [pasted, source], correspondence)


def _move_to_frame(points: np.ndarray, area: tuple[int, int, int, int], frame: np.ndarray) -> np.ndarray:
    """Move points (N, 2) from a canvas, which shows the frame in an area (x0, y0, x1, y1), to pixels of the frame."""
    x0, y0, x1, y1 = area
    return (points - (x0, y0)) * (frame.shape[1] / (x1 - x0), frame.shape[0] / (y1 - y0))


def make_showcase_sheet(
    title: str, columns: Sequence[str], rows: Sequence[ShowcaseRow], cell_px: int = SHOWCASE_CELL_PX
) -> np.ndarray:
    """Make the sheet: large cells, masks in stripes, and a few lines from masked places to places of the reference.

    Args:
        title, columns: see `contact_sheet`; the first two columns are source and reference.
        rows: the edits to show.
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
    """Choose the pairs of places to connect by lines, in pixels of the two cells."""
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
