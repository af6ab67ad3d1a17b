"""Which place of the reference filled which masked place of the source: as numbers, and as an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.spatial import cKDTree

from mimicbrush.io.atomic import write_aside
from mimicbrush.io.images import MASK_THRESHOLD, normalise_mode
from mimicbrush.ops.crops import Placement
from mimicbrush.ops.plot import mark_mask
from mimicbrush.ops.reference_maps import ReferenceMaps

#: What stands for the reference's corners in the image: top left, top right, bottom left, bottom right.
_CORNERS = np.array([[[230, 60, 50], [250, 210, 60]], [[60, 90, 220], [60, 190, 110]]], np.float32)

#: Of `plot_correspondence`: height of the titles.
TITLE_PX = 24
#: The focus from which a place is sure: its mark's line is whole, its colour not faded.
SURE_FOCUS = 0.3
#: How many marks at most, and as many as this though they are unsure.
MARKS, UNSURE_MARKS = 6, 3
#: Radius of a mark; two of them, in either image, lie at least `MARKS_APART_PX` apart.
MARK_PX = 10
MARKS_APART_PX = 2 * MARK_PX + 3
#: One for each mark, which the colour-blind can tell apart, too (Okabe and Ito).
_MARK_COLOURS = ((213, 94, 0), (86, 180, 233), (240, 228, 66), (0, 158, 115), (204, 121, 167), (0, 114, 178))
_BETWEEN_PX = 28
#: A strip as high as the others would be too wide to be written, or to be looked at.
_MOST_WIDTH_PX, _LEAST_HEIGHT_PX = 4096, 16
_FONT_PX, _LEGEND_PX, _LINE_PX, _LEAST_WIDTH_PX = 16, 13, 18, 420
_DASH_PX = 7
_JOINS = "A line joins a place in the hole with the place in the reference that it attended to most"
LEGEND = f"{_JOINS}. Thin dashed lines are unsure: the attention is spread over many places."


@dataclass(frozen=True, repr=False)
class Correspondence:
    """Places of the reference that the M masked tokens of a source attended to.

    Attributes:
        source_xy: (M, 2) float32, x and y of the token's centre, in pixels of the source.
        reference_xy: (M, 2) float32, where its attention to the reference peaks, in pixels of the reference; outside
            of it (or of the crop of it that was used) if that is on the padding.
        share: (M,) float32, the part of its attention that went to the reference at all, in 0..1.
        focus: (M,) float32, the part of that which went to the peak and the tokens around it, in 0..1.
        source_token_px, reference_token_px: side of a token in pixels of the source and of the (first) reference.
        reference_index: (M,) int64, in which of several references that place lies; zeros for one.
        maps: where else it went; None where it was loaded from a file.
    """

    source_xy: np.ndarray
    reference_xy: np.ndarray
    share: np.ndarray
    focus: np.ndarray
    source_token_px: float
    reference_token_px: float
    reference_index: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    maps: ReferenceMaps | None = None

    def __post_init__(self) -> None:
        if len(self.reference_index) != len(self.source_xy):  # left out, or a file of an earlier version
            object.__setattr__(self, "reference_index", np.zeros(len(self.source_xy), np.int64))

    def __repr__(self) -> str:
        return f"Correspondence of {len(self.source_xy)} tokens, mean focus {float(np.mean(self.focus)):.2f}"

    @classmethod
    def from_attention(
        cls,
        tokens: np.ndarray,
        attention: np.ndarray,
        source: Placement,
        reference: Placement | Sequence[Placement],
        head_peaks: np.ndarray | None = None,
    ) -> Correspondence:
        """Find the peak of each masked token's attention to the reference, or to several.

        Args:
            tokens: (M,) numbers of the masked tokens on a grid of n x n.
            attention: (M, r n, n) probabilities on the grids of r references, one below the other; the rest to 1 went
                to the own tokens.
            source, reference: how they lie on the canvas.
            head_peaks: as `attention`, see `ReferenceMaps`; None makes no `maps`.
        """
        references = [reference] if isinstance(reference, Placement) else reference
        count, n = len(attention), attention.shape[-1]
        token_px = source.size_px / n
        share = attention.sum(axis=(1, 2))
        index, peak = np.divmod(attention.reshape(count, -1).argmax(axis=1), n * n)
        row, column = np.divmod(peak, n)
        # Of the 3 x 3 tokens around the peak: how much, and where its centre is.
        padded = np.pad(attention.reshape(count, -1, n, n)[np.arange(count), index], ((0, 0), (1, 1), (1, 1)))
        offsets = np.arange(3)
        around = padded[
            np.arange(count)[:, None, None],
            row[:, None, None] + offsets[None, :, None],
            column[:, None, None] + offsets[None, None, :],
        ]  # (M, 3, 3)
        mass = around.sum(axis=(1, 2))
        safe = np.where(mass > 0, mass, 1)
        dx = (around.sum(axis=1) * (offsets - 1)).sum(axis=1) / safe
        dy = (around.sum(axis=2) * (offsets - 1)).sum(axis=1) / safe
        token_row, token_column = np.divmod(tokens, n)
        source_canvas = (np.stack([token_column, token_row], axis=1) + 0.5) * token_px
        reference_canvas = (np.stack([column + dx, row + dy], axis=1) + 0.5) * token_px
        places = np.stack([each.to_image(reference_canvas) for each in references])  # (r, M, 2)
        return cls(
            source_xy=source.to_image(source_canvas).astype(np.float32),
            reference_xy=places[index, np.arange(count)].astype(np.float32),
            share=share.astype(np.float32),
            focus=(mass / np.where(share > 0, share, 1)).astype(np.float32),
            source_token_px=token_px * source.image_px_per_canvas_px,
            reference_token_px=token_px * references[0].image_px_per_canvas_px,
            reference_index=index,
            maps=None if head_peaks is None else ReferenceMaps.pool(attention, head_peaks, references),
        )

    def select_reference(self, index: int) -> Correspondence:
        """Select the tokens whose place lies in this one of several references."""
        chosen = self.reference_index == index
        names = ("source_xy", "reference_xy", "share", "focus", "reference_index")
        maps = None if self.maps is None else self.maps.select(chosen, index)
        return replace(self, **{name: getattr(self, name)[chosen] for name in names}, maps=maps)

    def save(self, path: Path) -> None:
        """Write all attributes but `maps` as a NumPy archive, ``.npz``."""
        names = [each.name for each in fields(self) if each.name != "maps"]

        def write(aside: Path) -> None:
            with aside.open("wb") as file:
                np.savez_compressed(file, **{name: getattr(self, name) for name in names})

        write_aside(path, write)

    @classmethod
    def load(cls, path: Path) -> Correspondence:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as values:
            arrays: dict[str, Any] = {name: value if value.ndim else float(value) for name, value in values.items()}
        return cls(**arrays)


def plot_correspondence(
    source: Image.Image,
    mask: Image.Image,
    reference: Image.Image | Sequence[Image.Image],
    correspondence: Correspondence,
    height_px: int = 384,
) -> Image.Image:
    """Plot source and references side by side, with lines from masked places to the places they attended to most.

    A few numbered marks, each of a colour of its own, that never lie over each other. Where attention is scattered over
    the reference (a `Correspondence.focus` below `SURE_FOCUS`) its peak means little: such marks are thin and dashed,
    and there are none where enough others are sure. A legend below says so.

    Args:
        source, mask, reference: as the pipeline got them.
        correspondence: of this edit.
        height_px: of the images, less where one is very wide; titles and legend come on top and below.
    """
    references = [reference] if isinstance(reference, Image.Image) else list(reference)
    widest = max(each.width / each.height for each in (source, *references))
    height_px = min(height_px, max(_LEAST_HEIGHT_PX, int(_MOST_WIDTH_PX / widest)))
    left, source_scale = _scale_image(np.asarray(normalise_mode(source, "RGB")), height_px)  # (height_px, w, 3)
    panels, scales = zip(
        *(_scale_image(np.asarray(normalise_mode(each, "RGB")), height_px) for each in references), strict=True
    )
    left = mark_mask(left, _scale_mask(mask, height_px) > MASK_THRESHOLD)
    between = np.full((height_px, _BETWEEN_PX, 3), 255, np.uint8)
    image = np.concatenate([left, *(part for panel in panels for part in (between, panel))], axis=1)
    widths = np.array([panel.shape[1] for panel in panels])
    starts = left.shape[1] + _BETWEEN_PX + np.concatenate([[0], np.cumsum(widths + _BETWEEN_PX)[:-1]])  # of each panel
    start, index = int(starts[0]), correspondence.reference_index
    places = correspondence.reference_xy * np.stack(scales)[index]  # in its own panel
    is_visible = (places >= 0).all(axis=1) & (places[:, 0] < widths[index]) & (places[:, 1] < height_px)
    places = np.where(is_visible[:, None], places + np.stack([starts - start, 0 * starts], axis=1)[index], -1)
    marks = choose_place_pairs(
        correspondence.source_xy * source_scale,
        places,
        correspondence.focus,
        (left.shape[1], height_px),
        (image.shape[1] - start, height_px),
    )
    image = plot_place_pairs(image, marks, (0, 0), (start, 0))

    legend = _wrap_text(_choose_legend(marks), max(image.shape[1], _LEAST_WIDTH_PX) - 8)
    size = max(image.shape[1], _LEAST_WIDTH_PX), TITLE_PX + height_px + 8 + _LINE_PX * len(legend)
    sheet = Image.new("RGB", size, "white")
    sheet.paste(Image.fromarray(image), (0, TITLE_PX))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_PX)
    titles = ("source, hole striped", "source")  # the longest that leaves the other's place free
    own = next((title for title in titles if font.getlength(title) < start - 8), "")
    named = ["reference"] if len(references) == 1 else [f"reference {number + 1}" for number in range(len(references))]
    for x, title in ((0, own), *zip(starts.tolist(), named, strict=True)):
        pen.text((x + 2, 2), title, "black", font)
    for number, line in enumerate(legend):
        at = (4, TITLE_PX + height_px + 4 + number * _LINE_PX)
        pen.text(at, line, "black", ImageFont.load_default(_LEGEND_PX))
    return sheet


def _choose_legend(marks: Sequence[PlacePair]) -> str:
    if not marks:
        return "There are no lines: no place in the hole attended most to a place inside the reference."
    return f"{_JOINS}." if all(mark.is_sure for mark in marks) else LEGEND


def _wrap_text(text: str, width_px: int) -> list[str]:
    """Lines of whole words, none wider than that (a single word may be)."""
    font, lines = ImageFont.load_default(_LEGEND_PX), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width_px or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@dataclass(frozen=True)
class PlacePair:
    """A place of the source and one of the reference, far enough from the edges of their images to hold a number.

    Attributes:
        source, reference: (x, y).
        is_sure: whether the attention was focused.
    """

    source: tuple[float, float]
    reference: tuple[float, float]
    is_sure: bool

    def shift(self, source: tuple[float, float], reference: tuple[float, float]) -> PlacePair:
        """Shift both ends by (x, y) each."""
        (x, y), (u, v) = self.source, self.reference
        return PlacePair((x + source[0], y + source[1]), (u + reference[0], v + reference[1]), self.is_sure)


def choose_place_pairs(
    sources: np.ndarray,
    references: np.ndarray,
    focus: np.ndarray,
    source_size: tuple[int, int],
    reference_size: tuple[int, int],
    most: int = MARKS,
) -> list[PlacePair]:
    """Choose a few masked places, spread over the mask, none of whose ends lies near another's.

    Sure ones come first; unsure ones only fill up to `UNSURE_MARKS`. Places whose reference end lies off the image,
    on the padding, are left out.

    Args:
        sources, references: (M, 2) x and y of both ends, in pixels of the images as they are shown.
        focus: (M,), see `Correspondence`.
        source_size, reference_size: (width, height) of these images.
        most: how many at most.

    Returns:
        At most `most`; two ends in one image are `MARKS_APART_PX` apart or more.
    """
    is_visible = np.all((references >= 0) & (references < reference_size), axis=1)
    ends = np.stack([_move_from_edges(sources, source_size), _move_from_edges(references, reference_size)])
    numbers: list[int] = []
    for sure, fill_up_to in ((True, most), (False, min(most, UNSURE_MARKS))):
        free = np.flatnonzero(is_visible & ((focus >= SURE_FOCUS) == sure))
        while len(numbers) < fill_up_to:
            apart = np.linalg.norm(ends[:, free, None] - ends[:, None, numbers], axis=-1)  # (2, free, numbers)
            is_clear = (apart >= MARKS_APART_PX).all(axis=(0, 2))
            free, distances = free[is_clear], apart[0, is_clear]
            if not len(free):
                break
            if numbers:
                number = int(distances.min(axis=1).argmax())
            else:
                number = int(((ends[0, free] - ends[0, free].mean(axis=0)) ** 2).sum(axis=1).argmin())
            numbers.append(int(free[number]))
    places = [[(float(x), float(y)) for x, y in ends[which, numbers]] for which in (0, 1)]
    sures = (focus[numbers] >= SURE_FOCUS).tolist()
    return [PlacePair(source, place, sure) for source, place, sure in zip(*places, sures, strict=True)]


def _move_from_edges(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Moved so far into an image of (width, height) that a mark lies within it, or to its middle where it is small."""
    least = np.minimum(MARK_PX, (np.array(size) - 1) / 2)
    return np.clip(points, least, np.array(size) - 1 - least)


def plot_place_pairs(
    image: np.ndarray, marks: Sequence[PlacePair], source_at: tuple[int, int], reference_at: tuple[int, int]
) -> np.ndarray:
    """Plot marks into two images that lie side by side: lines first, so that no number lies under one.

    Args:
        image: (H, W, 3) uint8, that holds source and reference.
        marks: see `choose_place_pairs`.
        source_at, reference_at: x and y of their upper left corners in it.

    Returns:
        (H, W, 3) uint8.
    """
    canvas = np.array(image, order="C")  # a copy
    shifted = [mark.shift(source_at, reference_at) for mark in marks]
    for mark, colour in zip(shifted, _MARK_COLOURS, strict=False):
        for start, end in _split_line(mark):
            cv2.line(canvas, start, end, (0, 0, 0), 5 if mark.is_sure else 3, cv2.LINE_AA, shift=4)
            cv2.line(canvas, start, end, colour, 3 if mark.is_sure else 1, cv2.LINE_AA, shift=4)
    for mark, colour in zip(shifted, _MARK_COLOURS, strict=False):
        for centre in map(_to_sixteenths, (mark.source, mark.reference)):
            cv2.circle(canvas, centre, MARK_PX * 16, (0, 0, 0), -1, cv2.LINE_AA, shift=4)
            cv2.circle(canvas, centre, (MARK_PX - 1) * 16, colour, -1, cv2.LINE_AA, shift=4)
    image_with_numbers = Image.fromarray(canvas)
    pen, font = ImageDraw.Draw(image_with_numbers), ImageFont.load_default(_FONT_PX)
    for number, (mark, colour) in enumerate(zip(shifted, _MARK_COLOURS, strict=False), start=1):
        ink = "black" if np.dot(colour, (0.299, 0.587, 0.114)) > 110 else "white"
        for place in (mark.source, mark.reference):
            pen.text(place, str(number), ink, font, anchor="mm")
    return np.asarray(image_with_numbers)


def _split_line(mark: PlacePair) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The pieces of a mark's line, in sixteenths of a pixel: the whole of it, or dashes."""
    start, end = np.array(mark.source), np.array(mark.reference)
    if mark.is_sure:
        return [(_to_sixteenths(start), _to_sixteenths(end))]
    count = max(1, int(np.linalg.norm(end - start) / (2 * _DASH_PX)))
    at = (np.arange(count)[:, None] + np.array([0.25, 0.75])) / count  # (count, 2), 0..1
    pieces = start + at[..., None] * (end - start)
    return [(_to_sixteenths(first), _to_sixteenths(last)) for first, last in pieces]


def _to_sixteenths(point: Sequence[float] | np.ndarray) -> tuple[int, int]:
    """As fine as OpenCV's fixed-point drawing is asked to be."""
    x, y = (round(float(value) * 16) for value in point)
    return x, y


def tint_correspondence(
    source: Image.Image, mask: Image.Image, reference: Image.Image, correspondence: Correspondence, height_px: int = 384
) -> tuple[Image.Image, Image.Image]:
    """Tint two images for a grid: the reference by place, and the masked area by the places it came from.

    The marks of `plot_correspondence`, as numbers alone, join both. Where a token's attention is spread over the whole
    reference (a low `Correspondence.focus`), its place means little, and its colour is faded.

    Args:
        source, mask, reference: as the pipeline got them.
        correspondence: of this edit.
        height_px: of both.
    """
    # 1. Scaled first: what follows is cheap, however large the images are.
    left, source_scale = _scale_image(np.asarray(normalise_mode(source, "RGB")), height_px)  # (height_px, w, 3)
    right, reference_scale = _scale_image(np.asarray(normalise_mode(reference, "RGB")), height_px)
    covered = _scale_mask(mask, height_px)
    alpha = covered[..., None] / np.float32(255)  # (height_px, w, 1), 0..1

    # 2. A colour for each place of the reference, and for each masked pixel that of its nearest token.
    field = cv2.resize(_CORNERS, (right.shape[1], right.shape[0]), interpolation=cv2.INTER_LINEAR)
    tinted = 0.4 * right + 0.6 * field
    tokens = correspondence.source_xy * source_scale
    places = correspondence.reference_xy * reference_scale
    columns, rows = places.astype(int).clip(0, [right.shape[1] - 1, height_px - 1]).T
    sure = np.clip(correspondence.focus / SURE_FOCUS, 0, 1)[:, None]
    token_colours = sure * tinted[rows, columns] + (1 - sure) * 128
    colours = np.zeros(left.shape, np.float32)
    inside = np.nonzero(covered)
    if len(tokens):
        colours[inside] = token_colours[cKDTree(tokens).query(np.stack(inside[::-1], axis=1) + 0.5)[1]]
    recoloured, colour_map = (
        Image.fromarray(panel.round().astype(np.uint8)) for panel in ((1 - alpha) * left + alpha * colours, tinted)
    )

    # 3. The numbers.
    marks = choose_place_pairs(
        tokens, places, correspondence.focus, (left.shape[1], height_px), (right.shape[1], height_px)
    )
    font = ImageFont.load_default(_FONT_PX)
    for image, ends in (
        (recoloured, [mark.source for mark in marks]),
        (colour_map, [mark.reference for mark in marks]),
    ):
        pen = ImageDraw.Draw(image)
        for number, end in enumerate(ends):
            pen.text(end, str(number + 1), "white", font, anchor="mm", stroke_width=2, stroke_fill="black")
    return colour_map, recoloured


def _scale_mask(mask: Image.Image, height_px: int) -> np.ndarray:
    """(height_px, w) uint8: how much of each pixel is repainted, 0..255."""
    is_masked = np.asarray(normalise_mode(mask, "L")) > MASK_THRESHOLD
    return _scale_image(np.where(is_masked, np.uint8(255), np.uint8(0)), height_px)[0]


def _scale_image(image: np.ndarray, height_px: int) -> tuple[np.ndarray, np.ndarray]:
    """The image, and by what its x and y are to be multiplied."""
    height, width = image.shape[:2]
    width_px = max(1, round(width * height_px / height))
    how = cv2.INTER_AREA if height_px < height else cv2.INTER_CUBIC
    small = cv2.resize(image, (width_px, height_px), interpolation=how)
    return small, np.array([width_px / width, height_px / height])
