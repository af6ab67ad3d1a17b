"""Outputs: checked before the work starts, and saved elsewhere if they cannot be written after it."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mimicbrush.errors import InputError, MimicBrushError, OutputError, describe_os_error
from mimicbrush.io.atomic import make_folder, remove_empty_folders
from mimicbrush.io.text import make_storable

_BLOCK_BYTES = 4096


def check_output_file(
    path: Path, option: str = "", *, force: bool = True, needed_bytes: int = 0, is_tried: bool = True
) -> None:
    """Check that a file can be written, before the work starts. Nothing is left behind.

    Args:
        path: the file, in a folder that is there.
        option: how the user names it, such as "--output", for the message.
        force: an older file may be replaced.
        needed_bytes: an estimate of its size.
        is_tried: something is written into the folder, to see whether that works; once for a folder is enough.

    Raises:
        InputError: says what is in the way.
    """
    named = _name(path, option)
    with _refusals_explained(named, path):
        if not path.parent.is_dir():
            problem = "is not a folder" if path.parent.exists() else "does not exist"
            raise InputError(f"{named}: the folder {path.parent} {problem}")
        with suppress(FileNotFoundError):
            path.lstat()  # where the name itself is refused
        if path.is_dir():
            raise InputError(f"{named}: this is a folder, expected a file")
        if path.exists() and not path.is_file():
            raise InputError(f"{named}: this is a pipe or a device, expected a regular file")
        if path.exists() and not force:
            raise InputError(f"{named} already exists; choose another name, or overwrite it with --force")
        if is_tried:
            _try_writing(path.parent)
        _check_space(named, path.parent, needed_bytes)


def check_output_folder(
    folder: Path, option: str = "", *, is_replaced: bool = False, force: bool = True, needed_bytes: int = 0
) -> None:
    """Check that a folder can be made and written to, before the work starts.

    It is tried, since a superuser, a read-only disk and a quota do not show in the permissions. Nothing is left behind.

    Args:
        folder: the folder.
        option: how the user names it, such as "--output", for the message.
        is_replaced: it is written beside, and takes the place of the older one as a whole.
        force: an older folder may be replaced, or written into.
        needed_bytes: an estimate of what will lie in it.

    Raises:
        InputError: says what is in the way.
    """
    named = _name(folder, option)
    with _refusals_explained(named, folder):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{named}: this is a file, expected a folder")
        if folder.exists() and not force:
            raise InputError(f"{named} already exists; choose another name, or replace it with --force")
        made = make_folder(folder)
        try:
            _try_writing(folder)
            if is_replaced:
                _try_writing(folder.absolute().parent)
            _check_space(named, folder, needed_bytes)
        finally:
            remove_empty_folders(made)


def _name(path: Path, option: str) -> str:
    shown = make_storable(str(path))
    return f"{option}{'' if not option or option.endswith('=') else ' '}{shown}"


@contextmanager
def _refusals_explained(named: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            longest = max(len(os.fsencode(part)) for part in path.parts)
            reason = f"the name is too long for this file system (its longest part has {longest} bytes)"
        else:
            error.filename = None  # the name of the temporary file means nothing to the user
            reason = describe_os_error(error)
        raise InputError(f"{named} cannot be written: {reason}") from error
    except MimicBrushError:
        raise
    except ValueError as error:  # a character that no name may have
        raise InputError(f"{named} cannot be written: {error}") from error


def _try_writing(folder: Path) -> None:
    path = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        path.write_bytes(b"\0" * _BLOCK_BYTES)
    finally:
        path.unlink(missing_ok=True)


def _check_space(named: str, folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise InputError(
            f"{named} needs about {needed_bytes / 1e9:.3g} GB, and the disk has {free / 1e9:.3g} GB left; free some "
            "space, or choose another folder"
        )


def write_or_keep(path: Path, write: Callable[[Path], object], kept_name: str = "") -> Path | None:
    """Write a result. If that fails, save it in a new temporary folder, and say so on stderr.

    Args:
        path: a file or a folder.
        write: writes it, and is called again with another path where that fails.
        kept_name: of the file or folder at the other place; "" for the same name.

    Returns:
        Where the result is: `path`, or the other place; None if it could not be written there either.
    """
    try:
        write(path)
        return path
    except (OSError, InputError) as error:
        try:
            kept, problem = keep_elsewhere(kept_name or path.name, write, error)
        except OutputError as second:
            kept, problem = None, str(second)
    print(f"error: {problem}", file=sys.stderr)
    return kept


def write_results(folder: Path, write: Callable[[Path], object], summary: str) -> None:
    """Write the results of a long computation. If that fails, none of them is lost.

    Args:
        folder: where they are wanted.
        write: writes them.
        summary: the most important of them, in words.

    Raises:
        OutputError: they could not be written there; it says where they are kept, and holds the summary.
    """
    try:
        write(folder)
    except (OSError, InputError) as error:
        try:
            _, problem = keep_elsewhere(folder.name, write, error)
        except OutputError as second:
            problem = str(second)
        raise OutputError(f"{problem}\n{summary}") from error


def keep_elsewhere(name: str, write: Callable[[Path], object], error: OSError | InputError) -> tuple[Path, str]:
    """Write a result into a new temporary folder, after it could not be written to its path.

    Args:
        name: of the file or folder.
        write: writes it.
        error: why that could not be written.

    Returns:
        Where the result is, and what happened, in words.

    Raises:
        OutputError: it could not be written there either.
    """
    problem = describe_os_error(error) if isinstance(error, OSError) else str(error)
    try:
        kept = Path(tempfile.mkdtemp(prefix="mimicbrush-")) / name
        write(kept)
    except (OSError, InputError) as second:
        again = describe_os_error(second) if isinstance(second, OSError) else str(second)
        raise OutputError(f"{problem}. The result cannot be saved elsewhere, either: {again}") from second
    return kept, f"{problem}. The result was saved as {kept}"
