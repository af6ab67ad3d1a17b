"""The process in which foreign pickles are opened: each becomes a safetensors file and a list of its tensors.

Started by `untrusted_files` as ``python -I unpickle_process.py (headers|weights) FILE FOLDER [FILE FOLDER ...]``. A
pickle is a program; `weights_only` refuses all but tensors in dicts and lists, and what slips through or crashes, does
so here. What it may take of the machine depends on the size of its file (`limit_resources`).
Nothing of mimicbrush is imported: ``-I`` hides it, and this should start quickly.
"""

from __future__ import annotations

import json
import math
import pickle
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

#: Exit statuses, beside 0. The last line on stderr is then JSON: {"file": ..., "reason": ...}.
REFUSED_STATUS, UNREADABLE, OVERSIZED = 3, 4, 5
WEIGHTS_FILE, LIST_FILE = "weights.safetensors", "tensors.json"

#: A file holds each number once. Tensors that share numbers become copies: so many times the file's size, all together.
MAX_COPIES = 2
# Memory and processor time, beside what grows with the file: it is mapped, and may be copied twice.
_EXTRA_BYTES, _EXTRA_SECONDS, _BYTES_PER_SECOND = 1 << 30, 120, 10 << 20
# Of the list of a file's tensors. The released checkpoint needs a fiftieth.
_MAX_LIST_BYTES, _ENTRY_BYTES = 16 << 20, 100
_MAX_REASON = 2000
_ZIP_MAGIC = b"PK\x03\x04"


class OversizedError(Exception):
    """A file unpacks to more than it holds."""


def main() -> None:
    """Convert each FILE; stop at the first that cannot be."""
    what, *arguments = sys.argv[1:]
    for file, folder in zip(arguments[::2], arguments[1::2], strict=True):
        try:
            limit_resources(Path(file).stat().st_size)
            convert_pickle(Path(file), Path(folder), headers_only=what == "headers")
        except pickle.UnpicklingError as error:
            fail(REFUSED_STATUS, file, error)
        except OversizedError as error:
            fail(OVERSIZED, file, error)
        except Exception as error:  # noqa: BLE001 (whatever a damaged file brings about is passed on as the reason)
            fail(OVERSIZED if _lacks_memory(error) else UNREADABLE, file, error)


def limit_resources(file_bytes: int) -> None:
    """Limit what this process may still take for a file: memory, what it writes, and processor time.

    Args:
        file_bytes: size of the file.
    """
    if sys.platform != "linux":
        return
    import resource

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    for kind, limit in (
        (resource.RLIMIT_AS, mapped + _EXTRA_BYTES + (1 + 2 * MAX_COPIES) * file_bytes),
        (resource.RLIMIT_FSIZE, _EXTRA_BYTES + MAX_COPIES * file_bytes),
        (resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + _EXTRA_SECONDS + file_bytes // _BYTES_PER_SECOND),
    ):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def convert_pickle(file: Path, folder: Path, *, headers_only: bool) -> None:
    """Write the list of a file's tensors into a folder and, unless only headers are asked for, the tensors."""
    with file.open("rb") as opened:
        is_archive = opened.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    size = file.stat().st_size
    stored_bytes = check_archive(file) if is_archive else size
    # Only zip archives can be mapped into memory; the format before PyTorch 1.6 is none.
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive)
    tensors, others = collect_tensors(content)
    check_sizes(tensors, stored_bytes, size)
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


def check_archive(file: Path) -> int:
    """Check that a zip archive is as long as what it says it holds: PyTorch stores, and compresses nothing.

    Returns:
        Bytes of all that is not the pickle itself: of the storages.

    Raises:
        OversizedError: it is not; or an entry is there twice.
        zipfile.BadZipFile: damaged.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    compressed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if compressed is not None:
        raise OversizedError(f"its entry {compressed!a} is compressed, but PyTorch never compresses entries")
    twice = [name for name, count in Counter(entry.filename for entry in entries).items() if count > 1]
    if twice:
        raise OversizedError(f"it has two entries named {twice[0]!a}")
    held, size = sum(entry.file_size for entry in entries), file.stat().st_size
    if held > size:
        raise OversizedError(f"its entries claim {held:,} bytes, but the file has {size:,} bytes")
    return sum(entry.file_size for entry in entries if "/data/" in entry.filename)


def collect_tensors(content: object) -> tuple[list[tuple[tuple[str, ...], torch.Tensor]], list[tuple[list[str], str]]]:
    """List tensors by their path of keys, and by theirs the types of everything else.

    Raises:
        OversizedError: there are too many, as of lists that hold the same lists again and again.
    """
    tensors: list[tuple[tuple[str, ...], torch.Tensor]] = []
    others: list[tuple[list[str], str]] = []
    room = _MAX_LIST_BYTES

    def collect(value: Any, path: tuple[str, ...]) -> None:
        nonlocal room
        room -= _ENTRY_BYTES + sum(map(len, path))
        if room < 0:
            raise OversizedError(f"the list of its contents is longer than {_MAX_LIST_BYTES:,} bytes")
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized:
                tensors.append((path, value.detach().resolve_conj().resolve_neg()))
            else:
                others.append(([*path], f"tensor: {value.device}, {value.layout}, {value.dtype}"))
        elif isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
            for key, inner in value.items():
                collect(inner, (*path, str(key)))
        elif isinstance(value, list | tuple):
            for number, inner in enumerate(value):
                collect(inner, (*path, str(number)))
        else:
            others.append(([*path], type(value).__name__))

    try:
        collect(content, ())
    except RecursionError:
        raise OversizedError("its dicts and lists are nested too deeply, or contain themselves") from None
    return tensors, others


def check_sizes(tensors: list[tuple[tuple[str, ...], torch.Tensor]], stored_bytes: int, file_bytes: int) -> None:
    """Check that tensors are no larger than what is stored of them: each by itself, and all together.

    Args:
        tensors: see `collect_tensors`.
        stored_bytes: of all storages in the file.
        file_bytes: size of the file.

    Raises:
        OversizedError: they are larger.
    """
    total, storages = 0, dict[int, int]()
    for path, tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        # Not what torch says: the product of a hostile shape overflows there.
        needed = math.prod(tensor.shape) * tensor.element_size()
        if needed > storage.nbytes():
            raise OversizedError(
                f"{' / '.join(path)!a} should have {needed:,} bytes, but only {storage.nbytes():,} are stored"
            )
        total += needed
    if sum(storages.values()) > stored_bytes:
        # PyTorch would read on, into whatever follows in the file.
        raise OversizedError(
            f"its tensors claim {sum(storages.values()):,} bytes, but only {stored_bytes:,} are stored"
        )
    if total > MAX_COPIES * file_bytes:
        raise OversizedError(
            f"its tensors share their memory and would need {total:,} bytes without sharing; the file has "
            f"{file_bytes:,} bytes"
        )


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def fail(status: int, file: str, error: Exception) -> None:
    """Say which file and why, and end."""
    reason = f"{type(error).__name__}: {error}".rstrip(": ")[:_MAX_REASON]
    if isinstance(error, OversizedError):
        reason = str(error)
    elif status == OVERSIZED:
        reason = "it needs more memory than a file of its size may take"
    print(json.dumps({"file": file, "reason": reason}), file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
