"""The manifest of a mined folder: one Parquet part per shard. Schema: data_manifests/README.md.

Training reads pairs through `PairTable`. It maps one Arrow file into memory (`INDEX_NAME`, which the miner makes from
all parts), so the processes of a machine share its pages. Only rows that are requested become objects.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mimicbrush.data.pair import Pair, Span, refuse_pair
from mimicbrush.data.schema import SCHEMA, SCHEMA_VERSION, VERSION_KEY, manifest_row, neutral_value, unpack_points
from mimicbrush.errors import DataError, InputError
from mimicbrush.io.hashing import NO_CHECKSUM, hash_file, is_checksum_right, require_plain_file, store_checksum

INDEX_NAME = "index.arrow"
PLAN_NAME = "plan.json"
_STAMP_KEY = b"mimicbrush_parts"
_CHECKSUM_KEY = b"mimicbrush_checksum"
#: Columns that training and evaluation need.
_INDEX_COLUMNS = [name for name in SCHEMA.names if name not in ("status", "reason", "detail", "licence", "url")]
#: Columns that are needed to find and describe duplicate files.
_DUPLICATE_COLUMNS = ("status", "reason", "detail", "source_path", "source_hash")
_FILE_COLUMNS = ("kind", "source_path", "source_hash", "licence", "url", "decoder")
_INDEX_ROWS_PER_BATCH = 65_536

Split = Literal["train", "heldout", "all"]


class PairTable(Sequence[Pair]):
    """Sequence of pairs in a fixed order (by shard, then as mined). A `Pair` is built when it is requested.

    Args:
        table: the columns of `_INDEX_COLUMNS` and `source_key`, a row per pair.
        root: the mined folder.
        input_root: the input folder of the miner, with the photographs; None if it is not known.
        rows: indices of the rows of `table` to use, in order; None for all.
        path: the Arrow file that `table` is mapped from, if there is one; it is then pickled as its path.
    """

    def __init__(
        self,
        table: pa.Table,
        root: Path,
        input_root: Path | None,
        rows: np.ndarray | None = None,
        path: Path | None = None,
    ) -> None:
        self._table, self._root, self._input_root, self._path = table, root, input_root, path
        # 32 bits: eleven million rows are 44 MB in each worker process.
        self._rows = np.arange(len(table), dtype=np.int32) if rows is None else rows.astype(np.int32, copy=False)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._path is None:
            return PairTable, (self._table, self._root, self._input_root, self._rows)
        return _map_index, (self._path, self._root, self._input_root, self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Pair]:
        return (self[n] for n in range(len(self)))

    @overload
    def __getitem__(self, number: int) -> Pair: ...
    @overload
    def __getitem__(self, number: slice) -> PairTable: ...
    def __getitem__(self, number: int | slice) -> Pair | PairTable:
        if isinstance(number, slice):
            return self._with_rows(self._rows[number])
        row = int(self._rows[number])
        with refuse_pair(f"in row {row} of {self._root}"):
            return self._pair(row)

    def where(self, keep: np.ndarray) -> PairTable:
        """Select the pairs for which `keep`, (len,) bool, is true."""
        return self._with_rows(self._rows[keep])

    def column(self, name: str) -> np.ndarray:
        """Return a column of numbers or texts, (len,); `source_key` is the hash of the mined file as uint64."""
        values: np.ndarray = self._table[name].combine_chunks().to_numpy(zero_copy_only=False)[self._rows]
        return values

    def take(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """Return the values of some pairs in a column of numbers, (K,) -> (K,); only these rows are read."""
        values: np.ndarray = self._table[name].take(pa.array(self._rows[numbers])).to_numpy()
        return values

    def lengths(self, name: str) -> np.ndarray:
        """Count the numbers of a column of lists in each row, (len,) int32; the lists themselves are not read."""
        lengths: np.ndarray = pc.list_value_length(self._table[name]).combine_chunks().to_numpy(zero_copy_only=False)
        return lengths[self._rows]

    def values(self, name: str) -> np.ndarray:
        """Return all numbers of a column of lists, the lists of all rows concatenated."""
        rows = self._table[name].take(pa.array(self._rows)).combine_chunks()
        numbers: np.ndarray = rows.flatten().to_numpy(zero_copy_only=False)
        return numbers

    def digest(self) -> str:
        """Hash the ids of all pairs, in order (SHA-256). Tables with the same pairs have the same hash."""
        return hashlib.sha256("\n".join(self.column("pair_id")).encode()).hexdigest()

    def _with_rows(self, rows: np.ndarray) -> PairTable:
        return PairTable(self._table, self._root, self._input_root, rows, self._path)

    def _pair(self, number: int) -> Pair:
        def value(name: str) -> Any:
            return self._table[name][number].as_py()

        def values(name: str) -> np.ndarray:
            # Read from the buffer: making a Python list of a thousand numbers takes longer than decoding a JPEG.
            numbers: np.ndarray = self._table[name][number].values.to_numpy()
            return numbers

        def span(side: str) -> Span:
            return value(f"{side}_offset"), value(f"{side}_length")

        file, annotation_file = value("file"), value("annotation_file")
        return Pair(
            pair_id=value("pair_id"),
            kind=value("kind"),
            source_path=value("source_path"),
            source_hash=value("source_hash"),
            size_px=(value("height_px"), value("width_px")),
            a_file=self._file(number, file),
            a_span=span("a"),
            b_span=span("b") if value("b_offset") >= 0 else None,
            a_points=unpack_points(values("a_points")),
            b_points=unpack_points(values("b_points")),
            ssim=value("ssim"),
            annotation_file=self._file(number, annotation_file) if annotation_file else None,
            annotation_span=span("annotation"),
            segments=values("segments"),
            segment_ratios=values("segment_ratios"),
            a_sha256=value("a_sha256"),
            b_sha256=value("b_sha256"),
            a_frame=value("a_frame"),
            b_frame=value("b_frame"),
        )

    def _file(self, number: int, name: str) -> Path:
        """Return the path of a file of this row, and check that it is inside the mined folder or the input."""
        store, pair_id = self._table["store"][number].as_py(), self._table["pair_id"][number].as_py()
        root = self._root if store == "mined" else self._input_root
        if root is None:
            raise DataError(
                f"pair {pair_id} is in the folder that was mined, and {self._root} does not say which folder that is "
                "(no plan.json). Give it with data.input_root=FOLDER"
            )
        path = root / name
        if not path.resolve().is_relative_to(root.resolve()):
            raise DataError(f"pair {pair_id} names the file {name!r}, outside {root}")
        return path


def read_rows(root: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read all rows of a mined folder, by shard and then as mined.

    Shards are mined independently, so duplicates are found here: a file with the content of an earlier one gets one
    row with the status "rejected" and the reason "duplicate" instead of its own rows.

    Args:
        root: the mined folder.
        columns: names of the columns to read; None for all.

    Raises:
        DataError: there is no manifest, a part cannot be read, or it has another schema version.
    """
    names = list(SCHEMA.names if columns is None else columns)
    needed = names + [name for name in _DUPLICATE_COLUMNS if name not in names]
    parts = [_read_part(root, part, needed) for part in list_manifest_parts(root)]
    return pa.concat_tables(_replace_duplicates(parts)).select(names)


def list_manifest_parts(root: Path) -> list[Path]:
    """List the Parquet parts of a mined folder, in order. If there are markers, only finished shards are listed.

    Raises:
        DataError: there are none.
    """
    parts = sorted((root / "manifest").glob("*.parquet"))
    if (root / "markers").is_dir():
        parts = [part for part in parts if _marker_path(root, part).is_file()]
    if not parts:
        raise DataError(
            f"{root} has no mined pairs (no manifest/*.parquet). Mine some first: "
            f"mimicbrush mine input=FOLDER_OF_VIDEOS {shlex.quote(f'output={root}')}"
        )
    return parts


def _marker_path(root: Path, part: Path) -> Path:
    return root / "markers" / (part.stem.replace("part-", "shard-") + ".json")


def _read_part(root: Path, part: Path, columns: Sequence[str]) -> pa.Table:
    _check_part_hash(root, part)
    try:
        require_plain_file(part)
        version = (pq.read_schema(pa.OSFile(os.fsencode(part))).metadata or {}).get(VERSION_KEY, b"none").decode()
        if version != str(SCHEMA_VERSION):
            raise DataError(f"{part} has schema version {version}, this version reads {SCHEMA_VERSION}; mine again")
        table = pq.read_table(pa.OSFile(os.fsencode(part)), columns=list(columns))
        table.validate(full=True)  # text that is not UTF-8 would cause errors later
        typed = table.cast(pa.schema([SCHEMA.field(name) for name in columns]))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{part} cannot be read ({error}); delete its marker and mine again") from error
    # A null becomes the value that means "none"; if a pair needs this value, its row is refused later.
    for place, field in enumerate(typed.schema):
        if typed[place].null_count and not pa.types.is_list(field.type):
            typed = typed.set_column(place, field, pc.fill_null(typed[place], neutral_value(field.type)))
    return typed


def _check_part_hash(root: Path, part: Path) -> None:
    """Compare a part with the hash in its marker, if there is one: Parquet itself detects few damaged bytes."""
    marker = _marker_path(root, part)
    if not marker.is_file():
        return
    try:
        expected = json.loads(marker.read_text(encoding="utf-8")).get("part_sha256")
        actual = hash_file(part)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{part} or its marker cannot be read ({error}); delete {marker} and mine again") from error
    if expected not in (None, actual):
        raise DataError(f"{part} does not match its marker (different SHA-256); delete {marker} and mine again")


def _replace_duplicates(parts: list[pa.Table]) -> list[pa.Table]:
    """Return the parts with one row for each duplicate file instead of its own rows.

    The parts are not joined: a list column in one piece has at most 2**31 numbers, and all points together may be more.
    """
    table = pa.concat_tables(parts)
    hashes = table["source_hash"].combine_chunks().dictionary_encode()
    codes = hashes.indices.to_numpy(zero_copy_only=False)
    first_row = np.full(len(hashes.dictionary), len(table))
    np.minimum.at(first_row, codes, np.arange(len(table)))
    paths = table["source_path"].combine_chunks()
    first_path = paths.take(pa.array(first_row[codes]))
    differs = pc.and_(pc.not_equal(paths, first_path), pc.not_equal(table["source_hash"].combine_chunks(), ""))
    is_twin = differs.to_numpy(zero_copy_only=False)
    if not is_twin.any():
        return parts
    row_of_path: dict[str, tuple[int, dict[str, Any]]] = {}  # a duplicate clip may have several rows
    for number in map(int, np.flatnonzero(is_twin)):
        values = {name: table[name][number].as_py() for name in _FILE_COLUMNS if name in table.column_names}
        refusal = {"status": "rejected", "reason": "duplicate", "detail": f"the same bytes as {first_path[number]}"}
        row_of_path.setdefault(values["source_path"], (number, values | refusal))
    places = np.array([number for number, _ in row_of_path.values()])
    rejected = pa.Table.from_pylist([manifest_row(**values) for _, values in row_of_path.values()], SCHEMA)
    replaced, start = [], 0
    for part in parts:
        low, high = np.searchsorted(places, (start, start + len(part)))
        twins_here = is_twin[start : start + len(part)]
        instead = rejected.slice(low, high - low)
        replaced.append(
            _replace_rows(part, twins_here, instead, places[low:high] - start) if twins_here.any() else part
        )
        start += len(part)
    return replaced


def _replace_rows(part: pa.Table, is_twin: np.ndarray, instead: pa.Table, places: np.ndarray) -> pa.Table:
    """Leave out the rows of `is_twin`, (N,) bool, and put the rows of `instead` at `places`, (M,)."""
    both = pa.concat_tables([part.filter(pa.array(~is_twin)), instead.select(part.column_names)])
    return both.take(pa.array(np.argsort(np.concatenate([np.flatnonzero(~is_twin), places]))))


def write_index(root: Path, path: Path) -> None:
    """Write all pairs of a mined folder as one Arrow file that can be mapped into memory, with its own checksum."""
    table = _index_table(root)
    # Arrow writes the metadata both at the beginning and at the end of the file, around the data.
    table = table.replace_schema_metadata({**table.schema.metadata, _CHECKSUM_KEY: NO_CHECKSUM})
    with pa.OSFile(os.fsencode(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=_INDEX_ROWS_PER_BATCH)
    store_checksum(path)


def _index_table(root: Path) -> pa.Table:
    rows = read_rows(root, [*_INDEX_COLUMNS, "status"])
    table = rows.filter(pc.equal(rows["status"], "pair")).select(_INDEX_COLUMNS)
    keys = [origin_key(text) for text in table["source_hash"].to_pylist()]
    # `source_key` is the name of this column in all versions of the index file, so it is not renamed.
    table = table.append_column("source_key", pa.array(keys, pa.uint64()))
    return table.replace_schema_metadata({VERSION_KEY: str(SCHEMA_VERSION), _STAMP_KEY: _parts_stamp(root)})


def is_index_current(root: Path, *, needs_checksum: bool = False) -> bool:
    """Check whether there is an intact index that was made from the present parts.

    Args:
        root: the mined folder.
        needs_checksum: do not accept an index of an earlier version, which has no checksum.
    """
    index = root / INDEX_NAME
    if not index.is_file():
        return False
    try:
        is_right = is_checksum_right(index)  # first: Arrow trusts the lengths and offsets in the file
        if is_right is False or (is_right is None and needs_checksum):
            return False
        with pa.memory_map(os.fsencode(index)) as file:
            opened = pa.ipc.open_file(file)
            metadata = opened.schema.metadata or {}
            if is_right is None:
                opened.read_all().validate(full=True)
    except (pa.ArrowException, OSError, ValueError):  # truncated or damaged: the parts are read instead
        return False
    return metadata.get(_STAMP_KEY, b"") == _parts_stamp(root).encode()


def find_index_fault(root: Path) -> str:
    """Compare the index of a mined folder with the parts, and say what is wrong; "" for nothing.

    Raises:
        DataError: the parts cannot be read.
    """
    index = root / INDEX_NAME
    if not index.is_file():
        return "it does not exist"
    if not is_index_current(root):
        return "it is damaged, or was made from other parts"
    expected = _index_table(root)
    try:
        stored = pa.ipc.open_file(pa.memory_map(os.fsencode(index))).read_all()
        stored.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        return f"it is damaged ({error})"
    if stored.schema != expected.schema or len(stored) != len(expected):
        return (
            f"it has {len(stored)} rows of {stored.num_columns} columns, not {len(expected)} of {expected.num_columns}"
        )
    differing = [name for name in expected.column_names if not _are_equal(stored[name], expected[name])]
    return f"it differs from the parts in {', '.join(differing)}" if differing else ""


def _are_equal(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    if pa.types.is_floating(one.type):  # for Arrow, NaN is not NaN
        return bool(np.array_equal(one.to_numpy(), other.to_numpy(), equal_nan=True))
    return bool(one.equals(other))


def _parts_stamp(root: Path) -> str:
    """Hash the names, sizes and markers of all parts (SHA-256), to check that an index was made from them."""
    stamp = hashlib.sha256()
    for part in list_manifest_parts(root):
        marker = _marker_path(root, part)
        stamp.update(f"{part.name} {part.stat().st_size}\n".encode())
        stamp.update(marker.read_bytes() if marker.is_file() else b"")
    return stamp.hexdigest()


def read_manifest(root: Path, input_root: Path | None = None) -> PairTable:
    """Read all pairs of a mined folder.

    Args:
        root: the mined folder.
        input_root: folder of the photographs, if they were moved; None: where they were mined.

    Raises:
        DataError: there is no manifest, or it has another schema version.
    """
    input_root = input_root or find_mined_input(root)
    if is_index_current(root):
        return _map_index(root / INDEX_NAME, root, input_root)
    return PairTable(_index_table(root), root, input_root)


def _map_index(path: Path, root: Path, input_root: Path | None, rows: np.ndarray | None = None) -> PairTable:
    return PairTable(pa.ipc.open_file(pa.memory_map(os.fsencode(path))).read_all(), root, input_root, rows, path)


def check_outside_mined_folder(folder: Path, named: str) -> None:
    """Check that an output folder is not a mined folder or inside one, where `verify` would report its files.

    Args:
        folder: an output folder that is not for mined pairs.
        named: the option and its value, for the message.

    Raises:
        InputError: it is a mined folder or inside one.
    """
    folder = folder.absolute()
    for each in (folder, *folder.parents):
        with suppress(OSError):  # for example a name that is too long
            if (each / "manifest").is_dir() and ((each / "shards").is_dir() or (each / PLAN_NAME).is_file()):
                raise InputError(f"{named} is, or is inside, the mined folder {each}; choose a folder elsewhere")


def find_mined_input(root: Path) -> Path | None:
    """Find the input folder that was mined; None if there is no plan.

    The plan stores its path relative to the mined folder, so that both can be moved together.

    Raises:
        DataError: the plan cannot be read.
    """
    plan = root / PLAN_NAME
    if not plan.is_file():
        return None
    try:
        return (root / json.loads(plan.read_text(encoding="utf-8"))["input_root"]).resolve()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{plan} cannot be read ({error!r}); mine again into another folder") from error


@overload
def split_pairs(pairs: PairTable, split: Split, heldout_ratio: float = ...) -> PairTable: ...
@overload
def split_pairs(pairs: Sequence[Pair], split: Split, heldout_ratio: float = ...) -> Sequence[Pair]: ...
def split_pairs(pairs: Sequence[Pair], split: Split, heldout_ratio: float = 0.1) -> Sequence[Pair]:
    """Select the pairs of a split by the hash of the mined file, so that each file is in one split and stays in it.

    A file is held out if its hash is below `heldout_ratio` of the range of hashes. In a small collection, this
    would often hold out no file. So if there are four or more files of a kind, at least the two with the lowest hashes
    are held out: the reference gain compares with a reference from a second file.
    """
    if split == "all":
        return pairs
    if isinstance(pairs, PairTable):
        keys, kinds = pairs.column("source_key"), pairs.column("kind")
        return pairs.where(_is_heldout(keys, kinds, heldout_ratio) == (split == "heldout"))
    keys = np.array([origin_key(pair.source_hash) for pair in pairs], np.uint64)
    is_heldout = _is_heldout(keys, np.array([pair.kind for pair in pairs]), heldout_ratio)
    return [pair for pair, heldout in zip(pairs, is_heldout, strict=True) if heldout == (split == "heldout")]


def _is_heldout(keys: np.ndarray, kinds: np.ndarray, heldout_ratio: float) -> np.ndarray:
    heldout = np.zeros(len(keys), bool)
    for kind in ("video", "image"):
        of_kind = kinds == kind
        origins = np.unique(keys[of_kind])
        below = int((origins.astype(np.float64) < heldout_ratio * 2.0**64).sum())
        floor = 2 if heldout_ratio > 0 and len(origins) >= 4 else 0
        heldout |= of_kind & np.isin(keys, origins[: max(below, floor)])
    return heldout


def origin_key(source_hash: str) -> int:
    """Return the first 16 hex digits of a mined file's hash as a 64-bit number; other texts are hashed first."""
    try:
        key = int(source_hash[:16], 16)
    except ValueError:
        key = -1
    return key if key >= 0 else int.from_bytes(hashlib.sha256(source_hash.encode()).digest()[:8], "big")
