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
    y += _heading_px(columns)
    for row in rows:
        draw.text((_GAP_PX, y), row.caption, _FAINT, font)
        y += _LINE_PX
        for number, cell in enumerate(row.cells):
            left = _GAP_PX + number * (cell_px + _GAP_PX)
            if cell is None:
                draw.text((left + cell_px // 2, y + cell_px // 2), "-", _FAINT, font)
            else:
                sheet.paste(Image.fromarray(fit_cell(cell, cell_px)), (left, y))
        y += cell_px + 2 * _GAP_PX
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


def fit_cell(picture: np.ndarray, cell_px: int) -> np.ndarray:
    """Fit a picture into a square on light grey: (H, W[, 3]) uint8 -> (cell_px, cell_px, 3) uint8.

    Small pictures are enlarged without smoothing, so that single pixels stay visible as such.
    """
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=2)
    scale = cell_px / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST if scale >= 2 else cv2.INTER_CUBIC
    cell = np.full((cell_px, cell_px, 3), 236, np.uint8)
    left, top = (cell_px - size[0]) // 2, (cell_px - size[1]) // 2
    cell[top : top + size[1], left : left + size[0]] = cv2.resize(picture, size, interpolation=how)
    return cell


def show_hole(source: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The source as the model gets it, with a black hole: (H, W, 3) uint8, (H, W) -> (H, W, 3) uint8."""
    return np.where(mask[..., None] > 0, np.uint8(0), source)


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
