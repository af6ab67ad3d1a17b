"""Chooses the pairs to evaluate on, so that no result is measured on training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from mimicbrush.data.manifest import PairTable, origin_key, split_pairs
from mimicbrush.data.pair import Pair
from mimicbrush.data.training_data import TRAINING_DATA_FILE, TrainingData
from mimicbrush.errors import DataError
from mimicbrush.evaluation.heldout.options import EvaluationSplit


@dataclass(frozen=True)
class HeldOutSelection:
    """The pairs to evaluate on, and messages for the user about the choice."""

    pairs: list[Pair]
    messages: list[str]


def select_heldout_pairs(
    pairs: Sequence[Pair], split: EvaluationSplit, training: TrainingData | None
) -> HeldOutSelection:
    """Choose the pairs to evaluate on.

    With split `heldout`, all pairs of a folder are used if none of its sources was trained on. Otherwise only the
    sources are used that the trainer holds out by their hash.

    Args:
        pairs: all pairs of a mined folder.
        split: `heldout` or `all`.
        training: the sources that the model was trained on; None: not known.

    Raises:
        DataError: no pair is left, because no source is held out, or all held-out sources were trained on anyway.
    """
    kept, messages = _choose_kind(pairs)
    if split == "all":
        seen = len({pair.source_hash for pair in kept if training and training.has_seen(pair)})
        if seen:
            messages.append(f"split=all: {seen} of these sources were trained on, so this is not a held-out result.")
        return HeldOutSelection(kept, messages)
    if training and not any(training.has_seen(pair) for pair in kept):
        messages.append("No source of this folder was trained on, so all of its pairs are used.")
        return HeldOutSelection(kept, messages)
    if not training:
        messages.append(
            f"The pipeline has no {TRAINING_DATA_FILE}, so its training data is not known. Only the sources that "
            "training would hold out are used (split=all uses all of them)."
        )
    heldout = split_pairs(kept, "heldout", training.heldout_ratio) if training else split_pairs(kept, "heldout")
    if not heldout:
        sources = len({pair.source_hash for pair in kept})
        raise DataError(
            f"none of the {sources} sources is held out, so there is nothing to evaluate on; "
            "use split=all to evaluate on every pair (trained on or not), or another folder of mined pairs"
        )
    unseen, note = _leave_out_trained(heldout, training)
    return HeldOutSelection(unseen, [*messages, *note])


def _choose_kind(pairs: Sequence[Pair]) -> tuple[list[Pair], list[str]]:
    videos = [pair for pair in pairs if pair.kind == "video"]
    if videos:
        return videos, []
    if not pairs:
        raise DataError("the folder contains no pairs; mine videos first: mimicbrush mine")
    message = (
        "There are no pairs from videos, so pairs from single images are used. Source and reference are the same "
        "image, so copying in place is perfect, and only the warped set is meaningful."
    )
    return list(pairs), [message]


def _leave_out_trained(heldout: Sequence[Pair], training: TrainingData | None) -> tuple[list[Pair], list[str]]:
    """Leave out held-out pairs that were trained on: by the starting weights, or before the folder changed."""
    unseen = [pair for pair in heldout if not (training and training.has_seen(pair))]
    seen = sorted({pair.source_path for pair in heldout if training and training.has_seen(pair)})
    if not seen:
        return unseen, []
    named = f"{len(seen)} of the held-out sources were trained on earlier ({', '.join(seen[:3])}): "
    why = "the starting weights of this model were trained on them, or the folder has changed since"
    if not unseen:
        raise DataError(f"{named}{why}. No source is left to evaluate on; use another folder, or split=all")
    return unseen, [f"{named}{why}. They are left out."]


def spread_pairs(pairs: Sequence[Pair], max_pairs: int | None) -> list[Pair]:
    """Choose at most `max_pairs` pairs, see `spread_numbers`."""
    return [pairs[number] for _, number in spread_numbers(group_by_source(pairs), max_pairs)]


def group_by_source(pairs: Sequence[Pair]) -> dict[str, list[int]]:
    """Group pairs: source hash, in order -> the numbers of its pairs. For a table, no `Pair` objects are built."""
    hashes = read_column(pairs, "source_hash").tolist()
    numbers: dict[str, list[int]] = {source: [] for source in sorted(set(hashes))}
    for number, source in enumerate(hashes):
        numbers[source].append(number)
    return numbers


def read_column(pairs: Sequence[Pair], name: str) -> np.ndarray:
    """Read one attribute of all pairs, (len,). For a table, no `Pair` objects are built."""
    if isinstance(pairs, PairTable | JoinedPairs):
        return pairs.column(name)
    return np.array([getattr(pair, name) for pair in pairs])


def spread_numbers(by_source: Mapping[str, Sequence[int]], max_pairs: int | None) -> list[tuple[str, int]]:
    """Choose at most `max_pairs` pairs, spread evenly over the sources and within each source.

    Args:
        by_source: see `group_by_source`.
        max_pairs: largest number of pairs; None for all.

    Returns:
        (source, number of the pair), ordered by source, then by number; the same in every call.
    """
    quota = dict.fromkeys(by_source, 0)
    available = sum(map(len, by_source.values()))
    left = available if max_pairs is None else min(max_pairs, available)
    while left:
        for source, numbers in by_source.items():
            if left and quota[source] < len(numbers):
                quota[source] += 1
                left -= 1
    return [
        (source, numbers[len(numbers) * (2 * i + 1) // (2 * quota[source])])
        for source, numbers in by_source.items()
        for i in range(quota[source])
    ]


class JoinedPairs(Sequence[Pair]):
    """The concatenated pairs of several tables.

    Args:
        tables: the tables, one per mined folder.
    """

    def __init__(self, tables: Sequence[PairTable]) -> None:
        self._tables = list(tables)
        self._starts = np.cumsum([0, *(len(table) for table in tables)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, number: int) -> Pair: ...
    @overload
    def __getitem__(self, number: slice) -> list[Pair]: ...
    def __getitem__(self, number: int | slice) -> Pair | list[Pair]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._tables[which][number - int(self._starts[which])]

    def column(self, name: str) -> np.ndarray:
        """Return a column of all tables, see `PairTable.column`."""
        return np.concatenate([table.column(name) for table in self._tables])


def find_heldout_pairs(tables: Sequence[PairTable], training: TrainingData) -> tuple[JoinedPairs, list[str]]:
    """Find the held-out video pairs of the folders that a run trains on.

    Args:
        tables: all pairs of each of the folders.
        training: the sources that are trained on.

    Returns:
        The pairs, and notes for the user about the choice. A source that is held out in one folder and trained on in
        another is left out.
    """
    found, twice = [], set[str]()
    keys = np.array([origin_key(digits) for digits in training.source_hashes], np.uint64)
    for table in tables:
        heldout = split_pairs(table.where(table.column("kind") == "video"), "heldout", training.heldout_ratio)
        seen = np.isin(heldout.column("source_key"), keys)
        twice |= set(heldout.where(seen).column("source_path"))
        found.append(heldout.where(~seen))
    note = f"{len(twice)} sources are held out in one folder but trained on in another; they are not evaluated"
    return JoinedPairs(found), [note] if twice else []
