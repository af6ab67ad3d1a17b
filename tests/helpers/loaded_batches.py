"""The batches of a loader, for tests that do not look at its waits."""

from __future__ import annotations

from collections.abc import Iterator

from mimicbrush.data.batch import DecodedBatch
from mimicbrush.data.dataset import PairDataset
from mimicbrush.data.loader import poll_batches
from mimicbrush.data.sampler import RankBatches
from mimicbrush.types import TrainBatch


def load_batches(
    dataset: PairDataset, batches: RankBatches, *, num_workers: int
) -> Iterator[TrainBatch | DecodedBatch]:
    return (batch for batch in poll_batches(dataset, batches, num_workers=num_workers) if batch is not None)
