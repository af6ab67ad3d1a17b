"""The process in which foreign pickles are opened: each becomes a safetensors file and a list of its tensors.

Started by `untrusted_files` as ``python -I unpickle_process.py (headers|weights) FILE FOLDER [FILE FOLDER ...]``. A
pickle is a program; `weights_only` refuses all but tensors in dicts and lists, and what slips through or crashes, does
so here.
Nothing of mimicbrush is imported: ``-I`` hides it, and this should start quickly.
"""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

#: Exit statuses, beside 0. The last line on stderr is then JSON: {"file": ..., "reason": ...}.
REFUSED_STATUS, UNREADABLE = 3, 4
WEIGHTS_FILE, LIST_FILE = "weights.safetensors", "tensors.json"


def main() -> None:
    """Convert each FILE; stop at the first that cannot be."""
    what, *arguments = sys.argv[1:]
    for file, folder in zip(arguments[::2], arguments[1::2], strict=True):
        try:
            convert_pickle(Path(file), Path(folder), headers_only=what == "headers")
        except pickle.UnpicklingError as error:
            fail(REFUSED_STATUS, file, error)
        except Exception as error:  # noqa: BLE001 (whatever a damaged file brings about is passed on as the reason)
            fail(UNREADABLE, file, error)


def convert_pickle(file: Path, folder: Path, *, headers_only: bool) -> None:
    """Write the list of a file's tensors into a folder and, unless only headers are asked for, the tensors."""
    import torch
    from safetensors.torch import save_file

    # Only zip archives can be mapped into memory; the format before PyTorch 1.6 is none.
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    tensors: list[tuple[tuple[str, ...], torch.Tensor]] = []
    others: list[tuple[tuple[str, ...], str]] = []

    def collect(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, torch.Tensor):
            tensors.append((path, value.detach()))
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(inner, (*path, str(key)))
        elif isinstance(value, list | tuple):
            for number, inner in enumerate(value):
                collect(inner, (*path, str(number)))
        else:
            others.append((path, type(value).__name__))

    collect(content, ())
    listed = [[path, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for path, tensor in tensors]
    (folder / LIST_FILE).write_text(json.dumps({"tensors": listed, "others": others}))
    if headers_only:
        return
    # safetensors takes no tensor that shares memory with another, or that skips parts of its own.
    users = Counter(tensor.untyped_storage().data_ptr() for _, tensor in tensors)
    for number, (path, tensor) in enumerate(tensors):
        storage = tensor.untyped_storage()
        if users[storage.data_ptr()] > 1 or storage.nbytes() != tensor.nbytes or not tensor.is_contiguous():
            tensors[number] = (path, tensor.clone(memory_format=torch.contiguous_format))
    save_file({str(number): tensor for number, (_, tensor) in enumerate(tensors)}, folder / WEIGHTS_FILE)


def fail(status: int, file: str, error: Exception) -> None:
    """Say which file and why, and end."""
    print(json.dumps({"file": file, "reason": f"{type(error).__name__}: {error}".rstrip(": ")}), file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
