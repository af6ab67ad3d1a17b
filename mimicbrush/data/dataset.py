"""Sources -> samples, map-style over *global sample numbers* (see `PairMixture`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mimicbrush.data.options import DataOptions
from mimicbrush.data.pair import Pair
from mimicbrush.data.pair_sources import PairSource
from mimicbrush.data.sampler import PairMixture
from mimicbrush.data.transforms import MatchedPoints, SampleTransform, SampleViews
from mimicbrush.errors import DataError
from mimicbrush.ops.counter_rng import generator, mix

#: So many unreadable pairs in a row for one sample mean a source that is gone, not a damaged file.
_MAX_ATTEMPTS = 16
#: So many pairs are looked at for one of another source file.
_MAX_DRAWS = 256
#: Its random numbers are a stream of their own: with and without it, everything else about a sample is the same.
_UNRELATED = 1


@dataclass(frozen=True)
class Sample:
    """One sample: (S, S, 3), (S, S, 3) and (S, S) uint8, the mask 0 or 1; the rest as in TrainBatch."""

    source: np.ndarray
    reference: np.ndarray
    mask: np.ndarray
    key: int
    index: int
    faults: tuple[str, ...] = ()
    matches: MatchedPoints | None = None


@dataclass(frozen=True)
class DecodedSample:
    """The same before source and reference are drawn."""

    views: SampleViews
    key: int
    index: int
    faults: tuple[str, ...] = ()


class PairDataset(torch.utils.data.Dataset[Sample | DecodedSample]):
    """Samples by global number: ``dataset[n]`` is the same image on any rank, in any worker, after any restart.

    A pair that cannot be read is replaced by another one of the same source, chosen by a hash of (seed, number,
    attempt): so that, too, is the same everywhere. What was wrong travels in the sample's `faults`.

    Args:
        sources: what to train on, see `sources.load_pair_sources`.
        size_px: side of the square canvas.
        options: augmentation and masks; with ``augment_on="device"`` samples come undrawn.
        seed: of everything random.
        length: how many sample numbers there are, for loaders that ask.
        num_matches: the most matches that a sample brings along, for the correspondence loss; 0: none at all.
        unrelated_ratio: probability that the reference is one of another source file.

    Raises:
        DataError: unrelated references are wanted, and all pairs come from one source file. When a sample is asked
            for: too many pairs in a row cannot be read.
    """

    def __init__(
        self,
        sources: Sequence[PairSource],
        size_px: int,
        options: DataOptions,
        *,
        seed: int,
        length: int = 2**62,
        num_matches: int = 0,
        unrelated_ratio: float = 0.0,
    ) -> None:
        self.sources, self.size_px, self.seed, self.length = list(sources), size_px, seed, length
        self.mixture = PairMixture(
            [len(source.pairs) for source in sources], [source.weight for source in sources], seed
        )
        self.make = SampleTransform(size_px, options, num_matches)
        self.unrelated_ratio = unrelated_ratio
        if unrelated_ratio and len({int(key) for source in sources for key in source.pairs.column("origin_key")}) < 2:
            raise DataError(
                f"train.unrelated_reference_ratio={unrelated_ratio} takes references of other source files, and all "
                "pairs come from one; mine more files, or leave it at 0"
            )
        weights = np.array([source.weight for source in sources], np.float64)
        self.shares = weights / weights.sum()
        self.draws_here = options.augment_on == "cpu"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Sample | DecodedSample:
        source_number, item = self.mixture.locate(number)
        source = self.sources[source_number]
        key = mix(self.seed, number)
        faults: list[str] = []
        for attempt in range(_MAX_ATTEMPTS):
            if attempt:
                item = mix(self.seed, number, attempt) % len(source.pairs)
            try:
                pair = source.pairs[item]
                views = self.make(pair, generator(key, attempt))
                if self.unrelated_ratio:
                    views = self._perhaps_unrelated(views, pair, generator(key, attempt, _UNRELATED))
            except DataError as error:
                faults.append(f"sample {number}: {error}")
                continue
            if not self.draws_here:
                return DecodedSample(views, key, number, tuple(faults))
            source_px, reference_px = (view.draw(self.size_px) for view in (views.source, views.reference))
            return Sample(source_px, reference_px, views.mask, key, number, tuple(faults), views.matches)
        raise DataError(
            f"{_MAX_ATTEMPTS} pairs in a row of the source {source.name!r} ({len(source.pairs)} pairs) cannot be read. "
            f"The last: {faults[-1]}"
        )

    def _perhaps_unrelated(self, views: SampleViews, pair: Pair, rng: np.random.Generator) -> SampleViews:
        """The views, or with `unrelated_ratio` those with the reference of another source file and without matches.

        Where nearly all pairs come from one file, a pair of another one may not be met; then the sample stays as it is.
        """
        if rng.random() >= self.unrelated_ratio:
            return views
        for _ in range(_MAX_DRAWS):
            source = self.sources[int(rng.choice(len(self.sources), p=self.shares))]
            other = source.pairs[int(rng.integers(len(source.pairs)))]
            if other.source_hash != pair.source_hash:
                matches = views.matches and views.matches.none()
                return replace(views, reference=self.make.read_reference(other, rng), matches=matches)
        return views
