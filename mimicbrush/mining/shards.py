"""One shard on disk: a tar of JPEGs, a Parquet part, and a marker that is written last.

Everything is written aside in the same folder, flushed to the disk, then renamed; so a file that has its name
is whole, and a shard that has its marker is done. The same inputs and options give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mimicbrush.data.manifest import SCHEMA, SCHEMA_VERSION
from mimicbrush.mining.plan import Item, Plan
from mimicbrush.mining.work import Outcome, Source, refused_source
from mimicbrush.ops.files import write_aside

_HASH_CHARACTERS = 16


@dataclass(frozen=True)
class ShardPaths:
    """Where the three files of a shard lie."""

    tar: Path
    part: Path
    marker: Path

    @classmethod
    def of(cls, output: Path, number: int) -> ShardPaths:
        """The paths of shard `number` in a mined folder."""
        return cls(
            output / "shards" / f"shard-{number:06d}.tar",
            output / "manifest" / f"part-{number:06d}.parquet",
            output / "markers" / f"shard-{number:06d}.json",
        )


def fingerprint(plan: Plan, items: Sequence[Item]) -> str:
    """SHA-256 over all that decides a shard's content, as far as it is known beforehand."""
    content = {
        "schema": SCHEMA_VERSION,
        "options": plan.options,
        "ssim": plan.ssim_definition,
        "inputs": [[item.path, item.kind, item.size, item.reason] for item in items],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_marker(paths: ShardPaths, expected_fingerprint: str) -> dict[str, Any] | None:
    """The marker of a shard that is done and unharmed, else None: then the shard is to be mined (again)."""
    try:
        marker = json.loads(paths.marker.read_text(encoding="utf-8"))
        whole = (
            marker["fingerprint"] == expected_fingerprint
            and marker["tar_sha256"] == _sha256(paths.tar)
            and marker["part_sha256"] == _sha256(paths.part)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return marker if whole else None


def write_shard(
    paths: ShardPaths,
    outcomes: Iterable[tuple[Outcome, Path | None]],
    first_path_of: dict[str, str],
    shard_fingerprint: str,
) -> dict[str, Any]:
    """Write one shard.

    Args:
        paths: where to.
        outcomes: of its inputs in planned order, each with its spool file (None: it has no pictures).
        first_path_of: source hash -> first path with that content, of all earlier shards; added to here.
        shard_fingerprint: see `fingerprint`.

    Returns:
        The marker.
    """
    rows: list[dict[str, Any]] = []
    ignored: Counter[str] = Counter()
    for path in (paths.tar, paths.part, paths.marker):
        path.parent.mkdir(parents=True, exist_ok=True)
    paths.marker.unlink(missing_ok=True)  # from here on the old shard, if any, no longer counts as done

    def write_tar(path: Path) -> None:
        with tarfile.open(path, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for outcome, spool_path in outcomes:
                ignored.update(outcome.ignored)
                for source in outcome.sources:
                    source = _without_duplicates(source, first_path_of)
                    rows.extend(_store(source, spool_path, tar, paths.tar.name))

    write_aside(paths.tar, write_tar)
    table = pa.Table.from_pylist(rows, SCHEMA)
    write_aside(paths.part, lambda path: pq.write_table(table, path, compression="zstd"))
    marker = {
        "fingerprint": shard_fingerprint,
        "tar_sha256": _sha256(paths.tar),
        "part_sha256": _sha256(paths.part),
        "rows": len(rows),
        "pairs": sum(values["status"] == "pair" for values in rows),
        "ignored": dict(sorted(ignored.items())),
    }
    text = json.dumps(marker, indent=1) + "\n"
    write_aside(paths.marker, lambda path: path.write_bytes(text.encode()))
    return marker


def _without_duplicates(source: Source, first_path_of: dict[str, str]) -> Source:
    """The source, or one rejected row where an earlier file has the same content."""
    if not source.source_hash:
        return source
    first = first_path_of.setdefault(source.source_hash, source.path)
    if first == source.path:
        return source
    return refused_source(
        source.path,
        "duplicate",
        f"the same bytes as {first}",
        kind=source.rows[0]["kind"],
        source_hash=source.source_hash,
        status="rejected",
    )


def _store(source: Source, spool_path: Path | None, tar: tarfile.TarFile, shard: str) -> list[dict[str, Any]]:
    """Copy a source's pictures from the spool file into the tar; its rows with final offsets."""
    if source.rows[0]["status"] != "pair":
        return source.rows
    assert spool_path is not None
    rows = []
    with spool_path.open("rb") as spool:
        for number, values in enumerate(source.rows):
            pair_id = f"{source.source_hash[:_HASH_CHARACTERS]}-{number:04d}"
            values = values | {"pair_id": pair_id, "shard": shard}
            for side in ("a", "b"):
                if values[f"{side}_offset"] >= 0:
                    spool.seek(values[f"{side}_offset"])
                    data = spool.read(values[f"{side}_length"])
                    values[f"{side}_offset"] = _add_member(tar, f"{pair_id}.{side}.jpg", data)
            rows.append(values)
    return rows


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a file with a header that depends on nothing but name and length; where its bytes start."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    start = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return start


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
