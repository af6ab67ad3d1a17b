"""Files of an export that are written after its parts: the lists of the trainer, licences, records and counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimicbrush.io.atomic import path_inside, write_aside
from mimicbrush.io.hashing import hash_file
from mimicbrush.mining.exports.formats.layout import Record, SplitList, write_json_lines
from mimicbrush.mining.exports.formats.registry import FORMATS
from mimicbrush.mining.exports.parts import RECORDS, ExportFolder, read_sealed, write_sealed
from mimicbrush.mining.exports.plan import SPLITS, ExportPlan, ExportSplit

LICENCES_FILE = "LICENCES.txt"
SUMMARY_FILE, REFUSED_FILE = f"{RECORDS}/summary.json", f"{RECORDS}/refused.jsonl"
OUTSIDE_BAND = "outside_ssim_band"


@dataclass(frozen=True)
class _Walk:
    """An iterable that makes a new iterator each time, so that it can be read several times."""

    make: Callable[[], Iterator[Any]]

    def __iter__(self) -> Iterator[Any]:
        return self.make()


def write_export_lists(folder: ExportFolder, plan: ExportPlan, names: Sequence[str]) -> dict[str, Any]:
    """Write all lists of an export and its summary, and return the summary.

    Args:
        folder: the export.
        plan: its plan.
        names: names of the finished parts.
    """
    rows = _Walk(lambda: _walk_rows(folder, names))
    texts: dict[str, Iterable[str]] = {}
    for split in SPLITS:
        texts |= _list_split(folder, split, rows)
    texts[f"{RECORDS}/samples.jsonl"] = write_json_lines(_list_samples(rows))
    texts[REFUSED_FILE] = write_json_lines({"split": s} | row for s, row in rows if "reason" in row)
    origins = _count_origins(rows)
    texts[f"{RECORDS}/origins.jsonl"] = write_json_lines(origins)
    texts[LICENCES_FILE] = _describe_licences(origins)
    for name, pieces in texts.items():
        _write_text(folder.path / name, pieces)
    _remove_outdated_lists(folder, texts)
    summary = count_export(plan.num_pairs, plan.num_outside_band, rows)
    summary["bytes"] = sum(size for name in names for size, _ in _read(folder, name)["files"].values())
    summary["parts"] = sorted(names)
    summary["lists"] = {name: hash_file(folder.path / name) for name in texts}
    write_sealed(folder.path / SUMMARY_FILE, summary)
    return summary


def _remove_outdated_lists(folder: ExportFolder, names: Collection[str]) -> None:
    """Remove lists of an earlier run that are not written any more, because their split has lost its last sample."""
    try:
        earlier = read_sealed(folder.path / SUMMARY_FILE)["lists"]
    except (OSError, ValueError):  # no earlier run has finished, or its summary is damaged
        return
    for name in earlier:
        if name not in names:
            path_inside(folder.path, name).unlink(missing_ok=True)


def count_export(num_pairs: int, num_outside_band: int, rows: Iterable[tuple[str, Record]]) -> dict[str, Any]:
    """Count the pairs of an export: each is written, refused for a reason, or not written yet.

    Args:
        num_pairs: number of pairs in the mined folder.
        num_outside_band: see `ExportPlan`.
        rows: (split, row) of all markers.
    """
    written, samples, refused = Counter[str](), Counter[str](), Counter[str]()
    for split, row in rows:
        if "reason" in row:
            refused[row["reason"]] += 1
        else:
            written[split] += 1
            samples[split] += len(row["samples"])
    if num_outside_band:
        refused[OUTSIDE_BAND] = num_outside_band
    left = num_pairs - sum(written.values()) - sum(refused.values())
    return {
        "pairs": num_pairs,
        "written": {split: written[split] for split in SPLITS},
        "refused": dict(sorted(refused.items())),
        "not_written_yet": left,
        "samples": {split: samples[split] for split in SPLITS},
    }


def _read(folder: ExportFolder, name: str) -> dict[str, Any]:
    marker = folder.read_marker(name)
    assert marker is not None, f"the marker of {name} has disappeared"
    return marker


def _walk_rows(folder: ExportFolder, names: Sequence[str]) -> Iterator[tuple[str, Record]]:
    for name in sorted(names):
        for row in _read(folder, name)["rows"]:
            yield name.rpartition("-")[0], row


def _list_samples(rows: Iterable[tuple[str, Record]]) -> Iterator[Record]:
    for split, row in rows:
        facts = {key: value for key, value in row.items() if key not in ("samples", "place")}
        for sample in row.get("samples", ()):
            yield {"split": split, "name": sample["name"], "view": sample["view"], "caption": sample["caption"]} | facts


def _list_split(
    folder: ExportFolder, split: ExportSplit, rows: Iterable[tuple[str, Record]]
) -> dict[str, Iterable[str]]:
    """Return the trainer's lists of a split: path -> pieces of the text; none if the split has no sample."""
    records = _Walk(lambda: (each["record"] for s, row in rows if s == split for each in row.get("samples", ())))
    write = FORMATS[folder.settings["format"]].write_lists
    if write is None or next(iter(records), None) is None:
        return {}
    height, width = folder.settings["canvas_px"]
    listed = SplitList(folder.path.absolute() / split, records, (height, width))
    return {f"{split}/{name}": pieces for name, pieces in write(listed)}


def _count_origins(rows: Iterable[tuple[str, Record]]) -> list[Record]:
    """List the mined files that samples come from, sorted by path."""
    origins: dict[tuple[str, str], Record] = {}
    for split, row in rows:
        if "samples" in row:
            key = (row["source_path"], row["source_hash"])
            known = {name: row[name] for name in ("source_path", "source_hash", "licence", "url")}
            origin = origins.setdefault(key, {**known, "split": split, "samples": 0})
            origin["samples"] += len(row["samples"])
    return [origins[key] for key in sorted(origins)]


def _describe_licences(origins: Sequence[Record]) -> Iterator[str]:
    """Yield the text of `LICENCES_FILE`: the licences, with their numbers of files and samples."""
    files, samples = Counter[str](), Counter[str]()
    for origin in origins:
        licence = origin["licence"] or "unknown: the list of inputs has none"
        files[licence] += 1
        samples[licence] += origin["samples"]
    yield "Licences of the mined files that these samples come from\n\n"
    for licence in sorted(files):
        yield f"{json.dumps(licence, ensure_ascii=False)[1:-1]}: files {files[licence]}, samples {samples[licence]}\n"
    yield f"\n{RECORDS}/origins.jsonl names each file with its licence, address and SHA-256.\n"
    yield f"{RECORDS}/samples.jsonl names the file that each sample comes from.\n"


def _write_text(path: Path, pieces: Iterable[str]) -> None:
    def write(aside: Path) -> None:
        with aside.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.writelines(pieces)

    write_aside(path, write)
