"""Mined pairs -> samples: read, augment, mask. Map-style over *global sample numbers* (see `Mixture`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mimicbrush.data.options import DataOptions
from mimicbrush.data.pair import Pair
from mimicbrush.data.sampler import Mixture
from mimicbrush.data.schema import Kind
from mimicbrush.errors import DataError
from mimicbrush.ops.geometry import (
    inside,
    letterbox_matrix,
    random_matrix,
    resize_matrix,
    transform_points,
    warp,
)
from mimicbrush.ops.images import IMAGE_FILL, to_tensor
from mimicbrush.ops.masks import sift_grid_mask
from mimicbrush.ops.photometric import random_jitter
from mimicbrush.ops.randomness import generator, mix
from mimicbrush.types import TrainBatch

#: A warped segment must cover this part of the canvas (*ours*), else another one is drawn.
_SEGMENT_AREA_RATIO = (0.01, 0.9)
_SEGMENT_TRIES = 8


@dataclass(frozen=True)
class Sample:
    """One sample: (S, S, 3), (S, S, 3) and (S, S) uint8, the mask 0 or 1; key and number as in TrainBatch."""

    source: np.ndarray
    reference: np.ndarray
    mask: np.ndarray
    key: int
    index: int


class PairDataset(torch.utils.data.Dataset[Sample]):
    """Samples by global number: ``dataset[n]`` is the same picture on any rank, in any worker, after any restart.

    Args:
        pairs: what to train on; videos and images are told apart by their kind.
        size_px: side of the square canvas.
        options: mixture, augmentation and masks.
        seed: of everything random.
        length: how many sample numbers there are, for loaders that ask.

    Raises:
        DataError: no pair is left.
    """

    def __init__(
        self, pairs: Sequence[Pair], size_px: int, options: DataOptions, *, seed: int, length: int = 2**62
    ) -> None:
        used = [p for p in pairs if p.kind == "image" or options.min_ssim <= p.ssim <= options.max_ssim]
        shares: dict[Kind, float] = {"video": options.video_ratio, "image": 1 - options.video_ratio}
        self.sources = {kind: [p for p in used if p.kind == kind] for kind, share in shares.items() if share > 0}
        absent = [kind for kind, items in self.sources.items() if not items]
        self.sources = {kind: items for kind, items in self.sources.items() if items}
        if not self.sources:
            raise DataError(
                f"no pair to train on: {len(pairs)} were given, none is of a wanted kind {list(shares)} with "
                f"SSIM in {options.min_ssim}..{options.max_ssim} (data.min_ssim, data.max_ssim, data.video_ratio)"
            )
        if absent:
            warnings.warn(
                f"no {' and no '.join(absent)} pairs: all samples come from {', '.join(self.sources)} "
                f"(data.video_ratio={options.video_ratio} is not kept)",
                stacklevel=2,
            )
        self.kinds = list(self.sources)
        self.mixture = Mixture(
            [len(items) for items in self.sources.values()], [shares[kind] for kind in self.kinds], seed
        )
        self.size_px, self.options, self.seed, self.length = size_px, options, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Sample:
        source, item = self.mixture.locate(number)
        pair = self.sources[self.kinds[source]][item]
        key = mix(self.seed, number)
        make = self._video_sample if pair.kind == "video" else self._image_sample
        source_px, reference_px, mask = make(pair, generator(key, 0))
        return Sample(source_px, reference_px, mask, key, number)

    def _video_sample(self, pair: Pair, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Two frames, either one as the source; the hole is a grid that knows of the matches."""
        first = (pair.a_span, pair.a_points)
        second = (pair.b_span or pair.a_span, pair.b_points)
        if rng.random() < 0.5:
            first, second = second, first
        flip = self._shared_flip(rng)
        source_matrix, reference_matrix = (self._matrix(pair, rng, flip) for _ in range(2))
        source = self._draw(self._jittered(pair, first[0], rng), pair, source_matrix)
        reference = self._draw(self._jittered(pair, second[0], rng), pair, reference_matrix)
        points = transform_points(first[1], source_matrix)
        seen = inside(transform_points(second[1], reference_matrix), self.size_px)
        # A match counts only where the augmented reference still shows it.
        return source, reference, self._grid_mask(points[seen], rng)

    def _image_sample(self, pair: Pair, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Two augmentations of one picture; the hole is one of its segments (paper Sec. 3.3)."""
        flip = self._shared_flip(rng)
        reference = self._draw(self._jittered(pair, pair.a_span, rng), pair, self._matrix(pair, rng, flip))
        stored = self._jittered(pair, pair.a_span, rng)
        for _ in range(_SEGMENT_TRIES):
            matrix = self._matrix(pair, rng, flip)
            segment = pair.read_segment(int(rng.integers(len(pair.segments))))
            mask = (warp(segment * 255, matrix, self.size_px, fill=0) > 127).astype(np.uint8)
            if _SEGMENT_AREA_RATIO[0] <= mask.mean() <= _SEGMENT_AREA_RATIO[1]:
                break
        else:  # the segments are too small or leave the canvas
            mask = self._grid_mask(np.zeros((0, 2), np.float32), rng)
        return self._draw(stored, pair, matrix), reference, mask

    def _shared_flip(self, rng: np.random.Generator) -> bool | None:
        drawn = rng.random() < self.options.geometry.flip_probability
        return bool(drawn) if self.options.share_flips else None

    def _matrix(self, pair: Pair, rng: np.random.Generator, flip: bool | None) -> np.ndarray:
        """All geometry of one picture: from *stored* pixels to the canvas."""
        height, width = pair.size_px
        drawn = random_matrix(self.options.geometry, self.size_px, rng, flip)
        return drawn @ letterbox_matrix(width, height, self.size_px)

    def _jittered(self, pair: Pair, span: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """A stored picture with other colours, decoded no larger than the canvas needs."""
        return random_jitter(pair.read(span, self._reduction(pair)), self.options.jitter, rng)

    def _draw(self, pixels: np.ndarray, pair: Pair, matrix: np.ndarray) -> np.ndarray:
        """Pixels of `_jittered` through a matrix of `_matrix`: (S, S, 3) uint8."""
        reduction = self._reduction(pair)
        return warp(pixels, matrix @ resize_matrix(reduction, reduction), self.size_px, IMAGE_FILL)

    def _reduction(self, pair: Pair) -> int:
        """The largest reduction while decoding that leaves half as many pixels again as the canvas has."""
        return next(r for r in (8, 4, 2, 1) if r == 1 or max(pair.size_px) / r >= 1.5 * self.size_px)

    def _grid_mask(self, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        mask = self.options.mask
        return sift_grid_mask(
            points, self.size_px, rng, cells=mask.cells, matched=mask.matched, unmatched=mask.unmatched
        )


def collate(samples: Sequence[Sample]) -> TrainBatch:
    """Samples -> one batch."""
    masks = np.stack([sample.mask for sample in samples])[:, None]
    return TrainBatch(
        source=to_tensor(np.stack([sample.source for sample in samples])),
        reference=to_tensor(np.stack([sample.reference for sample in samples])),
        mask=torch.from_numpy(masks).float(),
        key=torch.tensor([sample.key for sample in samples]),
        index=torch.tensor([sample.index for sample in samples]),
    )
