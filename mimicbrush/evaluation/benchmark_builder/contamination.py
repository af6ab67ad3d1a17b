"""Checks that a benchmark contains nothing that a model was trained on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mimicbrush.data.manifest import PairTable, read_manifest, read_rows
from mimicbrush.data.training_data import HASH_DIGITS, TRAINING_DATA_FILE, read_training_data
from mimicbrush.errors import DataError, InputError
from mimicbrush.evaluation.benchmark_builder.part_boxes import reduce_for_matching
from mimicbrush.evaluation.heldout.selection import spread_pairs
from mimicbrush.ops.keypoints import match_features, sift_features
from mimicbrush.ops.similarity import (
    LIKELY_AGREEMENT,
    NEAR_DUPLICATE_SSIM,
    highest_ssim,
    phase_signature,
    signature_agreement,
)

#: Frames of the training set are first looked at in a part of their size, at least this much: decoding takes the time.
_GLANCE_SIDE_PX = 64
#: A thing that is pasted or filmed from nearer is found again by SIFT, which takes 0.2 s for a frame: one for each of
#: so many sources.
MAX_SIFT_SOURCES = 2000
_OWN_KEYPOINTS, _FRAME_KEYPOINTS = 600, 300
#: So many of a frame's features must have their best match in one image before the two are matched as a whole.
_MIN_VOTES = 5
#: Of 440 frames of clips with other things none had a single match that one motion explains; of clips made of the
#: images themselves half had more than 20.
MIN_SHARED_MATCHES = 12
_MAX_RATIO = 0.75
_NAMED = 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingOrigins:
    """The origins of training data, as far as a folder states them.

    Attributes:
        folder: the pipeline, or the mined folder.
        names: first `HASH_DIGITS` hex digits of a source's hash -> what to call it.
        pairs: of a mined folder, whose images can be looked at; None for a pipeline, which has none.
    """

    folder: Path
    names: Mapping[str, str]
    pairs: PairTable | None

    def describe(self) -> dict[str, Any]:
        """Describe for benchmark.json what it was compared with, without paths of this machine."""
        return {
            "name": self.folder.resolve().name,
            "kind": "pipeline" if self.pairs is None else "mined folder",
            "sources": len(self.names),
            "source_hashes": sorted(self.names),
            "compared": "hashes" if self.pairs is None else "hashes, images, and pieces of images",
            "sources_looked_at_for_pieces": 0 if self.pairs is None else min(MAX_SIFT_SOURCES, len(self.names)),
        }


def read_training_origins(folder: Path) -> TrainingOrigins:
    """Read what a folder states about training data.

    Args:
        folder: a pipeline folder with its training_data.json, or a mined folder, of which *every* source counts.

    Raises:
        InputError: it is neither.
        DataError: it cannot be read.
    """
    training = read_training_data(folder)
    if training is not None:
        names = {key: f"source {key}… in {TRAINING_DATA_FILE}" for key in training.source_hashes}
        return TrainingOrigins(folder, names, None)
    if not (folder / "manifest").is_dir():
        raise InputError(
            f"--against {folder}: expected a pipeline folder with a {TRAINING_DATA_FILE}, or a folder of mined pairs "
            "(with manifest/); this folder does not say what was trained on"
        )
    rows = read_rows(folder, ["source_hash", "source_path", "status"]).to_pylist()
    names = {row["source_hash"][:HASH_DIGITS]: row["source_path"] for row in rows if row["status"] == "pair"}
    return TrainingOrigins(folder, names, read_manifest(folder))


def check_hashes(materials: Iterable[tuple[str, str]], origins: Sequence[TrainingOrigins]) -> None:
    """Refuse files that are in the training set, by their hashes.

    Args:
        materials: what to call a file, and its SHA-256.
        origins: what was trained on.

    Raises:
        DataError: some are; both sides are named.
    """
    leaks = [
        f"{name} is {origin.names[digest[:HASH_DIGITS]]} of {origin.folder}"
        for name, digest in materials
        for origin in origins
        if digest[:HASH_DIGITS] in origin.names
    ]
    _refuse(list(dict.fromkeys(leaks)), "were trained on")


def check_images(images: Sequence[tuple[str, Callable[[], Image.Image]]], origins: Sequence[TrainingOrigins]) -> None:
    """Refuse images that the training set shows, as a whole or in pieces.

    All frames are compared with all images as a whole, also mirrored, shifted and of another size. Of one frame for
    each of up to `MAX_SIFT_SOURCES` sources it is also looked whether it shows a piece of an image. Of a pipeline
    folder only hashes exist: `check_hashes` compares them.

    Args:
        images: what to call one, and how to get it.
        origins: what was trained on.

    Raises:
        DataError: some are; both sides are named.
    """
    tables = [origin for origin in origins if origin.pairs is not None]
    if not tables or not images:
        return
    reduced = [reduce_for_matching(np.asarray(read())) for _, read in images]
    # Each as it is, and mirrored.
    signatures = np.stack([phase_signature(view) for whole in reduced for view in (whole, whole[:, ::-1])])
    leaks: list[str] = []
    for origin in tables:
        assert origin.pairs is not None
        for pair in origin.pairs:
            reduce = next((each for each in (8, 4, 2) if min(pair.size_px) >= each * _GLANCE_SIDE_PX), 1)
            for span in filter(None, (pair.a_span, pair.b_span)):
                likely = np.flatnonzero(
                    signature_agreement(phase_signature(pair.read(span, reduce)), signatures) > LIKELY_AGREEMENT
                )
                leaks += [
                    f"{images[number][0]} looks like {pair.source_path} of {origin.folder}"
                    for number in sorted({int(place) // 2 for place in likely})
                    if highest_ssim(reduced[number], pair.read(span)) > NEAR_DUPLICATE_SSIM
                ]
        leaks += _find_shared_pieces(images, reduced, origin)
        _log.info("looked at the images of %d pairs of %s", len(origin.pairs), origin.folder)
    _refuse(list(dict.fromkeys(leaks)), "appear in the training set")


def _find_shared_pieces(
    images: Sequence[tuple[str, Callable[[], Image.Image]]], reduced: Sequence[np.ndarray], origin: TrainingOrigins
) -> list[str]:
    """Find images that share a piece with frames of a mined folder, by SIFT matches that one motion explains."""
    assert origin.pairs is not None
    own = [sift_features(each, _OWN_KEYPOINTS) for each in reduced]
    owner = np.repeat(np.arange(len(own)), [len(features.points) for features in own])
    if len(owner) < 2:
        return []
    descriptors = np.concatenate([features.descriptors for features in own])
    squares = (descriptors**2).sum(axis=1)
    leaks = []
    for pair in spread_pairs(origin.pairs, min(MAX_SIFT_SOURCES, len(origin.names))):
        frame = pair.read_a()
        features = sift_features(frame, _FRAME_KEYPOINTS)
        distances = squares[None] - 2 * features.descriptors @ descriptors.T
        distances += (features.descriptors**2).sum(axis=1)[:, None]
        two = np.partition(distances, 1, axis=1)[:, :2]
        is_clear = two[:, 0] < _MAX_RATIO**2 * two[:, 1]
        votes = np.bincount(owner[distances.argmin(axis=1)[is_clear]], minlength=len(own))
        for number in map(int, np.flatnonzero(votes >= _MIN_VOTES)):
            matches = len(match_features(own[number], sift_features(frame))[0])
            if matches >= MIN_SHARED_MATCHES:
                name = f"{pair.source_path} of {origin.folder}"
                leaks.append(f"{images[number][0]} shares a piece with {name} ({matches} SIFT matches)")
    return leaks


def _refuse(leaks: Sequence[str], what: str) -> None:
    if not leaks:
        return
    more = f", and {len(leaks) - _NAMED} more" if len(leaks) > _NAMED else ""
    raise DataError(
        f"images of the benchmark {what}: {'; '.join(leaks[:_NAMED])}{more}. Remove them from the benchmark or from "
        "the training data. If only a part of a folder was trained on, name the pipeline instead (--against "
        "PIPELINE)"
    )
