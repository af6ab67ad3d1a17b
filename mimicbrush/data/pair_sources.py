"""Where pairs come from: one mined folder, or any number of them with weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from mimicbrush.data.manifest import PairTable, read_manifest, split_pairs
from mimicbrush.data.options import DataOptions
from mimicbrush.errors import DataError


@dataclass(frozen=True)
class PairSource:
    """Pairs of one kind, and how often they are drawn.

    Attributes:
        name: for messages.
        pairs: a loader process maps them instead of holding them.
        weight: share of the samples, relative to the other sources'.
    """

    name: str
    pairs: PairTable
    weight: float


def load_pair_sources(options: DataOptions) -> list[PairSource]:
    """The sources to train on, without the pairs that are held out and those outside of the SSIM band.

    Raises:
        DataError: a folder is not mined, or a source has no pair left.
    """
    if not options.sources:
        return split_by_kind(_training_pairs(options.root, options.input_root, options), options)
    found = []
    for name, source in options.sources.items():
        pairs = _training_pairs(source.root, source.input_root, options)
        chosen = _chosen(pairs, source.kind, options)
        if not len(chosen):
            raise DataError(
                f"data.sources.{name}: of {len(pairs)} pairs in {source.root} (without those held out) none is of kind "
                f"{source.kind} with SSIM in {options.min_ssim}..{options.max_ssim} (data.min_ssim, data.max_ssim)"
            )
        found.append(PairSource(name, chosen, source.weight))
    return found


def split_by_kind(pairs: PairTable, options: DataOptions) -> list[PairSource]:
    """One table -> a source of its videos and one of its images, weighted by `data.video_ratio`.

    A kind that is wanted and absent is left out with a warning.

    Raises:
        DataError: no pair is left.
    """
    shares = {"video": options.video_ratio, "image": 1 - options.video_ratio}
    wanted = {kind: share for kind, share in shares.items() if share > 0}
    tables = {kind: _chosen(pairs, kind, options) for kind in wanted}
    found = [PairSource(kind, tables[kind], wanted[kind]) for kind in wanted if len(tables[kind])]
    if not found:
        raise DataError(
            f"no pair to train on: {len(pairs)} were given, none is of a wanted kind {list(wanted)} with "
            f"SSIM in {options.min_ssim}..{options.max_ssim} (data.min_ssim, data.max_ssim, data.video_ratio)"
        )
    absent = [kind for kind in wanted if not len(tables[kind])]
    if absent:
        warnings.warn(
            f"no {' and no '.join(absent)} pairs: all samples come from {', '.join(source.name for source in found)} "
            f"(data.video_ratio={options.video_ratio} is not kept)",
            stacklevel=2,
        )
    return found


def _training_pairs(root: str, input_root: str, options: DataOptions) -> PairTable:
    pairs = read_manifest(Path(root), Path(input_root) if input_root else None)
    return split_pairs(pairs, "train", options.heldout_ratio)


def _chosen(pairs: PairTable, kind: str, options: DataOptions) -> PairTable:
    """Pairs of one kind; of videos, those within the SSIM band of training."""
    chosen = pairs.column("kind") == kind
    if kind == "video":
        ssim = pairs.column("ssim")
        chosen &= (ssim >= options.min_ssim) & (ssim <= options.max_ssim)
    return pairs.where(chosen)
