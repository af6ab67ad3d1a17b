"""Mines one shard: some inputs -> a tar of JPEGs, a Parquet part, an audit part, and a marker that is written last.

All engines call `mine_shard`. Its result depends only on the job, and it may be called any number of times. Each file
is written under another name in the same folder, flushed to the disk, then renamed. So a file with its final name is
complete, and a shard is done if the hashes in its marker are right. The same inputs and options give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mimicbrush.data.schema import SCHEMA, SCHEMA_VERSION
from mimicbrush.errors import DataError, is_full_disk
from mimicbrush.io.atomic import leftover_pattern, write_aside, write_json
from mimicbrush.io.hashing import hash_file
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.plan import Item, Plan
from mimicbrush.mining.report.audit import AUDIT_SCHEMA
from mimicbrush.mining.video.strict_reader import FrameReader
from mimicbrush.mining.worker import ItemOutcome, MinedFile, refuse_file
from mimicbrush.mining.worker_pool import WorkerPool

_HASH_CHARACTERS = 16


@dataclass(frozen=True)
class ShardPaths:
    """Paths of the files of a shard; `timing` is only for the report."""

    tar: Path
    part: Path
    audit: Path
    marker: Path
    timing: Path

    @classmethod
    def for_shard(cls, output: Path, number: int) -> ShardPaths:
        """Name the files of shard `number` in a mined folder."""
        return cls(
            output / "shards" / f"shard-{number:06d}.tar",
            output / "manifest" / f"part-{number:06d}.parquet",
            output / "audit" / f"part-{number:06d}.parquet",
            output / "markers" / f"shard-{number:06d}.json",
            output / "timing" / f"shard-{number:06d}.json",
        )

    @property
    def hashed(self) -> dict[str, Path]:
        """Files whose SHA-256 is in the marker: key in the marker -> path."""
        return {"tar_sha256": self.tar, "part_sha256": self.part, "audit_sha256": self.audit}


@dataclass(frozen=True)
class ShardJob:
    """A shard to mine: everything that decides its content.

    Attributes:
        number: number of the shard in the plan.
        items: its inputs, in order.
        root, output: the input folder and the mined folder.
        options: options of mining.
        reader: decodes videos.
        fingerprint: see `shard_fingerprint`.
    """

    number: int
    items: tuple[Item, ...]
    root: Path
    output: Path
    options: MiningOptions
    reader: FrameReader
    fingerprint: str

    @property
    def paths(self) -> ShardPaths:
        """Paths of the files of this shard."""
        return ShardPaths.for_shard(self.output, self.number)


def shard_fingerprint(plan: Plan, items: Sequence[Item]) -> str:
    """Hash the inputs and options that decide the content of a shard: SHA-256, hex."""
    content = {
        "schema": SCHEMA_VERSION,
        "options": plan.options,
        "ssim": plan.ssim_definition,
        "inputs": [item.to_json() for item in items],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_marker(paths: ShardPaths, expected_fingerprint: str | None = None) -> dict[str, Any] | None:
    """Read the marker of a complete, intact shard; None means that the shard must be mined (again).

    Args:
        paths: paths of the shard's files.
        expected_fingerprint: hash of its inputs and options; None: accept any.
    """
    try:
        marker: dict[str, Any] = json.loads(paths.marker.read_text(encoding="utf-8"))
        is_intact = expected_fingerprint in (None, marker["fingerprint"]) and all(
            marker[key] == hash_file(path) for key, path in paths.hashed.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return marker if is_intact else None


def mine_shard(job: ShardJob, pool: WorkerPool) -> bool:
    """Mine one shard, unless it is done.

    Args:
        job: the shard to mine.
        pool: pool of the processes that read the files.

    Returns:
        False if the shard was already done.

    Raises:
        DataError: a file cannot be written, or the input folder no longer exists.
    """
    if read_marker(job.paths, job.fingerprint) is not None:
        return False
    try:
        _remove_leftovers(job)
        # The name is unique, because workers of a killed run may still be writing to its spool folder.
        spool_folder = Path(tempfile.mkdtemp(".tmp", f"spool-{job.number:06d}-", job.output))
        try:
            _write_shard(job, pool, spool_folder)
        finally:
            shutil.rmtree(spool_folder, ignore_errors=True)
    except OSError as error:
        cause = "the disk is full" if is_full_disk(error) else str(error)
        raise DataError(
            f"shard {job.number} cannot be written to {job.output}: {cause}. Finished shards are kept. Solve the "
            "problem, then run the same command again"
        ) from error
    return True


def _remove_leftovers(job: ShardJob) -> None:
    """Remove files of this shard that a killed run left behind."""
    for spool_folder in job.output.glob(f"spool-{job.number:06d}-*.tmp"):
        shutil.rmtree(spool_folder, ignore_errors=True)
    for path in vars(job.paths).values():
        path.parent.mkdir(parents=True, exist_ok=True)
        for aside in path.parent.glob(leftover_pattern(path.name)):
            aside.unlink(missing_ok=True)
    job.paths.marker.unlink(missing_ok=True)  # from here on the old shard, if any, no longer counts as done


def _write_shard(job: ShardJob, pool: WorkerPool, spool_folder: Path) -> None:
    start = time.perf_counter()
    pending = [
        None
        if item.kind == "refused"
        else pool.submit(job.root, item, job.reader, job.options, spool_folder / f"{number}.bin")
        for number, item in enumerate(job.items)
    ]
    rows: list[dict[str, Any]] = []
    outcomes: list[ItemOutcome] = []

    def write_tar(path: Path) -> None:
        with tarfile.open(path, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (item, waiting) in enumerate(zip(job.items, pending, strict=True)):
                refusal = ItemOutcome([refuse_file(item, item.reason, item.detail)])
                outcome = refusal if waiting is None else waiting.result()
                assert outcome.files, f"{item.path} has no row"  # each input must be counted
                outcomes.append(outcome)
                spool_path = spool_folder / f"{number}.bin"
                for file in outcome.files:
                    rows.extend(_store_file(file, spool_path, tar, job.paths.tar))
                spool_path.unlink(missing_ok=True)

    write_aside(job.paths.tar, write_tar)
    if any(values["reason"] == "unreadable" for values in rows) and not job.root.is_dir():
        raise DataError(
            f"the input {job.root} has disappeared (was a disk removed?). Finished shards are kept. Restore the input, "
            "then run the same command again"
        )
    audit = [row for outcome in outcomes for file in outcome.files for row in file.audit]
    _write_parquet(job.paths.part, pa.Table.from_pylist(rows, SCHEMA))
    _write_parquet(job.paths.audit, pa.Table.from_pylist(audit, AUDIT_SCHEMA))
    seconds: dict[str, float] = defaultdict(float)
    for outcome in outcomes:
        for step, duration in outcome.seconds.items():
            seconds[step] += duration
    timing = {
        "wall_s": time.perf_counter() - start,
        "seconds": dict(seconds),
        "num_frames": sum(outcome.num_frames for outcome in outcomes),
        "num_files": sum(len(outcome.files) for outcome in outcomes),
        "input_bytes": sum(max(item.size, 0) for item in job.items),
    }
    write_json(job.paths.timing, timing)
    ignored: Counter[str] = Counter()
    for outcome in outcomes:
        ignored += outcome.ignored
    write_json(
        job.paths.marker,
        {
            "fingerprint": job.fingerprint,
            **{key: hash_file(path) for key, path in job.paths.hashed.items()},
            "rows": len(rows),
            "pairs": sum(values["status"] == "pair" for values in rows),
            "ignored": dict(sorted(ignored.items())),
        },
    )


def _write_parquet(path: Path, table: pa.Table) -> None:
    def write(aside: Path) -> None:
        with aside.open("wb") as file:  # opened here, because Arrow cannot open a path that is not UTF-8
            pq.write_table(table, file, compression="zstd")

    write_aside(path, write)


def _store_file(file: MinedFile, spool_path: Path, tar: tarfile.TarFile, tar_path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file with the ids of its pairs, and copy its JPEGs from the spool file into the tar."""
    rows = []
    for number, values in enumerate(file.rows):
        if values["status"] == "pair":
            pair_id = f"{values['source_hash'][:_HASH_CHARACTERS]}-{number:04d}"
            values = values | {"pair_id": pair_id}
            if values["store"] == "mined":
                values = _copy_to_tar(values, spool_path, tar, f"{tar_path.parent.name}/{tar_path.name}")
        rows.append(values)
    return rows


def _copy_to_tar(values: dict[str, Any], spool_path: Path, tar: tarfile.TarFile, file: str) -> dict[str, Any]:
    changed: dict[str, Any] = {"file": file}
    with spool_path.open("rb") as spool:
        for part, suffix in (("a", "a.jpg"), ("b", "b.jpg"), ("annotation", "json")):
            if values[f"{part}_offset"] >= 0:
                spool.seek(values[f"{part}_offset"])
                data = spool.read(values[f"{part}_length"])
                changed[f"{part}_offset"] = _add_member(tar, f"{values['pair_id']}.{suffix}", data)
    if values["annotation_file"]:
        changed["annotation_file"] = file
    return values | changed


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a file whose header depends only on its name and length; return the offset of its bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    start = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return start
