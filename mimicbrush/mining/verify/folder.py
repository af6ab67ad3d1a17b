"""Read a whole mined folder again, and list everything that differs from its manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import pyarrow.compute as pc
from tqdm import tqdm

from mimicbrush.data.manifest import INDEX_NAME, PLAN_NAME, find_index_fault, find_mined_input, read_rows
from mimicbrush.errors import DataError, InputError
from mimicbrush.io.locks import LOCK_NAME
from mimicbrush.mining.plan import Plan, read_plan
from mimicbrush.mining.shards import ShardPaths, shard_fingerprint
from mimicbrush.mining.summary import REPORT_NAME, SUMMARY_NAME, summarise_manifest
from mimicbrush.mining.verify.shard import ShardCheck, ShardCheckResult, ShardFault, verify_shard

_FOLDERS = ("shards", "manifest", "audit", "markers", "timing")
_MARKER = re.compile(r"shard-(\d{6,})\.json")
_MINE_AGAIN = "Run the mining command again"


@dataclass
class FolderCheckResult:
    """Result of verifying a mined folder: what was read, and all faults.

    Attributes:
        shards: number of shards with a marker.
        pairs, images: numbers of pairs and images that were read.
        bytes_read: bytes of the shards' files, and of images outside them.
        faults: faults of the plan, then of the shards in order, then of the whole folder.
    """

    shards: int = 0
    pairs: int = 0
    images: int = 0
    bytes_read: int = 0
    faults: list[ShardFault] = field(default_factory=list)


def verify_folder(
    root: Path, *, input_root: Path | None = None, workers: int = 1, progress: bool = True
) -> FolderCheckResult:
    """Read everything in a mined folder again: hashes, images, segments, counts, index. Nothing is changed.

    Args:
        root: the mined folder.
        input_root: folder of the photographs that were not copied, if it was moved; None: the folder that was mined.
        workers: number of processes that read shards.
        progress: whether to show a progress bar on stderr.

    Raises:
        InputError: this is not a mined folder, or `workers` is below 1.
        DataError: a worker process was killed.
    """
    if not root.is_dir() or not any((root / name).is_dir() for name in ("manifest", "markers")):
        raise InputError(
            f"{root} is not a mined folder (no manifest/ and no markers/); give the output of `mimicbrush mine`"
        )
    if workers < 1:
        raise InputError(f"workers={workers}: expected at least 1")
    total = FolderCheckResult()
    plan = _read_plan(root, total.faults)
    finished = _list_finished(root)
    total.shards = len(finished)
    checks = _list_checks(root, input_root, plan, finished, total.faults)
    shards: list[tuple[int, ShardCheckResult]] = []
    with tqdm(total=len(checks), unit="shard", desc="verifying", disable=not progress) as bar:
        for number, result in _run_checks(checks, workers):
            shards.append((number, result))
            bar.update()
    for _, result in sorted(shards, key=lambda entry: entry[0]):
        total.faults += result.faults
        total.pairs += result.pairs
        total.images += result.images
        total.bytes_read += result.bytes_read
    total.faults += _find_stray_files(root, finished)
    total.faults += _find_unfinished(root, plan, finished)
    total.faults += _check_folder(root, plan, bool(total.faults))
    return total


def _read_plan(root: Path, faults: list[ShardFault]) -> Plan | None:
    try:
        plan = read_plan(root / PLAN_NAME)
    except DataError as error:
        faults.append(ShardFault(PLAN_NAME, "", str(error), "the plan of the mined folder", "Mine into a new output"))
        return None
    if plan is None:
        faults.append(
            ShardFault(PLAN_NAME, "", "it does not exist", "the plan of the mined folder", "Mine into a new output")
        )
    return plan


def _list_finished(root: Path) -> list[int]:
    matches = (_MARKER.fullmatch(path.name) for path in (root / "markers").glob("shard-*.json"))
    return sorted(int(match[1]) for match in matches if match)


def _list_checks(
    root: Path, input_root: Path | None, plan: Plan | None, finished: list[int], faults: list[ShardFault]
) -> list[ShardCheck]:
    if plan is not None:
        input_root = input_root or find_mined_input(root)
        kinds = {item.kind for shard in plan.shards for item in shard}
        in_place = bool(kinds & {"image", "archive"}) and not plan.options.get("copy_images")
        if in_place and (input_root is None or not input_root.is_dir()):
            actual = f"the folder that was mined does not exist ({input_root})"
            remedy = "Give it with --input-root FOLDER. Photographs that were not copied have not been checked"
            faults.append(
                ShardFault(PLAN_NAME, "", actual, "the folder of the photographs that were not copied", remedy)
            )
            input_root = None
    checks = []
    for number in finished:
        items = tuple(plan.shards[number]) if plan is not None and number < len(plan.shards) else None
        expected = shard_fingerprint(plan, items) if plan is not None and items is not None else None
        checks.append(ShardCheck(root, input_root, number, items, expected))
    return checks


def _run_checks(checks: list[ShardCheck], workers: int) -> Iterator[tuple[int, ShardCheckResult]]:
    if workers == 1 or len(checks) < 2:
        for check in checks:
            yield check.number, verify_shard(check)
        return
    with ProcessPoolExecutor(min(workers, len(checks)), mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(verify_shard, check): check.number for check in checks}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that was reading a shard was killed (is there enough memory?). Try --workers 1"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _find_stray_files(root: Path, finished: list[int]) -> Iterator[ShardFault]:
    """Find files that do not belong to a finished shard."""
    expected = {path for number in finished for path in vars(ShardPaths.for_shard(root, number)).values()}
    expected |= {root / name for name in (PLAN_NAME, INDEX_NAME, SUMMARY_NAME, REPORT_NAME)}
    expected |= {root / name for name in _FOLDERS}
    for path in _list_entries(root):
        if path in expected:
            continue
        name = path.relative_to(root).as_posix()
        if path.parent == root / "manifest" and path.suffix == ".parquet":
            marker = f"markers/{path.stem.replace('part-', 'shard-')}.json"
            yield ShardFault(name, "", f"a part without a marker ({marker})", "a finished shard", _MINE_AGAIN)
        elif path.name.endswith(".tmp") or path.name.startswith(LOCK_NAME):
            yield ShardFault(name, "", "left by a run that was stopped", "no such file", f"{_MINE_AGAIN}, or delete it")
        else:
            yield ShardFault(name, "", "it belongs to no finished shard", "no such file", "Move it elsewhere")


def _list_entries(root: Path) -> Iterable[Path]:
    folders = [root, *(root / name for name in _FOLDERS if (root / name).is_dir())]
    return sorted(path for folder in folders for path in folder.iterdir())


def _find_unfinished(root: Path, plan: Plan | None, finished: list[int]) -> Iterator[ShardFault]:
    if plan is None:
        return
    numbers = set(finished)
    for number, items in enumerate(plan.shards):
        if number not in numbers:
            name = ShardPaths.for_shard(root, number).marker.relative_to(root).as_posix()
            inputs = ", ".join(item.path for item in items[:4]) + (", ..." if len(items) > 4 else "")
            yield ShardFault(
                name, "", f"no marker: {len(items)} inputs have no rows ({inputs})", "a marker", _MINE_AGAIN
            )
    for number in sorted(numbers - set(range(len(plan.shards)))):
        name = ShardPaths.for_shard(root, number).marker.relative_to(root).as_posix()
        yield ShardFault(
            name, "", "a shard that is not in the plan", f"{len(plan.shards)} shards", "Move its files elsewhere"
        )


def _check_folder(root: Path, plan: Plan | None, faulty: bool) -> Iterator[ShardFault]:
    """Check what concerns all shards together: unique ids, the summary and the index."""
    try:
        rows = read_rows(root, ["pair_id", "status"])
        counts = pc.value_counts(rows.filter(pc.equal(rows["status"], "pair"))["pair_id"])
        for entry in counts.filter(pc.greater(counts.field("counts"), 1)).to_pylist():
            actual = f"{entry['counts']} rows of this id"
            yield ShardFault("manifest/", entry["values"], actual, "one", "Mine into a new output")
        yield from _check_summary(root, plan)
        fault = find_index_fault(root)
    except DataError as error:
        if not faulty:  # otherwise, the damaged shard is already reported
            yield ShardFault("manifest/", "", str(error), "readable parts", _MINE_AGAIN)
        return
    if fault:
        remedy = f"Delete it, and run the mining command again: {INDEX_NAME} is made from the parts"
        yield ShardFault(INDEX_NAME, "", fault, "all pairs of manifest/, in order", remedy)


def _check_summary(root: Path, plan: Plan | None) -> Iterator[ShardFault]:
    path = root / SUMMARY_NAME
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        ignored = summary["ignored"]
        if not isinstance(ignored, dict):
            raise TypeError("ignored is not an object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield ShardFault(SUMMARY_NAME, "", f"cannot be read ({error})", "the counts of manifest/", _MINE_AGAIN)
        return
    expected = asdict(
        summarise_manifest(root, ignored, plan.options if plan is not None else summary.get("options", {}))
    )
    for key, value in expected.items():
        if summary.get(key, type(value)()) != value:  # earlier versions did not write empty values
            yield ShardFault(SUMMARY_NAME, "", f"{key}: {summary.get(key)}", f"{value}, as in manifest/", _MINE_AGAIN)
    if expected["inputs"] != expected["accepted"] + expected["rejected"] + expected["quarantined"]:
        sums = " + ".join(f"{expected[key]} {key}" for key in ("accepted", "rejected", "quarantined"))
        yield ShardFault("manifest/", "", sums, f"{expected['inputs']} inputs", "Mine into a new output")
