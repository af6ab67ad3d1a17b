"""Verification of a shard: its marker, its tar, and every image and segment in its rows."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mimicbrush.data.pair import Span, decode_jpeg
from mimicbrush.data.schema import POINT_UNITS_PER_PX, SCHEMA, SCHEMA_VERSION, VERSION_KEY
from mimicbrush.io.hashing import hash_file
from mimicbrush.mining.plan import Item
from mimicbrush.mining.refusals import QUARANTINED, REJECTED
from mimicbrush.mining.report.audit import AUDIT_SCHEMA
from mimicbrush.mining.shards import ShardPaths
from mimicbrush.ops.rle import AnnotationError, SegmentError, read_annotation, run_lengths

#: Areas are stored as 32-bit floats.
_RATIO_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ShardFault:
    """A fault in a mined folder.

    Attributes:
        file: path relative to the mined folder (or to the input folder, for photographs that were not copied).
        pair_id: id of the pair; "" for the file as a whole.
        actual, expected: what was found, and what was expected.
        remedy: what to do.
    """

    file: str
    pair_id: str
    actual: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        where = f"{self.file}, pair {self.pair_id}" if self.pair_id else self.file
        line = f"{where}: {self.actual}; expected {self.expected}. {self.remedy}"
        # Names come from the input: control characters must not reach the terminal, and a fault must stay on one line.
        return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)


@dataclass(frozen=True)
class ShardCheck:
    """A shard to verify, and its expected content.

    Attributes:
        root: the mined folder.
        input_root: the folder that was mined; None if it does not exist.
        number: number of the shard.
        items: its planned inputs; None if the shard is not in the plan.
        fingerprint: expected fingerprint in its marker; None if the shard is not in the plan.
    """

    root: Path
    input_root: Path | None
    number: int
    items: tuple[Item, ...] | None
    fingerprint: str | None


@dataclass
class ShardCheckResult:
    """Result of verifying a shard: what was read, and all faults."""

    faults: list[ShardFault]
    pairs: int = 0
    images: int = 0
    bytes_read: int = 0


def verify_shard(check: ShardCheck) -> ShardCheckResult:
    """Read a shard again, and check everything. Nothing is changed."""
    return _ShardReading(check).read()


class _ShardReading:
    def __init__(self, check: ShardCheck) -> None:
        self.check = check
        self.paths = ShardPaths.for_shard(check.root, check.number)
        self.result = ShardCheckResult([])
        self.members: dict[Path, dict[int, tuple[str, int]]] = {}  # of each tar, see `_read_tar_members`
        self.damaged: set[Path] = set()  # files with a wrong hash, which Arrow must not read
        self.remedy = f"Delete {self._name(self.paths.marker)} and run the mining command again"

    def _name(self, path: Path) -> str:
        return path.relative_to(self.check.root).as_posix()

    def _add_fault(self, file: str, actual: str, expected: str, pair_id: str = "", remedy: str = "") -> None:
        self.result.faults.append(ShardFault(file, pair_id, actual, expected, remedy or self.remedy))

    def _choose_remedy(self, values: dict[str, Any]) -> str:
        """Return what to do about an image; "": mine its shard again."""
        return (
            ""
            if values["store"] == "mined"
            else "Restore the file as it was when it was mined, or mine into a new output"
        )

    def read(self) -> ShardCheckResult:
        """Check the marker, the files of the shard, and then each row."""
        marker = self._check_marker()
        rows = self._read_rows(marker)
        self._check_audit()
        self._check_timing()
        if rows is None:
            return self.result
        self._check_inputs(rows)
        members = self._list_members(self.paths.tar, self._name(self.paths.tar))
        used_offsets: set[int] = set()
        for values in rows:
            if values["status"] == "pair":
                self.result.pairs += 1
                self._check_pair(values, members, used_offsets)
            else:
                self._check_refusal(values)
        for offset, (name, size) in members.items():
            if offset not in used_offsets:
                self._add_fault(
                    self._name(self.paths.tar), f"{name!r} ({size} bytes) belongs to no row", "a row for every file"
                )
        return self.result

    def _check_marker(self) -> dict[str, Any]:
        name = self._name(self.paths.marker)
        try:
            marker = json.loads(self.paths.marker.read_text(encoding="utf-8"))
            if not isinstance(marker, dict):
                raise ValueError("not a JSON object")
        except (OSError, ValueError) as error:
            self._add_fault(name, f"cannot be read ({error})", "the marker of a finished shard")
            return {}
        for key, path in self.paths.hashed.items():
            try:
                actual = hash_file(path)
            except OSError as error:
                self._add_fault(
                    self._name(path), f"cannot be read ({error.strerror})", "the file that the marker lists"
                )
                continue
            self.result.bytes_read += path.stat().st_size
            if actual != marker.get(key):
                self.damaged.add(path)
                self._add_fault(self._name(path), f"SHA-256 {actual}", f"{marker.get(key)}, as {name} says")
        if self.check.fingerprint not in (None, marker.get("fingerprint")):
            self._add_fault(
                name,
                f"fingerprint {marker.get('fingerprint')}",
                f"{self.check.fingerprint}, of the inputs in plan.json",
            )
        return marker

    def _read_rows(self, marker: dict[str, Any]) -> list[dict[str, Any]] | None:
        name = self._name(self.paths.part)
        table = self._read_table(self.paths.part, SCHEMA)
        if table is None:
            return None
        version = (table.schema.metadata or {}).get(VERSION_KEY, b"none").decode()
        if version != str(SCHEMA_VERSION):
            self._add_fault(name, f"schema version {version}", str(SCHEMA_VERSION))
            return None
        rows: list[dict[str, Any]] = table.to_pylist()
        for key, count in (("rows", len(rows)), ("pairs", sum(values["status"] == "pair" for values in rows))):
            if marker and marker.get(key) != count:
                self._add_fault(name, f"{count} {key}", f"{marker.get(key)}, as {self._name(self.paths.marker)} says")
        return rows

    def _read_table(self, path: Path, schema: pa.Schema) -> pa.Table | None:
        if path in self.damaged:
            return None
        try:
            table = pq.read_table(pa.OSFile(os.fsencode(path)))
            table.validate(full=True)
        except FileNotFoundError:  # `_check_marker` has reported it
            return None
        except (pa.ArrowException, OSError, ValueError) as error:
            self._add_fault(self._name(path), f"cannot be read ({error})", "an intact Parquet file")
            return None
        if not table.schema.equals(schema):
            self._add_fault(self._name(path), f"columns {table.column_names}", f"{schema.names}, each with its type")
            return None
        empty = [name for name in table.column_names if table[name].null_count]
        if empty:
            self._add_fault(self._name(path), f"nulls in {', '.join(empty)}", "no nulls")
            return None
        return table

    def _check_audit(self) -> None:
        table = self._read_table(self.paths.audit, AUDIT_SCHEMA)
        for number, data in enumerate(table["picture"].to_pylist() if table is not None else []):
            try:
                decode_jpeg(data)
            except (OSError, ValueError, SyntaxError) as error:
                self._add_fault(self._name(self.paths.audit), f"thumbnail {number}: {error}", "an intact JPEG")

    def _check_timing(self) -> None:
        try:
            json.loads(self.paths.timing.read_text(encoding="utf-8"))
        except FileNotFoundError:  # a shard is complete without it
            return
        except (OSError, ValueError) as error:
            self._add_fault(self._name(self.paths.timing), f"cannot be read ({error})", "JSON", remedy="Delete it")

    def _check_inputs(self, rows: list[dict[str, Any]]) -> None:
        """Check that inputs have rows, that rows have planned inputs, and that all rows of a file have one status."""
        name = self._name(self.paths.part)
        statuses: dict[str, set[str]] = {}
        for values in rows:
            statuses.setdefault(values["source_path"], set()).add(values["status"])
        for origin, of_file in statuses.items():
            if len(of_file) > 1:
                self._add_fault(
                    name, f"{origin!r} is {' and '.join(sorted(of_file))}", "the same status in all rows of a file"
                )
        if self.check.items is None:
            return
        archives = {f"{item.path}/" for item in self.check.items if item.kind == "archive"}
        planned = {item.path for item in self.check.items}
        for origin in statuses:
            if origin not in planned and not any(origin.startswith(archive) for archive in archives):
                expected = "only rows of the inputs of this shard in plan.json"
                self._add_fault(name, f"a row for {origin!r}", expected)
        with_rows = {archive for archive in archives if any(origin.startswith(archive) for origin in statuses)}
        for item in self.check.items:
            if item.path not in statuses and f"{item.path}/" not in with_rows:
                self._add_fault(name, f"no row for {item.path!r}", "a row for every input of plan.json")

    def _check_refusal(self, values: dict[str, Any]) -> None:
        reasons = {"rejected": REJECTED, "quarantined": QUARANTINED}.get(values["status"])
        if reasons is None or values["reason"] not in reasons:
            self._add_fault(
                self._name(self.paths.part),
                f"{values['source_path']!r} has status {values['status']!r} and reason {values['reason']!r}",
                "a status and a reason listed in data_manifests/README.md",
            )

    def _list_members(self, path: Path, name: str) -> dict[int, tuple[str, int]]:
        if path not in self.members:
            self.members[path] = {}
            try:
                if path.exists():  # a missing file is reported for the marker or for the pair
                    self.members[path] = _read_tar_members(path)
            except (tarfile.TarError, OSError, ValueError) as error:
                self._add_fault(name, f"cannot be read ({error})", "an intact tar")
        return self.members[path]

    def _check_pair(self, values: dict[str, Any], members: dict[int, tuple[str, int]], used_offsets: set[int]) -> None:
        pair_id, mined = values["pair_id"], values["store"] == "mined"
        if not pair_id or values["store"] not in ("mined", "input") or values["kind"] not in ("video", "image"):
            self._add_fault(
                self._name(self.paths.part),
                f"pair_id {pair_id!r}, store {values['store']!r}, kind {values['kind']!r}",
                "a pair_id, store mined or input, and kind video or image",
                pair_id,
            )
            return
        self._check_points(values)
        sides = [side for side in ("a", "b") if values[f"{side}_offset"] >= 0]
        if values["kind"] == "video" and (sides != ["a", "b"] or not values["a_frame"] < values["b_frame"]):
            self._add_fault(
                self._name(self.paths.part), "no two frames in order", "two frames, the earlier one first", pair_id
            )
        for side in sides:
            span = values[f"{side}_offset"], values[f"{side}_length"]
            data = self._read_bytes(values, values["file"], span, members, used_offsets, f"{side}.jpg" if mined else "")
            if data is not None:
                self._check_image(values, side, data)
        if values["annotation_file"]:
            span = values["annotation_offset"], values["annotation_length"]
            data = self._read_bytes(
                values, values["annotation_file"], span, members, used_offsets, "json" if mined else ""
            )
            if data is not None:
                self._check_segments(values, data)
        elif values["kind"] == "image":
            self._add_fault(
                self._name(self.paths.part), "no annotation_file", "an annotation_file for each photograph", pair_id
            )

    def _check_points(self, values: dict[str, Any]) -> None:
        name, size = self._name(self.paths.part), (values["width_px"], values["height_px"])
        counts = {side: len(values[f"{side}_points"]) for side in ("a", "b")}
        if counts["a"] != counts["b"] or counts["a"] % 2:
            self._add_fault(
                name,
                f"{counts['a']} and {counts['b']} coordinates",
                "two coordinates for each match",
                values["pair_id"],
            )
            return
        for side in ("a", "b"):
            points = np.array(values[f"{side}_points"], np.int64).reshape(-1, 2)
            num_outside = int((points > np.array(size) * POINT_UNITS_PER_PX).any(axis=1).sum())
            if num_outside:
                self._add_fault(
                    name,
                    f"{num_outside} points of image {side} are outside",
                    f"all inside {size[0]} x {size[1]} px",
                    values["pair_id"],
                )
        if values["kind"] == "video" and not -1 <= values["ssim"] <= 1:
            self._add_fault(name, f"SSIM {values['ssim']}", "a number from -1 to 1", values["pair_id"])

    def _read_bytes(
        self,
        values: dict[str, Any],
        file: str,
        span: Span,
        members: dict[int, tuple[str, int]],
        used_offsets: set[int],
        suffix: str,
    ) -> bytes | None:
        """Read the bytes at a span, and compare it with the tar's headers; None if they cannot be read.

        Args:
            values: values of the row.
            file, span: the file and the span that the row states.
            members: members of the shard's own tar.
            used_offsets: set to which the offset is added.
            suffix: suffix of the member in the shard's tar; "" for photographs that were not copied.
        """
        pair_id = values["pair_id"]
        root = self.check.root if suffix else self.check.input_root
        if root is None:  # reported once for the whole folder
            return None
        own = self._name(self.paths.tar)
        path = root / file
        if (suffix and file != own) or "\0" in file or not path.resolve().is_relative_to(root.resolve()):
            self._add_fault(self._name(self.paths.part), f"file {file!r}", own if suffix else f"inside {root}", pair_id)
            return None
        remedy = self._choose_remedy(values)
        if suffix or file.endswith(".tar"):
            actual = (members if suffix else self._list_members(path, file)).get(span[0])
            used_offsets.add(span[0])
            expected = (f"{pair_id}.{suffix}" if suffix else None, span[1])
            if actual is None or actual[1] != span[1] or expected[0] not in (None, actual[0]):
                header = "no file starts there" if actual is None else f"{actual[0]!r} of {actual[1]} bytes"
                name = expected[0] or "a file"
                self._add_fault(file, f"at byte {span[0]}: {header}", f"{name} of {span[1]} bytes", pair_id, remedy)
        try:
            size = path.stat().st_size
            fits = span[0] >= 0 and span[1] > 0 and sum(span) <= size
            is_alone = not suffix and not file.endswith(".tar")
            if not fits or (is_alone and sum(span) != size):  # a longer file has also changed
                self._add_fault(file, f"{size} bytes", f"{span[1]} bytes at {span[0]}", pair_id, remedy)
                return None
            with path.open("rb") as stream:
                stream.seek(span[0])
                data = stream.read(span[1])
        except OSError as error:
            self._add_fault(
                file, f"cannot be read ({error.strerror})", f"{span[1]} bytes at {span[0]}", pair_id, remedy
            )
            return None
        self.result.bytes_read += 0 if suffix else len(data)
        return data

    def _check_image(self, values: dict[str, Any], side: str, data: bytes) -> None:
        self.result.images += 1
        remedy = self._choose_remedy(values)
        actual = hashlib.sha256(data).hexdigest()
        if actual != values[f"{side}_sha256"]:
            expected = f"{values[f'{side}_sha256']}, as the manifest says"
            self._add_fault(values["file"], f"image {side} has SHA-256 {actual}", expected, values["pair_id"], remedy)
            return  # do not decode unknown data
        try:
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                size = image.size
            decode_jpeg(data)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            self._add_fault(values["file"], f"image {side}: {error}", "an intact JPEG", values["pair_id"], remedy)
            return
        if size != (values["width_px"], values["height_px"]):
            expected = f"{values['width_px']} x {values['height_px']}, as the manifest says"
            actual_size = f"image {side} is {size[0]} x {size[1]} px"
            self._add_fault(values["file"], actual_size, expected, values["pair_id"], remedy)

    def _check_segments(self, values: dict[str, Any], data: bytes) -> None:
        file, pair_id = values["annotation_file"], values["pair_id"]
        remedy = self._choose_remedy(values)
        for actual, expected in _find_segment_faults(values, data):
            self._add_fault(file, actual, expected, pair_id, remedy)


def _find_segment_faults(values: dict[str, Any], data: bytes) -> Iterator[tuple[str, str]]:
    """Yield (actual, expected) for each segment that differs from the mined one."""
    height, width = values["height_px"], values["width_px"]
    if len(values["segments"]) != len(values["segment_ratios"]) or not values["segments"]:
        yield (
            f"{len(values['segments'])} segments, {len(values['segment_ratios'])} areas",
            "the same number of both, at least one",
        )
        return
    try:
        segmentations = read_annotation(data)
    except AnnotationError as error:
        yield f"no segments ({error})", "JSON as in SA-1B"
        return
    for number, ratio in zip(values["segments"], values["segment_ratios"], strict=True):
        if not 0 <= number < len(segmentations):
            yield f"{len(segmentations)} segments", f"a segment with number {number}"
            continue
        try:
            actual = sum(run_lengths(segmentations[number], height, width)[1::2]) / (height * width)
        except SegmentError as error:
            yield f"segment {number}: {error}", "run lengths that fit"
            continue
        if abs(actual - ratio) > _RATIO_TOLERANCE:
            yield f"segment {number} covers {actual:.6f} of the image", f"{ratio:.6f}, as the manifest says"


def _read_tar_members(path: Path) -> dict[int, tuple[str, int]]:
    """Read the headers of a tar: offset of a file's first byte -> (name, size)."""
    with tarfile.open(path, mode="r:") as tar:
        return {info.offset_data: (info.name, info.size) for info in tar if info.isreg()}
