"""Stores and checks the sizes and hashes of the files in a folder of weights. Imports no torch.

Without this, a folder with missing or exchanged files could be opened as another model: networks of two runs have the
same shapes, and without its LoRA file, FLUX.2 klein is its base model. `pipelines.hub` writes the checksums when a
pipeline is saved (also by `training.export`); `pipelines.folder` checks them when it is opened.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from mimicbrush.errors import WeightsError
from mimicbrush.io.atomic import write_json
from mimicbrush.io.stored_files import StoredFiles, find_changed_file, list_stored_files, parse_stored_files
from mimicbrush.io.text import make_storable
from mimicbrush.models.pretrained.files import DamagedFileError, read_object

#: In a pipeline folder; FLUX.2 klein states its files in imitation.json.
CHECKSUMS_FILE = "checksums.json"
#: The key of the files in either.
FILES_KEY = "files"
#: What to do about a folder whose files are not those that were saved.
HOW_TO_MEND = "Copy the whole folder again, or write it again with `mimicbrush export RUN`"
_SUFFIXES = (".json", ".safetensors")


def list_weights(folder: Path, parts: list[str]) -> StoredFiles:
    """List files of a folder, with their sizes and hashes.

    Args:
        folder: of the model.
        parts: names of files in it, which may be absent, and of folders, whose JSON and safetensors files count.
    """
    found: list[Path] = []
    for part in parts:
        path = folder / part
        inside = path.rglob("*") if path.is_dir() else [path]
        found += [each for each in inside if each.suffix in _SUFFIXES and each.is_file()]
    return list_stored_files(folder, found)


def write_checksums(folder: Path, parts: list[str]) -> None:
    """Write `CHECKSUMS_FILE`; for the arguments see `list_weights`."""
    write_json(folder / CHECKSUMS_FILE, {FILES_KEY: list_weights(folder, parts)})


def check_checksums(folder: Path, *, deep: bool = False, without: Collection[str] = ()) -> None:
    """Check a folder against its `CHECKSUMS_FILE`; older folders have none, and pass.

    Args:
        folder: of a pipeline.
        deep: read every byte; otherwise only sizes are compared.
        without: names of components whose files do not matter.

    Raises:
        WeightsError: a file is missing or is not what was saved; says which, and what to do.
    """
    record = folder / CHECKSUMS_FILE
    if not record.is_file():
        return
    try:
        stated = read_object(record).get(FILES_KEY)
    except DamagedFileError as error:
        raise DamagedFileError(record, f"{error.reason}. {HOW_TO_MEND}") from error
    files = read_stated_files(record, stated)
    needed = {name: each for name, each in files.items() if name.partition("/")[0] not in without}
    check_stored_files(record, needed, deep=deep)


def read_stated_files(record: Path, stated: object) -> StoredFiles:
    """Read what a JSON file states as its files.

    Raises:
        DamagedFileError: it is no list of files.
    """
    try:
        return parse_stored_files(stated)
    except ValueError as error:
        raise DamagedFileError(record, f"{error}. {HOW_TO_MEND}") from error


def check_stored_files(record: Path, files: StoredFiles, *, deep: bool) -> None:
    """Check the folder of a JSON file against the files that this states.

    Raises:
        WeightsError: see `check_checksums`.
    """
    folder = record.parent
    try:
        found = find_changed_file(folder, files, deep=deep)
    except OSError as error:
        raise WeightsError(f"{folder} cannot be checked: {error}. {HOW_TO_MEND}") from error
    if found is not None:
        name, fault = found
        raise WeightsError(
            f"{folder} has other files than those that were saved: {make_storable(name)} {fault}. {HOW_TO_MEND}. If "
            f'you changed it on purpose, remove this file from "{FILES_KEY}" in {record.name}'
        )
