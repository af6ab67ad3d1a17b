"""The plan of an export: which pairs are in it, in which order, and in which parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import pyarrow.compute as pc

from mimicbrush.data.manifest import PairTable, read_manifest, read_rows, split_pairs
from mimicbrush.errors import DataError
from mimicbrush.mining.exports.options import ExportOptions

ExportSplit = Literal["train", "heldout"]
SPLITS: tuple[ExportSplit, ...] = get_args(ExportSplit)
#: Approximate target pixels and largest number of samples of a part, which is held in memory until it is complete. It
#: has at least one pair.
_PIXELS_PER_PART, _MOST_PER_PART = 64 * 512**2, 256


@dataclass(frozen=True)
class ExportPart:
    """Some pairs of a split, written together.

    Attributes:
        split: its split, and the name of its folder.
        number: its number among the parts of the split.
        places: places of its pairs in the order of the export.
    """

    split: ExportSplit
    number: int
    places: range

    @property
    def name(self) -> str:
        """Name of its marker, and of its tar."""
        return f"{self.split}-{self.number:06d}"


@dataclass(frozen=True)
class ExportPlan:
    """All pairs of an export.

    Attributes:
        tables: split -> its pairs.
        parts: the parts in the order in which they are written. An incomplete export has about the same share of each
            split.
        num_pairs: number of pairs in the mined folder.
        num_outside_band: number of video pairs whose SSIM is outside the range of the options.
        licences: hash of a mined file -> (licence, address) as the input list gave them.
    """

    tables: Mapping[ExportSplit, PairTable]
    parts: tuple[ExportPart, ...]
    num_pairs: int
    num_outside_band: int
    licences: Mapping[str, tuple[str, str]]


def choose_part_size(options: ExportOptions) -> int:
    """Choose the approximate number of samples in one part (one tar)."""
    height, width = options.canvas_px
    return max(1, min(_PIXELS_PER_PART // (height * width), _MOST_PER_PART))


def plan_export(root: Path, options: ExportOptions, samples_per_part: int) -> ExportPlan:
    """Plan an export: split the pairs as training does, without videos outside the SSIM range.

    Raises:
        DataError: the folder is not mined, or no pair is left.
    """
    data = options.data
    pairs = read_manifest(root, Path(data.input_root) if data.input_root else None)
    tables: dict[ExportSplit, PairTable] = {}
    for split in SPLITS:
        table = split_pairs(pairs, split, data.heldout_ratio)
        ssim = table.column("ssim")
        # As in training, a video whose SSIM is NaN is kept here. It is refused and counted when it is read.
        is_outside = (table.column("kind") == "video") & ((ssim < data.min_ssim) | (ssim > data.max_ssim))
        tables[split] = table.where(~is_outside)
    count = sum(map(len, tables.values()))
    if not count:
        raise DataError(
            f"there are no pairs to export: none of the {len(pairs)} pairs in {root} has an SSIM from "
            f"{data.min_ssim} to {data.max_ssim} (data.min_ssim, data.max_ssim)"
        )
    step = max(1, samples_per_part // options.views)
    parts = [
        ExportPart(split, number, range(start, min(start + step, len(table))))
        for split, table in tables.items()
        for number, start in enumerate(range(0, len(table), step))
    ]
    parts.sort(key=lambda part: part.places.start / len(tables[part.split]))
    return ExportPlan(tables, tuple(parts), len(pairs), len(pairs) - count, _read_licences(root))


def _read_licences(root: Path) -> dict[str, tuple[str, str]]:
    rows = read_rows(root, ["status", "source_hash", "licence", "url"])
    rows = rows.filter(pc.equal(rows["status"], "pair")).group_by(["source_hash", "licence", "url"]).aggregate([])
    columns = (rows[name].to_pylist() for name in ("source_hash", "licence", "url"))
    return {source_hash: (licence, url) for source_hash, licence, url in zip(*columns, strict=True)}
