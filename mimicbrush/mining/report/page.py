"""Writes report.html: what was mined and what was refused, in one file that depends only on the folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from mimicbrush.data.manifest import PLAN_NAME, PairTable, read_manifest, read_rows
from mimicbrush.errors import DataError
from mimicbrush.io.atomic import write_aside
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.plan import read_plan
from mimicbrush.mining.refusals import QUARANTINED, REJECTED
from mimicbrush.mining.report import statistics, thumbnails
from mimicbrush.mining.report.plots import Histogram, HistogramMark, plot_histogram, plot_shares
from mimicbrush.mining.summary import REPORT_NAME, SUMMARY_NAME, Summary, count_values, summarise_manifest

#: Number of clips for which the report estimates storage and time.
MANY_CLIPS = 100_000
_EXAMPLES, _LISTED = 3, 200
#: Longest name or detail in characters: both come from the input files, and can have any length.
_LONGEST_TEXT = 300
_STEPS = {
    "decode": "decoding",
    "shots": "shots",
    "sharpness": "sharpness",
    "ssim": "SSIM",
    "sift": "SIFT",
    "jpeg": "JPEG",
}


@dataclass(frozen=True)
class ReasonRow:
    """A reason, how many files have it, and examples of them as (path, detail)."""

    word: str
    status: str
    meaning: str
    files: int
    examples: list[tuple[str, str]]


@dataclass(frozen=True)
class Figure:
    """A plot, and the sentences below it."""

    title: str
    svg: Markup
    caption: str


def write_mining_report(root: Path, *, input_root: Path | None = None) -> str | None:
    """Write report.html into a mined folder, unless it is up to date.

    Args:
        root: the mined folder.
        input_root: folder of the photographs that were not copied, if it was moved; None: the folder that was mined.

    Returns:
        The warning at the top of the report, see `statistics.warn_of_still_pairs`; None if there is none.

    Raises:
        DataError: there is no manifest, or it cannot be read.
    """
    html, warning = _render(root, input_root)
    text = html.encode()
    path = root / REPORT_NAME
    if not path.is_file() or path.read_bytes() != text:
        write_aside(path, lambda aside: aside.write_bytes(text))
    return warning


def render_report(root: Path, *, input_root: Path | None = None) -> str:
    """Render the report of a mined folder as one HTML page; the same folder gives the same text."""
    return _render(root, input_root)[0]


def _render(root: Path, input_root: Path | None) -> tuple[str, str | None]:
    """Render the page; return it, and the warning at its top."""
    plan = read_plan(root / PLAN_NAME)
    pairs = read_manifest(root, input_root)
    rows = read_rows(root, ["status", "reason", "detail", "kind", "source_path", "licence", "decoder"])
    kinds = pairs.column("kind")
    videos, photographs = pairs.where(kinds == "video"), pairs.where(kinds == "image")
    summary = summarise_manifest(root, _read_ignored(root), plan.options if plan is not None else {})
    defaults = asdict(MiningOptions())
    options = defaults | summary.options
    time = statistics.read_throughput(root, plan)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mimicbrush", "mining/report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=_format_count, size=_format_size, short=_shorten, percent=lambda share: f"{share:.1%}"
    )
    masks = statistics.measure_masks(videos)
    warning = statistics.warn_of_still_pairs(masks)
    quarantined = rows.filter(pc.equal(rows["status"], "quarantined"))
    html = environment.get_template("report.html.jinja").render(
        summary=summary,
        warning=warning,
        inputs_bar=plot_shares(
            [(name, getattr(summary, name)) for name in ("accepted", "rejected", "quarantined")],
            f"{summary.accepted} accepted, {summary.rejected} rejected, {summary.quarantined} quarantined",
        ),
        **_measure_storage(root, summary, rows, pairs),
        many_clips=MANY_CLIPS,
        decoders=_count_decoders(rows),
        changed_options=statistics.list_changed_options(plan),
        options=options,
        figures=_build_video_figures(videos, masks, options),
        bands=statistics.list_ssim_bands(videos.column("ssim"), (options["min_ssim"], options["max_ssim"])),
        num_video_pairs=len(videos),
        kept=thumbnails.render_kept_pairs(videos),
        refused=thumbnails.render_refused_pairs(root),
        reasons=_list_reasons(rows),
        quarantined=_list_files(quarantined, _LISTED),
        num_quarantined=len(quarantined),
        segment_figure=_build_segment_figure(photographs, options),
        photographs=thumbnails.render_photographs(photographs),
        num_photographs=len(photographs),
        time=time,
        steps=_list_steps(time),
        time_bar=plot_shares(
            [(f"step-{step}", time.seconds.get(step, 0.0)) for step in _STEPS],
            "; ".join(f"{name} {share:.0%}" for name, _, _, share in _list_steps(time)),
        ),
        licences=statistics.count_licences(rows),
    )
    return html, warning


def _read_ignored(root: Path) -> dict[str, int]:
    """Read the numbers of ignored files by suffix from the summary, because the manifest has no rows for them."""
    try:
        counts = json.loads((root / SUMMARY_NAME).read_text(encoding="utf-8"))["ignored"]
        return {str(suffix): int(count) for suffix, count in counts.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{root / SUMMARY_NAME} cannot be read ({error!r}); run the mining command again") from error


def _measure_storage(root: Path, summary: Summary, rows: pa.Table, pairs: PairTable) -> dict[str, object]:
    """Measure bytes on disk: by folder, per pair, and for `MANY_CLIPS` clips like these (None without clips)."""
    disk = statistics.measure_disk_bytes(root)
    is_copy = (pairs.column("store") == "mined") & (pairs.column("kind") == "image")
    copied = int(pairs.column("a_length")[is_copy].sum() + pairs.column("annotation_length")[is_copy].sum())
    clips = len(rows.filter(pc.equal(rows["kind"], "video")).group_by(["source_path"]).aggregate([]))
    total = sum(disk.values())
    return {
        "disk": disk,
        "disk_total": total,
        "disk_per_pair": total / summary.pairs if summary.pairs else None,
        "disk_many": (total - copied) * MANY_CLIPS / clips if clips and summary.pairs_by_kind.get("video") else None,
        "num_clips": clips,
    }


def _count_decoders(rows: pa.Table) -> list[tuple[str, int]]:
    files_by_decoder = rows.group_by(["decoder", "source_path"]).aggregate([])["decoder"]
    return sorted((decoder, count) for decoder, count in count_values(files_by_decoder).items() if decoder)


def _build_video_figures(
    videos: PairTable, masks: statistics.MaskStatistics, options: dict[str, float]
) -> list[Figure]:
    """Build the plots of SSIM, matches, motion, masks and gaps of the video pairs; none without video pairs."""
    if not len(videos):
        return []
    sample = f"of {len(masks.hidden)} pairs" + (" (a fixed sample)" if len(masks.hidden) < len(videos) else "")
    ssims, matches = videos.column("ssim"), videos.lengths("a_points") // 2
    gaps = videos.column("b_time_s") - videos.column("a_time_s")
    band = (options["min_ssim"], options["max_ssim"])
    longest = max(options["min_gap_s"], float(gaps.max()))
    most = _round_up(float(np.percentile(matches, 99)))
    farthest = _round_up(max(0.02, float(np.percentile(masks.motion, 99))))
    still = float((masks.motion < 0.01).mean())
    return [
        _build_figure(
            "SSIM of the two frames",
            ssims,
            (0, 1),
            "{:.2f}",
            f"Mined: {band[0]:g} to {band[1]:g} (shaded); 1 means equal images. Training can use a smaller range "
            "without mining again.",
            band=band,
        ),
        _build_figure(
            "SIFT matches per pair",
            matches,
            (0, most),
            "{:.0f}",
            f"A pair needs at least {options['min_matches']}. The last bar includes all pairs with more.",
        ),
        _build_figure(
            "How far the matches moved",
            masks.motion,
            (0, farthest),
            "{:.3f}",
            f"Median of the points of a pair, as a share of the diagonal, {sample}. At 0, nothing moved, and copying "
            f"in place is enough; {still:.1%} of the pairs moved less than 1%. The last bar includes all pairs that "
            "moved more.",
        ),
        _build_figure(
            "Share of the image that is hidden",
            masks.hidden,
            (0, 1),
            "{:.2f}",
            f"With the grid mask of the paper, sampled from the stored matches with fixed seeds, {sample}.",
        ),
        _build_figure(
            "Hidden cells with a match",
            masks.matched,
            (0, 1),
            "{:.2f}",
            f"The share of the hidden cells with a match, so that the other frame shows them, {sample}.",
        ),
        _build_figure(
            "Time between the frames",
            gaps,
            (0, longest),
            "{:.1f}",
            f"Mined: {options['min_gap_s']:g} to {options['max_gap_s']:g} s.",
            unit=" s",
        ),
    ]


def _build_figure(
    title: str,
    values: np.ndarray,
    limits: tuple[float, float],
    style: str,
    caption: str,
    *,
    unit: str = "",
    band: tuple[float, float] | None = None,
) -> Figure:
    values_at = statistics.find_percentiles(values)
    marks = [
        HistogramMark(values_at[which], f"p{which} {style.format(values_at[which])}{unit}") for which in (5, 50, 95)
    ]
    words = ", ".join(f"percentile {which}: {style.format(value)}{unit}" for which, value in values_at.items())
    svg = plot_histogram(Histogram.count(values, *limits), f"Histogram: {title}; {words}", unit, marks, band)
    return Figure(title, svg, caption)


def _round_up(number: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten, for round numbers along an axis."""
    power = 10.0 ** np.floor(np.log10(number))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= number * (1 - 1e-9)))


def _build_segment_figure(photographs: PairTable, options: dict[str, float]) -> Figure | None:
    if not len(photographs):
        return None
    ratios = photographs.values("segment_ratios")
    caption = (
        f"{_format_count(len(ratios))} segments of {_format_count(len(photographs))} photographs, as a share of the "
        f"image. Accepted: {options['min_segment_ratio']:g} to {options['max_segment_ratio']:g} (shaded); "
        f"at most {options['max_segments']} per photograph."
    )
    band = (options["min_segment_ratio"], options["max_segment_ratio"])
    return _build_figure("Area of the segments", ratios, (0, 1), "{:.2f}", caption, band=band)


def _list_reasons(rows: pa.Table) -> list[ReasonRow]:
    counts = count_values(rows.group_by(["source_path", "reason"]).aggregate([])["reason"])
    table = []
    for status, meanings in (("rejected", REJECTED), ("quarantined", QUARANTINED)):
        for word, meaning in meanings.items():
            examples = _list_files(rows.filter(pc.equal(rows["reason"], word)), _EXAMPLES) if counts[word] else []
            table.append(
                ReasonRow(word, status, meaning, counts[word], [(path, detail) for path, _, detail in examples])
            )
    return sorted(table, key=lambda reason: -reason.files)


def _list_files(rows: pa.Table, limit: int) -> list[tuple[str, str, str]]:
    """List (path, reason, detail) of the first `limit` rows."""
    return [(row["source_path"], row["reason"], row["detail"]) for row in rows.slice(0, limit).to_pylist()]


def _list_steps(time: statistics.Throughput) -> list[tuple[str, str, float, float]]:
    """List (name, key, seconds, share) of each step that took any time."""
    return [
        (name, step, time.seconds[step], time.seconds[step] / time.total_s)
        for step, name in _STEPS.items()
        if time.seconds.get(step, 0.0) > 0
    ]


def _format_count(number: float) -> str:
    return f"{number:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _format_size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return (
        f"{num_bytes:.3g}\N{NO-BREAK SPACE}{unit}" if num_bytes < 1000 else f"{num_bytes:.0f}\N{NO-BREAK SPACE}{unit}"
    )


def _shorten(text: str) -> str:
    """Cut a text to at most `_LONGEST_TEXT` characters."""
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"
