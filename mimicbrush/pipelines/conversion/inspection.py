"""What a checkpoint, a state dict or a pipeline folder holds, without loading it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimicbrush.errors import WeightsError
from mimicbrush.io.text import make_storable
from mimicbrush.models.pretrained.files import read_object
from mimicbrush.pipelines.conversion.untrusted_files import (
    TensorEntry,
    check_shards,
    read_entries,
    weights_of,
)


@dataclass(frozen=True)
class InspectedPart:
    """Tensors of one network.

    Attributes:
        name: of the part or component.
        entries: its tensors; the paths begin below the part.
    """

    name: str
    entries: list[TensorEntry]

    @property
    def parameters(self) -> int:
        """Number of numbers in all tensors."""
        return sum(math.prod(entry.shape) for entry in self.entries)

    @property
    def dtypes(self) -> dict[str, int]:
        """dtype -> number of tensors."""
        return dict(Counter(entry.dtype for entry in self.entries))

    def as_dict(self, *, keys: bool) -> dict[str, Any]:
        """Convert to values for JSON."""
        found: dict[str, Any] = {
            "part": self.name,
            "num_keys": len(self.entries),
            "num_parameters": self.parameters,
            "dtypes": self.dtypes,
        }
        if keys:
            found["keys"] = {
                ".".join(entry.path): {"shape": list(entry.shape), "dtype": entry.dtype} for entry in self.entries
            }
        return found


def inspect_weights(given: Path) -> list[InspectedPart]:
    """List the parts of a file, of a network's folder or of a pipeline folder that have weights.

    Raises:
        WeightsError: absent, damaged, or refused (see `untrusted_files.read_files`).
    """
    if (given / "model_index.json").is_file():
        components = [
            name for name, value in read_object(given / "model_index.json").items() if isinstance(value, list)
        ]
        return [
            InspectedPart(name, _entries_of(given / name))
            for name in sorted(components)
            if (given / name / "config.json").is_file()
        ]
    entries = _entries_of(given)
    if not entries:
        raise WeightsError(f"{given} contains no tensors")
    parts: dict[str, list[TensorEntry]] = {}
    for entry in entries:
        # A plain state dict is one part; of a nested one, each entry at the top is.
        top, *rest = entry.path if len(entry.path) > 1 else (given.stem, *entry.path)
        parts.setdefault(top, []).append(TensorEntry(tuple(rest), entry.shape, entry.dtype))
    return [InspectedPart(name, found) for name, found in parts.items()]


def _entries_of(given: Path) -> list[TensorEntry]:
    files = weights_of(given)
    entries = [read_entries(file) for file in files]
    check_shards(files, [[entry.path for entry in found] for found in entries])
    return [entry for found in entries for entry in found]


def describe_parts(parts: list[InspectedPart], *, keys: bool) -> str:
    """Describe parts for people."""
    names = [make_storable(part.name) for part in parts]
    width, lines = max(map(len, names)), list[str]()
    for name, part in zip(names, parts, strict=True):
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in part.dtypes.items())
        lines.append(f"{name:<{width}}  {len(part.entries):>5} keys  {part.parameters:>13,} parameters  {dtypes}")
        if keys:
            lines += [
                f"    {make_storable('.'.join(entry.path))}  {entry.shape}  {entry.dtype}" for entry in part.entries
            ]
    return "\n".join(lines)


def parts_as_json(parts: list[InspectedPart], *, keys: bool) -> dict[str, Any]:
    """Convert parts to JSON for programs."""
    return {"parts": [part.as_dict(keys=keys) for part in parts]}
