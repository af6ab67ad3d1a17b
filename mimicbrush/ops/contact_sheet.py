"""Contact sheets: labelled grids of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL_PX = 144
GAP_PX = 6
TEXT_PX = 13
LINE_PX = 17
PAPER, INK, FAINT = (255, 255, 255), (25, 25, 25), (110, 110, 110)


@dataclass(frozen=True)
class SheetRow:
    """A row of a contact sheet: a caption, and one image per column, (H, W, 3) or (H, W) uint8 or None."""

    caption: str
    cells: Sequence[np.ndarray | None]


def contact_sheet(title: str, columns: Sequence[str], rows: Sequence[SheetRow], cell_px: int = CELL_PX) -> np.ndarray:
    """Lay images out in a labelled grid.

    Args:
        title: above everything; newlines allowed.
        columns: one heading per column; newlines allowed.
        rows: images of any size; each is fitted into a square of `cell_px`.
        cell_px: side of a cell.

    Returns:
        (H, W, 3) uint8 RGB, of `sheet_size`.
    """
    width, height = sheet_size(title, columns, len(rows), cell_px)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(TEXT_PX)
    y = GAP_PX
    pen.multiline_text((GAP_PX, y), title, INK, ImageFont.load_default(TEXT_PX + 2), spacing=4)
    y += title_height_px(title)
    for number, heading in enumerate(columns):
        left = GAP_PX + number * (cell_px + GAP_PX)
        pen.multiline_text((left, y), heading, INK, font, spacing=3)
    for row_number, row in enumerate(rows):
        _, top = cell_corner(title, columns, row_number, 0, cell_px)
        pen.text((GAP_PX, top - LINE_PX), row.caption, FAINT, font)
        for number, cell in enumerate(row.cells):
            left, top = cell_corner(title, columns, row_number, number, cell_px)
            if cell is None:
                pen.text((left + cell_px // 2, top + cell_px // 2), "-", FAINT, font)
            else:
                sheet.paste(Image.fromarray(fit_cell(cell, cell_px)), (left, top))
    return np.asarray(sheet)


def sheet_size(title: str, columns: Sequence[str], num_rows: int, cell_px: int = CELL_PX) -> tuple[int, int]:
    """Compute width and height of a contact sheet in pixels: at least as wide as its title."""
    font = ImageFont.load_default(TEXT_PX + 2)
    title_width = max((round(font.getlength(line)) for line in title.split("\n")), default=0)
    width = max(len(columns) * (cell_px + GAP_PX), title_width + GAP_PX) + GAP_PX
    rows = num_rows * (cell_px + 2 * GAP_PX + LINE_PX)
    return width, GAP_PX + title_height_px(title) + _heading_px(columns) + rows


def title_height_px(title: str) -> int:
    """Compute the height of a sheet's title with the gap below it, in pixels."""
    return (title.count("\n") + 1) * (LINE_PX + 4) + GAP_PX


def _heading_px(columns: Sequence[str]) -> int:
    return (max(heading.count("\n") for heading in columns) + 1) * LINE_PX + 2


def cell_corner(title: str, columns: Sequence[str], row: int, column: int, cell_px: int = CELL_PX) -> tuple[int, int]:
    """Compute x and y of a cell's upper left corner in a `contact_sheet`; rows and columns count from 0."""
    top = GAP_PX + title_height_px(title) + _heading_px(columns)
    return (
        GAP_PX + column * (cell_px + GAP_PX),
        top + row * (LINE_PX + cell_px + 2 * GAP_PX) + LINE_PX,
    )


def cell_fit(shape: tuple[int, ...], cell_px: int) -> tuple[int, int, int, int]:
    """Compute where `fit_cell` puts an image of (H, W, ...): left, top, width and height in the cell."""
    scale = cell_px / max(shape[:2])
    height, width = (max(1, round(side * scale)) for side in shape[:2])
    return (cell_px - width) // 2, (cell_px - height) // 2, width, height


def fit_cell(image: np.ndarray, cell_px: int, smooth: bool = False) -> np.ndarray:
    """Fit an image into a square on light grey: (H, W[, 3]) uint8 -> (cell_px, cell_px, 3) uint8.

    Small images are enlarged without smoothing, so that single pixels stay visible as such, unless `smooth` is set.
    """
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    scale = cell_px / max(image.shape[:2])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST if scale >= 2 and not smooth else cv2.INTER_CUBIC
    cell = np.full((cell_px, cell_px, 3), 236, np.uint8)
    left, top, width, height = cell_fit(image.shape, cell_px)
    cell[top : top + height, left : left + width] = cv2.resize(image, (width, height), interpolation=how)
    return cell
