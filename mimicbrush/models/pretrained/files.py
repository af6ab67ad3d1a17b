"""Read the files of a stored network without loading it: configs, and the headers of safetensors files.

Imports no torch, so that an incomplete or damaged file is reported within a second.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mimicbrush.errors import WeightsError
from mimicbrush.io.hashing import require_plain_file
from mimicbrush.io.text import make_storable, parse_json

#: Part of the name of half-precision files in diffusers and transformers: NAME.fp16.safetensors.
HALF_VARIANT = "fp16"
#: Longest header of a safetensors file, and longest JSON file. Those of large models have about a tenth of this.
MAX_HEAD_BYTES = 16 << 20
#: Largest number of layers, labels and the like in a config: a network is built before its weights are compared.
MAX_COUNT = 1000
# Length of the number at the start of a file, which is the length of the header.
_LENGTH_BYTES = 8


class DamagedFileError(WeightsError):
    """A damaged file, which must be downloaded again.

    Attributes:
        file: the damaged file.
        reason: what is wrong with it.
    """

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(f"{make_storable(str(file))} is damaged: {make_storable(reason)}")
        self.file, self.reason = file, reason


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its type, such as "F32" or "BF16", and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredNetwork:
    """A network in a folder.

    Attributes:
        folder: a folder that diffusers or transformers wrote.
        config: config of the network.
        files: files of its weights; several if they are in shards.
        tensors: name -> type and shape.
    """

    folder: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]

    @property
    def variant(self) -> str | None:
        """Name of the variant in diffusers: "fp16", or None for the usual files."""
        return HALF_VARIANT if self.files[0].stem.endswith(f".{HALF_VARIANT}") else None

    @property
    def num_bytes(self) -> int:
        """Size of all weights files together, bytes."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def dtypes(self) -> str:
        """Types of the tensors, the most frequent first."""
        names = [tensor.dtype for tensor in self.tensors.values()]
        return ", ".join(sorted(set(names), key=names.count, reverse=True))


def read_network(folder: Path, file_stem: str, *, allow_half: bool = False) -> StoredNetwork:
    """Read the config and the tensor names of a network's folder.

    Args:
        folder: folder of the network.
        file_stem: name of its files in the library: "diffusion_pytorch_model" or "model".
        allow_half: use the half-precision variant if there is no other file.

    Raises:
        WeightsError: a file is absent, or shards do not fit their index.
        DamagedFileError: a file is damaged.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise WeightsError(f"{folder} has no config.json, which is needed for the size of the network")
    config = read_object(config_file)
    check_config_counts(config, config_file)
    single, index = folder / f"{file_stem}.safetensors", folder / f"{file_stem}.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise WeightsError(
            f"{folder} contains both {single.name} and {index.name}; remove the one that should not be used"
        )
    if single.is_file():
        return StoredNetwork(folder, config, (single,), read_head(single))
    half = folder / f"{file_stem}.{HALF_VARIANT}.safetensors"
    if allow_half and not index.is_file() and half.is_file():
        return StoredNetwork(folder, config, (half,), read_head(half))
    if not index.is_file():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".ckpt"))
        there = f"; it contains {', '.join(others)}, but pickles and other variants are not loaded" if others else ""
        raise WeightsError(f"{folder} has no {single.name}{there}")
    tensors, files = _read_shards(index)
    return StoredNetwork(folder, config, files, tensors)


def _read_shards(index: Path) -> tuple[dict[str, StoredTensor], tuple[Path, ...]]:
    weight_map = read_object(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or any(Path(str(name)).name != name for name in weight_map.values())
    ):
        raise DamagedFileError(index, "it has no weight_map from tensors to the names of files in the same folder")
    files = tuple(index.parent / name for name in sorted(set(weight_map.values())))
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise WeightsError(f"{index.parent} lacks {', '.join(absent)}, which {index.name} names")
    heads = {file.name: read_head(file) for file in files}
    holders = {key: name for name, head in heads.items() for key in head}
    if holders != weight_map or sum(map(len, heads.values())) != len(holders):
        differing = sorted(key for key in {**holders, **weight_map} if holders.get(key) != weight_map.get(key))
        problem = f"its entry for {differing[0]} is wrong or missing" if differing else "they contain a tensor twice"
        raise WeightsError(f"{index} does not fit its shards: {problem}")
    return {key: tensor for head in heads.values() for key, tensor in head.items()}, files


def read_head(file: Path) -> dict[str, StoredTensor]:
    """Read the names, types and shapes of the tensors in a safetensors file, but not the tensors.

    Raises:
        DamagedFileError: the header cannot be read, or the tensors do not fill the file exactly.
    """
    check_head(file)
    try:
        with safe_open(file, "numpy") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
            return {key: StoredTensor(each.get_dtype(), tuple(each.get_shape())) for key, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(file, _describe_damage(file, str(error))) from error


def check_head(file: Path) -> None:
    """Check the header of a safetensors file before the library reads it.

    The library accepts headers of 100 MB. If a name appears twice, it uses the second tensor.

    Raises:
        DamagedFileError: the file is shorter than its header, or the header is too long, is not JSON, or has a name
            twice.
    """
    try:
        require_plain_file(file)
        size = file.stat().st_size
        with file.open("rb") as opened:
            head_bytes = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            head = opened.read(min(head_bytes, MAX_HEAD_BYTES))
    except OSError as error:
        raise DamagedFileError(file, f"it cannot be read ({error})") from error
    if size < _LENGTH_BYTES + head_bytes:
        raise DamagedFileError(
            file, f"it has {size:,} bytes and no header; the download was interrupted, or it is not a safetensors file"
        )
    if head_bytes > MAX_HEAD_BYTES:
        raise DamagedFileError(file, f"its header has {head_bytes:,} bytes, expected at most {MAX_HEAD_BYTES:,}")
    try:
        json.loads(head, object_pairs_hook=_refuse_repetition)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(file, f"its header cannot be read ({error})") from error


def _refuse_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in found if names.count(name) > 1)} appears twice")
    return found


def _describe_damage(file: Path, reason: str) -> str:
    """Say what is wrong with a file that safetensors refuses: it may be too short or too long."""
    size = file.stat().st_size
    if "not fully covered" not in reason:
        return f"its header cannot be read ({reason})"
    with file.open("rb") as opened:
        head_bytes = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        head = json.loads(opened.read(head_bytes))
    head.pop("__metadata__", None)
    needed = _LENGTH_BYTES + head_bytes + max((entry["data_offsets"][1] for entry in head.values()), default=0)
    cut = "the download was interrupted" if size < needed else "there is extra data after them"
    return f"it has {size:,} bytes, but its tensors need {needed:,}; {cut}"


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file, such as the config of a network.

    Raises:
        DamagedFileError: it does not contain an object, is longer than `MAX_HEAD_BYTES`, or is nested too deeply.
    """
    try:
        require_plain_file(file)
        with file.open("rb") as opened:
            text = opened.read(MAX_HEAD_BYTES + 1)
        if len(text) > MAX_HEAD_BYTES:
            raise DamagedFileError(file, f"it is longer than {MAX_HEAD_BYTES:,} bytes")
        content = parse_json(text)
    except (OSError, ValueError) as error:
        raise DamagedFileError(file, f"it cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise DamagedFileError(file, f"it contains a {type(content).__name__}, expected an object")
    return content


def check_config_counts(config: object, file: object) -> None:
    """Check that the config of a network has at most `MAX_COUNT` layers, labels, or entries in a list.

    Args:
        config: content of a config.json.
        file: name of the file in errors.

    Raises:
        WeightsError: a number is too large; the message names its key.
    """
    waiting = [("", config)]  # no recursion: JSON can be nested deeper than Python can call functions
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            if len(value) > MAX_COUNT:
                raise WeightsError(
                    f"{file} has {len(value):,} values of {make_storable(key)}, expected at most {MAX_COUNT:,}"
                )
            waiting += ((key, each) for each in value)
        elif isinstance(value, int | float) and any(word in key for word in ("layers", "labels")) and value > MAX_COUNT:
            shown = f"{value:.6g}" if value < 1e300 else "at least 1e+300"  # a Python int may be too large for a float
            raise WeightsError(f"{file} has {make_storable(f'{key}={shown}')}, expected at most {MAX_COUNT:,}")
