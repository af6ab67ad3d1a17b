"""Files and folders that get their name only when they are whole, and paths that stay inside a folder."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimicbrush.errors import InputError

#: What `write_aside` leaves beside its files when the process is killed.
ASIDE_PATTERN = ".*.tmp"

# It can be read only by setting it, for the whole process: so once, before there are threads that write files.
_UMASK = os.umask(0)
os.umask(_UMASK)


def path_inside(root: Path, name: str) -> Path:
    """Resolve a path that a list names relative to its own folder, and refuse one that leaves it.

    Args:
        root: an existing folder.
        name: relative to it.

    Raises:
        InputError: it leaves the folder, by "..", as an absolute path or through a link.
    """
    path = root / name
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, characters that no path may have
        raise InputError(f"{name!r} is no path ({error})") from error
    if not inside:
        raise InputError(f"{name!r} leads out of {root}")
    return path


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that gets its name only when it is whole and on the disk.

    Args:
        path: the file; an older one stays as it is until the new one replaces it.
        write: called with a hidden name in the same folder (`ASIDE_PATTERN`), to write the content there; what
            it returns is not looked at. Where it raises, nothing is left behind.
    """
    # No suffix of the file's own: whoever collects for instance *.parquet must not meet half a file.
    # Random, not the process's number: in containers on a shared disk these are alike.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    if os.name == "posix":  # the new name must be on the disk, too; Windows opens no folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: Any, *, ensure_ascii: bool = True) -> None:
    """Write a value as a JSON file, as `write_aside` does: one space of indentation, a newline at the end, UTF-8.

    Args:
        path: the file.
        value: what `json` can write.
        ensure_ascii: whether characters beyond ASCII are written as escapes, so that any program reads them.

    Raises:
        ValueError: a number in it is NaN or infinite, which JSON has no word for; nothing is written then.
    """
    text = json.dumps(value, indent=1, ensure_ascii=ensure_ascii, allow_nan=False) + "\n"
    write_aside(path, lambda aside: aside.write_bytes(text.encode()))


def apply_umask(folder: Path) -> None:
    """Give the files of a folder the permissions of the umask; safetensors writes them for their owner alone."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~_UMASK)


def replace_folder(final: Path, write: Callable[[Path], object]) -> None:
    """Write a folder that gets its name only when it is whole; an older one stays until then.

    Args:
        final: the folder.
        write: called with a name beside it, to make the folder there. Where it raises, nothing is left behind.
    """
    final = final.absolute()
    aside, old = (final.with_name(f".{final.name}.{kind}.tmp") for kind in ("new", "old"))
    if old.exists() and not final.exists():
        old.rename(final)  # killed between the two renames below
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        write(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if final.exists():
        final.rename(old)
    aside.rename(final)
    shutil.rmtree(old, ignore_errors=True)
