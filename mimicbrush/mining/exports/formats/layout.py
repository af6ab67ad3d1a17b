"""Defines a format: the files of a sample, and the lists that its trainer reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

#: Content of a file: text, or an image, (H, W, 3) or (H, W) uint8, whose file type is that of the suffix.
FileContent = np.ndarray | str
#: One sample in the list of a trainer.
Record = dict[str, Any]


@dataclass(frozen=True)
class TrainingSample:
    """A sample as a trainer gets it; S is the side of the canvas, and W is S times the number of images side by side.

    Attributes:
        name: name of its files, without suffix: only digits and a dash, so that no trainer interprets a part of it.
        target: (S, W, 3) uint8, the image to be painted.
        source: (S, W, 3) uint8, the target with a black hole.
        references: one or more of (S, S, 3) uint8.
        mask: (S, W) uint8, 255 = repaint, 0 = keep.
        caption: one line.
        facts: its pair, file and licence, for formats that store more than a caption.
        suffix: suffix of its images, ".png" or ".jpg"; masks are always ".png".
    """

    name: str
    target: np.ndarray
    source: np.ndarray
    references: tuple[np.ndarray, ...]
    mask: np.ndarray
    caption: str
    facts: Mapping[str, Any]
    suffix: str = ".png"


@dataclass(frozen=True)
class SplitList:
    """The samples of one split, for the list of a trainer.

    Attributes:
        folder: absolute path of the split's folder.
        records: the records of the samples, in order; they can be iterated several times.
        size_px: (height, width) of the targets.
    """

    folder: Path
    records: Iterable[Record]
    size_px: tuple[int, int]


@dataclass(frozen=True)
class ExportFormat:
    """The layout of one trainer.

    Attributes:
        lay_out: sample -> (path in the folder of the split -> content, its record in the list).
        write_lists: the samples of a split -> (path in that folder, pieces of its text) of each list; None: the
            trainer finds the files by itself.
        in_tars: whether each part is one tar instead of separate files.
    """

    lay_out: Callable[[TrainingSample], tuple[dict[str, FileContent], Record]]
    write_lists: Callable[[SplitList], Iterator[tuple[str, Iterator[str]]]] | None = None
    in_tars: bool = False


def number_names(stem: str, count: int) -> list[str]:
    """Number names from the second one on: reference, reference_2, reference_3."""
    return [stem if number == 1 else f"{stem}_{number}" for number in range(1, count + 1)]


def write_json_lines(records: Iterable[Record]) -> Iterator[str]:
    """Yield one line of JSON for each record, in ASCII, so that the locale has no effect."""
    return (json.dumps(record) + "\n" for record in records)
