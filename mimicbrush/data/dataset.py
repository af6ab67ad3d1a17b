"""Datasets of samples from mined pairs, by *global sample number* (see `sampler.PairMixture`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from mimicbrush.data.encoded_views import EncodedFolder
from mimicbrush.data.options import DataOptions
from mimicbrush.data.other_references import OtherReferences
from mimicbrush.data.pair import Pair, refuse_pair
from mimicbrush.data.pair_sources import PairSource
from mimicbrush.data.sampler import FixedViews, PairMixture
from mimicbrush.data.transforms import ImageView, MatchedPoints, SampleTransform, SampleViews
from mimicbrush.errors import DataError
from mimicbrush.io.text import make_storable
from mimicbrush.ops.counter_rng import generator, mix

#: If so many pairs in a row cannot be read, the folder is missing; a single damaged file does not explain it.
_MAX_ATTEMPTS = 16
#: Number of tries to find a pair of another mined file.
_MAX_CANDIDATES = 256
#: Streams of random numbers: unrelated references; the second and further references. They are separate, so no other
#: random number depends on them.
_UNRELATED, _OTHERS = 1, 2
#: Key of the random numbers of fixed views, which do not depend on a seed.
_FIXED_VIEWS = 0x76696577
#: Largest number of characters kept of a message about a pair, which contains a file name of any length.
_MAX_FAULT = 1000


@dataclass(frozen=True)
class Sample:
    """A rendered sample.

    Attributes:
        source, reference: (S, S, 3) uint8 RGB.
        mask: (S, S) uint8, 0 or 1.
        key, index, faults, matches: as in `TrainBatch`, for one sample.
        other_references: the second and further references, R-1 of (S, S, 3) uint8.
    """

    source: np.ndarray
    reference: np.ndarray
    mask: np.ndarray
    key: int
    index: int
    faults: tuple[str, ...] = ()
    matches: MatchedPoints | None = None
    other_references: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class DecodedSample:
    """A sample whose source and references are decoded, but not rendered yet."""

    views: SampleViews
    key: int
    index: int
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncodedSample:
    """A sample already encoded: name -> tensor of its row, see `encoded_views.make_row_forms`."""

    tensors: dict[str, torch.Tensor]
    key: int
    index: int
    faults: tuple[str, ...] = ()


class PairDataset(torch.utils.data.Dataset[Sample | DecodedSample | EncodedSample]):
    """Dataset of samples by global number: ``dataset[n]`` is the same on any rank and after any restart.

    With the option `fixed_views` = V, each pair has V augmentations; epoch e of its source shows view e mod V.

    A pair that cannot be read is replaced by another one of the same source, chosen by a hash of (seed, number,
    attempt), so the replacement is also the same everywhere. The sample's `faults` say what was wrong.

    Args:
        pair_sources: the pairs to train on, see `mimicbrush.data.pair_sources.load_pair_sources`.
        size_px: side of the square canvas.
        options: augmentation and masks; with ``augment_on="device"`` samples are `DecodedSample`.
        encoded: the encoded fixed views: samples are `EncodedSample`, and no image is read.
        seed: seed of all random numbers.
        length: the length that the dataset reports to loaders.
        num_matches: largest number of matches of a sample, for the correspondence loss; 0: no matches.
        unrelated_ratio: probability that the references come from another mined file (with fixed views: from a fixed
            view of a pair of another file).

    Raises:
        DataError: `unrelated_ratio` is set, and all pairs come from one mined file; or, from ``dataset[n]``, too many
            pairs in a row cannot be read.
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
        encoded: EncodedFolder | None = None,
    ) -> None:
        self.pair_sources, self.size_px, self.seed, self.length = list(pair_sources), size_px, seed, length
        lengths = [len(each.pairs) for each in pair_sources]
        self.mixture = PairMixture(lengths, [each.weight for each in pair_sources], seed)
        self.fixed = FixedViews(lengths, options.fixed_views) if options.fixed_views else None
        self.encoded, self.num_matches = encoded, num_matches
        self.transform = SampleTransform(size_px, options, num_matches)
        self.other_references = OtherReferences(pair_sources, self.transform, options.num_references - 1)
        self.unrelated_ratio = unrelated_ratio
        if unrelated_ratio and _count_origins(pair_sources) < 2:
            raise DataError(
                f"train.unrelated_reference_ratio={unrelated_ratio} takes references from other source files, and all "
                "pairs come from one file; mine more files, or set it to 0"
            )
        weights = np.array([each.weight for each in pair_sources], np.float64)
        self.shares = weights / weights.sum()
        self.renders_here = options.augment_on == "cpu"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Sample | DecodedSample | EncodedSample:
        # component: index in `pair_sources`; item: index of the pair in it.
        component, item, epoch = self.mixture.locate_in_epoch(number)
        pair_source = self.pair_sources[component]
        key = mix(self.seed, number)
        faults: list[str] = []
        for attempt in range(_MAX_ATTEMPTS):
            if attempt:
                item = mix(self.seed, number, attempt) % len(pair_source.pairs)
            try:
                with refuse_pair(f"number {item} of {pair_source.name}"):
                    return self._make_sample(component, item, epoch, key, number, attempt, faults)
            except DataError as error:
                faults.append(make_storable(f"sample {number}: {error}", _MAX_FAULT))
        raise DataError(
            f"{_MAX_ATTEMPTS} consecutive pairs of the source {pair_source.name!r} ({len(pair_source.pairs)} pairs) "
            f"cannot be read. The last: {faults[-1]}"
        )

    def _make_sample(
        self, component: int, item: int, epoch: int, key: int, number: int, attempt: int, faults: Sequence[str]
    ) -> Sample | DecodedSample | EncodedSample:
        """Make a sample of a pair, freshly augmented or as the fixed view of this epoch."""
        if self.fixed is None:
            views = self._sample_views(component, item, key, attempt)
            return _finish_sample(views, self.size_px, self.renders_here, key, number, faults)
        view, rng = epoch % self.fixed.count, generator(key, attempt, _UNRELATED)
        if self.encoded is not None:
            return EncodedSample(self._read_encoded(component, item, view, rng), key, number, tuple(faults))
        views = self._sample_fixed_view(component, item, view, rng)
        return _finish_sample(views, self.size_px, self.renders_here, key, number, faults)

    def _sample_views(self, component: int, item: int, key: int, attempt: int) -> SampleViews:
        """Sample the views of a pair; with probability `unrelated_ratio`, with other references and no matches."""
        pair = self._pair(component, item)
        views = self.transform(pair, generator(key, attempt))
        rng, rng_of_others = (generator(key, attempt, stream) for stream in (_UNRELATED, _OTHERS))
        other = self._find_unrelated(pair, rng)
        if other is None:
            return self._add_references(views, component, item, rng_of_others)
        reference = self.transform.read_reference(self._pair(*other), rng)
        return self._replace_references(views, *other, reference, rng_of_others)

    def _sample_fixed_view(self, component: int, item: int, view: int, rng: np.random.Generator) -> SampleViews:
        """Make a fixed view of a pair; with probability `unrelated_ratio`, with the references of another file."""
        assert self.fixed is not None
        pair = self._pair(component, item)
        found = self._find_unrelated(pair, rng)
        if found is None:
            return make_fixed_view(self.transform, self.other_references, component, item, pair, view)
        other, others_view = self._pair(*found), int(rng.integers(self.fixed.count))
        reference = transform_fixed(self.transform, other, others_view).reference
        views = transform_fixed(self.transform, pair, view)
        return self._replace_references(views, *found, reference, _fixed_generator(other, others_view, _OTHERS))

    def _add_references(self, views: SampleViews, component: int, item: int, rng: np.random.Generator) -> SampleViews:
        """Add the second and further references."""
        others = self.other_references.sample(component, item, views.reference, views.source, rng)
        return replace(views, other_references=others)

    def _replace_references(
        self, views: SampleViews, component: int, item: int, reference: ImageView, rng: np.random.Generator
    ) -> SampleViews:
        """Replace all references by those of a pair of another file, which have no matches."""
        others = self.other_references.sample(component, item, reference, None, rng)
        matches = views.matches and views.matches.to_empty()
        return replace(views, reference=reference, matches=matches, other_references=others)

    def _read_encoded(self, component: int, item: int, view: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Read the sample that `_sample_fixed_view` would make from the folder of encoded views."""
        assert self.fixed is not None and self.encoded is not None
        tensors = self.encoded.read_row(self.fixed.row(component, item, view))
        other = self._find_unrelated(self._pair(component, item), rng) if self.unrelated_ratio else None
        if other is not None:
            of_other = self.encoded.read_row(self.fixed.row(*other, int(rng.integers(self.fixed.count))))
            for name in ("mean", "std"):  # rows: source, masked source, reference
                tensors[name] = torch.cat([tensors[name][:2], of_other[name][2:]])
            tensors |= {"image_tokens": of_other["image_tokens"], "is_match": torch.zeros_like(tensors["is_match"])}
        if not self.num_matches:
            del tensors["is_match"]
        return tensors

    def _find_unrelated(self, pair: Pair, rng: np.random.Generator) -> tuple[int, int] | None:
        """Find, with probability `unrelated_ratio`, a pair of another mined file: (component, item).

        If no pair of another file is found in `_MAX_CANDIDATES` tries, the sample keeps its own references.
        """
        if not self.unrelated_ratio or rng.random() >= self.unrelated_ratio:
            return None
        for _ in range(_MAX_CANDIDATES):
            component = int(rng.choice(len(self.pair_sources), p=self.shares))
            item = int(rng.integers(len(self.pair_sources[component].pairs)))
            if self._pair(component, item).source_hash != pair.source_hash:
                return component, item
        return None

    def _pair(self, component: int, item: int) -> Pair:
        return self.pair_sources[component].pairs[item]


class FixedViewDataset(torch.utils.data.Dataset[Sample | DecodedSample]):
    """Dataset of all fixed views, one per row, for `mimicbrush encode-views`.

    A pair that cannot be read gives a blank sample with the key -1 and the reason as its only fault.

    Args:
        pair_sources, size_px, options: as for `PairDataset`; `fixed_views` must be 1 or more.
    """

    def __init__(self, pair_sources: Sequence[PairSource], size_px: int, options: DataOptions) -> None:
        self.pair_sources, self.size_px = list(pair_sources), size_px
        self.fixed = FixedViews([len(each.pairs) for each in pair_sources], options.fixed_views)
        self.transform = SampleTransform(size_px, options, options.num_matches)
        self.renders_here = options.augment_on == "cpu"

    def __len__(self) -> int:
        return len(self.fixed)

    def __getitem__(self, row: int) -> Sample | DecodedSample:
        component, item, view = self.fixed.locate(row)
        source = self.pair_sources[component]
        finish = partial(_finish_sample, size_px=self.size_px, renders_here=self.renders_here, number=row)
        try:
            with refuse_pair(f"number {item} of {source.name}"):
                return finish(transform_fixed(self.transform, source.pairs[item], view), key=0, faults=())
        except DataError as error:
            return finish(self._make_blank(), key=-1, faults=[make_storable(str(error), _MAX_FAULT)])

    def _make_blank(self) -> SampleViews:
        black = ImageView(np.zeros((1, 1, 3), np.uint8), np.eye(3), np.zeros((3, 4)))
        nowhere = np.zeros((0, 2), np.float32)
        mask = np.zeros((self.size_px, self.size_px), np.uint8)
        return SampleViews(black, black, mask, MatchedPoints(nowhere, nowhere, self.transform.num_matches))


def transform_fixed(transform: SampleTransform, pair: Pair, view: int) -> SampleViews:
    """Transform a pair to its fixed view `view`. The result depends only on the pair's id, its file and the view.

    Raises:
        DataError: the pair cannot be read.
    """
    return transform(pair, _fixed_generator(pair, view))


def make_fixed_view(
    transform: SampleTransform, others: OtherReferences, component: int, item: int, pair: Pair, view: int
) -> SampleViews:
    """Make a fixed view of a pair with all of its references, as training sees it.

    Args:
        transform: makes the view, see `transform_fixed`.
        others: samples the second and further references.
        component, item: index of the pair source, and index of the pair in it.
        pair: the pair at these indices.
        view: number of the fixed view, 0..V-1.

    Raises:
        DataError: the pair, or a frame of its shot, cannot be read.
    """
    views = transform_fixed(transform, pair, view)
    rng = _fixed_generator(pair, view, _OTHERS)
    return replace(views, other_references=others.sample(component, item, views.reference, views.source, rng))


def _fixed_generator(pair: Pair, view: int, *stream: int) -> np.random.Generator:
    """Make the random generator of a fixed view, or of one of its separate streams."""
    digest = hashlib.sha256(f"{pair.source_hash} {pair.pair_id}".encode()).hexdigest()
    return generator(_FIXED_VIEWS, int(digest[:16], 16), view, *stream)


def _finish_sample(
    views: SampleViews, size_px: int, renders_here: bool, key: int, number: int, faults: Sequence[str]
) -> Sample | DecodedSample:
    """Render a sample, or leave the rendering to the model's device."""
    if not renders_here:
        return DecodedSample(views, key, number, tuple(faults))
    source_px, reference_px, *others = (
        view.render(size_px) for view in (views.source, views.reference, *views.other_references)
    )
    return Sample(source_px, reference_px, views.mask, key, number, tuple(faults), views.matches, tuple(others))


def _count_origins(pair_sources: Sequence[PairSource]) -> int:
    """Count the mined files that the pairs come from."""
    return len({int(key) for each in pair_sources for key in each.pairs.column("source_key")})
