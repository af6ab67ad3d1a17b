"""Weights out of files of any format, without trusting them.

safetensors are read as they are. Everything else is a pickle and is opened by another process (`unpickle_process`);
this process sees only the safetensors file that comes out of it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mimicbrush.errors import WeightsError
from mimicbrush.io.text import make_storable
from mimicbrush.models.pretrained.files import check_config_counts, check_head, read_object
from mimicbrush.models.pretrained.stored_weights import StateDict
from mimicbrush.pipelines.conversion import unpickle_process

#: What a file holds: its tensors by their path of keys (see `TensorEntry`).
Content = dict[tuple[str, ...], torch.Tensor]

PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
#: Enough for the 10 GB of the released checkpoint on a slow disk.
TIMEOUT_S = 1800.0

# What the libraries call the file of a network, and of the list of its shards; the safe format first.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file.

    Attributes:
        path: its keys from the outermost dict inwards; a plain state dict has one each.
        shape: of the tensor.
        dtype: as PyTorch calls it, for instance "float16".
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str


def read_files(
    files: Sequence[Path],
    *,
    scratch: Path | None = None,
    timeout_s: float = TIMEOUT_S,
) -> list[Content]:
    """Read the tensors of some files, each by its path of keys (see `TensorEntry`).

    Args:
        files: safetensors, or pickles.
        scratch: an existing folder with room for a copy of the pickles (default: the system's for temporary files).
        timeout_s: for all pickles together.

    Raises:
        WeightsError: a file is absent, damaged, of unknown type, holds more than tensors or two under one name, or
            took too long.
    """
    unsafe = _check_types(files)
    found: dict[Path, Content] = {}
    # Mapped files may vanish on POSIX; Windows keeps those that are in use, and sweeps them out some day.
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".weights-", ignore_cleanup_errors=True) as room:
        folders = _convert(unsafe, Path(room), "weights", timeout_s)
        for file, folder in folders.items():
            listed = _listed(folder, file)
            if listed["others"]:
                names = ", ".join(make_storable(f"{'.'.join(path)} ({kind})") for path, kind in listed["others"][:10])
                raise WeightsError(f"{file} contains more than weights: {names}")
            tensors = _read_safetensors(folder / unpickle_process.WEIGHTS_FILE, named=file)
            paths = [tuple(path) for path, _, _ in listed["tensors"]]
            found[file] = {path: tensors[str(number)] for number, path in enumerate(paths)}
    for file in files:
        if file not in unsafe:
            found[file] = {(key,): tensor for key, tensor in _read_safetensors(file, named=file).items()}
    return [found[file] for file in files]


def read_groups(groups: Mapping[str, Sequence[Path]], *, scratch: Path | None = None) -> dict[str, list[Content]]:
    """`read_files` for several networks, each in one or more files: all pickles are opened in one go."""
    found = iter(read_files([file for files in groups.values() for file in files], scratch=scratch))
    return {name: [next(found) for _ in files] for name, files in groups.items()}


def read_state_dict(files: Sequence[Path]) -> StateDict:
    """Read the state dict that a file holds, or several files (shards) hold together.

    Raises:
        WeightsError: see `read_files`; or a file nests its tensors deeper.
    """
    return join_shards(files, read_files(files))


def join_shards(files: Sequence[Path], contents: Sequence[Content]) -> StateDict:
    """Join what `read_files` found in some files to one state dict.

    Raises:
        WeightsError: a file holds something else; or see `check_shards`.
    """
    joined: StateDict = {}
    for file, content in zip(files, contents, strict=True):
        deep = [path for path in content if len(path) != 1]
        if deep:
            raise WeightsError(
                f"{file} is not a plain state dict: it contains {' / '.join(deep[0]) or 'a bare tensor'}"
            )
        joined |= {key: tensor for (key,), tensor in content.items()}
    check_shards(files, contents)
    return joined


def check_shards(files: Sequence[Path], contents: Sequence[Iterable[tuple[str, ...]]]) -> None:
    """Check that the files of one network hold each key once, and the keys of their index, where there is one.

    Args:
        files: see `weights_of`.
        contents: for each of them its tensors' paths of keys (see `TensorEntry`).

    Raises:
        WeightsError: names the key and the files.
    """
    place: dict[str, Path] = {}
    for file, content in zip(files, contents, strict=True):
        for path in content:
            key = "/".join(path)
            if key in place:
                raise WeightsError(f"{key} appears twice: in {place[key]} and in {file}")
            place[key] = file
    for index in sorted({found for file in files for found in file.parent.glob("*.index.json")}):
        named = shards_of(index)
        if set(named.values()) != set(files):
            continue  # of other files
        for key in [*named, *place]:
            if named.get(key) != place.get(key):
                should, does = (str(where.get(key, "no file")) for where in (named, place))
                raise WeightsError(
                    f"{index} does not fit its shards: it says that {key} is in {should}, but it is in {does}"
                )


def shards_of(index: Path) -> dict[str, Path]:
    """Read which file holds each key, as an index file says.

    Raises:
        WeightsError: damaged, or it names a file that does not lie beside it.
    """
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise WeightsError(f"{index} is damaged: it has no weight_map from keys to file names")
    for key, name in named.items():
        # By its name, not by where it leads: in a Hugging Face cache every file is a link out of its folder.
        if name in ("", "..") or Path(name).name != name:
            raise WeightsError(
                f"{index}: the shard of {key} is {name!r}, expected the name of a file in the same folder"
            )
    return {key: index.parent / name for key, name in named.items()}


def read_entries(file: Path, *, timeout_s: float = TIMEOUT_S) -> list[TensorEntry]:
    """List what a file holds, without reading the weights of a safetensors file or copying those of a pickle.

    Raises:
        WeightsError: see `read_files`; other things than tensors are left out.
    """
    if not _check_types([file]):
        check_head(file)
        try:
            with safe_open(file, "pt") as opened:
                slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
                return [
                    TensorEntry(
                        (key,), tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype())
                    )
                    for key, part in slices.items()
                ]
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
    with tempfile.TemporaryDirectory(prefix="mimicbrush-") as room:
        folder = _convert([file], Path(room), "headers", timeout_s)[file]
        listed = _listed(folder, file)
    return [TensorEntry(tuple(path), tuple(shape), dtype) for path, shape, dtype in listed["tensors"]]


def weights_of(given: Path, subfolder: str | None = None) -> list[Path]:
    """Find the files with a network's weights: several where it was saved in shards.

    Args:
        given: a file, or a folder as diffusers or transformers write it.
        subfolder: looked into first, if the folder has it ("unet" for a Stable Diffusion folder).

    Raises:
        WeightsError: there are none, or more than one kind of them; or see `shards_of`.
    """
    if given.is_file() and given.suffix in (*PICKLES, ".safetensors"):
        return [given]
    if given.is_file() and given.suffix != ".json":
        # A config stands for its folder; any other file was meant itself.
        raise WeightsError(
            f"{given} is not a weights file; expected a folder, or a file that ends in "
            f"{', '.join(('.safetensors', *PICKLES))}"
        )
    folder = _folder_of(given, subfolder)
    for suffix in _SUFFIXES:
        for stem in _STEMS:
            if (folder / f"{stem}{suffix}").is_file():
                return [folder / f"{stem}{suffix}"]
            index = folder / f"{stem}{suffix}.index.json"
            if index.is_file():
                return sorted(set(shards_of(index).values()))
    there = sorted(path for path in folder.iterdir() if path.suffix in (*PICKLES, ".safetensors"))
    if len(there) == 1:
        return there
    problem = (
        f"several weights files, name one of them: {', '.join(path.name for path in there)}" if there else "no weights"
    )
    raise WeightsError(f"{folder} contains {problem}")


def config_of(given: Path, subfolder: str | None = None) -> dict[str, Any]:
    """Read the config.json of a network: in its folder, or beside its file (see `weights_of`).

    Raises:
        WeightsError: absent or damaged, or it asks for a boundless network.
    """
    file = _folder_of(given, subfolder) / "config.json"
    if not file.is_file():
        raise WeightsError(f"{given}: {file} does not exist, but it is needed for the size of the network")
    config = read_object(file)
    check_config_counts(config, file)
    return config


def _folder_of(given: Path, subfolder: str | None) -> Path:
    if not given.exists():
        raise WeightsError(f"{given}: no such file or folder")
    if given.is_file():
        return given.parent
    return given / subfolder if subfolder is not None and (given / subfolder).is_dir() else given


def _check_types(files: Sequence[Path]) -> list[Path]:
    """List those files that are pickles."""
    for file in files:
        if not file.is_file():
            raise WeightsError(f"{file}: no such file")
        if file.suffix not in (*PICKLES, ".safetensors"):
            raise WeightsError(
                f"{file} is of an unknown type; expected a file that ends in {', '.join(('.safetensors', *PICKLES))}"
            )
    return [file for file in files if file.suffix in PICKLES]


def _read_safetensors(file: Path, *, named: Path) -> StateDict:
    check_head(file)
    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, RuntimeError) as error:  # the last: shapes that PyTorch cannot hold
        raise _damaged(named, error) from error


def _convert(files: list[Path], room: Path, what: str, timeout_s: float) -> dict[Path, Path]:
    """Let another process convert pickles; return the folder of what came out of each file."""
    folders = {file: room / str(number) for number, file in enumerate(files)}
    if not files:
        return folders
    command = [sys.executable, "-I", unpickle_process.__file__, what]
    for file, folder in folders.items():
        folder.mkdir()
        command += [str(file.absolute()), str(folder)]
    # PyTorch knows variables that change what weights_only means; here it means what it says.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_FORCE_")}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise WeightsError(f"{', '.join(map(str, files))}: could not be read within {timeout_s:g} s") from None
    if done.returncode == 0:
        return folders
    try:
        problem = json.loads(done.stderr.strip().splitlines()[-1])
        file, reason = Path(problem["file"]), problem["reason"]
    except (IndexError, ValueError, TypeError, KeyError):
        end = (
            make_storable(done.stderr.strip()[-400:])
            or "no message; it took too much memory or time for such small files"
        )
        raise WeightsError(
            f"{', '.join(map(str, files))}: the reading process ended with status {done.returncode}: {end}"
        ) from None
    if done.returncode == unpickle_process.OVERSIZED:
        raise WeightsError(
            f"{file} is refused: {make_storable(reason)}. It would unpack to more data than it contains, which no "
            "file of weights does. Ask its authors for the weights as .safetensors"
        )
    if done.returncode == unpickle_process.REFUSED_STATUS:
        raise WeightsError(
            f"{file} is refused: it contains more than tensors in dicts and lists ({_short(reason)}). Such a pickle "
            "can run code when it is loaded; none of it was run. Ask its authors for the weights as .safetensors."
        )
    raise _damaged(file, _short(reason))


def _listed(folder: Path, file: Path) -> dict[str, Any]:
    """Read what `_convert` has listed of a file."""
    listed: dict[str, Any] = json.loads((folder / unpickle_process.LIST_FILE).read_text())
    for path, count in Counter(tuple(path) for path, _, _ in listed["tensors"]).items():
        if count > 1:  # as of a number and of a text that look alike
            raise WeightsError(f"{file} contains {count} tensors with the same name, {make_storable(' / '.join(path))}")
    return listed


def _damaged(file: Path, reason: object) -> WeightsError:
    why = make_storable(str(reason))
    return WeightsError(f"{file} cannot be read: it is damaged or incomplete ({why}); download it again")


def _short(reason: str) -> str:
    """Shorten PyTorch's long messages to what matters."""
    telling = re.search(r"(unsupported|blocked)[^\n]*?(?= whose|\.? by default|\n|$)", reason, re.IGNORECASE)
    return make_storable(telling[0] if telling else reason.strip().splitlines()[0].split(". ")[0])


_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
