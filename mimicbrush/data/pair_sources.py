"""Loads the pairs to train on, from one mined folder or from several with weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from mimicbrush.data.manifest import PairTable, read_manifest, split_pairs
from mimicbrush.data.options import DataOptions
from mimicbrush.data.sampler import to_exact
from mimicbrush.errors import DataError


@dataclass(frozen=True)
class PairSource:
    """Pairs of one kind, and how often they are sampled.

    Attributes:
        name: name of the source in messages.
        pairs: the table of pairs; loader processes map its file into memory.
        weight: exact share of the samples, relative to the weights of the other sources.
    """

    name: str
    pairs: PairTable
    weight: Fraction


def load_pair_sources(options: DataOptions) -> list[PairSource]:
    """Load the pairs to train on, without held-out pairs and pairs outside the SSIM range.

    Raises:
        DataError: a folder is not mined, or one of several has no pair left.
    """
    if not options.sources:
        return split_by_kind(_read_training_pairs(options.root, options.input_root, options), options)
    pair_sources = []
    for name, component in options.sources.items():
        pairs = _read_training_pairs(component.root, component.input_root, options)
        selected = _select_pairs(pairs, component.kind, options)
        if not len(selected):
            raise DataError(
                f"data.sources.{name}: none of the {len(pairs)} pairs in {component.root} (without held-out pairs) is "
                f"of kind {component.kind} with SSIM from {options.min_ssim} to {options.max_ssim} (data.min_ssim, "
                "data.max_ssim)"
            )
        pair_sources.append(PairSource(name, selected, to_exact(component.weight)))
    return pair_sources


def split_by_kind(pairs: PairTable, options: DataOptions) -> list[PairSource]:
    """Split one table into its videos and its images, weighted by `data.video_ratio`.

    A kind that has a share but no pair is left out with a warning.

    Raises:
        DataError: no pair is left.
    """
    videos = to_exact(options.video_ratio)
    shares = {"video": videos, "image": 1 - videos}
    share_of_kind = {kind: share for kind, share in shares.items() if share > 0}
    tables = {kind: _select_pairs(pairs, kind, options) for kind in share_of_kind}
    pair_sources = [PairSource(kind, tables[kind], share_of_kind[kind]) for kind in share_of_kind if len(tables[kind])]
    if not pair_sources:
        raise DataError(
            f"no pairs to train on: none of the {len(pairs)} given pairs is of the kinds {list(share_of_kind)} with "
            f"SSIM from {options.min_ssim} to {options.max_ssim} (data.min_ssim, data.max_ssim, data.video_ratio)"
        )
    absent = [kind for kind in share_of_kind if not len(tables[kind])]
    if absent:
        present = ", ".join(each.name for each in pair_sources)
        warnings.warn(
            f"there are no {' and no '.join(absent)} pairs: all samples come from {present} "
            f"(data.video_ratio={options.video_ratio} has no effect)",
            stacklevel=2,
        )
    return pair_sources


def _read_training_pairs(root: str, input_root: str, options: DataOptions) -> PairTable:
    pairs = read_manifest(Path(root), Path(input_root) if input_root else None)
    return split_pairs(pairs, "train", options.heldout_ratio)


def _select_pairs(pairs: PairTable, kind: str, options: DataOptions) -> PairTable:
    """Select the pairs of one kind; for videos, those within the SSIM range of training.

    A video pair whose SSIM is NaN stays selected: it is refused and counted when it is read.
    """
    selected = pairs.column("kind") == kind
    if kind == "video":
        ssim = pairs.column("ssim")
        selected &= ~((ssim < options.min_ssim) | (ssim > options.max_ssim))
    return pairs.where(selected)
