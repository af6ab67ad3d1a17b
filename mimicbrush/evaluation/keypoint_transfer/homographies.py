"""Tasks from a known homography: views warped from photographs, or a folder of real images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from mimicbrush.data.training_data import HASH_DIGITS, TrainingData
from mimicbrush.errors import DataError, InputError
from mimicbrush.evaluation.heldout.selection import spread_numbers
from mimicbrush.evaluation.keypoint_transfer.tasks import TransferTask, make_keypoint_grid
from mimicbrush.io.hashing import hash_file
from mimicbrush.io.images import read_image
from mimicbrush.ops.canvas import IMAGE_FILL
from mimicbrush.ops.color_jitter import JitterRanges, apply_jitter, random_jitter
from mimicbrush.ops.counter_rng import generator
from mimicbrush.ops.geometry import (
    GeometryRanges,
    is_inside,
    letterbox_matrix,
    random_matrix,
    resize_matrix,
    warp_to_canvas,
)

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".webp")


@dataclass(frozen=True)
class Strength:
    """A strength of homographies: how far a view may be from the middle of the photograph (*ours*).

    Attributes:
        ranges: of rotation, scale and tilt.
        shift_ratio: largest shift along x and y, a part of the side.
    """

    ranges: GeometryRanges
    shift_ratio: float


#: Between two views of a pair lies up to twice of this.
STRENGTHS = {
    "weak": Strength(GeometryRanges(0.0, rotation_deg=5, scale=(0.95, 1.05), projective_intensity=0.1), 0.05),
    "medium": Strength(GeometryRanges(0.0, rotation_deg=12, scale=(0.85, 1.18), projective_intensity=0.2), 0.1),
    "strong": Strength(GeometryRanges(0.0, rotation_deg=25, scale=(0.75, 1.33), projective_intensity=0.35), 0.2),
}

#: 1.ppm and H_1_2 (HPatches), img1.ppm and H1to2p (Oxford, VGG).
_IMAGE_NAME = re.compile(r"(?:img)?([1-9])\.(?:ppm|png|jpe?g)", re.IGNORECASE)
_MATRIX_NAME = re.compile(r"H_1_([2-9])|H1to([2-9])p")
_LAYOUT = "subfolders with 1.ppm .. 6.ppm (or png, jpg) and H_1_2 .. H_1_6, or with img1.ppm .. and H1to2p .."


def find_unseen_photographs(folder: Path, training: TrainingData | None) -> tuple[list[Path], list[Path]]:
    """Find the images below a folder that were not trained on, sorted; and those that were.

    Whether a model has seen clips that were *rendered* over a photograph cannot be known from the photograph.

    Args:
        folder: of photographs.
        training: what the model was trained on; None: not known.

    Raises:
        InputError: there are none, or all were trained on.
    """
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _IMAGE_SUFFIXES and path.name[0] != "." and path.is_file()
    )
    if not found:
        raise InputError(f"{folder} contains no photographs ({', '.join(_IMAGE_SUFFIXES)})")
    hashes = training.source_hashes if training else frozenset[str]()
    seen = [path for path in found if hash_file(path)[:HASH_DIGITS] in hashes]
    if len(seen) == len(found):
        raise InputError(f"the model was trained on all {len(found)} photographs in {folder}; use other photographs")
    return [path for path in found if path not in seen], seen


def make_photograph_tasks(
    files: Sequence[Path], strengths: Sequence[str], size_px: int, max_pairs: int | None, seed: int
) -> tuple[list[TransferTask], list[str]]:
    """Make two views of each photograph at each strength, the reference in other colours.

    A view is the middle square of the photograph through a homography of its own, drawn from the photograph's bytes
    and the seed; white where the photograph ends.

    Args:
        files: photographs.
        strengths: of `STRENGTHS`; they are the names of the sets.
        size_px: side of the canvas.
        max_pairs: at most so many pairs of views: of fewer photographs, spread over the list, each at all strengths;
            at least one for each strength.
        seed: of homographies and colours.

    Returns:
        The tasks, and those (FILE, STRENGTH) whose views have no keypoint in common.

    Raises:
        InputError: a photograph cannot be read, or fewer pairs of views are wanted than there are strengths.
        DataError: no view has a keypoint.
    """
    tasks, empty = [], []
    if max_pairs is not None and max_pairs < len(strengths):
        raise InputError(
            f"expected at least {len(strengths)} pairs of views for {len(strengths)} strengths, got {max_pairs}"
        )
    count = len(files) if max_pairs is None else min(len(files), max_pairs // len(strengths))
    for number in range(count):
        file = files[len(files) * number // count]
        image = np.asarray(read_image(file, "RGB"))
        key = hash_file(file)
        for name in strengths:
            rng = generator(int(key[:16], 16), seed, list(STRENGTHS).index(name))
            views = [_sample_view(STRENGTHS[name], image, size_px, rng) for _ in range(2)]
            jitter = random_jitter(JitterRanges(), rng).matrix(cv2.mean(image)[:3])
            images = (image, apply_jitter(image, jitter))
            task = _make_task(images, views, np.eye(3), size_px, group=key, set_name=name)
            if task is None:
                empty.append(f"{file}, {name}")
            else:
                tasks.append(task)
    return _refuse_none(tasks, "views"), empty


def read_homography_tasks(root: Path, size_px: int, max_pairs: int | None) -> tuple[list[TransferTask], list[str]]:
    """Read real images of planes: the first of each folder is the source, the others are references.

    Args:
        root: subfolders as in HPatches or in Oxford's affine set, see the error; or one of these.
        size_px: side of the canvas, on which the images are letterboxed.
        max_pairs: at most so many, spread over the subfolders; None for all.

    Returns:
        The tasks, in sets "1 to 2", "1 to 3", ..., and those (MATRIX FILE) whose images have no keypoint in common.

    Raises:
        InputError: no folder is laid out like this, or an image cannot be read.
        DataError: a file is missing or is no homography; names it.
    """
    folders = [folder for folder in (root, *sorted(root.glob("*"))) if folder.is_dir() and _find_matrices(folder)]
    if not folders:
        raise InputError(f"{root} contains no images with homographies; expected {_LAYOUT}")
    pairs = [(folder, number, file) for folder in folders for number, file in _find_matrices(folder).items()]
    by_folder: dict[str, list[int]] = {}
    for index, (folder, _, _) in enumerate(pairs):
        by_folder.setdefault(str(folder), []).append(index)
    tasks, empty = [], []
    for _, index in spread_numbers(by_folder, max_pairs):
        folder, number, file = pairs[index]
        matrix = read_homography(file)
        images = [np.asarray(read_image(_find_image(folder, each, file), "RGB")) for each in (1, number)]
        fits = [letterbox_matrix(image.shape[1], image.shape[0], size_px) for image in images]
        task = _make_task(images, fits, matrix, size_px, group=folder.name, set_name=f"1 to {number}")
        if task is None:
            empty.append(str(file))
        else:
            tasks.append(task)
    return _refuse_none(tasks, "images"), empty


def read_homography(file: Path) -> np.ndarray:
    """Read a text file with the nine numbers of a homography, three a line -> (3, 3) float64.

    Raises:
        DataError: it cannot be read, or is no homography; names it.
    """
    try:
        rows = [[float(word) for word in line.split()] for line in file.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as a homography with three lines of three numbers ({error})") from error
    if [len(row) for row in rows] != [3, 3, 3]:
        raise DataError(
            f"{file} has lines of {[len(row) for row in rows]} numbers; a homography has three lines of 3 numbers"
        )
    matrix = np.array(rows, np.float64)
    if not np.isfinite(matrix).all() or np.linalg.matrix_rank(matrix) < 3:
        raise DataError(f"{file} is not a homography: its numbers are not finite, or the matrix has no inverse")
    return matrix


def _find_matrices(folder: Path) -> dict[int, Path]:
    """Number of the image that is mapped to -> the file of its homography."""
    found: dict[int, Path] = {}
    for file in sorted(folder.iterdir()):
        match = _MATRIX_NAME.fullmatch(file.name)
        if match and (twin := found.setdefault(int(match[1] or match[2]), file)) != file:
            raise DataError(f"{twin} and {file.name} are homographies to the same image; keep only one of them")
    return dict(sorted(found.items()))


def _find_image(folder: Path, number: int, matrix_file: Path) -> Path:
    """The image of a number, which a homography's file asks for."""
    found = [
        file
        for file in sorted(folder.iterdir())
        if (match := _IMAGE_NAME.fullmatch(file.name)) and int(match[1]) == number
    ]
    if len(found) != 1:
        there = ", ".join(file.name for file in found) or "none"
        raise DataError(
            f"{matrix_file} needs exactly one image {number}.ppm or img{number}.ppm (or png, jpg) in the same "
            f"folder, found: {there}"
        )
    return found[0]


def _sample_view(strength: Strength, image: np.ndarray, size_px: int, rng: np.random.Generator) -> np.ndarray:
    """(3, 3): from the pixels of an image to a canvas that its middle square fills, and through a homography."""
    height, width = image.shape[:2]
    ratio = size_px / min(width, height)
    middle = np.eye(3)
    middle[:2, 2] = (size_px - width * ratio) / 2, (size_px - height * ratio) / 2
    shift = np.eye(3)
    shift[:2, 2] = rng.uniform(-1, 1, 2) * strength.shift_ratio * size_px
    view = random_matrix(strength.ranges, size_px, rng, flip=False)
    return shift @ view @ middle @ resize_matrix(ratio, ratio)


def _make_task(
    images: Sequence[np.ndarray],
    onto: Sequence[np.ndarray],
    between: np.ndarray,
    size_px: int,
    group: str,
    set_name: str,
) -> TransferTask | None:
    """A task of two images (H, W, 3) uint8, or None where they have no keypoint in common.

    Args:
        images: source and reference.
        onto: (3, 3) each, from their pixels to their canvases.
        between: (3, 3), from the source image's pixels to the reference image's.
        size_px, group, set_name: see `TransferTask`.
    """
    source_xy = make_keypoint_grid(size_px)
    in_source = _transform(np.linalg.inv(onto[0]), source_xy)
    in_reference = _transform(between, in_source)
    reference_xy = _transform(onto[1], in_reference)
    shown = _is_within(in_source, images[0]) & _is_within(in_reference, images[1]) & is_inside(reference_xy, size_px)
    if not shown.any():
        return None
    source, reference = (
        warp_to_canvas(image, matrix, size_px, IMAGE_FILL) for image, matrix in zip(images, onto, strict=True)
    )
    return TransferTask(
        source, reference, source_xy[shown], reference_xy[shown], float(size_px), group=group, set_name=set_name
    )


def _transform(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(K, 2) points through a (3, 3) matrix in float64; not a number where they come to lie behind the camera."""
    mapped = np.column_stack([points, np.ones(len(points))]) @ matrix.T
    known = mapped[np.isfinite(mapped).all(axis=1)]
    # A matrix means the same with any sign: what most of the image is, is before the camera.
    in_front = np.sign(mapped[:, 2]) == np.sign(known[:, 2].sum())
    return np.where(in_front[:, None], mapped[:, :2] / np.where(in_front, mapped[:, 2], 1)[:, None], np.nan)


def _is_within(points: np.ndarray, image: np.ndarray) -> np.ndarray:
    """(K,) bool: which points lie between the centres of the image's outermost pixels; what is no number does not."""
    height, width = image.shape[:2]
    return np.all((points >= 0) & (points <= (width - 1, height - 1)), axis=1)


def _refuse_none(tasks: list[TransferTask], what: str) -> list[TransferTask]:
    if not tasks:
        raise DataError(f"no two {what} share a keypoint")
    return tasks
