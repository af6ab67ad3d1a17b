"""Summary of a mined folder from its manifest: counts that add up, reasons, and percentiles of SSIM."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mimicbrush.data.manifest import read_rows
from mimicbrush.errors import DataError
from mimicbrush.mining.video.signals import find_signals
from mimicbrush.ops.similarity import SSIM_DEFINITION

SUMMARY_NAME = "summary.json"
REPORT_NAME = "report.html"
_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
_HISTOGRAM_BINS = 20


@dataclass(frozen=True)
class Summary:
    """Counts of a mined folder: numbers of files, except `pairs`; `inputs = accepted + rejected + quarantined`.

    Attributes:
        inputs: videos, and photographs with segments (also in archives); a bad archive counts as one.
        accepted: files with at least one pair.
        rejected: readable files without a pair.
        quarantined: files that cannot be trusted.
        pairs: pairs to train on; a photograph with segments is one.
        pairs_by_kind: "video", "image" -> number of pairs.
        reasons: reason -> number of files without a pair.
        ignored: suffix -> number of files that are not inputs.
        ssim_percentiles: percentiles of the SSIM of video pairs; empty if there are none.
        ssim_histogram: counts in 20 equal bins of 0..1.
        ssim_definition: how SSIM is computed.
        options: the options that the folder was mined with.
        signals: "hdr", "interlaced" -> number of such videos, if there are any; `options` says how they were mined.
    """

    inputs: int
    accepted: int
    rejected: int
    quarantined: int
    pairs: int
    pairs_by_kind: dict[str, int]
    reasons: dict[str, int]
    ignored: dict[str, int]
    ssim_percentiles: dict[str, float]
    ssim_histogram: list[int]
    ssim_definition: str
    options: dict[str, Any]
    signals: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the summary as the text of summary.json."""
        return json.dumps(asdict(self), indent=1) + "\n"


def count_values(column: pa.ChunkedArray) -> Counter[str]:
    """Count how often each value of a column of texts occurs."""
    return Counter({entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()})


def summarise_manifest(output: Path, ignored: Mapping[str, int], options: dict[str, Any]) -> Summary:
    """Summarise the manifest of a mined folder, in which each input has one or more rows.

    Raises:
        DataError: the manifest cannot be read, or the counts do not add up.
    """
    columns = ["status", "reason", "detail", "kind", "source_path", "ssim"]
    table = read_rows(output, columns)
    # All rows of a file have one status, so a file counts once.
    files = table.group_by(["source_path", "status", "reason"]).aggregate([])
    statuses, reasons = count_values(files["status"]), count_values(files["reason"])
    kinds = count_values(table.filter(pc.equal(table["status"], "pair"))["kind"])
    ssims = table["ssim"].to_numpy().astype(np.float64)
    ssims = ssims[np.isfinite(ssims)]
    percentiles = np.percentile(ssims, _PERCENTILES).tolist() if len(ssims) else []
    histogram, _ = np.histogram(ssims.clip(0, 1), bins=_HISTOGRAM_BINS, range=(0, 1))
    reasons.pop("", None)
    if len(files) != statuses["pair"] + statuses["rejected"] + statuses["quarantined"]:
        raise DataError(f"{output} has rows with an unknown status ({', '.join(statuses)}); mine again")
    return Summary(
        inputs=len(files),
        accepted=statuses["pair"],
        rejected=statuses["rejected"],
        quarantined=statuses["quarantined"],
        pairs=sum(kinds.values()),
        pairs_by_kind=dict(sorted(kinds.items())),
        reasons=dict(sorted(reasons.items())),
        ignored=dict(sorted(ignored.items())),
        ssim_percentiles={f"p{p}": round(float(v), 4) for p, v in zip(_PERCENTILES, percentiles, strict=False)},
        ssim_histogram=[int(count) for count in histogram],
        ssim_definition=SSIM_DEFINITION,
        options=options,
        signals=_count_signals(table),
    )


def _count_signals(table: pa.Table) -> dict[str, int]:
    """Count the HDR and the interlaced videos by the notes in their rows."""
    videos = table.filter(pc.equal(table["kind"], "video"))
    files = videos.group_by(["source_path", "reason", "detail"]).aggregate([])
    words = (
        find_signals(reason, detail)
        for reason, detail in zip(files["reason"].to_pylist(), files["detail"].to_pylist(), strict=True)
    )
    return dict(sorted(Counter(word for each in words for word in each).items()))
