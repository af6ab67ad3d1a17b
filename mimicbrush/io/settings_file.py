"""Settings of a folder that is made in parts. They determine its content, so that a later run can continue it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mimicbrush.errors import DataError
from mimicbrush.io.text import parse_json

_Folder = TypeVar("_Folder")


def read_settings_file(
    file: Path, version: int, build: Callable[[Mapping[str, Any]], _Folder], again: str
) -> _Folder | None:
    """Read the settings of a folder; None if there is no such file yet.

    Args:
        file: JSON with the version as `format`.
        version: the one that this code reads.
        build: makes the result from the values in the file; it may raise errors for values that are not valid.
        again: verb for making such a folder, such as "export".

    Raises:
        DataError: the file cannot be read, or is of another version.
    """
    if not file.is_file():
        return None
    try:
        values = parse_json(file.read_bytes())
        if values["format"] != version:
            raise DataError(
                f"{file} has version {values['format']}, and this version of mimicbrush reads {version}; {again} again"
            )
        return build(values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"{file} cannot be read ({error!r}); {again} again into another folder") from error


def find_setting_differences(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """List the settings of a folder that differ from those of this run, for a message."""
    return [
        f"{name}: {stored.get(name)!r} in the folder, {expected.get(name)!r} now"
        for name in {**stored, **expected}
        if stored.get(name) != expected.get(name)
    ]
