"""Reports of an evaluation: files for programs, and a table and sentences for people."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mimicbrush.evaluation.heldout.reference_gain import GAINS, ROWS, describe_gain
from mimicbrush.evaluation.statistics import MIN_SOURCES
from mimicbrush.io.atomic import write_aside

_PACKAGES = ("mimicbrush", "torch", "diffusers", "transformers", "numpy", "opencv-python", "scikit-image")
_ROW_NAMES = {
    "model": "the model, true reference",
    "wrong_reference": "the model, wrong reference",
    "no_reference": "the model, no reference",
    "copy_in_place": "copy in place (no model)",
    "opencv_inpaint": "OpenCV inpainting (no model)",
    "sift_homography": "SIFT and homography (no model)",
}


def find_package_versions(more: Sequence[str] = ()) -> dict[str, str | None]:
    """Find the versions of packages that a result may depend on: package -> version, None if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*_PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def write_jsonl(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, to another name that is then renamed."""
    text = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values)
    write_aside(path, lambda aside: aside.write_bytes(text.encode()))


def format_summary(metrics: dict[str, Any], sets: Sequence[str]) -> str:
    """Format metrics.json for a terminal: a table and three sentences per set, and the note about few sources."""
    parts = [f"\n{_format_table(name, metrics[name])}\n{describe_gains(metrics[name])}\n" for name in sets]
    if metrics["note"]:
        parts.append(f"NOTE: {metrics['note']}\n")
    return "\n".join(parts)


def _format_table(name: str, values: dict[str, Any]) -> str:
    meaning = {"natural": "references as mined", "warped": "references warped by a homography"}[name]
    lines = [
        f"{name} set: {meaning}; {values['n']} pairs of {values['n_sources']} source videos",
        f"  {'in the hole':30}{'PSNR dB':>9}{'SSIM':>8}{'n':>6}",
    ]
    for row in ROWS:
        row_values = values["rows"][row]
        ssim = "-" if row_values["ssim"] is None else f"{row_values['ssim']:.3f}"
        lines.append(f"  {_ROW_NAMES[row]:30}{row_values['psnr']:9.2f}{ssim:>8}{row_values['n']:6d}")
    return "\n".join(lines)


def describe_gains(summary: dict[str, Any]) -> str:
    """Describe the three gains of one set in sentences, with a warning if there are few source videos."""
    n_sources = summary["n_sources"]
    is_few = n_sources < MIN_SOURCES
    caution = f", which is too narrow with only {n_sources} source videos" if is_few else ""
    lines = []
    for key, gain in GAINS.items():
        low, high = summary[f"{key}_ci95"]
        sentence = "too few videos for a conclusion." if is_few else describe_gain(key, low, high)
        lines.append(
            f"{gain.name.capitalize()} ({gain.between}) {summary[key]:+.2f} dB (95 % interval {low:+.2f} to {high:+.2f}"
            f"{caution}): {sentence}"
        )
    return "\n".join(lines)
