"""Run lengths of segments (COCO, in the JSON of SA-1B), checked before a library decodes them.

The JSON is ``{"image": {...}, "annotations": [{"segmentation": {"size": [h, w], "counts": ...}, ...}]}``. pycocotools
trusts what it is given, and reads or writes outside of its memory where the runs do not fit.
"""

from __future__ import annotations

import reprlib
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from mimicbrush.io.text import parse_json


class AnnotationError(ValueError):
    """Error about a JSON of another layout than SA-1B's."""


class SegmentError(ValueError):
    """Error about run lengths that do not fit the image."""


def read_annotation(annotation: bytes) -> list[dict[str, Any]]:
    """Read the segmentations of a JSON file, ``{"size": ..., "counts": ...}`` each; they are not checked yet.

    Raises:
        AnnotationError: not this layout.
    """
    try:
        content = parse_json(annotation)
    except ValueError as error:
        raise AnnotationError(str(error)) from error
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise AnnotationError("no list 'annotations'")
    segmentations: list[dict[str, Any]] = []
    for number, entry in enumerate(annotations):
        segmentation = entry.get("segmentation") if isinstance(entry, dict) else None
        if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
            raise AnnotationError(f"annotation {number} has no segmentation with 'size' and 'counts'")
        segmentations.append(segmentation)
    return segmentations


def run_lengths(segmentation: dict[str, Any], height: int, width: int) -> list[int]:
    """Read the run lengths of a segment (background first), checked to tile an image of this size exactly.

    Raises:
        SegmentError: they do not.
    """
    size, num_pixels = segmentation["size"], height * width
    if size != [height, width] or not _are_whole_numbers(size):  # JSON's true is 1, too
        raise SegmentError(f"its size is {_shorten(size)}, expected {[height, width]}")
    counts = segmentation["counts"]
    runs = _unpack_counts(counts, num_pixels) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not _are_whole_numbers(runs):
        raise SegmentError("the counts are neither a string nor a list of integers")
    wrong = next((run for run in runs if not 0 <= run <= num_pixels), None)  # before the sum, which may be endless
    if wrong is not None:
        raise SegmentError(f"a run is {_shorten(wrong)}, expected 0..{num_pixels}")
    if sum(runs) != num_pixels:
        raise SegmentError(f"the sum of the runs is {sum(runs)}, expected {num_pixels}")
    return runs


def _are_whole_numbers(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def _shorten(value: object) -> str:
    """Any JSON value as a few characters: it may be nested without end, or a number of thousands of digits."""
    return reprlib.repr(value)


def decode_segment(segmentation: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Decode a segment as a mask: (height, width) uint8, 0 or 1.

    Raises:
        SegmentError: its run lengths do not fit.
    """
    runs = run_lengths(segmentation, height, width)
    size = [height, width]
    rle = coco_mask.frPyObjects({"size": size, "counts": runs}, height, width)
    decoded: np.ndarray = coco_mask.decode(rle)
    return decoded


def _unpack_counts(counts: str, num_pixels: int) -> list[int]:
    """Undo COCO's packing: 5 bits a character, the sixth says that more follow; differences from run 3 on."""
    runs: list[int] = []
    value, shift, total = 0, 0, 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            raise SegmentError(f"the counts contain {character!r}, or a number that does not end")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        if not 0 <= value <= num_pixels:
            raise SegmentError(f"run {len(runs)} is {value}, expected 0..{num_pixels}")
        runs.append(value)
        total += value
        # Runs of nothing would never reach the end.
        if total > num_pixels or len(runs) > 2 * num_pixels + 1:
            raise SegmentError(f"{len(runs)} runs cover {total} pixels, but the image has {num_pixels}")
        value, shift = 0, 0
    if shift:
        raise SegmentError("the counts end in the middle of a number")
    return runs
