"""Export a mined folder from end to end. A run that was stopped can be continued."""

from __future__ import annotations

import hashlib
import signal
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
from tqdm import tqdm

from mimicbrush.data.manifest import check_outside_mined_folder
from mimicbrush.errors import DataError
from mimicbrush.io.locks import hold_folder
from mimicbrush.io.outputs import check_output_folder
from mimicbrush.mining.exports.formats.registry import FORMATS
from mimicbrush.mining.exports.lists import write_export_lists
from mimicbrush.mining.exports.options import ExportOptions
from mimicbrush.mining.exports.parts import ExportFolder, join_files
from mimicbrush.mining.exports.plan import ExportPlan, ExportSplit, choose_part_size, plan_export
from mimicbrush.mining.exports.samples import UNREADABLE_PAIR, ExportedPair, PairExporter

_exporter: PairExporter | None = None


def export_pairs(
    root: Path,
    output: Path,
    options: ExportOptions,
    *,
    max_bytes: int | None = None,
    workers: int = 1,
    progress: bool = True,
    samples_per_part: int | None = None,
) -> dict[str, Any]:
    """Export the pairs of a mined folder. The same options give the same bytes, however often the run was stopped.

    Args:
        root: the mined folder.
        output: a new folder, or the output of a run with the same options.
        options: the options, which decide the content.
        max_bytes: largest size of all parts together; a later run can add the parts that were left out.
        workers: number of processes that make and encode images.
        progress: whether to show a progress bar on stderr.
        samples_per_part: approximate number of samples in one part; None: depends on the size of the images.

    Returns:
        The counts, see `count_export`.

    Raises:
        InputError: the output cannot be used.
        DataError: the folder is not mined, or a worker process was killed.
    """
    check_output_folder(output, "--output")
    check_outside_mined_folder(output, f"--output {output}")
    samples_per_part = samples_per_part or choose_part_size(options)
    plan = plan_export(root, options, samples_per_part)
    settings = options.as_settings() | {"samples_per_part": samples_per_part, "pairs": _describe_pairs(plan)}
    with hold_folder(output):
        folder = ExportFolder(output, settings)
        folder.begin()
        exporter = PairExporter(plan.tables, plan.licences, options)
        done = _write_parts(folder, plan, exporter, max_bytes, workers, progress)
        return write_export_lists(folder, plan, done)


def _describe_pairs(plan: ExportPlan) -> str:
    """Return the number of pairs, and a hash of their ids, images and licences."""
    digest = hashlib.sha256(repr(sorted(plan.licences.items())).encode("utf-8", "surrogatepass"))
    for table in plan.tables.values():
        digest.update(table.digest().encode())
        for name in ("source_hash", "a_sha256", "b_sha256"):
            digest.update("\n".join(table.column(name)).encode())
    return f"{plan.num_pairs} ({digest.hexdigest()[:16]})"


def _write_parts(
    folder: ExportFolder, plan: ExportPlan, exporter: PairExporter, max_bytes: int | None, workers: int, progress: bool
) -> list[str]:
    """Write missing parts until the next one would exceed `max_bytes`; return the names of all finished parts."""
    in_tars = FORMATS[exporter.options.format].in_tars
    found = {part.name: folder.find_done(part) for part in plan.parts}
    # Pairs that an earlier run could not read may be readable now.
    kept = {name: marker for name, marker in found.items() if marker and not _lacks_pairs(marker)}
    jobs = ((part.split, place) for part in plan.parts if part.name not in kept for place in part.places)
    results = _export_all(exporter, jobs, workers)
    done, total = set(), 0
    num_pairs = sum(len(part.places) for part in plan.parts)
    with tqdm(total=num_pairs, unit="pair", desc="exporting", disable=not progress) as bar:
        try:
            for part in plan.parts:
                marker = kept.get(part.name)
                if marker is None:
                    exported = list(islice(results, len(part.places)))
                    size = sum(map(len, join_files(part, exported, in_tars).values()))
                else:
                    size = sum(size for size, _ in marker["files"].values())
                if max_bytes is not None and total + size > max_bytes:
                    break
                if marker is None:
                    folder.write_part(part, exported)
                total += size
                done.add(part.name)
                bar.update(len(part.places))
        finally:
            results.close()
    # An earlier run with a larger limit may have written more parts.
    return [part.name for part in plan.parts if part.name in done or found[part.name]]


def _lacks_pairs(marker: dict[str, Any]) -> bool:
    return any(row.get("reason") == UNREADABLE_PAIR for row in marker["rows"])


def _export_all(
    exporter: PairExporter, jobs: Iterable[tuple[ExportSplit, int]], workers: int
) -> Generator[ExportedPair, None, None]:
    """Export pairs in order; processes work a little ahead of the writer."""
    if workers == 1:
        for job in jobs:
            yield exporter.export_pair(*job)
        return
    waiting: deque[Future[ExportedPair]] = deque()
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(exporter,)) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(_export_one, *job))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that made samples was killed (is there enough memory?). Run the same command again with "
                "--workers 1"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def _start_worker(exporter: PairExporter) -> None:
    global _exporter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all processes; the parent stops the workers
    cv2.setNumThreads(1)
    _exporter = exporter


def _export_one(split: ExportSplit, place: int) -> ExportedPair:
    assert _exporter is not None
    return _exporter.export_pair(split, place)
