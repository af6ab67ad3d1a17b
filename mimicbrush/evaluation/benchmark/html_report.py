"""The HTML report of a benchmark: tables, images side by side (worst first), maps, faults and the metric card."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mimicbrush.evaluation.benchmark import table
from mimicbrush.evaluation.benchmark.layout import TRACKS, Benchmark, Case
from mimicbrush.evaluation.benchmark.metrics import METRICS, select_numbers
from mimicbrush.evaluation.benchmark.run_editor import (
    CaseScores,
    EditorRun,
    paste_variants,
    read_case_images,
    read_correspondence,
)
from mimicbrush.io.atomic import write_aside
from mimicbrush.io.images import read_image
from mimicbrush.ops.canvas import MASK_THRESHOLD
from mimicbrush.ops.correspondence import tint_correspondence
from mimicbrush.ops.plot import mark_mask

TEMPLATE = "report.html.jinja"
#: Height of the images on the page, and the most that all of them may take.
_HEIGHT_PX, _QUALITY = 180, 80
_MOST_BYTES = 24_000_000


def write_benchmark_report(
    path: Path,
    benchmark: Benchmark,
    runs: Sequence[EditorRun],
    summary: dict[str, Any],
    differences: Sequence[dict[str, Any]],
    card: dict[str, Any],
    shown_cases: int,
) -> None:
    """Write report.html, a single file that contains its images."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    images = _Images()
    tracks = []
    for name, track in TRACKS.items():
        cases = _sort_worst_first(runs, name)
        if cases:
            shown = [_show_case(case, runs, images) for case in cases[:shown_cases]]
            tracks.append({"title": track.title, "count": len(cases), "cases": shown})
    environment = Environment(
        loader=PackageLoader("mimicbrush.evaluation.benchmark", "."), autoescape=True, undefined=StrictUndefined
    )
    text = environment.get_template(TEMPLATE).render(
        tables=[
            {
                "heads": ["method", *(heading for heading, _ in METRICS.values())],
                "title": f"{task}, {table.TASK_TITLES[variant]}",
                "rows": [(name, list(cells.values())) for name, cells in table.tabulate_task(summary, task, variant)],
            }
            for task in table.list_tasks(summary)
            for variant in table.TASK_TITLES
        ]
        + [{"heads": table.DIFFERENCE_HEADS, **each} for each in table.tabulate_differences(differences)],
        notes=[table.PAPER_CAUTION, *table.list_cautions(summary)],
        tally=table.count_outcomes(benchmark, runs),
        troubles=table.list_troubles(benchmark, runs),
        tracks=tracks,
        left_out=images.left_out,
        card=json.dumps(card, indent=1, ensure_ascii=False),
        root=str(benchmark.root),
    )
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def _sort_worst_first(runs: Sequence[EditorRun], track: str) -> list[Case]:
    """Sort the cases of a track: failures of the first editor come first, then its lowest scores."""

    def key(scores: CaseScores) -> tuple[float, str]:
        found = select_numbers(scores.scores.get("pasted", {}))
        for metric in ("psnr", "dinov2_i", "dino_i", "clip_i"):
            if metric in found:
                return found[metric], scores.case.number
        return float("-inf"), scores.case.number

    return [each.case for each in sorted(runs[0].cases, key=key) if each.case.track.name == track]


def _show_case(case: Case, runs: Sequence[EditorRun], images: _Images) -> dict[str, Any]:
    source, mask, reference = read_case_images(case)
    binary_mask = (np.asarray(mask) > MASK_THRESHOLD).astype(np.uint8)
    cells = [
        {
            "title": "source",
            "image": images.add(mark_mask(np.asarray(source), binary_mask)),
            "text": case.subject or "",
        },
        {"title": "reference", "image": images.add(np.asarray(reference)), "text": case.prompt or ""},
    ]
    if case.track.has_truth:
        cells.append({"title": "ground truth", "image": images.add(np.asarray(source)), "text": ""})
    maps = []
    for run in runs:
        scores = next(each for each in run.cases if each.case == case)
        if scores.result is None:
            cells.append({"title": run.name, "image": None, "text": f"{scores.outcome}: {scores.reason}"})
            continue
        painted = np.asarray(read_image(scores.result, "RGB"))
        pasted = paste_variants(painted, np.asarray(source), np.asarray(mask))["pasted"]
        cells.append({"title": run.name, "image": images.add(pasted), "text": _format_scores(scores)})
        found = read_correspondence(scores)
        if found is not None:
            places, came = tint_correspondence(source, mask, reference, found, _HEIGHT_PX)
            maps += [
                {
                    "title": f"{run.name}: reference, with a colour for each place",
                    "image": images.add(np.asarray(places)),
                },
                {
                    "title": f"{run.name}: source, in the colours of the reference places that the hole came from",
                    "image": images.add(np.asarray(came)),
                },
            ]
    return {"number": case.number, "cells": cells, "maps": maps}


def _format_scores(scores: CaseScores) -> str:
    return "  ".join(
        f"{METRICS[key][0]} {value:.{METRICS[key][1]}f}"
        for key, value in select_numbers(scores.scores["pasted"]).items()
    )


class _Images:
    """Inlined images, up to a limit."""

    def __init__(self) -> None:
        self.bytes, self.left_out = 0, 0

    def add(self, pixels: np.ndarray) -> str | None:
        """Make a data URI of an image (H, W, 3) uint8; None beyond the limit."""
        image = Image.fromarray(pixels)
        image.thumbnail((2 * _HEIGHT_PX, _HEIGHT_PX), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=_QUALITY)
        if self.bytes + buffer.tell() > _MOST_BYTES:
            self.left_out += 1
            return None
        self.bytes += buffer.tell()
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
