"""report.html: what was mined and what was not, as one file that opens anywhere and is a function of the folder."""

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
from mimicbrush.mining.reasons import QUARANTINED, REJECTED
from mimicbrush.mining.report import statistics, thumbnails
from mimicbrush.mining.report.plots import Histogram, HistogramMark, histogram_svg, share_svg
from mimicbrush.mining.summary import REPORT_NAME, SUMMARY_NAME, Summary, count_values, summarise_manifest

#: Storage and time are told for so many clips.
MANY_CLIPS = 100_000
_EXAMPLES, _LISTED = 3, 200
#: Names and details come from outside, and may be of any length.
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
    """A image of numbers, and the sentences that go with it."""

    title: str
    svg: Markup
    says: str


def write_mining_report(root: Path, *, input_root: Path | None = None) -> None:
    """Write report.html into a mined folder, unless it says the same already.

    Args:
        root: the mined folder.
        input_root: where the photographs in place lie, if they have moved since; None: where they were mined.

    Raises:
        DataError: no manifest there, or one that cannot be read.
    """
    text = report_html(root, input_root=input_root).encode()
    path = root / REPORT_NAME
    if not path.is_file() or path.read_bytes() != text:
        write_aside(path, lambda aside: aside.write_bytes(text))


def report_html(root: Path, *, input_root: Path | None = None) -> str:
    """The report of a mined folder as a page of its own; the same folder gives the same text."""
    plan = read_plan(root / PLAN_NAME)
    pairs = read_manifest(root, input_root)
    rows = read_rows(root, ["status", "reason", "detail", "kind", "source_path", "licence", "decoder"])
    kinds = pairs.column("kind")
    videos, photographs = pairs.where(kinds == "video"), pairs.where(kinds == "image")
    summary = summarise_manifest(root, _ignored(root), plan.options if plan is not None else {})
    defaults = asdict(MiningOptions())
    options = defaults | summary.options
    time = statistics.throughput(root, plan)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mimicbrush", "mining/report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=_count, size=_size, short=_short, percent=lambda share: f"{share:.1%}")
    quarantined = rows.filter(pc.equal(rows["status"], "quarantined"))
    return environment.get_template("report.html.jinja").render(
        summary=summary,
        inputs_bar=share_svg(
            [(name, getattr(summary, name)) for name in ("accepted", "rejected", "quarantined")],
            f"{summary.accepted} accepted, {summary.rejected} rejected, {summary.quarantined} quarantined",
        ),
        **_storage(root, summary, rows, pairs),
        many_clips=MANY_CLIPS,
        decoders=_decoders(rows),
        changed_options=statistics.changed_options(plan),
        options=options,
        figures=_video_figures(videos, options),
        bands=statistics.list_ssim_bands(videos.column("ssim"), (options["min_ssim"], options["max_ssim"])),
        num_video_pairs=len(videos),
        kept=thumbnails.kept_pairs(videos),
        refused=thumbnails.refused_pairs(root),
        reasons=_reasons(rows),
        quarantined=_named(quarantined, _LISTED),
        num_quarantined=len(quarantined),
        segment_figure=_segment_figure(photographs, options),
        photographs=thumbnails.photographs(photographs),
        num_photographs=len(photographs),
        time=time,
        steps=_steps(time),
        time_bar=share_svg(
            [(f"step-{step}", time.seconds.get(step, 0.0)) for step in _STEPS],
            "; ".join(f"{name} {share:.0%}" for name, _, _, share in _steps(time)),
        ),
        licences=statistics.licences(rows),
    )


def _ignored(root: Path) -> dict[str, int]:
    """Files of other types, which only the summary knows: they have no rows."""
    try:
        counts = json.loads((root / SUMMARY_NAME).read_text(encoding="utf-8"))["ignored"]
        return {str(suffix): int(count) for suffix, count in counts.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{root / SUMMARY_NAME} cannot be read ({error!r}); give the mining command again") from error


def _storage(root: Path, summary: Summary, rows: pa.Table, pairs: PairTable) -> dict[str, object]:
    """Bytes on disk: of what, of one pair, and for `MANY_CLIPS` clips like these (None without clips)."""
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


def _decoders(rows: pa.Table) -> list[tuple[str, int]]:
    named = rows.group_by(["decoder", "source_path"]).aggregate([])["decoder"]
    return sorted((decoder, count) for decoder, count in count_values(named).items() if decoder)


def _video_figures(videos: PairTable, options: dict[str, float]) -> list[Figure]:
    """SSIM, matches, gaps, masks and motion of the video pairs; none without video pairs."""
    if not len(videos):
        return []
    masks = statistics.mask_figures(videos)
    sample = f"of {len(masks.hidden)} pairs" + (", a fixed sample" if len(masks.hidden) < len(videos) else "")
    ssims, matches = videos.column("ssim"), videos.lengths("a_points") // 2
    gaps = videos.column("b_time_s") - videos.column("a_time_s")
    band = (options["min_ssim"], options["max_ssim"])
    longest = max(options["min_gap_s"], float(gaps.max()))
    most = _round_up(float(np.percentile(matches, 99)))
    farthest = _round_up(max(0.02, float(np.percentile(masks.moved, 99))))
    still = float((masks.moved < 0.01).mean())
    return [
        _figure(
            "SSIM of the two frames",
            ssims,
            (0, 1),
            "{:.2f}",
            f"Mined: {band[0]:g} to {band[1]:g}, shaded; 1 is the same image. Training can narrow the band without "
            "mining again.",
            band=band,
        ),
        _figure(
            "SIFT matches per pair",
            matches,
            (0, most),
            "{:.0f}",
            f"A pair needs {options['min_matches']}. The last bar holds all that have more.",
        ),
        _figure(
            "How far the matches moved",
            masks.moved,
            (0, farthest),
            "{:.3f}",
            f"Median of a pair's points, as a share of the diagonal, {sample}. At 0, copying in place would do: "
            f"{still:.1%} of the pairs moved less than 1%. The last bar holds all that moved farther.",
        ),
        _figure(
            "Share of the image that is hidden",
            masks.hidden,
            (0, 1),
            "{:.2f}",
            f"By the paper's grid mask, drawn from the stored matches with fixed seeds, {sample}.",
        ),
        _figure(
            "Hidden cells with a match",
            masks.matched,
            (0, 1),
            "{:.2f}",
            f"The share of what is hidden that the other frame is known to show, {sample}.",
        ),
        _figure(
            "Time between the frames",
            gaps,
            (0, longest),
            "{:.1f}",
            f"Mined: {options['min_gap_s']:g} to {options['max_gap_s']:g} s.",
            unit=" s",
        ),
    ]


def _figure(
    title: str,
    values: np.ndarray,
    limits: tuple[float, float],
    style: str,
    says: str,
    *,
    unit: str = "",
    band: tuple[float, float] | None = None,
) -> Figure:
    told = statistics.percentiles(values)
    marks = [HistogramMark(told[which], f"p{which} {style.format(told[which])}{unit}") for which in (5, 50, 95)]
    words = ", ".join(f"percentile {which}: {style.format(value)}{unit}" for which, value in told.items())
    svg = histogram_svg(Histogram.of(values, *limits), f"Histogram: {title}; {words}", unit, marks, band)
    return Figure(title, svg, says)


def _round_up(number: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50, ... and of their decimals: round numbers along an axis."""
    power = 10.0 ** np.floor(np.log10(number))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= number * (1 - 1e-9)))


def _segment_figure(photographs: PairTable, options: dict[str, float]) -> Figure | None:
    if not len(photographs):
        return None
    ratios = photographs.values("segment_ratios")
    says = (
        f"{_count(len(ratios))} segments of {_count(len(photographs))} photographs, as a share of the image. "
        f"Accepted: {options['min_segment_ratio']:g} to {options['max_segment_ratio']:g}, shaded; "
        f"at most {options['max_segments']} of a photograph."
    )
    band = (options["min_segment_ratio"], options["max_segment_ratio"])
    return _figure("Area of the segments", ratios, (0, 1), "{:.2f}", says, band=band)


def _reasons(rows: pa.Table) -> list[ReasonRow]:
    found = count_values(rows.group_by(["source_path", "reason"]).aggregate([])["reason"])
    table = []
    for status, meanings in (("rejected", REJECTED), ("quarantined", QUARANTINED)):
        for word, meaning in meanings.items():
            examples = _named(rows.filter(pc.equal(rows["reason"], word)), _EXAMPLES) if found[word] else []
            table.append(
                ReasonRow(word, status, meaning, found[word], [(path, detail) for path, _, detail in examples])
            )
    return sorted(table, key=lambda reason: -reason.files)


def _named(rows: pa.Table, limit: int) -> list[tuple[str, str, str]]:
    """(path, reason, detail) of the first rows."""
    return [(row["source_path"], row["reason"], row["detail"]) for row in rows.slice(0, limit).to_pylist()]


def _steps(time: statistics.Throughput) -> list[tuple[str, str, float, float]]:
    """(name, key, seconds, share) of each step that took any time."""
    return [
        (name, step, time.seconds[step], time.seconds[step] / time.total_s)
        for step, name in _STEPS.items()
        if time.seconds.get(step, 0.0) > 0
    ]


def _count(number: float) -> str:
    return f"{number:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return (
        f"{num_bytes:.3g}\N{NO-BREAK SPACE}{unit}" if num_bytes < 1000 else f"{num_bytes:.0f}\N{NO-BREAK SPACE}{unit}"
    )


def _short(text: str) -> str:
    """A text from outside, at most `_LONGEST_TEXT` characters of it."""
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"
