"""Read a list of inputs: paths, and what the list says of each file (hash, licence, address)."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mimicbrush.errors import InputError
from mimicbrush.io.atomic import path_inside
from mimicbrush.mining.plan import Item, find_item, refuse_item

LIST_SUFFIXES = (".csv", ".parquet")
#: Columns that are read, by the names that lists give them.
_COLUMNS = {"path": "path", "sha256": "sha256", "licence": "licence", "license": "licence", "url": "url"}
_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_input_list(path: Path, root: Path) -> tuple[list[Item], list[str]]:
    """Read the inputs that a CSV (with a header, UTF-8) or Parquet file names.

    Args:
        path: of the list. It must have a column `path`, relative to `root`, and may have `sha256`, `licence` (or
            `license`) and `url`; empty cells say nothing.
        root: the files must lie in this folder.

    Returns:
        The inputs, sorted by path, and the columns that were not read.

    Raises:
        InputError: the list cannot be read, lacks `path`, names a file twice, holds a hash that is none, or a path
            that leaves the folder. Files that are not there are inputs all the same, with a reason.
    """
    rows, columns = _read_csv(path) if path.suffix.lower() == ".csv" else _read_parquet(path)
    known_columns = [column for column in columns if column.strip().lower() in _COLUMNS]
    names = [_COLUMNS[column.strip().lower()] for column in known_columns]
    if "path" not in names or len(set(names)) < len(names):
        raise InputError(
            f"{path} has the columns {', '.join(columns) or '(none)'}; expected `path` and, if known, "
            "`sha256`, `licence` and `url`, each once"
        )
    items: dict[str, Item] = {}
    for number, row in enumerate(rows, start=1):
        values = {name: row[column].strip() for name, column in zip(names, known_columns, strict=True)}
        item = _build_item(values, root, f"{path}, entry {number}")
        if item.path in items:
            raise InputError(f"{path}, entry {number}: {item.path!r} is named twice")
        items[item.path] = item
    if not items:
        raise InputError(f"{path} names no file")
    unused = [column for column in columns if column not in known_columns]
    return sorted(items.values(), key=lambda item: item.path), unused


def _read_csv(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="", strict=True)
            rows = list(reader)
            columns = list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV in UTF-8 ({error})") from error
    too_long = next((number for number, row in enumerate(rows, start=1) if None in row), None)
    if too_long:
        raise InputError(f"{path}, entry {too_long}: more cells than the header has; quote cells that hold commas")
    return rows, columns


def _read_parquet(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path} cannot be read as Parquet ({error})") from error
    columns = list(table.column_names)
    rows = [{name: "" if value is None else str(value) for name, value in row.items()} for row in table.to_pylist()]
    return rows, columns


def _build_item(values: dict[str, str], root: Path, where: str) -> Item:
    name, sha256 = values["path"], values.get("sha256", "").lower()
    if not name:
        raise InputError(f"{where}: no path")
    if sha256 and not _SHA256.fullmatch(sha256):
        raise InputError(f"{where}: sha256 {sha256!r} is not 64 hexadecimal digits")
    try:
        file = path_inside(root, name)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    relative = Path(name)
    if not file.exists():
        item = refuse_item(relative, "absent", f"not in {root.name}/")
    else:
        item = find_item(file, root) or refuse_item(relative, "unknown_type", f"suffix {relative.suffix!r}")
    return replace(item, sha256=sha256, licence=values.get("licence", ""), url=values.get("url", ""))
