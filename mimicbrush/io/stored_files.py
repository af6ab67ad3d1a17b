"""Files of a folder, listed with their sizes and hashes when they are saved, and compared when they are opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mimicbrush.io.hashing import hash_file

#: Name of a file, with "/" between folders -> its size in bytes, and its SHA-256.
StoredFiles = dict[str, tuple[int, str]]


def list_stored_files(folder: Path, files: Iterable[Path]) -> StoredFiles:
    """List files of a folder with their sizes and hashes, sorted by name.

    Args:
        folder: the names are relative to it.
        files: in the folder, at any depth.
    """
    paths = sorted(set(files))
    with ThreadPoolExecutor() as pool:  # hashing leaves the other threads running
        hashes = pool.map(hash_file, paths)
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, sha256)
        for path, sha256 in zip(paths, hashes, strict=True)
    }


def parse_stored_files(stated: object) -> StoredFiles:
    """Read a list of files as JSON holds it.

    Raises:
        ValueError: it is none, or a name leads out of the folder.
    """
    if not isinstance(stated, Mapping):
        raise ValueError("its files are no object")
    return {name: _parse_entry(name, entry) for name, entry in stated.items()}


def _parse_entry(name: str, entry: Any) -> tuple[int, str]:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"the file {name} is not inside the folder")
    match entry:
        case [int(size), str(sha256)]:
            return size, sha256
    raise ValueError(f"the file {name} has no size and hash")


def find_changed_file(folder: Path, files: StoredFiles, *, deep: bool) -> tuple[str, str] | None:
    """Find a file that is not what was saved.

    Args:
        folder: that holds the files.
        files: as they were saved.
        deep: also compare hashes. This takes a second for a gigabyte or so.

    Returns:
        The name of the first such file, and what is wrong with it, such as "is missing"; None where all are right.

    Raises:
        OSError: a file cannot be read.
    """
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            return name, "is missing"
        if path.stat().st_size != size:
            return name, f"has {path.stat().st_size:,} bytes, {size:,} were saved"
    if deep:
        found = list_stored_files(folder, (folder / name for name in files))
        for name, stored in files.items():
            if found[Path(name).as_posix()] != stored:
                return name, "has another SHA-256 than when it was saved"
    return None
