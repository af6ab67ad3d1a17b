"""Folders of encoded views: the latents, image tokens and depth maps of every fixed view, stored in shards of rows.

Each row is a view, in the order of `sampler.FixedViews`. A folder has these files:

* ``views.json``: the settings that decide its content, shapes and types; written first.
* ``constants.safetensors``: the tensors for "no reference" and "no depth", and their CRC-32.
* ``shards/views-000000.safetensors``: the rows of a shard, the fingerprint of the folder with the number of the shard,
  and a CRC-32 of each row; they are checked whenever a row is read.
* ``markers/views-000000.json``: the SHA-256 of a shard, written last: a shard that has a marker is done.

Shards are mapped into memory, so the processes of a machine share the pages that are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mimicbrush.errors import DataError
from mimicbrush.io.atomic import leftover_pattern, write_aside, write_json
from mimicbrush.io.hashing import hash_file
from mimicbrush.io.settings_file import read_settings_file
from mimicbrush.io.text import parse_json

#: Version of the content of a folder.
_FORMAT = 1
SETTINGS_NAME, CONSTANTS_NAME = "views.json", "constants.safetensors"
#: Approximate size of a shard. It is held in memory until it is written, and lost if the run is killed before.
SHARD_BYTES = 2**28
_OPEN_SHARDS = 256
#: Only one entry of metadata: safetensors writes several in any order, and equal shards must have equal bytes.
_ABOUT, _CRC = "about", "crc32"
_CONSTANTS = ("no_image_tokens", "no_depth_map")


@dataclass(frozen=True)
class TensorForm:
    """Shape and type of one tensor of a row: `dtype` is a name in torch, such as "float16"."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of this tensor in a row."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type as a `torch.dtype`."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def make_row_forms(
    latent_shape: tuple[int, int, int],
    tokens_shape: tuple[int, int],
    depth_shape: tuple[int, int],
    num_matches: int,
    dtype: str,
) -> dict[str, TensorForm]:
    """List the tensors of a row.

    Args:
        latent_shape: (4, h, w) of the latents.
        tokens_shape: (N, C) of the image tokens.
        depth_shape: (H, W) of the depth map.
        num_matches: largest number of matches of a view.
        dtype: "float16" or "float32": type of latents, image tokens and depth map.
    """
    return {
        "mean": TensorForm((3, *latent_shape), dtype),
        "std": TensorForm((3, *latent_shape), dtype),
        "latent_mask": TensorForm((1, *latent_shape[1:]), "uint8"),
        "image_tokens": TensorForm(tokens_shape, dtype),
        "depth_map": TensorForm((1, *depth_shape), dtype),
        "source_xy": TensorForm((num_matches, 2), "float32"),
        "reference_xy": TensorForm((num_matches, 2), "float32"),
        "is_match": TensorForm((num_matches,), "bool"),
    }


@dataclass(frozen=True)
class EncodedFolder:
    """A folder of encoded views, finished or not.

    Attributes:
        path: the folder.
        settings: name -> value of everything that decides the content.
        forms: name -> shape and type of each tensor of a row.
        num_rows: number of views.
        rows_per_shard: rows of each shard; the last one may be shorter.
    """

    path: Path
    settings: Mapping[str, Any]
    forms: Mapping[str, TensorForm]
    num_rows: int
    rows_per_shard: int

    @property
    def bytes_per_row(self) -> int:
        """Bytes of the tensors of one view."""
        return sum(form.num_bytes for form in self.forms.values())

    @property
    def num_shards(self) -> int:
        """Number of shards of the finished folder."""
        return -(-self.num_rows // self.rows_per_shard)

    def rows_of(self, shard: int) -> range:
        """List the rows of a shard."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.num_rows))

    def shard_path(self, shard: int) -> Path:
        """Return the path of a shard."""
        return self.path / "shards" / f"views-{shard:06d}.safetensors"

    def marker_path(self, shard: int) -> Path:
        """Return the path of the marker of a shard."""
        return self.path / "markers" / f"views-{shard:06d}.json"

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all settings that decide the content: SHA-256, hex."""
        return hashlib.sha256(json.dumps(self._as_json(), sort_keys=True).encode()).hexdigest()

    def _as_json(self) -> dict[str, Any]:
        forms = {name: asdict(form) | {"shape": list(form.shape)} for name, form in self.forms.items()}
        return {
            "format": _FORMAT,
            "settings": dict(self.settings),
            "tensors": forms,
            "num_rows": self.num_rows,
            "rows_per_shard": self.rows_per_shard,
        }

    def begin(self, constants: Mapping[str, torch.Tensor]) -> None:
        """Write the settings and the constants, before the first shard."""
        for folder in ("shards", "markers"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        in_order = {name: constants[name] for name in _CONSTANTS}
        content = {**in_order, _CRC: torch.tensor(_compute_crc(in_order))}
        write_aside(self.path / CONSTANTS_NAME, lambda aside: save_file(content, aside))
        write_json(self.path / SETTINGS_NAME, self._as_json())

    def read_constants(self) -> dict[str, torch.Tensor]:
        """Read the tensors for "no reference" and "no depth": `no_image_tokens` and `no_depth_map`, float32.

        Raises:
            DataError: the file is missing or damaged.
        """
        path = self.path / CONSTANTS_NAME
        try:
            content = load_file(path)
            constants = {name: content[name] for name in _CONSTANTS}
            if int(content[_CRC]) != _compute_crc(constants):
                raise ValueError("different CRC-32")
            return constants
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); run the same mimicbrush encode-views command again, "
                "without --verify, to write it again"
            ) from error

    def is_done(self, shard: int) -> bool:
        """Whether a shard has its marker, was made with these settings, and has its length."""
        marker = self._read_marker(shard)
        try:
            return (
                marker.get("fingerprint") == self.fingerprint
                and marker.get("bytes") == self.shard_path(shard).stat().st_size
            )
        except OSError:
            return False

    def is_intact(self, shard: int) -> bool:
        """Whether a shard is done, and all of its bytes are as they were written."""
        return self.is_done(shard) and self._read_marker(shard).get("sha256") == hash_file(self.shard_path(shard))

    def _read_marker(self, shard: int) -> dict[str, Any]:
        try:
            marker = parse_json(self.marker_path(shard).read_bytes())
        except (OSError, ValueError):
            return {}
        return marker if isinstance(marker, dict) else {}

    def write_shard(self, shard: int, tensors: Mapping[str, torch.Tensor], faults: Mapping[int, str]) -> None:
        """Write a shard and its marker.

        Args:
            shard: number of the shard.
            tensors: name -> (rows, ...), with the shapes and types of `forms`.
            faults: row in the shard -> why its pair could not be read; the tensors of this row have no meaning.
        """
        path, marker = self.shard_path(shard), self.marker_path(shard)
        marker.unlink(missing_ok=True)
        _open_shard.cache_clear()
        for file in (path, marker):  # files that a killed process left behind
            for aside in file.parent.glob(leftover_pattern(file.name)):
                aside.unlink(missing_ok=True)
        count = len(self.rows_of(shard))
        checksums = torch.tensor([_compute_crc({name: tensors[name][n] for name in self.forms}) for n in range(count)])
        content = {**{name: tensors[name].contiguous() for name in self.forms}, _CRC: checksums}
        about = {"faults": {str(row): fault for row, fault in faults.items()}, "place": self._place_of(shard)}
        write_aside(path, lambda aside: save_file(content, aside, {_ABOUT: json.dumps(about)}))
        values = {"fingerprint": self.fingerprint, "bytes": path.stat().st_size, "sha256": hash_file(path)}
        write_json(marker, {**values, "unreadable_views": len(faults)})

    def read_row(self, row: int, names: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
        """Read a view: name -> tensor.

        Args:
            row: 0..num_rows-1.
            names: names of the tensors to return; () for all.

        Raises:
            DataError: the pair could not be read when it was encoded, or the shard is missing or damaged.
        """
        shard, place = divmod(row, self.rows_per_shard)
        path = self.shard_path(shard)
        try:
            opened = _open_shard(str(path))
            about = parse_json(opened.metadata()[_ABOUT])
            if about["place"] != self._place_of(shard):
                raise ValueError("it is another shard")
            fault = dict(about["faults"]).get(str(place))
            if fault is None:
                tensors = {name: opened.get_slice(name)[place : place + 1][0] for name in self.forms}
                checksum = int(opened.get_slice(_CRC)[place : place + 1][0])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"{path} cannot be read ({error}). {self._advice()}") from error
        if fault is not None:
            raise DataError(f"it could not be read when its views were encoded: {fault}")
        if any(tensors[name].shape != torch.Size(form.shape) for name, form in self.forms.items()) or (
            _compute_crc(tensors) != checksum
        ):
            raise DataError(f"row {place} of {path} is damaged (different CRC-32). {self._advice()}")
        return {name: tensors[name] for name in names or tensors}

    def _place_of(self, shard: int) -> str:
        return f"{self.fingerprint}/{shard}"

    def _advice(self) -> str:
        return (
            "Run mimicbrush encode-views with --verify, then again without it. The second run encodes the shard again"
        )


def read_encoded_folder(path: Path) -> EncodedFolder | None:
    """Read the settings of a folder of encoded views; None if there are none yet.

    Raises:
        DataError: the settings cannot be read, or are of another version.
    """

    def build(values: Mapping[str, Any]) -> EncodedFolder:
        forms = {name: TensorForm(tuple(each["shape"]), each["dtype"]) for name, each in values["tensors"].items()}
        folder = EncodedFolder(
            path, dict(values["settings"]), forms, int(values["num_rows"]), int(values["rows_per_shard"])
        )
        if not (folder.num_rows > 0 and folder.rows_per_shard > 0 and folder.bytes_per_row > 0):
            raise ValueError("it has no rows")
        return folder

    return read_settings_file(path / SETTINGS_NAME, _FORMAT, build, "encode")


def open_encoded_folder(path: Path) -> EncodedFolder:
    """Open a folder of encoded views to train from it.

    Raises:
        DataError: there is none, or not all of its shards are done.
    """
    folder = read_encoded_folder(path)
    if folder is None:
        raise DataError(
            f"data.encoded_views={path} is not a folder of encoded views (it has no {SETTINGS_NAME}); make one "
            "with mimicbrush encode-views"
        )
    missing = [shard for shard in range(folder.num_shards) if not folder.is_done(shard)]
    if missing:
        raise DataError(
            f"data.encoded_views={path}: {len(missing)} of {folder.num_shards} shards are missing; run the same "
            "mimicbrush encode-views command again to encode them"
        )
    return folder


@lru_cache(maxsize=_OPEN_SHARDS)
def _open_shard(path: str) -> Any:
    return safe_open(path, "pt")


def _compute_crc(tensors: Mapping[str, torch.Tensor]) -> int:
    """The CRC-32 of the tensors of a row, in their order."""
    checksum = 0
    for tensor in tensors.values():
        checksum = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, checksum)
    return checksum
