"""A contact sheet of mined pairs with their matches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mimicbrush.data.pair import Pair
from mimicbrush.evaluation.heldout.selection import spread_pairs
from mimicbrush.ops.contact_sheet import GAP_PX, INK, LINE_PX, PAPER, TEXT_PX, title_height_px
from mimicbrush.ops.plot import plot_matches


def make_pairs_sheet(pairs: Sequence[Pair], max_pairs: int = 12, columns: int = 2) -> np.ndarray:
    """Make a sheet of mined pairs, spread over their videos, with lines for SIFT matches: (H, W, 3) uint8.

    Raises:
        ValueError: there are no pairs.
    """
    if not pairs:
        raise ValueError("there are no pairs to show")
    chosen = spread_pairs(pairs, max_pairs)
    font = ImageFont.load_default(TEXT_PX)
    cells = []
    for pair in chosen:
        panel = plot_matches(pair.read_a(), pair.read_b(), pair.a_points, pair.b_points)
        cell = Image.new("RGB", (panel.shape[1], panel.shape[0] + LINE_PX), PAPER)
        cell.paste(Image.fromarray(panel), (0, LINE_PX))
        text = f"{pair.source_path}   SSIM {pair.ssim:.2f}   {len(pair.a_points)} matches"
        ImageDraw.Draw(cell).text((0, 0), text, INK, font)
        cells.append(cell)
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    step_x, step_y = width + 2 * GAP_PX, height + GAP_PX
    title = f"{len(chosen)} of {len(pairs)} mined pairs; each line is a match (at most 60 per pair)"
    top = title_height_px(title)
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * step_x + GAP_PX, top + GAP_PX + rows * step_y), PAPER)
    ImageDraw.Draw(sheet).text((GAP_PX, GAP_PX), title, INK, ImageFont.load_default(TEXT_PX + 2))
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        sheet.paste(cell, (GAP_PX + column * step_x, top + GAP_PX + row * step_y))
    return np.asarray(sheet)
