"""Maps sample numbers to pairs by a pure function, so that the state of the loader is a single integer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

from mimicbrush.errors import DataError
from mimicbrush.ops.counter_rng import mix, permute_position


@dataclass(frozen=True)
class PairMixture:
    """Mixture of several sets of pairs: sample number -> (component, item), without state.

    Among the first n samples, each component has its share of n, rounded up or down. So the mixture is right for every
    n and any weights, and not only on average. The first component has ``floor(share * n)`` samples; `SharedTurns`
    distributes the rest. Within a component, each item comes once per epoch, in a random order that differs between
    epochs.

    Attributes:
        lengths: number of items of each component, each at least 1.
        weights: relative shares, one per component; a float means its decimal text, so that 0.7 is seven tenths.
        seed: seed of the random orders.
    """

    lengths: Sequence[int]
    weights: Sequence[float | Fraction]
    seed: int
    _first_share: Fraction = field(init=False, repr=False, compare=False)
    _others: SharedTurns | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or not all(0 < weight < math.inf for weight in self.weights):
            raise DataError(f"a mixture needs items and positive weights, got {self.lengths} and {self.weights}")
        if len(self.lengths) != len(self.weights):
            raise DataError(f"{len(self.lengths)} components but {len(self.weights)} weights")
        exact = [to_exact(weight) for weight in self.weights]
        shares = [weight / sum(exact) for weight in exact]
        object.__setattr__(self, "_first_share", shares[0])
        object.__setattr__(self, "_others", SharedTurns(shares[1:]) if len(shares) > 2 else None)

    def locate(self, number: int) -> tuple[int, int]:
        """Return (index of the component, index of the item in it) of a global sample number."""
        return self.locate_in_epoch(number)[:2]

    def locate_in_epoch(self, number: int) -> tuple[int, int, int]:
        """Return (index of the component, index of the item in it, epoch of the component), see `locate`."""
        component, ordinal = 0, math.floor(number * self._first_share)
        if math.floor((number + 1) * self._first_share) == ordinal:
            component, ordinal = 1, number - ordinal
            if self._others is not None:
                component, ordinal = self._others.locate(ordinal)
                component += 1
        epoch, position = divmod(ordinal, self.lengths[component])
        return component, permute_position(position, self.lengths[component], mix(self.seed, component, epoch)), epoch


@dataclass(frozen=True)
class FixedViews:
    """Row numbers of all fixed views: (component, item, view) <-> row. The views of an item have consecutive rows.

    Attributes:
        lengths: items per component, as in `PairMixture`.
        count: number of views of each item, 1 or more.
    """

    lengths: Sequence[int]
    count: int

    def __len__(self) -> int:
        return sum(self.lengths) * self.count

    def row(self, component: int, item: int, view: int) -> int:
        """Return the row of a view, 0..len-1."""
        return (sum(self.lengths[:component]) + item) * self.count + view

    def locate(self, row: int) -> tuple[int, int, int]:
        """Return (index of the component, index of the item in it, number of the view) of a row."""
        item, view = divmod(row, self.count)
        component = 0
        while item >= self.lengths[component]:
            item -= self.lengths[component]
            component += 1
        return component, item, view


def to_exact(weight: float | Fraction) -> Fraction:
    """Return a weight as the exact fraction of its decimal text: 0.7 is 7/10, without a binary rounding error."""
    return Fraction(str(weight))


#: Number of turns that are computed and cached together.
_BLOCK = 4096


class SharedTurns:
    """Exact schedule of several components: number of a turn -> (component, number of its turns before).

    Turn t belongs to the first sample by which these components together must have given t + 1 samples. Among the
    components that are not ahead of their shares, the one whose next sample is due first gets the turn (earliest
    deadline first). So no component ever has a whole sample more or less than its share: between samples a and b, there
    are ``ceil(b W) - ceil(a W)`` turns for shares that sum to W, and no subset of the components is due more than that.

    Shares are fractions, so the schedule is periodic. It is computed on demand, a block at a time.

    Args:
        shares: shares of all samples, two or more; their sum is at most 1.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        self.shares = [(share.numerator, share.denominator) for share in shares]
        self.total = sum(shares)
        # After so many samples, each share is a whole number of samples, and the schedule repeats.
        self.period = math.lcm(*(denominator for _, denominator in self.shares))
        self.per_period = [self.period * top // bottom for top, bottom in self.shares]
        self._starts = [(0,) * len(self.shares)]  # counts before each block
        self._block = lru_cache(maxsize=4)(self._take_turns)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), ([Fraction(*share) for share in self.shares],)  # a loader process computes its own cache

    def locate(self, turn: int) -> tuple[int, int]:
        """Return (index of the component, how many samples it has given before) of a turn."""
        periods, turn = divmod(turn, sum(self.per_period))
        block, place = divmod(turn, _BLOCK)
        while len(self._starts) <= block:
            taken = self._block(len(self._starts) - 1)
            self._starts.append(tuple(n + taken.count(i) for i, n in enumerate(self._starts[-1])))
        taken = self._block(block)
        component = taken[place]
        before = self._starts[block][component] + taken[:place].count(component)
        return component, periods * self.per_period[component] + before

    def _take_turns(self, block: int) -> bytes:
        """List the components of one block of turns."""
        counts = list(self._starts[block])
        first = block * _BLOCK
        taken = bytearray()
        # A component's sample number c is released at sample floor(c / share), and due by ceil((c + 1) / share).
        released = [count * bottom // top for count, (top, bottom) in zip(counts, self.shares, strict=True)]
        due = [-(-(count + 1) * bottom // top) for count, (top, bottom) in zip(counts, self.shares, strict=True)]
        for turn in range(first, min(first + _BLOCK, sum(self.per_period))):
            # The sample at which ceil(n W) grows from `turn`.
            sample = turn * self.total.denominator // self.total.numerator
            component = min((i for i in range(len(counts)) if released[i] <= sample), key=due.__getitem__)
            top, bottom = self.shares[component]
            counts[component] += 1
            released[component] = counts[component] * bottom // top
            due[component] = -(-(counts[component] + 1) * bottom // top)
            taken.append(component)
        return bytes(taken)


@dataclass(frozen=True)
class RankBatches:
    """Sample numbers of one rank, batch by batch: a `batch_sampler` for torch's DataLoader.

    A step takes the same global samples for any number of ranks and any split into micro-batches.

    Attributes:
        first_step, last_step: steps to yield, the last excluded.
        batch_size: samples per rank and micro-batch.
        micro_batches: micro-batches of each step (gradient accumulation).
        rank, world_size: number of this process, and number of processes.
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
