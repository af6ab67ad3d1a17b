"""Mined pairs -> samples, by *global sample number* (see `PairMixture`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mimicbrush.data.options import DataOptions
from mimicbrush.data.pair import Pair, refuse_pair
from mimicbrush.data.pair_sources import PairSource
from mimicbrush.data.sampler import PairMixture
from mimicbrush.data.transforms import MatchedPoints, SampleTransform, SampleViews
from mimicbrush.errors import DataError
from mimicbrush.io.text import make_storable
from mimicbrush.ops.counter_rng import generator, mix

#: So many unreadable pairs in a row for one sample mean a folder that is gone, not a damaged file.
_MAX_ATTEMPTS = 16
#: So many pairs are tried for one of another mined file.
_MAX_CANDIDATES = 256
#: Key of the random numbers of unrelated references: a stream of their own, so that nothing else depends on them.
_UNRELATED = 1
#: Characters of a message about a pair that are kept; it names a file.
_MAX_FAULT = 1000


@dataclass(frozen=True)
class Sample:
    """A rendered sample: (S, S, 3), (S, S, 3) and (S, S) uint8, the mask 0 or 1; the rest as in TrainBatch."""

    source: np.ndarray
    reference: np.ndarray
    mask: np.ndarray
    key: int
    index: int
    faults: tuple[str, ...] = ()
    matches: MatchedPoints | None = None


@dataclass(frozen=True)
class DecodedSample:
    """A sample whose source and reference are decoded, but not rendered yet."""

    views: SampleViews
    key: int
    index: int
    faults: tuple[str, ...] = ()


class PairDataset(torch.utils.data.Dataset[Sample | DecodedSample]):
    """Dataset of samples by global number: ``dataset[n]`` is the same on any rank and after any restart.

    A pair that cannot be read is replaced by another one of the same folder, chosen by a hash of (seed, number,
    attempt): so that, too, is the same everywhere. What was wrong travels in the sample's `faults`.

    Args:
        pair_sources: what to train on, see `mimicbrush.data.pair_sources.load_pair_sources`.
        size_px: side of the square canvas.
        options: augmentation and masks; with ``augment_on="device"`` samples come as `DecodedSample`.
        seed: of everything random.
        length: how many sample numbers there are, for loaders that ask.
        num_matches: the most matches that a sample brings along, for the correspondence loss; 0: none at all.
        unrelated_ratio: probability that the reference is one of another mined file.

    Raises:
        DataError: unrelated references are asked for, and all pairs come from one mined file. When a sample is asked
            for: too many pairs in a row cannot be read.
    """

    def __init__(
        self,
        pair_sources: Sequence[PairSource],
        size_px: int,
        options: DataOptions,
        *,
        seed: int,
        length: int = 2**62,
        num_matches: int = 0,
        unrelated_ratio: float = 0.0,
    ) -> None:
        self.pair_sources, self.size_px, self.seed, self.length = list(pair_sources), size_px, seed, length
        self.mixture = PairMixture(
            [len(each.pairs) for each in pair_sources], [each.weight for each in pair_sources], seed
        )
        self.transform = SampleTransform(size_px, options, num_matches)
        self.unrelated_ratio = unrelated_ratio
        if unrelated_ratio and _count_origins(pair_sources) < 2:
            raise DataError(
                f"train.unrelated_reference_ratio={unrelated_ratio} takes references of other source files, and all "
                "pairs come from one; mine more files, or leave it at 0"
            )
        weights = np.array([each.weight for each in pair_sources], np.float64)
        self.shares = weights / weights.sum()
        self.renders_here = options.augment_on == "cpu"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Sample | DecodedSample:
        component, item = self.mixture.locate(number)
        pair_source = self.pair_sources[component]
        key = mix(self.seed, number)
        faults: list[str] = []
        for attempt in range(_MAX_ATTEMPTS):
            if attempt:
                item = mix(self.seed, number, attempt) % len(pair_source.pairs)
            try:
                with refuse_pair(f"number {item} of {pair_source.name}"):
                    return self._sample(pair_source.pairs[item], key, number, attempt, faults)
            except DataError as error:
                faults.append(make_storable(f"sample {number}: {error}", _MAX_FAULT))
        raise DataError(
            f"{_MAX_ATTEMPTS} pairs in a row of the source {pair_source.name!r} ({len(pair_source.pairs)} pairs) "
            f"cannot be read. The last: {faults[-1]}"
        )

    def _sample(self, pair: Pair, key: int, number: int, attempt: int, faults: Sequence[str]) -> Sample | DecodedSample:
        views = self.transform(pair, generator(key, attempt))
        if self.unrelated_ratio:
            views = self._sample_unrelated(views, pair, generator(key, attempt, _UNRELATED))
        if not self.renders_here:
            return DecodedSample(views, key, number, tuple(faults))
        source_px, reference_px = (view.render(self.size_px) for view in (views.source, views.reference))
        return Sample(source_px, reference_px, views.mask, key, number, tuple(faults), views.matches)

    def _sample_unrelated(self, views: SampleViews, pair: Pair, rng: np.random.Generator) -> SampleViews:
        """Return the views; with probability `unrelated_ratio`, with a reference of another mined file and no matches.

        Where nearly all pairs come from one file, a pair of another one may not be met; then the sample stays as it is.
        """
        if rng.random() >= self.unrelated_ratio:
            return views
        for _ in range(_MAX_CANDIDATES):
            pairs = self.pair_sources[int(rng.choice(len(self.pair_sources), p=self.shares))].pairs
            other = pairs[int(rng.integers(len(pairs)))]
            if other.source_hash != pair.source_hash:
                matches = views.matches and views.matches.to_empty()
                return replace(views, reference=self.transform.read_reference(other, rng), matches=matches)
        return views


def _count_origins(pair_sources: Sequence[PairSource]) -> int:
    """Count the mined files that the pairs come from."""
    return len({int(key) for each in pair_sources for key in each.pairs.column("source_key")})
