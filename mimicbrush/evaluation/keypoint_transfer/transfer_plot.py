"""Plots of carried keypoints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mimicbrush.evaluation.keypoint_transfer.pck import ALPHA, find_correct
from mimicbrush.evaluation.keypoint_transfer.tasks import TransferTask

_SIDE_PX, _GAP_PX, _TITLE_PX, _FONT_PX = 448, 12, 30, 17
_POINTS = 12
RIGHT, WRONG, _TRUTH = (20, 170, 80), (225, 50, 40), (255, 255, 255)


def plot_transfers(
    tasks: Sequence[TransferTask], found: Sequence[np.ndarray], title: str, most: int = 6
) -> Image.Image:
    """Plot source and reference side by side, a numbered line for each of some keypoints.

    Green lines end within `ALPHA` of the side of the true place, red ones do not: a ring marks where they should end.

    Args:
        tasks, found: keypoints, and where they were carried, (K, 2) px each.
        title: what carried them.
        most: so many tasks are drawn at most, taken evenly.
    """
    count = min(most, len(tasks))
    shown = [len(tasks) * number // count for number in range(count)]
    width = 2 * _SIDE_PX + _GAP_PX
    sheet = Image.new("RGB", (width, 2 * _TITLE_PX + count * (_SIDE_PX + _TITLE_PX)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_PX)
    draw.text((4, 5), f"Keypoints of a source, found in its reference by {title}", "black", font)
    _plot_legend(draw)
    for number, index in enumerate(shown):
        _plot_task(sheet, tasks[index], found[index], 2 * _TITLE_PX + number * (_SIDE_PX + _TITLE_PX))
    return sheet


def _plot_legend(draw: ImageDraw.ImageDraw) -> None:
    font = ImageFont.load_default(_FONT_PX)
    x, y = 14.0, 1.5 * _TITLE_PX
    for colour, words in (
        (RIGHT, f"correct: within {ALPHA:g} of the side"),
        (WRONG, "wrong"),
        (_TRUTH, "true place of a wrong one"),
    ):
        _plot_mark(draw, np.array([x, y]), colour, "", 2 * _SIDE_PX)
        draw.text((x + 12, y), words, "black", font, anchor="lm")
        x += 12 + draw.textlength(words, font) + 28


def _plot_task(sheet: Image.Image, task: TransferTask, found: np.ndarray, top: int) -> None:
    """Two panels below `top`, with a line of figures above them."""
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_PX)
    is_right = find_correct(found, task, ALPHA)
    counted = f"{int(is_right.sum())} of {len(found)} correct"
    draw.text((4, top + _TITLE_PX - 4), "source", "black", font, anchor="ls")
    where = f"reference{f' ({task.set_name})' if task.set_name else ''}: {counted}"
    draw.text((_SIDE_PX + _GAP_PX + 4, top + _TITLE_PX - 4), where, "black", font, anchor="ls")
    corners = [np.array([left, top + _TITLE_PX]) for left in (0, _SIDE_PX + _GAP_PX)]
    for image, corner in zip((task.source, task.reference), corners, strict=True):
        sheet.paste(Image.fromarray(image).resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BICUBIC), tuple(corner))
        draw.rectangle([*(corner - 1), *(corner + _SIDE_PX)], outline="grey")

    def on_sheet(points: np.ndarray, panel: int) -> np.ndarray:
        scaled = (points + 0.5) * (_SIDE_PX / len(task.source))
        return np.clip(scaled, 6, _SIDE_PX - 6) + corners[panel]

    chosen = _choose_far_apart(task.source_xy, min(_POINTS, len(found)))
    starts, ends, truths = (
        on_sheet(points[chosen], panel) for points, panel in ((task.source_xy, 0), (found, 1), (task.reference_xy, 1))
    )
    colours = [RIGHT if right else WRONG for right in is_right[chosen]]
    for start, end, colour in zip(starts, ends, colours, strict=True):
        draw.line([*start, *end], colour, 2)
    for number, (start, end, truth, colour) in enumerate(zip(starts, ends, truths, colours, strict=True), start=1):
        if colour == WRONG:
            _plot_mark(draw, truth, _TRUTH, str(number), corners[1][0] + _SIDE_PX)
        _plot_mark(draw, start, colour, str(number), corners[0][0] + _SIDE_PX)
        _plot_mark(draw, end, colour, str(number), corners[1][0] + _SIDE_PX)


def _choose_far_apart(points: np.ndarray, count: int) -> np.ndarray:
    """Numbers (count,) of points (K, 2), each the farthest from those before it, then in the points' own order."""
    chosen = [0]
    while len(chosen) < count:
        distances = np.linalg.norm(points[:, None] - points[chosen][None], axis=-1)
        chosen.append(int(distances.min(axis=1).argmax()))
    return np.array(sorted(chosen))


def _plot_mark(
    draw: ImageDraw.ImageDraw, at: np.ndarray, colour: tuple[int, int, int], words: str, right_px: int
) -> None:
    """A dot, or for `_TRUTH` a ring, and words beside it that stay left of `right_px`."""
    x, y = map(float, at)
    if colour == _TRUTH:
        draw.ellipse([x - 7, y - 7, x + 7, y + 7], outline="black", width=4)
        draw.ellipse([x - 6, y - 6, x + 6, y + 6], outline=colour, width=2)
    else:
        draw.ellipse([x - 6, y - 6, x + 6, y + 6], colour, "white")
    font = ImageFont.load_default(_FONT_PX)
    beside = (9, "lm") if x + 9 + draw.textlength(words, font) < right_px else (-9, "rm")
    edge = "black" if colour == _TRUTH else colour
    draw.text((x + beside[0], y), words, "white", font, anchor=beside[1], stroke_width=2, stroke_fill=edge)
