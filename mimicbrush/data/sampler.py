"""Sample number -> pair, as a pure function, so that the whole state of the loader is one integer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mimicbrush.errors import DataError
from mimicbrush.ops.counter_rng import mix, permute_position


@dataclass(frozen=True)
class PairMixture:
    """Mixture of several sets of pairs: sample number -> (component, item), without state.

    Of the first n samples, the first component gives ``floor(weight * n)``: the mixture holds for every prefix,
    not only on average. Within a component every item comes once per epoch, in an order that is random and
    differs between epochs.

    Attributes:
        lengths: items per component, each at least 1.
        weights: relative shares, one per component.
        seed: of the orders.
    """

    lengths: Sequence[int]
    weights: Sequence[float]
    seed: int

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or min(self.weights) <= 0:
            raise DataError(f"a mixture needs items and positive weights, got {self.lengths} and {self.weights}")
        if len(self.lengths) != len(self.weights):
            raise DataError(f"{len(self.lengths)} components but {len(self.weights)} weights")

    def locate(self, number: int) -> tuple[int, int]:
        """Return (index of the component, index of the item in it) of a global sample number."""
        ordinal, rest = number, sum(self.weights)
        for component, weight in enumerate(self.weights):
            share = weight / rest
            before = math.floor(ordinal * share)
            if component == len(self.weights) - 1 or math.floor((ordinal + 1) * share) > before:
                ordinal = ordinal if component == len(self.weights) - 1 else before
                break
            ordinal, rest = ordinal - before, rest - weight
        epoch, position = divmod(ordinal, self.lengths[component])
        return component, permute_position(position, self.lengths[component], mix(self.seed, component, epoch))


@dataclass(frozen=True)
class RankBatches:
    """Sample numbers of one rank, batch by batch: a `batch_sampler` for torch's DataLoader.

    A step takes the same global samples for any number of ranks and any split into micro-batches.

    Attributes:
        first_step, last_step: steps to yield, the last excluded.
        batch_size: samples per rank and micro-batch.
        micro_batches: per step (gradient accumulation).
        rank, world_size: this process, and how many there are.
    """

    first_step: int
    last_step: int
    batch_size: int
    micro_batches: int = 1
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[list[int]]:
        for micro_step in range(self.first_step * self.micro_batches, self.last_step * self.micro_batches):
            start = (micro_step * self.world_size + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step) * self.micro_batches
