"""Read an export again, and list everything that differs from its markers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mimicbrush.errors import DataError
from mimicbrush.io.hashing import hash_file
from mimicbrush.mining.exports.lists import OUTSIDE_BAND, SUMMARY_FILE, count_export
from mimicbrush.mining.exports.parts import read_export_folder, read_sealed
from mimicbrush.mining.exports.plan import SPLITS

#: Suffixes of files that a trainer would use as samples if they were in the folder.
_SAMPLE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".txt", ".tar")
_AGAIN = "run the export command again"


def verify_export(path: Path, *, workers: int = 1, progress: bool = True) -> tuple[list[str], dict[str, Any]]:
    """Read every byte of an export again. Nothing is changed.

    Args:
        path: folder of the export.
        workers: number of threads that read.
        progress: whether to show a progress bar on stderr.

    Returns:
        The faults, one sentence each, and the summary of the export.

    Raises:
        DataError: the folder is not an export, or the export is not finished.
    """
    folder = read_export_folder(path)
    if folder is None:
        raise DataError(f"{path} is not an export (it has no records/export.json)")
    try:
        summary = read_sealed(path / SUMMARY_FILE)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not finished, or {SUMMARY_FILE} is damaged ({error}); {_AGAIN}") from error
    names, lists = summary["parts"], summary["lists"]
    if folder.has_begun or set(folder.list_marked()) - set(names):
        raise DataError(f"{path} is not finished: a run that continued it was stopped; {_AGAIN}")
    markers = {name: folder.read_marker(name) for name in names}
    faults = [f"the marker of part {name} is missing or damaged; {_AGAIN}" for name in names if not markers[name]]
    read = {name: marker for name, marker in markers.items() if marker is not None}
    expected = {file: digest for marker in read.values() for file, (_, digest) in marker["files"].items()} | lists
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(expected), unit="file", desc="verifying", disable=not progress) as bar,
    ):
        for fault in pool.map(lambda item: _check_file(path, *item), expected.items()):
            bar.update()
            if fault:
                faults.append(fault)
    faults += _find_strangers(path, expected)
    rows = [(name.rpartition("-")[0], row) for name, marker in read.items() for row in marker["rows"]]
    counted = count_export(summary["pairs"], summary["refused"].get(OUTSIDE_BAND, 0), rows)
    faults += [
        f"{SUMMARY_FILE} has {name}: {summary.get(name)}, but the markers have {value}; {_AGAIN}"
        for name, value in counted.items()
        if summary.get(name) != value
    ]
    if counted["not_written_yet"] < 0:
        faults.append(f"the numbers of written and refused pairs are larger than the number of pairs; {_AGAIN}")
    return faults, summary


def _check_file(root: Path, name: str, digest: str) -> str:
    """Describe the fault of a file; "" if it has none."""
    try:
        # The export command keeps files of the right length, so this one must be deleted first.
        return (
            ""
            if hash_file(root / name) == digest
            else f"{name} has changed since it was written; delete it, and {_AGAIN}"
        )
    except OSError as error:
        return f"{name} cannot be read ({error.strerror}); {_AGAIN}"


def _find_strangers(root: Path, expected: dict[str, str]) -> Iterator[str]:
    """Find files among the samples that do not belong to the export."""
    folders = {Path(name).parent for name in expected if Path(name).parts[0] in SPLITS}
    for folder in sorted(folders):
        for path in sorted((root / folder).iterdir()):
            name = (folder / path.name).as_posix()
            if path.suffix.lower() in _SAMPLE_SUFFIXES and name not in expected:
                yield f"{name} is not a file of this export; move it away, because a trainer may use it as a sample"
