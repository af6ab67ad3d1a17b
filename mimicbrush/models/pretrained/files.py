"""The files of a stored network, looked at without loading it: only configs and the heads of safetensors are read.

No heavy import here: a cut or damaged file must be named within a second, not after torch and diffusers are imported.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimicbrush.errors import WeightsError

_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
#: Longer heads are damage; those of the largest network here have 200 kB.
_MAX_HEAD_BYTES = 100_000_000


class DamagedFileError(WeightsError):
    """A file that is not what was written once; it should be fetched again.

    Attributes:
        file: which.
    """

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(f"{file} is damaged: {reason}")
        self.file = file


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its type, as safetensors calls it, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredNetwork:
    """A network in a folder.

    Attributes:
        folder: as diffusers or transformers write it.
        config: of the network.
        files: its weights; several where they are in shards.
        tensors: name -> type and shape.
    """

    folder: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]

    @property
    def num_bytes(self) -> int:
        """Of all weights files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def dtypes(self) -> str:
        """Of the tensors, the most frequent first."""
        names = [tensor.dtype for tensor in self.tensors.values()]
        return ", ".join(sorted(set(names), key=names.count, reverse=True))


def read_network(folder: Path, stem: str) -> StoredNetwork:
    """What a network's folder holds.

    Args:
        folder: of the network.
        stem: what the library calls its files: "diffusion_pytorch_model" or "model".

    Raises:
        WeightsError: something is absent, or shards do not fit their index.
        DamagedFileError: a file is damaged.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise WeightsError(f"{folder} has no config.json, which says how large the network is")
    config = read_object(config_file)
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file() and index.is_file():
        raise WeightsError(f"{folder} holds both {whole.name} and {index.name}; remove the one that is not meant")
    if whole.is_file():
        return StoredNetwork(folder, config, (whole,), read_head(whole))
    if not index.is_file():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".ckpt"))
        there = f"; it holds {', '.join(others)}. Pickles are not opened, nor other variants taken" if others else ""
        raise WeightsError(f"{folder} has no {whole.name}{there}")
    tensors, files = _read_shards(index)
    return StoredNetwork(folder, config, files, tensors)


def _read_shards(index: Path) -> tuple[dict[str, StoredTensor], tuple[Path, ...]]:
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not named or any(Path(str(name)).name != name for name in named.values()):
        raise DamagedFileError(index, "it has no weight_map from tensors to the names of files beside it")
    files = tuple(index.parent / name for name in sorted(set(named.values())))
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise WeightsError(f"{index.parent} lacks {', '.join(absent)}, which {index.name} names")
    heads = {file.name: read_head(file) for file in files}
    found = {key: name for name, head in heads.items() for key in head}
    if found != named or sum(map(len, heads.values())) != len(found):
        differing = sorted(key for key in {**found, **named} if found.get(key) != named.get(key)) or ["a tensor twice"]
        raise WeightsError(f"{index} does not fit its shards: they do not hold {differing[0]} as it says")
    return {key: tensor for head in heads.values() for key, tensor in head.items()}, files


def read_head(file: Path) -> dict[str, StoredTensor]:
    """The tensors that a safetensors file says it holds, if it is as long as they are.

    Raises:
        DamagedFileError: it cannot be read, or has another length.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or not 0 < length <= min(_MAX_HEAD_BYTES, size - 8):
                raise DamagedFileError(file, f"it has {size:,} bytes and no head; a fetch was cut off, or it is no "
                                             "safetensors file")  # fmt: skip
            head = json.loads(opened.read(length))
        head.pop("__metadata__", None)
        tensors = {key: StoredTensor(entry["dtype"], tuple(entry["shape"])) for key, entry in head.items()}
        ends = [entry["data_offsets"][1] for entry in head.values()]
        bits = sum(math.prod(tensor.shape) * _BITS[tensor.dtype] for tensor in tensors.values())
    except (OSError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise DamagedFileError(file, f"its head cannot be read ({error!r})") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        cut = "a fetch was cut off" if size < expected else "there is something behind them"
        raise DamagedFileError(file, f"it has {size:,} bytes, its tensors need {expected:,}; {cut}")
    if bits != 8 * max(ends, default=0):
        raise DamagedFileError(file, "its tensors do not have the sizes that its head says")
    return tensors


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DamagedFileError: it is none.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DamagedFileError(file, f"it cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise DamagedFileError(file, f"it holds a {type(content).__name__}, expected an object")
    return content
