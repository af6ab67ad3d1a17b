"""Which pairs to evaluate on, so that nothing is measured on what was trained on."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mimicbrush.data.manifest import split_pairs
from mimicbrush.data.pair import Pair
from mimicbrush.errors import DataError
from mimicbrush.evaluation.options import EvaluationSplit

#: Written by the trainer into each pipeline folder.
TRAINING_DATA_FILE = "training_data.json"
#: Hex digits of a source hash that this file keeps.
HASH_DIGITS = 16


@dataclass(frozen=True)
class TrainingData:
    """What a model was trained on.

    Attributes:
        heldout_ratio: part of the source videos that was held out, 0..1.
        source_hashes: the first `HASH_DIGITS` hex digits of every source trained on.
    """

    heldout_ratio: float
    source_hashes: frozenset[str]

    def has_seen(self, pair: Pair) -> bool:
        """Whether the pair's source was trained on."""
        return pair.source_hash[:HASH_DIGITS] in self.source_hashes


@dataclass(frozen=True)
class Selection:
    """The pairs to evaluate on, and what a person should know about the choice."""

    pairs: list[Pair]
    messages: list[str]


def read_training_data(pipeline_folder: Path) -> TrainingData | None:
    """What a pipeline folder says about its training, or None where it says nothing.

    Raises:
        DataError: the file is there but cannot be read.
    """
    path = pipeline_folder / TRAINING_DATA_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        return TrainingData(float(values["heldout_ratio"]), frozenset(map(str, values["source_hashes"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read ({error!r}); expected heldout_ratio and source_hashes. "
            "Without it nobody knows what was trained on: save the pipeline again, or evaluate with split=all"
        ) from error


def select_pairs(pairs: Sequence[Pair], split: EvaluationSplit, training: TrainingData | None) -> Selection:
    """Choose the pairs to evaluate on.

    With split `heldout`, a folder of which nothing was trained on is used whole; of any other folder only the
    sources are used that the trainer holds out by their hash.

    Args:
        pairs: all pairs of a mined folder.
        split: `heldout` or `all`.
        training: what the model was trained on; None: not known.

    Raises:
        DataError: no pair is left, or a held-out source was trained on all the same.
    """
    kept, messages = _of_one_kind(pairs)
    if split == "all":
        seen = len({pair.source_hash for pair in kept if training and training.has_seen(pair)})
        if seen:
            messages.append(f"split=all: {seen} of these sources were trained on, so this is no held-out result.")
        return Selection(kept, messages)
    if training and not any(training.has_seen(pair) for pair in kept):
        messages.append("No source of this folder was trained on: all of its pairs are used.")
        return Selection(kept, messages)
    if not training:
        messages.append(
            f"The pipeline has no {TRAINING_DATA_FILE}, so what it was trained on is not known: "
            "only the sources that our trainer would hold out are used (split=all uses all)."
        )
    heldout = split_pairs(kept, "heldout", training.heldout_ratio) if training else split_pairs(kept, "heldout")
    if not heldout:
        sources = len({pair.source_hash for pair in kept})
        raise DataError(
            f"none of the {sources} sources is held out, so there is nothing to evaluate on; "
            "take split=all to use every pair (trained on or not), or another folder of mined pairs"
        )
    _check_unseen(heldout, training)
    return Selection(list(heldout), messages)


def _of_one_kind(pairs: Sequence[Pair]) -> tuple[list[Pair], list[str]]:
    videos = [pair for pair in pairs if pair.kind == "video"]
    if videos:
        return videos, []
    if not pairs:
        raise DataError("the folder holds no pairs; mine videos first: python scripts/mine_pairs.py")
    message = (
        "There are no pairs from videos, so pairs from single images are used: source and reference are the "
        "same picture, copying in place is perfect, and only the warped set says something."
    )
    return list(pairs), [message]


def _check_unseen(heldout: Sequence[Pair], training: TrainingData | None) -> None:
    """Guard the split: a folder that has lost sources since the training holds out others."""
    seen = sorted({pair.source_path for pair in heldout if training and training.has_seen(pair)})
    if seen:
        raise DataError(
            f"{len(seen)} sources that are held out now were trained on ({', '.join(seen[:3])}): the folder "
            "has changed since; evaluate on the folder as it was, on another one, or with split=all"
        )


def spread_pairs(pairs: Sequence[Pair], max_pairs: int | None) -> list[Pair]:
    """At most `max_pairs` pairs, as evenly over the sources as their numbers allow, and within each.

    Returns:
        Pairs ordered by source hash, then in the order given; the same for every call.
    """
    by_source: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_source[pair.source_hash].append(pair)
    sources = sorted(by_source)
    quota = dict.fromkeys(sources, 0)
    left = len(pairs) if max_pairs is None else min(max_pairs, len(pairs))
    while left:
        for source in sources:
            if left and quota[source] < len(by_source[source]):
                quota[source] += 1
                left -= 1
    return [
        by_source[source][len(by_source[source]) * (2 * i + 1) // (2 * quota[source])]
        for source in sources
        for i in range(quota[source])
    ]
