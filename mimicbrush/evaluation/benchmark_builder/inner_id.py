"""Inner-ID cases: source and reference show one instance in two scenes, and the unmasked source is the ground truth.

Paper Sec. 3.4. From the DreamBooth dataset by a list of pairs with hand-placed boxes, from any folder of folders of
images, and from videos that were mined but not trained on.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mimicbrush.data.manifest import read_manifest, read_rows, split_pairs
from mimicbrush.data.pair import Pair
from mimicbrush.data.training_data import HASH_DIGITS
from mimicbrush.errors import DataError, InputError
from mimicbrush.evaluation.benchmark.layout import BenchmarkFault
from mimicbrush.evaluation.benchmark_builder.contamination import TrainingOrigins
from mimicbrush.evaluation.benchmark_builder.materials import (
    BOX_OF_MATCHES,
    HAND_PLACED_BOX,
    REGION_NAMES,
    MaskFolder,
    Material,
    RatioBox,
    Region,
    RegionName,
    Rights,
    list_image_files,
    list_licence_files,
)
from mimicbrush.evaluation.benchmark_builder.part_boxes import (
    MIN_PART_MATCHES,
    MatchFeatures,
    extract_match_features,
    find_best_boxes,
    find_matched_boxes,
)
from mimicbrush.evaluation.heldout.selection import spread_pairs
from mimicbrush.io.atomic import path_inside
from mimicbrush.io.hashing import hash_file
from mimicbrush.io.images import read_image
from mimicbrush.ops import counter_rng
from mimicbrush.ops.similarity import LIKELY_AGREEMENT, NEAR_DUPLICATE_SSIM, highest_ssim, signature_agreement

#: Images whose features are kept at once; of each about a megabyte.
_LOOKS = 256
CLASSES_FILE = "prompts_and_classes.txt"


@dataclass(frozen=True)
class InnerPair:
    """A source to be masked, and a reference of the same instance."""

    source: Material
    reference: Material


# ---- the DreamBooth dataset


def find_dreambooth_root(folder: Path) -> Path:
    """Find the folder that holds the subjects: the dataset itself, or a clone of google/dreambooth around it.

    Raises:
        InputError: neither.
    """
    for root in (folder / "dataset", folder):
        if root.is_dir() and any(list_image_files(each) for each in root.iterdir() if each.is_dir()):
            return root
    raise InputError(
        f"{folder}: expected folders of images such as dog/00.jpg, or dataset/ with such folders; "
        "git clone https://github.com/google/dreambooth"
    )


def read_dreambooth_pairs(
    folder: Path, manifest: Path, masks: MaskFolder
) -> tuple[list[InnerPair], list[BenchmarkFault]]:
    """Read the pairs of a list (data_manifests/DREAMBOOTH.md), with part and subject boxes on the sources.

    Args:
        folder: see `find_dreambooth_root`.
        manifest: the list; its paths begin with "dataset/".
        masks: go before the boxes.

    Returns:
        Pairs in the order of the list, and what of it is missing or damaged.

    Raises:
        InputError: no such folder, a list that cannot be read, or paths in it that leave the folder.
    """
    root = find_dreambooth_root(folder)
    pairs, faults = [], []
    for number, line in enumerate(_read_lines(manifest), 1):
        try:
            names = {side: line[side].removeprefix("dataset/") for side in ("source", "reference")}
            paths = {side: path_inside(root, name) for side, name in names.items()}
            labels: dict[RegionName, str] = {"part": str(line["part"]), "subject": str(line["class"])}
            boxes = {name: _read_box(line[f"{name}_box"]) for name in labels}
            rights = {
                side: Rights(
                    line[f"{side}_credit"], line[f"{side}_licence"], line[f"{side}_url"], list_licence_files(root)
                )
                for side in names
            }
            subject, kind = str(line["subject"]), str(line["class"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{manifest}, line {number}: {error!r}; see data_manifests/DREAMBOOTH.md") from error
        fault = next((fault for path in paths.values() if (fault := find_image_fault(path))), None)
        if fault:
            faults.append(fault)
            continue
        source, reference = (
            _make_material(paths[side], str(Path(names[side]).with_suffix("")), subject, kind, rights[side])
            for side in ("source", "reference")
        )
        for name, label in labels.items():
            source = source.with_region(name, Region(HAND_PLACED_BOX, label, boxes[name]))
        pairs.append(InnerPair(masks.add_to(source), masks.add_to(reference)))
    return pairs, faults


def _read_box(values: Sequence[float]) -> RatioBox:
    left, top, right, bottom = map(float, values)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(f"{values} is not a valid box; expected left < right and top < bottom, as ratios in 0..1")
    return left, top, right, bottom


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(text.splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not a valid JSON object ({error})") from error


# ---- any folder of folders


def read_folder_materials(folder: Path, masks: MaskFolder) -> tuple[list[Material], list[BenchmarkFault]]:
    """Read all images of a folder of folders, a folder per subject.

    A class is given by lines `subject,class` in prompts_and_classes.txt, as in the DreamBooth dataset; without it,
    nobody says, and no inter-ID case comes of them. Licences are the files of that name in either folder.

    Returns:
        The images by subject and name, and those that cannot be read.

    Raises:
        InputError: no such folder, or no folder of images in it.
    """
    if not folder.is_dir():
        raise InputError(f"--pictures {folder}: no such folder")
    classes = read_classes(folder / CLASSES_FILE)
    found, faults = [], []
    for subject in sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")):
        texts = list_licence_files(subject) or list_licence_files(folder)
        for path in list_image_files(subject):
            fault = find_image_fault(path)
            if fault:
                faults.append(fault)
                continue
            rights = Rights(texts=texts)
            key = f"{subject.name}/{path.stem}"
            found.append(masks.add_to(_make_material(path, key, subject.name, classes.get(subject.name, ""), rights)))
    if not found and not faults:
        raise InputError(f"--pictures {folder}: expected one folder with images per subject, such as dog/00.jpg")
    return found, faults


def read_classes(path: Path) -> dict[str, str]:
    """Read subject -> class from lines `subject,class`; other lines are ignored, and no file gives nothing."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\nPrompts")[0].splitlines()
    rows = (line.strip().split(",") for line in lines)
    return {row[0]: row[1] for row in rows if len(row) == 2 and row[0] != "subject_name"}


def choose_folder_pairs(
    materials: Sequence[Material], seed: int, max_pairs: int
) -> tuple[list[InnerPair], list[BenchmarkFault]]:
    """Choose pairs of images of one subject, in a seeded order, the subjects in turn.

    Near duplicates are no pair: copying the reference would be the ground truth. A source without a part gets the
    box around most of the SIFT matches between the two.

    Args:
        materials: the images of all subjects.
        seed: of the order.
        max_pairs: so many with a part, and so many with the subject, are enough.

    Returns:
        The pairs, each image a source at most once; and the sources on which no part could be told.
    """
    by_subject: dict[str, list[Material]] = {}
    for material in materials:
        by_subject.setdefault(material.subject, []).append(material)
    queues = [
        _shuffle(list(itertools.permutations(by_subject[subject], 2)), seed, number)
        for number, subject in enumerate(sorted(by_subject))
    ]

    @lru_cache(maxsize=_LOOKS)
    def look(material: Material) -> MatchFeatures:
        return extract_match_features(np.asarray(material.read()))

    found: dict[str, InnerPair] = {}  # by the key of the source
    faults: dict[str, BenchmarkFault] = {}
    for source, reference in (pair for turn in itertools.zip_longest(*queues) for pair in turn if pair):
        counts = {name: sum(name in pair.source.regions for pair in found.values()) for name in REGION_NAMES}
        adds_subject = "subject" in source.regions and counts["subject"] < max_pairs
        if source.key in found or not (counts["part"] < max_pairs or adds_subject):
            continue
        one, other = look(source), look(reference)
        if signature_agreement(one.signatures[0], other.signatures).max() > LIKELY_AGREEMENT and _are_alike(
            source, reference
        ):
            continue
        boxes = None if "part" in source.regions else find_matched_boxes(one, other)
        if boxes:
            source = source.with_region("part", Region(BOX_OF_MATCHES, box=boxes[0]))
            reference = reference.with_region("part", Region(BOX_OF_MATCHES, box=boxes[1]))
        elif "part" not in source.regions:
            faults[source.key] = BenchmarkFault(
                source.path, f"no box has {MIN_PART_MATCHES} SIFT matches to another image"
            )
        if source.regions:
            found[source.key] = InnerPair(source, reference)
    without = [fault for key, fault in faults.items() if key not in found or "part" not in found[key].source.regions]
    return list(found.values()), without


def _are_alike(one: Material, other: Material) -> bool:
    return highest_ssim(np.asarray(one.read()), np.asarray(other.read())) > NEAR_DUPLICATE_SSIM


def _shuffle(pairs: list[tuple[Material, Material]], *keys: int) -> list[tuple[Material, Material]]:
    order = counter_rng.generator(*keys).permutation(len(pairs))
    return [pairs[number] for number in order]


# ---- mined videos


def read_mined_pairs(
    folder: Path, masks: MaskFolder, origins: Sequence[TrainingOrigins], max_pairs: int
) -> tuple[list[InnerPair], list[BenchmarkFault], list[str]]:
    """Read pairs of frames of videos that were not trained on, spread evenly over the videos.

    Args:
        folder: a mined folder.
        masks: named by the pair and the frame: part/PAIR_ID-a.png. The first frame is the source.
        origins: what was trained on; where that is empty, the sources that our trainer would hold out are used.
        max_pairs: at most so many.

    Returns:
        The pairs; those that cannot be read or have no part; and what a person should know about the choice.

    Raises:
        DataError: no mined folder, or no video of it is left.
    """
    table = read_manifest(folder)
    videos = table.where(table.column("kind") == "video")
    if origins:
        keys = np.array([digest[:HASH_DIGITS] for digest in videos.column("source_hash")], dtype=object)
        trained = set().union(*(each.names for each in origins))
        chosen = videos.where(np.array([key not in trained for key in keys], bool))
        note = f"{folder.name}: uses only videos that are not in the training data of --against"
    else:
        chosen = split_pairs(videos, "heldout")
        note = f"{folder.name}: --against is not given, so only the videos that training would hold out are used"
    if not len(chosen):
        raise DataError(
            f"--pairs {folder}: all {len(videos)} pairs from videos may have been trained on; mine other videos, or "
            "name the pipeline that the benchmark is for (--against PIPELINE)"
        )
    rights = _read_rights(folder)
    pairs, faults = [], []
    for pair in spread_pairs(chosen, max_pairs):
        try:
            for span in filter(None, (pair.a_span, pair.b_span)):
                pair.read(span)
        except DataError as error:
            faults.append(BenchmarkFault(pair.a_file, str(error)))
            continue
        source, reference = (
            masks.add_to(_make_frame_material(pair, side, rights.get(pair.source_hash, Rights())))
            for side in ("a", "b")
        )
        height, width = pair.size_px
        boxes = find_best_boxes(pair.a_points, pair.b_points, (width, height))
        if "part" not in source.regions and boxes:
            source = source.with_region("part", Region(BOX_OF_MATCHES, box=boxes[0]))
            reference = reference.with_region("part", Region(BOX_OF_MATCHES, box=boxes[1]))
        if source.regions:
            pairs.append(InnerPair(source, reference))
        else:
            faults.append(
                BenchmarkFault(pair.a_file, f"pair {pair.pair_id}: fewer than {MIN_PART_MATCHES} matches in any box")
            )
    return pairs, faults, [note]


def _make_frame_material(pair: Pair, side: str, rights: Rights) -> Material:
    span = pair.a_span if side == "a" else pair.b_span or pair.a_span

    def read() -> Image.Image:
        return Image.fromarray(pair.read(span))

    return Material(f"{pair.pair_id}-{side}", pair.source_path, "", pair.source_hash, rights, pair.a_file, read)


def _read_rights(folder: Path) -> dict[str, Rights]:
    rows = read_rows(folder, ["source_hash", "source_path", "licence", "url"]).to_pylist()
    return {row["source_hash"]: Rights(row["source_path"], row["licence"], row["url"]) for row in rows}


# ---- files


def find_image_fault(path: Path) -> BenchmarkFault | None:
    """Find what is wrong with an image file; None where it can be read."""
    try:
        read_image(path, "RGB")
    except InputError as error:
        return BenchmarkFault(path, str(error).removeprefix(f"{path}: "))
    return None


def _make_material(path: Path, key: str, subject: str, kind: str, rights: Rights) -> Material:
    return Material(key, subject, kind, hash_file(path), rights, path, partial(read_image, path, "RGB"))


def list_siblings(materials: Iterable[Material]) -> list[tuple[str, str]]:
    """List every image file of the same subjects, as (name, SHA-256): a leak of any of them is a leak."""
    files = [path for folder in sorted({each.path.parent for each in materials}) for path in list_image_files(folder)]
    return [(f"{path.parent.name}/{path.name}", hash_file(path)) for path in files]
