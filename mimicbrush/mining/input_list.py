"""Read a list of inputs: paths, and optionally the hash, licence and address of each file.

A Parquet list that is very large when decompressed is refused before it is read. A path that cannot be a file becomes
an input that is refused with a reason; a list that contradicts itself is an error.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mimicbrush.errors import InputError
from mimicbrush.io.atomic import path_inside
from mimicbrush.io.text import make_storable
from mimicbrush.mining.plan import Item, find_item, refuse_item
from mimicbrush.mining.segmented_images import LONGEST_NAME, normalise_name
from mimicbrush.ranges import NumberRange

LIST_SUFFIXES = (".csv", ".parquet")
#: Columns that are read: name in the list -> meaning.
_COLUMNS = {name: name for name in ("path", "sha256", "licence", "url", "start_s", "end_s")} | {"license": "licence"}
_SECONDS = NumberRange(at_least=0)
SHA256 = re.compile(r"[0-9a-f]{64}")
#: Largest size of a Parquet list when decompressed: in bytes, or as a multiple of its own size; the larger one counts.
_MAX_UNPACKED_BYTES, _MAX_EXPANSION = 1 << 28, 100
#: Longest cell in characters, about the limit of `csv`.
_LONGEST_CELL = 1 << 17
_ROWS_AT_ONCE = 4096
#: Meaning of the column that `read_list_column` reads.
_WANTED = "wanted"


def read_input_list(path: Path, root: Path) -> tuple[list[Item], list[str]]:
    """Read the inputs in a list, a CSV (UTF-8, with a header) or Parquet file.

    Args:
        path: the list. It must have a column `path`, relative to `root`. It may have `sha256`, `licence` (or
            `license`), `url`, and for videos `start_s` and `end_s`; their cells may be empty.
        root: the folder that contains the files.

    Returns:
        The inputs, sorted by path, and the names of unused columns. Missing files are also inputs, with a reason.

    Raises:
        InputError: the list cannot be read, has no column `path`, lists a file twice, has an invalid hash, or a path
            outside the folder.
    """
    items: dict[str, Item] = {}
    unused: list[str] = []
    for number, values in enumerate(_read_entries(path, _COLUMNS, unused), start=1):
        item = _build_item(values, root, f"{path}, entry {number}")
        if item.path in items:
            raise InputError(f"{path}, entry {number}: {make_storable(item.path)!r} is listed twice")
        items[item.path] = item
    if not items:
        raise InputError(f"{path} lists no files")
    return sorted(items.values(), key=lambda item: item.path), unused


def read_list_column(path: Path, column: str) -> dict[str, str]:
    """Read one column of a list of inputs, such as captions: path of the mined file -> text of its cell.

    Args:
        path: the list, as for `read_input_list`.
        column: name of the column; upper and lower case are the same.

    Raises:
        InputError: the list cannot be read, has no such column, or has two texts for a file.
    """
    wanted = column.strip().lower()
    if wanted in ("", "path"):
        raise InputError(f"the column {column!r} has another meaning; give another column of {path}")
    texts: dict[str, str] = {}
    unused: list[str] = []
    for values in _read_entries(path, {"path": "path", wanted: _WANTED}, unused):
        if _WANTED not in values:
            raise InputError(
                f"{path} has no column `{column}`; in addition to `path`, it has: {', '.join(unused) or '(none)'}"
            )
        name = normalise_name(values["path"])
        if texts.setdefault(name, values[_WANTED]) != values[_WANTED]:
            raise InputError(f"{path}: {make_storable(name)!r} is listed twice, with different texts; remove one")
    return texts


def _read_entries(path: Path, meanings: Mapping[str, str], unused: list[str]) -> Iterator[dict[str, str]]:
    """Yield the entries of a list: meaning of the column -> cell. Errors of the file become an InputError."""
    if not path.is_file():
        found = "is a pipe, a socket or a device; expected a file" if path.exists() else "does not exist"
        raise InputError(f"{path} {found}")
    read = _read_csv if path.suffix.lower() == ".csv" else _read_parquet
    try:
        yield from read(path, meanings, unused)
    except (OSError, UnicodeError, csv.Error, pa.ArrowException) as error:
        kind = "CSV in UTF-8" if read is _read_csv else "Parquet"
        raise InputError(f"{path} cannot be read as {kind} ({make_storable(str(error))})") from error


def _choose_columns(path: Path, columns: list[str], meanings: Mapping[str, str], unused: list[str]) -> dict[str, str]:
    """Return the known columns of a list: name -> meaning; the names of the others are added to `unused`."""
    known = {column: meanings[column.strip().lower()] for column in columns if column.strip().lower() in meanings}
    names = [known[column] for column in columns if column in known]
    if "path" not in names or len(set(names)) < len(names):
        raise InputError(
            f"{path} has the columns {make_storable(', '.join(columns)) or '(none)'}; expected `path` and optionally "
            "`sha256`, `licence`, `url`, `start_s` and `end_s`, each once"
        )
    unused += [make_storable(column) for column in columns if column not in known]
    return known


def _read_csv(path: Path, meanings: Mapping[str, str], unused: list[str]) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restval="", strict=True)
        known = _choose_columns(path, list(reader.fieldnames or []), meanings, unused)
        for number, row in enumerate(reader, start=1):
            if None in row:
                raise InputError(
                    f"{path}, entry {number}: more cells than in the header; put quotes around cells with commas"
                )
            yield {name: row[column].strip() for column, name in known.items()}


def _read_parquet(path: Path, meanings: Mapping[str, str], unused: list[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of a Parquet list in batches.

    Repeated texts are stored once, because a few bytes of a file can expand to a million long rows.
    """
    with pq.ParquetFile(path) as opened:
        known = _choose_columns(path, opened.schema_arrow.names, meanings, unused)
        _check_types(path, opened.schema_arrow, known)
        _check_unpacked_size(path, opened.metadata, known)
    texts = [column for column in known if _is_text(opened.schema_arrow.field(column).type)]
    with pq.ParquetFile(path, read_dictionary=texts) as opened:
        for batch in opened.iter_batches(_ROWS_AT_ONCE, columns=list(known)):
            batch.validate(full=True)  # in a damaged file, the index of a text may be out of range
            columns = [_read_cells(path, batch[column]) for column in known]
            for cells in zip(*columns, strict=True):
                yield dict(zip(known.values(), cells, strict=True))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _check_types(path: Path, schema: pa.Schema, known: dict[str, str]) -> None:
    for column, name in known.items():
        kind = schema.field(column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        is_plain = pa.types.is_null(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if not (_is_text(kind) or pa.types.is_string_view(kind) or (is_plain and name != "path")):
            raise InputError(f"{path}: the column `{make_storable(column)}` has type {kind}, expected text")


def _check_unpacked_size(path: Path, metadata: pq.FileMetaData, known: dict[str, str]) -> None:
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    unpacked = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in known)
    limit = max(_MAX_UNPACKED_BYTES, _MAX_EXPANSION * path.stat().st_size)
    if not 0 <= unpacked <= limit:
        raise InputError(
            f"{path} has {unpacked} bytes when decompressed, expected at most {limit}; if it is a list, write it as CSV"
        )


def _read_cells(path: Path, column: pa.Array) -> Iterable[str]:
    """Return the cells of a column as text; null and NaN are empty cells."""
    if not pa.types.is_dictionary(column.type):
        return ["" if value is None or value != value else str(value) for value in column.to_pylist()]
    lengths = [value for value in pc.binary_length(column.dictionary).to_pylist() if value is not None]
    if max(lengths, default=0) > _LONGEST_CELL:
        raise InputError(f"{path} has a cell of {max(lengths)} bytes, expected at most {_LONGEST_CELL}")
    values = [(value or "").strip() for value in column.dictionary.to_pylist()]
    return ["" if index is None else values[index] for index in column.indices.to_pylist()]


def _build_item(values: dict[str, str], root: Path, where: str) -> Item:
    sha256 = values.get("sha256", "").lower()
    if not values["path"]:
        raise InputError(f"{where}: the path is missing")
    if sha256 and not SHA256.fullmatch(sha256):
        raise InputError(f"{where}: sha256 {make_storable(sha256, 80)!r}: expected 64 hexadecimal digits")
    start_s, end_s = (read_seconds(values.get(name, ""), f"{where}: {name}") for name in ("start_s", "end_s"))
    if end_s is not None and end_s <= (start_s or 0.0):
        raise InputError(f"{where}: end_s={end_s:g} must be larger than start_s={start_s or 0.0:g}")
    item = _find_listed_file(normalise_name(values["path"]), root, where)
    if item.kind in ("image", "archive") and (start_s is not None or end_s is not None):
        raise InputError(f"{where}: {make_storable(item.path)!r} is not a video; leave start_s and end_s empty")
    known = replace(item, sha256=sha256, licence=values.get("licence", ""), url=values.get("url", ""))
    return replace(known, start_s=start_s or 0.0, end_s=end_s)


def read_seconds(cell: str, named: str) -> float | None:
    """Read a time of a list; None for an empty cell.

    Args:
        cell: text of the cell.
        named: the entry and its column, for the message.

    Raises:
        InputError: the cell is not a time in seconds.
    """
    if not cell:
        return None
    try:
        return float(_SECONDS.read(cell))
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{named}: {make_storable(str(error), 120)}") from error


def _find_listed_file(name: str, root: Path, where: str) -> Item:
    relative = Path(name)
    if "\0" in name or len(name) > LONGEST_NAME:
        return refuse_item(relative, "bad_name", "a file cannot have this name")
    try:
        file = path_inside(root, name)
        if not file.exists():
            return refuse_item(relative, "absent", f"not in {root.name}/")
    except InputError as error:
        if error.__cause__ is not None:  # the path cannot be resolved
            return refuse_item(relative, "unreadable", "a circular link")
        raise InputError(f"{where}: {make_storable(str(error))}") from error
    except OSError as error:
        return refuse_item(relative, "bad_name", error.strerror or str(error))
    return find_item(file, root) or refuse_item(relative, "unknown_type", f"suffix {relative.suffix!r}")
