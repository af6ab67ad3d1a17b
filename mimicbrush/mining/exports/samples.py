"""A pair -> its samples, drawn as training draws fixed views, as the files of a format."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from mimicbrush.data.dataset import transform_fixed
from mimicbrush.data.manifest import PairTable
from mimicbrush.data.pair import Pair, refuse_pair
from mimicbrush.data.transforms import SampleTransform
from mimicbrush.errors import DataError
from mimicbrush.io.text import make_storable
from mimicbrush.mining.exports.formats.layout import Content, TrainingSample
from mimicbrush.mining.exports.formats.registry import FORMATS
from mimicbrush.mining.exports.options import MAX_VIEWS, ExportOptions
from mimicbrush.mining.exports.plan import SPLITS, ExportSplit
from mimicbrush.ops.counter_rng import mix, permute_position

#: Reasons for which a pair is in the plan of an export, but not in its files.
UNREADABLE, NO_CAPTION = "unreadable", "no_caption"
#: Takes half the time of Pillow's default, 6, for files that are 2 % larger.
_PNG_LEVEL = 4


@dataclass(frozen=True)
class ExportedPair:
    """What an export has made of a pair.

    Attributes:
        row: of its marker: the pair and its samples; or the reason why it has none.
        files: path in the folder of the split -> content.
    """

    row: dict[str, Any]
    files: dict[str, bytes]


@dataclass(frozen=True)
class PairExporter:
    """Makes the files of a pair. It is sent to each process once.

    Attributes:
        tables, licences: as in `ExportPlan`.
        options: of the export.
    """

    tables: Mapping[ExportSplit, PairTable]
    licences: Mapping[str, tuple[str, str]]
    options: ExportOptions

    @cached_property
    def _transform(self) -> SampleTransform:
        return SampleTransform(self.options.size_px, self.options.data)

    def export_pair(self, split: ExportSplit, place: int) -> ExportedPair:
        """Export the pair at a place in the order of the export, which is random, so that any beginning is a sample.

        A pair is exported with all of its views or not at all.
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
                return self._export_views(pair, place, caption, row)
        except DataError as error:
            return ExportedPair(row | {"reason": UNREADABLE, "detail": make_storable(str(error))}, {})

    def _export_views(self, pair: Pair, place: int, caption: str, row: dict[str, Any]) -> ExportedPair:
        files: dict[str, bytes] = {}
        samples = []
        for view in range(self.options.views):
            facts = {"caption": caption, "view": view, **{key: row[key] for key in row if key != "place"}}
            sample = self._draw_sample(pair, f"{place:07d}-{view}", view, caption, facts)
            contents, record = FORMATS[self.options.format].lay_out(sample)
            files |= {path: self._encode(path, content) for path, content in contents.items()}
            samples.append({"name": sample.name, "view": view, "caption": caption, "record": record})
        return ExportedPair(row | {"samples": samples}, files)

    def _draw_sample(self, pair: Pair, name: str, view: int, caption: str, facts: Mapping[str, Any]) -> TrainingSample:
        """Draw a view of a pair; the hole is filled as `ops.canvas.blank_mask` fills it."""
        options = self.options
        views = transform_fixed(self._transform, pair, options.seed * MAX_VIEWS + view)
        target, reference = views.source.render(options.size_px), views.reference.render(options.size_px)
        mask = views.mask * np.uint8(255)
        if options.side_by_side:
            target = np.hstack([reference, target])
            mask = np.hstack([np.zeros_like(mask), mask])
        source = np.where(mask[..., None] > 0, np.uint8(0), target)
        return TrainingSample(name, target, source, (reference,), mask, caption, facts, options.suffix)

    def _encode(self, path: str, content: Content) -> bytes:
        if isinstance(content, str):
            return content.encode()
        file = io.BytesIO()
        if path.endswith(".png"):
            Image.fromarray(content).save(file, "PNG", compress_level=_PNG_LEVEL)
        else:
            Image.fromarray(content).save(file, "JPEG", quality=self.options.jpeg_quality, subsampling=0)
        return file.getvalue()
