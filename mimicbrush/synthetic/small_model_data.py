"""Data that the small model is trained and tested on, as files that the miner reads.

Rendered clips over photographs and dead leaves, and photographs and dead leaves with segments in SA-1B's layout. Real
clips come beside them. No photograph is on both sides. Those of the DreamBooth dataset are only for testing, so that
a benchmark made of them holds nothing that the model has seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from skimage.segmentation import felzenszwalb

from mimicbrush.errors import InputError
from mimicbrush.io.atomic import write_aside
from mimicbrush.io.hashing import hash_file
from mimicbrush.ops.counter_rng import generator
from mimicbrush.synthetic.clips import (
    HELDOUT_PHOTOGRAPHS,
    LEAVES,
    TRAIN_PHOTOGRAPHS,
    ClipSpec,
    bundled_photograph,
    read_photograph,
)
from mimicbrush.synthetic.dead_leaves import dead_leaves

_PHOTOGRAPH_SUFFIXES = (".jpg", ".jpeg", ".png")
_STILL_SIDE_PX = 320
_JPEG_QUALITY = 92
#: Of the graph-based segmentation that stands in for SAM (Felzenszwalb and Huttenlocher 2004).
_SEGMENT_SCALE, _SEGMENT_MIN_RATIO = 400, 0.01


def list_photographs(folder: Path) -> list[str]:
    """List the photographs below a folder, sorted, without hidden files."""
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _PHOTOGRAPH_SUFFIXES)
    return [str(path) for path in paths if path.name[0] != "." and path.is_file()]


def check_train_heldout_apart(photographs: Sequence[str], heldout: Sequence[str]) -> None:
    """Check that no test photograph is trained on, and that each photograph has a name of its own.

    Args:
        photographs: to train on, beside `TRAIN_PHOTOGRAPHS`.
        heldout: to test on; where there are none, `HELDOUT_PHOTOGRAPHS` are.

    Raises:
        InputError: a photograph, by its bytes, is on both sides; or stills of two would have one name.
    """
    stems: dict[str, str] = {}
    for name in [*TRAIN_PHOTOGRAPHS, *photographs]:
        namesake = stems.setdefault(Path(name).stem, name)
        if namesake != name:
            raise InputError(f"{namesake} and {name} would give stills of the same name; rename one of the photographs")
    heldout_paths = [Path(name) for name in heldout] or [bundled_photograph(name) for name in HELDOUT_PHOTOGRAPHS]
    path_of_hash = {hash_file(path): path for path in heldout_paths}
    for path in [*map(bundled_photograph, TRAIN_PHOTOGRAPHS), *map(Path, photographs)]:
        if (other := path_of_hash.get(hash_file(path))) is not None:
            raise InputError(f"{path} is also held out for testing ({other}); remove it from one of the two folders")


def training_clips(photographs: Sequence[str], count: int, seed: int) -> dict[str, ClipSpec]:
    """Describe clips by file name: every third over leaves, the others over photographs, with things cut from both.

    There are three or four things in a clip. They tilt and cover each other, so that each part of a frame has a motion
    of its own.

    Args:
        photographs: files, beside those of `TRAIN_PHOTOGRAPHS`.
        count: of clips.
        seed: of everything.
    """
    names = [*TRAIN_PHOTOGRAPHS, *photographs]
    specs = {}
    for number in range(count):
        leaves = [f"{LEAVES}{seed * 100_000 + 3 * number + part}" for part in range(3)]
        shuffled = [names[index] for index in generator(seed, number).permutation(len(names))]
        background = shuffled[0] if number % 3 else leaves[0]
        cutouts = (leaves[1], *shuffled[1 : 3 + number % 2])
        specs[f"{number:04d}.mp4"] = ClipSpec(
            background, cutouts, seed=seed * 1000 + number, seconds=4.0, thing_sides=(0.25, 0.6), tilt=0.12
        )
    return specs


def heldout_clips(folder: Path, seed: int) -> dict[str, ClipSpec]:
    """Describe clips by file name, one per folder of photographs: things of two photographs move over a third.

    Raises:
        InputError: no folder has three photographs.
    """
    specs = {}
    for number, subject in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        names = list_photographs(subject)
        if len(names) >= 3:
            key = seed * 1000 + number
            specs[f"{subject.name}.mp4"] = ClipSpec(names[0], (names[1], names[2]), seed=key, seconds=3.0)
    if not specs:
        raise InputError(
            f"{folder} has no folder with at least three photographs; expected one folder for each subject"
        )
    return specs


def write_stills(folder: Path, photographs: Sequence[str], num_leaves: int, crops: int, seed: int) -> Iterator[Path]:
    """Write NAME.jpg and NAME.json of photographs and leaves with their segments, yielding each image's path.

    Args:
        folder: is made.
        photographs: files, beside those of `TRAIN_PHOTOGRAPHS`.
        num_leaves: images of leaves, whose segments are the leaves.
        crops: random crops of each photograph, whose segments are those of a graph-based segmentation.
        seed: of crops and leaves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_leaves):
        image, labels = dead_leaves(_STILL_SIDE_PX, _STILL_SIDE_PX, generator(seed, number))
        yield _write_still(folder / f"leaves_{number:04d}", image, labels)
    for name in [*TRAIN_PHOTOGRAPHS, *photographs]:
        rng = generator(seed, *Path(name).name.encode())
        photograph = read_photograph(name, rng)
        for number in range(crops):
            side = round(rng.uniform(0.4, 1.0) * min(photograph.shape[:2]))
            top, left = (int(rng.integers(length - side + 1)) for length in photograph.shape[:2])
            crop = photograph[top : top + side, left : left + side]
            image = cv2.resize(crop, (_STILL_SIDE_PX, _STILL_SIDE_PX), interpolation=cv2.INTER_AREA)
            labels = felzenszwalb(image, scale=_SEGMENT_SCALE, min_size=round(_SEGMENT_MIN_RATIO * image.size / 3))
            yield _write_still(folder / f"{Path(name).stem}_{number:02d}", image, labels)


def _write_still(stem: Path, image: np.ndarray, labels: np.ndarray) -> Path:
    annotations = []
    for number in np.unique(labels):
        shape = np.asfortranarray(labels == number, np.uint8)
        if shape.mean() < _SEGMENT_MIN_RATIO:
            continue
        runs = coco_mask.encode(shape)
        annotations.append({"segmentation": {"size": runs["size"], "counts": runs["counts"].decode()}})
    path = stem.with_suffix(".jpg")
    write_aside(
        stem.with_suffix(".json"), lambda aside: aside.write_text(json.dumps({"image": {}, "annotations": annotations}))
    )
    write_aside(path, lambda aside: Image.fromarray(image).save(aside, format="JPEG", quality=_JPEG_QUALITY))
    return path
