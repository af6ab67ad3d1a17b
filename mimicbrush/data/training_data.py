"""The file ``training_data.json`` of a run or pipeline: the hashes of the source files that it was trained on.

The trainer writes the file. Evaluation reads it, so that no result is measured on training data. Nothing heavy is
imported here, because commands read the file before they load a model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mimicbrush.errors import DataError
from mimicbrush.io.atomic import write_json

if TYPE_CHECKING:
    from mimicbrush.data.pair import Pair

#: Name of the file, in the folder of a run and in each pipeline folder.
TRAINING_DATA_FILE = "training_data.json"
#: Hex digits of a source hash that the file keeps.
HASH_DIGITS = 16


@dataclass(frozen=True)
class TrainingData:
    """The source files that a model was trained on.

    Attributes:
        heldout_ratio: share of the source files that was held out, 0..1.
        source_hashes: the first `HASH_DIGITS` hex digits of the hash of each source file that was trained on.
    """

    heldout_ratio: float
    source_hashes: frozenset[str]

    def has_seen(self, pair: Pair) -> bool:
        """Whether the pair's source was trained on."""
        return pair.source_hash[:HASH_DIGITS] in self.source_hashes


def write_training_data(folder: Path, training: TrainingData) -> None:
    """Write `TRAINING_DATA_FILE` into the folder of a run or of a pipeline."""
    values = {"heldout_ratio": training.heldout_ratio, "source_hashes": sorted(training.source_hashes)}
    write_json(folder / TRAINING_DATA_FILE, values)


def read_training_data(folder: Path) -> TrainingData | None:
    """Read `TRAINING_DATA_FILE` from the folder of a run or of a pipeline; None if there is no such file.

    Raises:
        DataError: the file is there but cannot be read.
    """
    path = folder / TRAINING_DATA_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        return TrainingData(float(values["heldout_ratio"]), frozenset(map(str, values["source_hashes"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read ({error!r}); expected heldout_ratio and source_hashes. "
            "Without it, the pairs that were trained on are not known: save the pipeline again, or use split=all"
        ) from error
