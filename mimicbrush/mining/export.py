"""Exports a manifest as JSON lines, for programs that cannot read Parquet."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa

from mimicbrush.data.manifest import read_rows
from mimicbrush.data.schema import SCHEMA

_ROWS_AT_ONCE = 4096
_SHORT_FLOATS = [column.name for column in SCHEMA if column.type in (pa.float32(), pa.list_(pa.float32()))]


def export_rows(root: Path, out: TextIO) -> int:
    """Write all rows of a mined folder, one JSON object per line, with the columns in the order of the schema.

    NaN becomes null; 32-bit numbers have only as many digits as are needed to restore them exactly.

    Returns:
        The number of rows.

    Raises:
        DataError: there is no manifest, or a part cannot be read.
    """
    table = read_rows(root)
    for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
        for values in batch.to_pylist():
            row = {name: _simplify(value, name in _SHORT_FLOATS) for name, value in values.items()}
            out.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    return len(table)


def _simplify(value: Any, is_short: bool) -> Any:
    if isinstance(value, list):
        return [_simplify(entry, is_short) for entry in value] if is_short else value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return float(str(np.float32(value))) if is_short else value
    return value
