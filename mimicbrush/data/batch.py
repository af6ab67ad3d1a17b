"""Collates samples into batches, which are already rendered, or are rendered on the device of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Union, cast

import numpy as np
import torch

from mimicbrush.data.dataset import DecodedSample, EncodedSample, Sample
from mimicbrush.data.transforms import ImageView, MatchedPoints
from mimicbrush.ops.canvas import IMAGE_FILL, to_tensor, warp_images
from mimicbrush.types import EncodedViews, Matches, TrainBatch

#: A batch from a loader.
LoadedBatch = Union[TrainBatch, "DecodedBatch", EncodedViews]
_TENSORS = ("images", "sizes", "to_image", "colours", "mask", "key", "index")


@dataclass
class DecodedBatch:
    """A batch of decoded images that are not rendered yet; `to` renders it.

    B samples with R references have n = (1 + R) B images: all sources, all first references, all second ones, etc.

    Attributes:
        images: (n, H, W, 3) uint8 RGB, each in the upper left corner of the common size.
        sizes: (n, 2) int64, height and width of each.
        to_image: (n, 3, 3) float32, matrices from the canvas to the image's pixels.
        colours: (n, 3, 4) float32, see `ops.color_jitter.Jitter.matrix`.
        mask: (B, 1, S, S) uint8, 0 or 1: masks are sampled in the loader, exactly as for `TrainBatch`.
        key, index, faults, matches: as in `TrainBatch`.
    """

    images: torch.Tensor
    sizes: torch.Tensor
    to_image: torch.Tensor
    colours: torch.Tensor
    mask: torch.Tensor
    key: torch.Tensor
    index: torch.Tensor
    faults: tuple[str, ...] = ()
    matches: Matches | None = None

    @property
    def num_references(self) -> int:
        """References of each sample, R."""
        return len(self.images) // len(self.mask) - 1

    def to(self, device: torch.device) -> TrainBatch:
        """Render the batch on this device."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        mask = moved.pop("mask")
        key, index = moved.pop("key"), moved.pop("index")
        pixels = warp_images(**moved, size_px=mask.shape[-1], fill=IMAGE_FILL) / 127.5 - 1
        source, reference, *others = pixels.split(len(mask))
        matches = self.matches and self.matches.to(device)
        other_references = torch.stack(others, dim=1) if others else None
        return TrainBatch(source, reference, mask.float(), key, index, self.faults, matches, other_references)

    def pin_memory(self) -> DecodedBatch:
        """Move the batch to page-locked memory: torch's DataLoader looks for this method."""
        pinned = {name: getattr(self, name).pin_memory() for name in _TENSORS}
        return replace(self, **pinned, matches=self.matches and self.matches.pin_memory())

    def __len__(self) -> int:
        return len(self.key)


def collate_samples(
    samples: Sequence[Sample] | Sequence[DecodedSample] | Sequence[EncodedSample],
) -> LoadedBatch:
    """Collate samples, all of one type, into one batch."""
    key = torch.tensor([sample.key for sample in samples])
    index = torch.tensor([sample.index for sample in samples])
    faults = tuple(fault for sample in samples for fault in sample.faults)
    if isinstance(samples[0], DecodedSample):
        decoded = [sample.views for sample in cast(Sequence[DecodedSample], samples)]
        by_sample = [(each.source, each.reference, *each.other_references) for each in decoded]
        views = [view for same_place in zip(*by_sample, strict=True) for view in same_place]
        mask = torch.from_numpy(np.stack([each.mask for each in decoded])[:, None])
        return DecodedBatch(
            *_stack_views(views), mask, key, index, faults, _pad_matches([each.matches for each in decoded])
        )
    if isinstance(samples[0], EncodedSample):
        rows = [sample.tensors for sample in cast(Sequence[EncodedSample], samples)]
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        source_xy, reference_xy = tensors.pop("source_xy"), tensors.pop("reference_xy")
        matches = Matches(source_xy, reference_xy, tensors.pop("is_match")) if "is_match" in tensors else None
        return EncodedViews(**tensors, key=key, index=index, faults=faults, matches=matches)
    finished = cast(Sequence[Sample], samples)
    others = [to_tensor(np.stack(each)) for each in zip(*(sample.other_references for sample in finished), strict=True)]
    return TrainBatch(
        source=to_tensor(np.stack([sample.source for sample in finished])),
        reference=to_tensor(np.stack([sample.reference for sample in finished])),
        mask=torch.from_numpy(np.stack([sample.mask for sample in finished])[:, None]).float(),
        key=key,
        index=index,
        faults=faults,
        matches=_pad_matches([sample.matches for sample in finished]),
        other_references=torch.stack(others, dim=1) if others else None,
    )


def _pad_matches(matches: Sequence[MatchedPoints | None]) -> Matches | None:
    """Pad the matches of each sample to their capacity, and stack them; None if they were not requested."""
    if matches[0] is None:
        return None
    size = matches[0].capacity
    xy = np.zeros((2, len(matches), size, 2), np.float32)
    is_match = np.zeros((len(matches), size), bool)
    for number, each in enumerate(cast(Sequence[MatchedPoints], matches)):
        count = len(each.source_xy)
        xy[0, number, :count], xy[1, number, :count] = each.source_xy, each.reference_xy
        is_match[number, :count] = True
    return Matches(torch.from_numpy(xy[0]), torch.from_numpy(xy[1]), torch.from_numpy(is_match))


def _stack_views(views: Sequence[ImageView]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stack images, sizes, matrices and colours for `DecodedBatch`."""
    sizes = np.array([view.pixels.shape[:2] for view in views])
    images = np.zeros((len(views), *sizes.max(axis=0), 3), np.uint8)
    for image, view, (height, width) in zip(images, views, sizes, strict=True):
        image[:height, :width] = view.pixels
    to_image = np.stack([np.linalg.inv(view.matrix) for view in views]).astype(np.float32)
    colours = np.stack([view.colour for view in views]).astype(np.float32)
    arrays = (images, sizes, to_image, colours)
    first, second, third, fourth = map(torch.from_numpy, arrays)
    return first, second, third, fourth
