"""Contact sheets: what a number means is seen only in pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mimicbrush.data.pair import Pair
from mimicbrush.evaluation.heldout import spread_pairs
from mimicbrush.ops.panels import match_panel

CELL_PX = 144
_GAP_PX = 6
_TEXT_PX = 13
_LINE_PX = 17
_PAPER, _INK, _FAINT = (255, 255, 255), (25, 25, 25), (110, 110, 110)


@dataclass(frozen=True)
class SheetRow:
    """A caption, and below it one picture per column, (H, W, 3) or (H, W) uint8; None: left empty."""

    caption: str
    cells: Sequence[np.ndarray | None]


def contact_sheet(title: str, columns: Sequence[str], rows: Sequence[SheetRow], cell_px: int = CELL_PX) -> np.ndarray:
    """Lay pictures out in a labelled grid.

    Args:
        title: above everything; newlines allowed.
        columns: one heading per column; newlines allowed.
        rows: pictures of any size; each is fitted into a square of `cell_px`.
        cell_px: side of a cell.

    Returns:
        (H, W, 3) uint8 RGB, of `sheet_size`.
    """
    width, height = sheet_size(title, columns, len(rows), cell_px)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_TEXT_PX)
    y = _GAP_PX
    draw.multiline_text((_GAP_PX, y), title, _INK, ImageFont.load_default(_TEXT_PX + 2), spacing=4)
    y += _title_px(title)
    for number, heading in enumerate(columns):
        left = _GAP_PX + number * (cell_px + _GAP_PX)
        draw.multiline_text((left, y), heading, _INK, font, spacing=3)
    for row_number, row in enumerate(rows):
        _, top = cell_corner(title, columns, row_number, 0, cell_px)
        draw.text((_GAP_PX, top - _LINE_PX), row.caption, _FAINT, font)
        for number, cell in enumerate(row.cells):
            left, top = cell_corner(title, columns, row_number, number, cell_px)
            if cell is None:
                draw.text((left + cell_px // 2, top + cell_px // 2), "-", _FAINT, font)
            else:
                sheet.paste(Image.fromarray(fit_cell(cell, cell_px)), (left, top))
    return np.asarray(sheet)


def sheet_size(title: str, columns: Sequence[str], num_rows: int, cell_px: int = CELL_PX) -> tuple[int, int]:
    """Width and height of a contact sheet in pixels: at least as wide as its title."""
    font = ImageFont.load_default(_TEXT_PX + 2)
    title_width = max((round(font.getlength(line)) for line in title.split("\n")), default=0)
    width = max(len(columns) * (cell_px + _GAP_PX), title_width + _GAP_PX) + _GAP_PX
    rows = num_rows * (cell_px + 2 * _GAP_PX + _LINE_PX)
    return width, _GAP_PX + _title_px(title) + _heading_px(columns) + rows


def _title_px(title: str) -> int:
    return (title.count("\n") + 1) * (_LINE_PX + 4) + _GAP_PX


def _heading_px(columns: Sequence[str]) -> int:
    return (max(heading.count("\n") for heading in columns) + 1) * _LINE_PX + 2


def cell_corner(title: str, columns: Sequence[str], row: int, column: int, cell_px: int = CELL_PX) -> tuple[int, int]:
    """x and y of a cell's upper left corner in a `contact_sheet`; rows and columns count from 0."""
    top = _GAP_PX + _title_px(title) + _heading_px(columns)
    return (
        _GAP_PX + column * (cell_px + _GAP_PX),
        top + row * (_LINE_PX + cell_px + 2 * _GAP_PX) + _LINE_PX,
    )


def cell_fit(shape: tuple[int, ...], cell_px: int) -> tuple[int, int, int, int]:
    """Where `fit_cell` puts a picture of (H, W, ...): left, top, width and height in the cell."""
    scale = cell_px / max(shape[:2])
    height, width = (max(1, round(side * scale)) for side in shape[:2])
    return (cell_px - width) // 2, (cell_px - height) // 2, width, height


def fit_cell(picture: np.ndarray, cell_px: int, smooth: bool = False) -> np.ndarray:
    """Fit a picture into a square on light grey: (H, W[, 3]) uint8 -> (cell_px, cell_px, 3) uint8.

    Small pictures are enlarged without smoothing, so that single pixels stay visible as such, unless `smooth` is set.
    """
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=2)
    scale = cell_px / max(picture.shape[:2])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST if scale >= 2 and not smooth else cv2.INTER_CUBIC
    cell = np.full((cell_px, cell_px, 3), 236, np.uint8)
    left, top, width, height = cell_fit(picture.shape, cell_px)
    cell[top : top + height, left : left + width] = cv2.resize(picture, (width, height), interpolation=how)
    return cell


def pairs_sheet(pairs: Sequence[Pair], max_pairs: int = 12, columns: int = 2) -> np.ndarray:
    """Mined pairs, spread over their sources, with their SIFT matches drawn: (H, W, 3) uint8.

    Raises:
        ValueError: there are no pairs.
    """
    if not pairs:
        raise ValueError("there are no pairs to show")
    chosen = spread_pairs(pairs, max_pairs)
    font = ImageFont.load_default(_TEXT_PX)
    cells = []
    for pair in chosen:
        panel = match_panel(pair.read_a(), pair.read_b(), pair.a_points, pair.b_points)
        cell = Image.new("RGB", (panel.shape[1], panel.shape[0] + _LINE_PX), _PAPER)
        cell.paste(Image.fromarray(panel), (0, _LINE_PX))
        text = f"{pair.source_path}   SSIM {pair.ssim:.2f}   {len(pair.a_points)} matches"
        ImageDraw.Draw(cell).text((0, 0), text, _INK, font)
        cells.append(cell)
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    step_x, step_y = width + 2 * _GAP_PX, height + _GAP_PX
    title = f"{len(chosen)} of {len(pairs)} mined pairs; a line joins the two ends of a match (at most 60)"
    top = _title_px(title)
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * step_x + _GAP_PX, top + _GAP_PX + rows * step_y), _PAPER)
    ImageDraw.Draw(sheet).text((_GAP_PX, _GAP_PX), title, _INK, ImageFont.load_default(_TEXT_PX + 2))
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        sheet.paste(cell, (_GAP_PX + column * step_x, top + _GAP_PX + row * step_y))
    return np.asarray(sheet)
