"""Transfers to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from mimicbrush.evaluation.keypoint_transfer.methods import Method
from mimicbrush.evaluation.keypoint_transfer.pck import correct
from mimicbrush.evaluation.keypoint_transfer.tasks import TransferTask

_SIDE_PX, _GAP_PX, _POINTS, _ALPHA = 320, 8, 24, 0.1
_RIGHT, _WRONG = (30, 160, 80), (220, 60, 50)


def draw_transfers(tasks: Sequence[TransferTask], method: Method, most: int = 6) -> Image.Image:
    """Source and reference side by side, a line for each of some keypoints: green where it is right within 0.1."""
    shown = [tasks[len(tasks) * number // min(most, len(tasks))] for number in range(min(most, len(tasks)))]
    sheet = Image.new("RGB", (2 * _SIDE_PX + _GAP_PX, len(shown) * (_SIDE_PX + _GAP_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, task in enumerate(shown):
        top = number * (_SIDE_PX + _GAP_PX)
        for picture, left in ((task.source, 0), (task.reference, _SIDE_PX + _GAP_PX)):
            sheet.paste(Image.fromarray(picture).resize((_SIDE_PX, _SIDE_PX), Image.Resampling.NEAREST), (left, top))
        found = method(task)
        right = correct(found, task, _ALPHA)
        scale = _SIDE_PX / len(task.source)
        step = max(1, len(found) // _POINTS)
        for source, reference, is_right in zip(task.source_xy[::step], found[::step], right[::step], strict=True):
            start = (source + 0.5) * scale + np.array([0, top])
            end = np.clip((reference + 0.5) * scale, 0, _SIDE_PX) + np.array([_SIDE_PX + _GAP_PX, top])
            draw.line([*start, *end], _RIGHT if is_right else _WRONG, 2)
            for x, y in (start, end):
                draw.ellipse([x - 3, y - 3, x + 3, y + 3], _RIGHT if is_right else _WRONG)
    return sheet
