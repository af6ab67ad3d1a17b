"""Makes the files of a pair's samples, like the fixed views of training."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from mimicbrush.data.dataset import make_fixed_view
from mimicbrush.data.manifest import PairTable
from mimicbrush.data.other_references import OtherReferences
from mimicbrush.data.pair import Pair, refuse_pair
from mimicbrush.data.pair_sources import PairSource
from mimicbrush.data.transforms import SampleTransform
from mimicbrush.errors import DataError
from mimicbrush.io.text import make_storable
from mimicbrush.mining.exports.formats.layout import FileContent, TrainingSample
from mimicbrush.mining.exports.formats.registry import FORMATS
from mimicbrush.mining.exports.options import ExportOptions
from mimicbrush.mining.exports.plan import SPLITS, ExportSplit
from mimicbrush.ops.counter_rng import mix, permute_position

#: Reasons why a pair of the plan has no files.
UNREADABLE_PAIR, NO_CAPTION = "unreadable", "no_caption"
#: The views of each seed begin at a multiple of this, which is also the largest value of `data.fixed_views`.
_VIEWS_PER_SEED = 10**6
#: Takes half the time of Pillow's default, 6, for files that are 2 % larger.
_PNG_LEVEL = 4


@dataclass(frozen=True)
class ExportedPair:
    """Result of exporting a pair.

    Attributes:
        row: its row in the marker: the pair and its samples, or the reason why it has none.
        files: path in the folder of the split -> content.
    """

    row: dict[str, Any]
    files: dict[str, bytes]


@dataclass(frozen=True)
class PairExporter:
    """Exporter of single pairs, which is sent to each process once.

    Attributes:
        tables, licences: as in `ExportPlan`.
        options: options of the export.
    """

    tables: Mapping[ExportSplit, PairTable]
    licences: Mapping[str, tuple[str, str]]
    options: ExportOptions

    @cached_property
    def _transform(self) -> SampleTransform:
        return SampleTransform(self.options.size_px, self.options.data)

    @cached_property
    def _other_references(self) -> OtherReferences:
        pair_sources = [PairSource(split, self.tables[split], Fraction(1)) for split in SPLITS]
        return OtherReferences(pair_sources, self._transform, self.options.data.num_references - 1)

    def export_pair(self, split: ExportSplit, place: int) -> ExportedPair:
        """Export the pair at a place in the order of the export, with all of its views or not at all.

        The order is random, so that an incomplete export is a random sample of all pairs.
        """
        pairs = self.tables[split]
        number = permute_position(place, len(pairs), mix(self.options.seed, SPLITS.index(split)))
        row: dict[str, Any] = {"place": place}
        try:
            with refuse_pair(f"number {number} of the pairs to export"):
                pair = pairs[number]
                licence, url = self.licences.get(pair.source_hash, ("", ""))
                row |= {"pair_id": pair.pair_id, "kind": pair.kind, "source_path": pair.source_path}
                row |= {"source_hash": pair.source_hash, "licence": licence, "url": url}
                caption = self.options.find_caption(pair.source_path)
                if not caption:
                    detail = f"{pair.source_path} has no caption in the list, and there is no --caption for all"
                    return ExportedPair(row | {"reason": NO_CAPTION, "detail": make_storable(detail)}, {})
                return self._export_views(split, number, pair, caption, row)
        except DataError as error:
            return ExportedPair(row | {"reason": UNREADABLE_PAIR, "detail": make_storable(str(error))}, {})

    def _export_views(
        self, split: ExportSplit, number: int, pair: Pair, caption: str, row: dict[str, Any]
    ) -> ExportedPair:
        files: dict[str, bytes] = {}
        samples = []
        for view in range(self.options.views):
            name = f"{row['place']:07d}-{view}"
            images = self._draw_images(split, number, pair, view)
            facts = {"caption": caption, "view": view, **{key: row[key] for key in row if key != "place"}}
            sample = TrainingSample(name, *images, caption, facts, self.options.suffix)
            contents, record = FORMATS[self.options.format].lay_out(sample)
            files |= {path: self._encode(path, content) for path, content in contents.items()}
            samples.append({"name": name, "view": view, "caption": caption, "record": record})
        return ExportedPair(row | {"samples": samples}, files)

    def _draw_images(
        self, split: ExportSplit, number: int, pair: Pair, view: int
    ) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...], np.ndarray]:
        """Make the images of a view: target, source, references, mask; the hole is black, as in training."""
        options = self.options
        view += options.seed * _VIEWS_PER_SEED
        views = make_fixed_view(self._transform, self._other_references, SPLITS.index(split), number, pair, view)
        shown = views.source, views.reference, *views.other_references
        target, *references = (each.render(options.size_px) for each in shown)
        mask = views.mask * np.uint8(255)
        if options.side_by_side:
            target = np.hstack([*references, target])
            mask = np.hstack([*(np.zeros_like(mask) for _ in references), mask])
        source = np.where(mask[..., None] > 0, np.uint8(0), target)
        return target, source, tuple(references), mask

    def _encode(self, path: str, content: FileContent) -> bytes:
        if isinstance(content, str):
            return content.encode()
        file = io.BytesIO()
        if path.endswith(".png"):
            Image.fromarray(content).save(file, "PNG", compress_level=_PNG_LEVEL)
        else:
            Image.fromarray(content).save(file, "JPEG", quality=self.options.jpeg_quality, subsampling=0)
        return file.getvalue()
