"""Mine a folder: videos and photographs in, shards of pairs, a manifest and a summary out."""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

from mimicbrush.errors import DataError, InputError
from mimicbrush.mining import plan as planning
from mimicbrush.mining.options import MiningOptions, check_number
from mimicbrush.mining.plan import Item, Plan
from mimicbrush.mining.reader import FrameReader, PyAVReader
from mimicbrush.mining.shards import ShardPaths, fingerprint, read_marker, write_shard
from mimicbrush.mining.summary import Summary, summarise
from mimicbrush.mining.work import Outcome, mine_item, refused_source, start_worker
from mimicbrush.ops.files import ASIDE_PATTERN, write_aside

SUMMARY_NAME = "summary.json"
_SPOOL_PREFIX, _SPOOL_SUFFIX = "spool-", ".tmp"
#: Inputs in hand per worker, finished ones included that wait for a slower one before them.
_INPUTS_AHEAD = 4


def mine(
    input_dir: Path,
    output_dir: Path,
    options: MiningOptions | None = None,
    *,
    workers: int = 2,
    timeout_s: float = 1800.0,
    progress: bool = True,
    reader: FrameReader | None = None,
) -> Summary:
    """Mine all videos, photographs with segments, and tars of these, below a folder.

    A shard that is done is not touched, so a run that was stopped is simply started again. One run at a time
    per output folder.

    Args:
        input_dir: searched with all its subfolders.
        output_dir: made if needed; gets `manifest/`, `shards/`, `markers/`, `plan.json`, `summary.json`.
        options: what makes a pair; None for the defaults.
        workers: processes that decode.
        timeout_s: for one file (one tar); when it is over, the file is quarantined.
        progress: whether to draw a progress bar on stderr.
        reader: for videos; None for `PyAVReader` with the limits of the options. It is pickled.

    Raises:
        InputError: a folder without inputs, or an output that does not belong to them.
        DataError: an output folder whose files cannot be read, or an input at which a worker fails in a way
            that is not foreseen; it is named, and the shards before it stay.
    """
    options = options or MiningOptions()
    reader = reader or PyAVReader(max_pixels=options.max_pixels, max_duration_s=options.max_duration_s)
    check_number("workers", workers, whole=True)
    check_number("timeout_s", timeout_s)
    if not isinstance(progress, bool):
        raise InputError(f"progress={progress}: must be true or false")
    if workers < 1 or timeout_s <= 0:
        raise InputError(f"workers={workers} must be at least 1, and timeout_s={timeout_s:g} above 0")
    root, output = _check_folders(input_dir, output_dir)
    items, ignored = planning.discover(root, output)
    if not items:
        raise InputError(_nothing_found(root, ignored))
    plan = planning.make_plan(output, items, options)
    output.mkdir(parents=True, exist_ok=True)
    _write_if_new(output / planning.PLAN_NAME, plan.to_json())
    ignored += _mine_shards(root, output, plan, options, reader, workers, timeout_s, progress)
    summary = summarise(output, ignored, asdict(options))
    _write_if_new(output / SUMMARY_NAME, summary.to_json())
    return summary


def _check_folders(input_dir: Path, output_dir: Path) -> tuple[Path, Path]:
    if not input_dir.is_dir():
        what = "is a file" if input_dir.exists() else "does not exist"
        raise InputError(f"the input {input_dir} {what}; name a folder with videos, or photographs with segments")
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"the output {output_dir} is a file; name a folder, or a path where one can be made")
    root, output = input_dir.resolve(), output_dir.resolve()
    if root == output:
        raise InputError(f"input and output are the same folder {root}; name another output")
    return root, output


def _nothing_found(root: Path, ignored: Counter[str]) -> str:
    others = ", ".join(f"{count} x {suffix}" for suffix, count in ignored.most_common(8)) or "no file at all"
    return (
        f"{root} holds nothing to mine ({others}); expected videos ({' '.join(planning.VIDEO_SUFFIXES)}), "
        "photographs with segments (NAME.jpg beside NAME.json, as in SA-1B), or .tar files of these"
    )


def _mine_shards(
    root: Path,
    output: Path,
    plan: Plan,
    options: MiningOptions,
    reader: FrameReader,
    workers: int,
    timeout_s: float,
    progress: bool,
) -> Counter[str]:
    """Mine what is not done; how many files the archives hold beside photographs with segments."""
    _remove_stale(output)
    prints = [fingerprint(plan, items) for items in plan.shards]
    paths = [ShardPaths.of(output, number) for number in range(len(plan.shards))]
    markers = [read_marker(path, print_) for path, print_ in zip(paths, prints, strict=True)]
    todo = [item for items, marker in zip(plan.shards, markers, strict=True) if marker is None for item in items]
    first_path_of: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    outcomes = _outcomes(root, output, todo, options, reader, workers, timeout_s)
    bar = tqdm(total=len(todo), unit="file", desc="mining", disable=not (progress and todo))

    def shard_outcomes(count: int) -> Generator[tuple[Outcome, Path | None]]:
        for outcome in itertools.islice(outcomes, count):
            yield outcome
            bar.update()

    try:
        for items, path, print_, marker in zip(plan.shards, paths, prints, markers, strict=True):
            if marker is None:
                marker = write_shard(path, shard_outcomes(len(items)), first_path_of, print_)
            else:
                _remember(path.part, first_path_of)
            ignored += Counter(marker["ignored"])
    finally:
        bar.close()
        outcomes.close()
    return ignored


def _remove_stale(output: Path) -> None:
    """Remove what a run that was killed left behind."""
    for spool_folder in output.glob(f"{_SPOOL_PREFIX}*{_SPOOL_SUFFIX}"):
        shutil.rmtree(spool_folder, ignore_errors=True)
    first = ShardPaths.of(output, 0)
    for folder in (output, first.tar.parent, first.part.parent, first.marker.parent):
        for aside in folder.glob(ASIDE_PATTERN):
            aside.unlink(missing_ok=True)


def _remember(part: Path, first_path_of: dict[str, str]) -> None:
    """Note the contents of a finished shard, so that later duplicates of them are known."""
    table = pq.read_table(part, columns=["source_hash", "source_path"])
    for source_hash, source_path in zip(*(column.to_pylist() for column in table.columns), strict=True):
        if source_hash:
            first_path_of.setdefault(source_hash, source_path)


def _outcomes(
    root: Path,
    output: Path,
    items: Sequence[Item],
    options: MiningOptions,
    reader: FrameReader,
    workers: int,
    timeout_s: float,
) -> Generator[tuple[Outcome, Path | None]]:
    """What each input gives, in order, mined some inputs ahead; a spool file lives until the next step."""
    if not items:
        return
    # A name of its own: workers of a killed run may live a little longer, and must not write into ours.
    spool_folder = Path(tempfile.mkdtemp(_SPOOL_SUFFIX, _SPOOL_PREFIX, output))
    pool = ProcessPool(max_workers=workers, context=multiprocessing.get_context("spawn"), initializer=start_worker)
    waiting: deque[tuple[Item, Path, Future[Outcome] | None]] = deque()
    ahead = iter(enumerate(items))
    try:
        while True:
            for number, item in ahead:
                spool_path = spool_folder / f"{number}.bin"
                future = None
                if item.kind != "refused":
                    arguments = (root, item, reader, options, spool_path)
                    future = pool.schedule(mine_item, args=arguments, timeout=timeout_s)
                waiting.append((item, spool_path, future))
                if len(waiting) >= _INPUTS_AHEAD * workers:
                    break
            if not waiting:
                return
            item, spool_path, future = waiting.popleft()
            outcome = _result(item, future, timeout_s)
            yield outcome, spool_path
            spool_path.unlink(missing_ok=True)
    finally:
        pool.stop()
        pool.join()
        shutil.rmtree(spool_folder, ignore_errors=True)


def _result(item: Item, future: Future[Outcome] | None, timeout_s: float) -> Outcome:
    """Wait for one input. A worker that died or hung costs this input only; a fault of ours ends the run."""
    if future is None:
        return Outcome([refused_source(item.path, item.reason, item.detail)])
    failure = future.exception()
    if failure is None:
        return future.result()
    if isinstance(failure, FutureTimeoutError):
        reason, detail = "timeout", f"more than timeout_s={timeout_s:g}"
    elif isinstance(failure, ProcessExpired):
        reason, detail = "worker_died", f"exit code {failure.exitcode}"
    else:
        raise DataError(
            f"{item.path}: mining this file failed in a way that is not foreseen ({type(failure).__name__}: "
            f"{str(failure).strip()}). Mend the cause if it lies on this machine (a full disk, say); else move the "
            "file out of the input and report the fault. Then give the same command again: finished shards stay"
        ) from failure
    return Outcome([refused_source(item.path, reason, detail, kind=item.row_kind)])


def _write_if_new(path: Path, text: str) -> None:
    """Write a file unless it says the same already: a run that finds nothing to do changes nothing."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    write_aside(path, lambda aside: aside.write_bytes(text.encode()))
