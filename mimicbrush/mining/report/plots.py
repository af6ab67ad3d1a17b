"""Histograms and bars as inline SVG, without scripts, in the colours of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

_WIDTH, _HEIGHT = 420, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 8, 8, 34, 24


@dataclass(frozen=True)
class Histogram:
    """Counts of numbers in equal bins.

    Attributes:
        counts: counts per bin; values outside the edges are in the first or last bin.
        low, high: edges of the first and the last bin.
    """

    counts: tuple[int, ...]
    low: float
    high: float

    @classmethod
    def count(cls, values: np.ndarray, low: float, high: float, bins: int = 40) -> Histogram:
        """Count numbers, (N,) and finite, into bins."""
        counts, _ = np.histogram(values.clip(low, high), bins=bins, range=(low, high))
        return cls(tuple(int(count) for count in counts), low, high)


@dataclass(frozen=True)
class HistogramMark:
    """A vertical line at a value, with a short text."""

    value: float
    text: str


def plot_histogram(
    histogram: Histogram,
    alt: str,
    unit: str = "",
    marks: Sequence[HistogramMark] = (),
    band: tuple[float, float] | None = None,
) -> Markup:
    """Plot a histogram as SVG.

    Args:
        histogram: the counts.
        alt: description of the plot in words.
        unit: text after the numbers of the axis.
        marks: at most three; labels that would overlap are in different rows.
        band: range of values that is shaded.
    """
    span = (histogram.high - histogram.low) or 1.0
    plot_width, floor = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _BOTTOM

    def x(value: float) -> float:
        return _LEFT + plot_width * min(1.0, max(0.0, (value - histogram.low) / span))

    parts = [Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, _HEIGHT, alt)]
    if band is not None:
        parts.append(
            Markup('<rect class="band" x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>').format(
                x(band[0]), _TOP, x(band[1]) - x(band[0]), floor - _TOP
            )
        )
    step = plot_width / len(histogram.counts)
    most = max(1, *histogram.counts)
    for number, count in enumerate(histogram.counts):
        if count:
            height = max(1.5, (floor - _TOP) * count / most)
            low = histogram.low + span * number / len(histogram.counts)
            parts.append(
                Markup(
                    '<rect class="bar" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}" rx="1">'
                    "<title>{:.3g} to {:.3g}{}: {}</title></rect>"
                ).format(
                    _LEFT + number * step + 0.5,
                    floor - height,
                    max(0.6, step - 1),
                    height,
                    low,
                    low + span / len(histogram.counts),
                    unit,
                    count,
                )
            )
    parts += _plot_axis(histogram, unit, floor, x(histogram.low), plot_width)
    parts += [mark for each in _plot_marks(marks, [x(mark.value) for mark in marks], floor) for mark in each]
    return Markup("").join([*parts, Markup("</svg>")])


def _plot_axis(histogram: Histogram, unit: str, floor: float, left: float, width: float) -> list[Markup]:
    parts = [Markup('<line class="axis" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(left, left + width, floor)]
    for fifth in range(6):
        anchor = ("start", *["middle"] * 4, "end")[fifth]
        value = histogram.low + (histogram.high - histogram.low) * fifth / 5
        parts.append(
            Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{}{}</text>').format(
                left + width * fifth / 5, floor + 16, anchor, f"{value:.3g}" if value < 1000 else f"{value:.0f}", unit
            )
        )
    return parts


def _plot_marks(marks: Sequence[HistogramMark], places: Sequence[float], floor: float) -> list[tuple[Markup, Markup]]:
    """Plot lines and their labels; each label is in one of three rows."""
    labels, ends = [], [-9.0, -9.0, -9.0]
    for mark, place in sorted(zip(marks, places, strict=True), key=lambda entry: entry[1]):
        width = 6.2 * len(mark.text)
        left = min(max(place - width / 2, 2.0), _WIDTH - width - 2)
        row = next((row for row in range(3) if left > ends[row] + 4), 2)
        ends[row] = left + width
        y = _TOP - 3 - 11 * row
        line = Markup('<line class="mark" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(place, y + 2, floor)
        label = Markup('<text class="strong" x="{:.1f}" y="{}" textLength="{:.0f}">{}</text>')
        text = label.format(left, y, width, mark.text)
        labels.append((line, text))
    return labels


def plot_shares(parts: Sequence[tuple[str, float]], alt: str) -> Markup:
    """Plot one bar that is split into parts of (CSS class, amount) each, as SVG."""
    total = sum(amount for _, amount in parts) or 1.0
    svg = [Markup('<svg class="share" viewBox="0 0 1000 24" preserveAspectRatio="none" role="img" aria-label="{}">')]
    svg[0] = svg[0].format(alt)
    left = 0.0
    for name, amount in parts:
        width = 1000 * amount / total
        if width > 0:
            rectangle = Markup('<rect class="{}" x="{:.2f}" width="{:.2f}" y="0" height="24"/>')
            svg.append(rectangle.format(name, left, max(0.5, width - 2)))
        left += width
    return Markup("").join([*svg, Markup("</svg>")])
