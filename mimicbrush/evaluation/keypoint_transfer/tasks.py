"""Tasks: pairs of images with keypoints whose places in both are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mimicbrush.data.pair import Pair
from mimicbrush.errors import DataError, InputError
from mimicbrush.evaluation.heldout.samples import WARP, hash_pair
from mimicbrush.evaluation.heldout.selection import spread_pairs
from mimicbrush.io.atomic import path_inside
from mimicbrush.io.images import read_image
from mimicbrush.io.text import parse_json
from mimicbrush.ops.canvas import IMAGE_FILL
from mimicbrush.ops.color_jitter import JitterRanges, apply_jitter, random_jitter
from mimicbrush.ops.counter_rng import generator
from mimicbrush.ops.geometry import is_inside, letterbox_matrix, random_matrix, transform_points, warp_to_canvas

#: Keypoints lie on a grid of so many by so many over the canvas: *ours*; SIFT points would favour what SIFT likes.
GRID = 12


@dataclass(frozen=True)
class TransferTask:
    """A task: keypoints to carry from a source to a reference, both on square canvases of side S.

    Attributes:
        source, reference: (S, S, 3) uint8 RGB, letterboxed with white.
        source_xy, reference_xy: (K, 2) float64, x and y of the keypoints in pixels of the canvases.
        extent_px: of what a distance is a part of: the longer side of the image, or of the object's box.
        group: what the bootstrap draws together.
        set_name: of the part of the data that it belongs to, for a table by parts; empty where there are none.
    """

    source: np.ndarray
    reference: np.ndarray
    source_xy: np.ndarray
    reference_xy: np.ndarray
    extent_px: float
    group: str
    set_name: str = ""


def make_warped_tasks(
    pairs: Sequence[Pair], size_px: int, max_pairs: int | None, seed: int
) -> tuple[list[TransferTask], list[str]]:
    """Make tasks of a frame and the same frame through a strong homography and in other colours.

    Returns:
        The tasks, and the pairs whose warped frame shows no keypoint any more.

    Raises:
        DataError: an image cannot be read, or none is left with keypoints.
    """
    tasks, empty = [], []
    for pair in spread_pairs(pairs, max_pairs):
        rng = generator(hash_pair(pair), seed)
        image = pair.read_a()
        height, width = image.shape[:2]
        fit = letterbox_matrix(width, height, size_px)
        matrix = random_matrix(WARP, size_px, rng, flip=False)
        jitter = random_jitter(JitterRanges(), rng).matrix(cv2.mean(image)[:3])
        grid = make_keypoint_grid(size_px)
        in_image = transform_points(grid, np.linalg.inv(fit))
        shown = (in_image >= 0).all(axis=1) & (in_image <= (width - 1, height - 1)).all(axis=1)
        target = transform_points(grid, matrix)
        kept = shown & is_inside(target, size_px)
        if kept.any():
            tasks.append(
                TransferTask(
                    source=warp_to_canvas(image, fit, size_px, IMAGE_FILL),
                    reference=warp_to_canvas(apply_jitter(image, jitter), matrix @ fit, size_px, IMAGE_FILL),
                    source_xy=grid[kept],
                    reference_xy=target[kept].astype(np.float64),
                    extent_px=float(size_px),
                    group=pair.source_hash,
                )
            )
        else:
            empty.append(pair.pair_id)
    if not tasks:
        raise DataError(f"none of {len(pairs)} pairs has keypoints that are visible in both images")
    return tasks, empty


def make_keypoint_grid(size_px: int) -> np.ndarray:
    """Make a grid of keypoints over a canvas: (`GRID` x `GRID`, 2) float64, row by row."""
    centres = (np.arange(GRID) + 0.5) * size_px / GRID - 0.5
    return np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)


def read_spair_tasks(root: Path, size_px: int, max_pairs: int | None, split: str = "test") -> list[TransferTask]:
    """Read SPair-71k (Min et al. 2019): ``PairAnnotation/SPLIT/*.json`` and ``JPEGImages/CATEGORY/*.jpg``.

    Its distances are parts of the longer side of the object's box in the reference (its "trg").

    Raises:
        InputError: there is no such folder.
        DataError: an annotation or an image cannot be read; names it.
    """
    folder = root / "PairAnnotation" / split
    files = sorted(folder.glob("*.json"))
    if not files:
        raise InputError(
            f"{folder} contains no annotations; expected SPair-71k with PairAnnotation/{split}/*.json and JPEGImages/"
        )
    count = len(files) if max_pairs is None else min(max_pairs, len(files))
    return [_read_spair_task(root, files[len(files) * number // count], size_px) for number in range(count)]


def _read_spair_task(root: Path, file: Path, size_px: int) -> TransferTask:
    try:
        values: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
        category = str(values["category"])
        source_points, target_points = (np.array(values[key], np.float64) for key in ("src_kps", "trg_kps"))
        left, top, right, bottom = map(float, values["trg_bndbox"])
        names = [f"{category}/{values[key]}" for key in ("src_imname", "trg_imname")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} cannot be read as an annotation of SPair-71k ({error!r})") from error
    if source_points.shape != target_points.shape or source_points.ndim != 2 or source_points.shape[1] != 2:
        raise DataError(
            f"{file}: the keypoints of the two images have the shapes {source_points.shape} and {target_points.shape}"
        )
    shown = [np.asarray(read_image(path_inside(root / "JPEGImages", name), "RGB")) for name in names]
    fits = [letterbox_matrix(each.shape[1], each.shape[0], size_px) for each in shown]
    source, reference = (
        warp_to_canvas(image, fit, size_px, IMAGE_FILL) for image, fit in zip(shown, fits, strict=True)
    )
    return TransferTask(
        source=source,
        reference=reference,
        source_xy=transform_points(source_points, fits[0]).astype(np.float64),
        reference_xy=transform_points(target_points, fits[1]).astype(np.float64),
        extent_px=max(right - left, bottom - top) * size_px / max(shown[1].shape[:2]),
        group=category,
    )
