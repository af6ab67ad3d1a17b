"""Which place of the reference filled which place of the hole: as numbers, and as a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.spatial import cKDTree

from mimicbrush.ops.crops import Placement
from mimicbrush.ops.files import MASK_THRESHOLD, upright, write_aside

#: What stands for the reference's corners in the picture: top left, top right, bottom left, bottom right.
_CORNERS = np.array([[[230, 60, 50], [250, 210, 60]], [[60, 90, 220], [60, 190, 110]]], np.float32)

#: Of `draw_correspondence`: height of the titles; the focus from which colours are not faded; how many marks.
TITLE_PX = 24
_CLEAR_FOCUS = 0.3
_MARKS = 6
_GAP_PX = 8
_FONT_PX = TITLE_PX * 2 // 3


@dataclass(frozen=True, repr=False)
class Correspondence:
    """For each of the M tokens of a hole, where in the reference its attention went.

    Attributes:
        source_xy: (M, 2) float32, x and y of the token's centre, in pixels of the source.
        reference_xy: (M, 2) float32, where its attention to the reference peaks, in pixels of the reference; outside
            of it (or of the crop of it that was used) if that is on the padding.
        share: (M,) float32, the part of its attention that went to the reference at all, in 0..1.
        focus: (M,) float32, the part of that which went to the peak and the tokens around it, in 0..1.
        source_token_px, reference_token_px: side of a token in pixels of the source and of the reference.
    """

    source_xy: np.ndarray
    reference_xy: np.ndarray
    share: np.ndarray
    focus: np.ndarray
    source_token_px: float
    reference_token_px: float

    def __repr__(self) -> str:
        return f"Correspondence of {len(self.source_xy)} tokens, mean focus {float(np.mean(self.focus)):.2f}"

    @classmethod
    def from_attention(
        cls, tokens: np.ndarray, attention: np.ndarray, source: Placement, reference: Placement
    ) -> Correspondence:
        """Find the peaks.

        Args:
            tokens: (M,) numbers of the hole's tokens on a grid of n x n.
            attention: (M, n, n) probabilities on the reference's grid; the rest to 1 went to the own tokens.
            source, reference: how both lie on the canvas.
        """
        count, n, _ = attention.shape
        token_px = source.size_px / n
        share = attention.sum(axis=(1, 2))
        peak = attention.reshape(count, -1).argmax(axis=1)
        row, column = np.divmod(peak, n)
        # Of the 3 x 3 tokens around the peak: how much, and where its centre is.
        padded = np.pad(attention, ((0, 0), (1, 1), (1, 1)))
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
        hole_row, hole_column = np.divmod(tokens, n)
        source_canvas = (np.stack([hole_column, hole_row], axis=1) + 0.5) * token_px
        reference_canvas = (np.stack([column + dx, row + dy], axis=1) + 0.5) * token_px
        return cls(
            source_xy=source.to_picture(source_canvas).astype(np.float32),
            reference_xy=reference.to_picture(reference_canvas).astype(np.float32),
            share=share.astype(np.float32),
            focus=(mass / np.where(share > 0, share, 1)).astype(np.float32),
            source_token_px=token_px * source.picture_px_per_canvas_px,
            reference_token_px=token_px * reference.picture_px_per_canvas_px,
        )

    def save(self, path: Path) -> None:
        """Write all attributes as a NumPy archive, ``.npz``."""

        def write(aside: Path) -> None:
            with aside.open("wb") as file:
                np.savez_compressed(file, **asdict(self))

        write_aside(path, write)

    @classmethod
    def load(cls, path: Path) -> Correspondence:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as values:
            arrays: dict[str, Any] = {name: value if value.ndim else float(value) for name, value in values.items()}
        return cls(**arrays)


def draw_correspondence(
    source: Image.Image, mask: Image.Image, reference: Image.Image, correspondence: Correspondence, height_px: int = 384
) -> Image.Image:
    """Three pictures side by side: source with its hole, reference under colours, hole in the colours it came from.

    Some numbered marks join places of the hole with where they came from. Where a token's attention is spread over the
    whole reference (a low `Correspondence.focus`), its place means little, and its colour is faded.

    Args:
        source, mask, reference: as the pipeline got them.
        correspondence: of this edit.
        height_px: of the panels; the titles come on top.
    """
    painted = _paint(source, mask, reference, correspondence, height_px)
    first, second, third = painted.panels
    gap = np.full((height_px, _GAP_PX, 3), 255, np.uint8)
    row = np.concatenate([first, gap, second, gap, third], axis=1)
    spread = len(painted.tokens) > 0 and float(correspondence.focus.mean()) < _CLEAR_FOCUS / 2
    titles = [
        "source, hole",
        "reference",
        "where the hole came from" + (" (vague)" if spread else ""),
    ]
    sheet = Image.new("RGB", (row.shape[1], height_px + TITLE_PX), "white")
    sheet.paste(Image.fromarray(row), (0, TITLE_PX))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_PX)
    starts = [0, first.shape[1] + _GAP_PX, first.shape[1] + second.shape[1] + 2 * _GAP_PX]
    for start, title in zip(starts, titles, strict=True):
        draw.text((start + 2, 2), title, "black", font)
    painted.mark(draw, painted.places, (starts[1], TITLE_PX))
    painted.mark(draw, painted.tokens, (starts[2], TITLE_PX))
    return sheet


def paint_correspondence(
    source: Image.Image, mask: Image.Image, reference: Image.Image, correspondence: Correspondence, height_px: int = 384
) -> tuple[Image.Image, Image.Image]:
    """The last two panels of `draw_correspondence`, without titles, each a picture of its own."""
    painted = _paint(source, mask, reference, correspondence, height_px)
    second, third = (Image.fromarray(panel) for panel in painted.panels[1:])
    painted.mark(ImageDraw.Draw(second), painted.places, (0, 0))
    painted.mark(ImageDraw.Draw(third), painted.tokens, (0, 0))
    return second, third


@dataclass(frozen=True)
class _Painted:
    """The panels, (height_px, w, 3) uint8 each, and the hole's tokens and their places in the reference, (M, 2)."""

    panels: tuple[np.ndarray, np.ndarray, np.ndarray]
    tokens: np.ndarray
    places: np.ndarray

    def mark(self, draw: ImageDraw.ImageDraw, points: np.ndarray, corner: tuple[int, int]) -> None:
        """Number a few tokens, or their places, in a panel whose top left corner is given."""
        font, last_row = ImageFont.load_default(_FONT_PX), len(self.panels[0]) - 1
        for number, token in enumerate(_spread_out(self.tokens, _MARKS)):
            x, y = points[token]
            at = (corner[0] + float(x), corner[1] + float(np.clip(y, 0, last_row)))
            draw.text(at, str(number + 1), "white", font, anchor="mm", stroke_width=2, stroke_fill="black")


def _paint(
    source: Image.Image, mask: Image.Image, reference: Image.Image, correspondence: Correspondence, height_px: int
) -> _Painted:
    # 1. Scaled first: what follows is cheap, however large the pictures are.
    left, source_scale = _scaled(np.asarray(upright(source, "RGB")), height_px)  # (height_px, w, 3)
    right, reference_scale = _scaled(np.asarray(upright(reference, "RGB")), height_px)
    is_hole = np.asarray(upright(mask, "L")) > MASK_THRESHOLD
    covered, _ = _scaled(np.where(is_hole, np.uint8(255), np.uint8(0)), height_px)
    hole = covered[..., None] / np.float32(255)  # (height_px, w, 1), 0..1

    # 2. A colour for each place of the reference, and each pixel of the hole in the one that its nearest token has.
    field = cv2.resize(_CORNERS, (right.shape[1], right.shape[0]), interpolation=cv2.INTER_LINEAR)
    tinted = 0.4 * right + 0.6 * field
    tokens = correspondence.source_xy * source_scale
    places = correspondence.reference_xy * reference_scale
    columns, rows = places.astype(int).clip(0, [right.shape[1] - 1, height_px - 1]).T
    sure = np.clip(correspondence.focus / _CLEAR_FOCUS, 0, 1)[:, None]
    token_colours = sure * tinted[rows, columns] + (1 - sure) * 128
    colours = np.zeros(left.shape, np.float32)
    inside = np.nonzero(covered)
    if len(tokens):
        colours[inside] = token_colours[cKDTree(tokens).query(np.stack(inside[::-1], axis=1) + 0.5)[1]]
    first, second, third = (
        panel.round().astype(np.uint8) for panel in ((1 - hole) * left, tinted, (1 - hole) * left + hole * colours)
    )
    return _Painted((first, second, third), tokens, places)


def _spread_out(points: np.ndarray, most: int) -> list[int]:
    """Numbers of some points (M, 2) that lie far from each other, the first nearest to the middle."""
    if not len(points):
        return []
    chosen = [int(((points - points.mean(axis=0)) ** 2).sum(axis=1).argmin())]
    distance = np.full(len(points), np.inf)
    while len(chosen) < min(most, len(points)):
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(distance.argmax()))
    return chosen


def _scaled(picture: np.ndarray, height_px: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture, and by what its x and y are to be multiplied."""
    height, width = picture.shape[:2]
    width_px = max(1, round(width * height_px / height))
    small = cv2.resize(picture, (width_px, height_px), interpolation=cv2.INTER_AREA)
    return small, np.array([width_px / width, height_px / height])
