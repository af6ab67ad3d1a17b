"""The folder of an export: it has parts with some pairs each, and the marker of a part is written last.

A folder contains

* ``train/`` and ``heldout/``: the files that the trainer reads;
* ``LICENCES.txt``: the licences of the mined files;
* ``records/export.json``: the settings that decide the content, written first;
* ``records/markers/train-000000.json``: the marker of a part: its samples, its refused pairs, and the size and SHA-256
  of each file; a part with a marker is finished;
* ``records/begun.json``: the files of a part that has no marker yet;
* ``records/``: all samples, mined files and refused pairs as JSON lines, and ``summary.json``, written at the end.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mimicbrush.errors import DataError, InputError
from mimicbrush.io.atomic import ASIDE_PATTERN, path_inside, write_json
from mimicbrush.io.settings_file import find_setting_differences, read_settings_file
from mimicbrush.io.text import parse_json
from mimicbrush.mining.exports.formats.registry import FORMATS
from mimicbrush.mining.exports.plan import SPLITS, ExportPart
from mimicbrush.mining.exports.samples import ExportedPair

#: Version of the content of a folder.
_FORMAT = 1
RECORDS = "records"
_SETTINGS_FILE = f"{RECORDS}/export.json"
_MARKERS = f"{RECORDS}/markers"
_BEGUN_FILE = f"{RECORDS}/begun.json"


@dataclass(frozen=True)
class ExportFolder:
    """The folder of an export, finished or not.

    Attributes:
        path: path of the folder.
        settings: name -> value of everything that decides the content.
    """

    path: Path
    settings: Mapping[str, Any]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the settings, hex."""
        return _hash_values(self.settings)

    def begin(self) -> None:
        """Write the settings, or check that an earlier run had the same, and remove its incomplete files.

        Raises:
            InputError: the folder contains other files, or an export with other settings.
            DataError: the settings of the earlier run cannot be read.
        """
        earlier = read_export_folder(self.path)
        if earlier is None:
            # If an earlier run was stopped before it wrote the settings, only the folder of the records exists.
            if any(path.name[0] != "." and path.name != RECORDS for path in self.path.iterdir()):
                raise InputError(f"--output {self.path} has files that do not belong to an export; use another folder")
            (self.path / _MARKERS).mkdir(parents=True, exist_ok=True)
            write_json(self.path / _SETTINGS_FILE, {"format": _FORMAT, "settings": dict(self.settings)})
        elif differences := find_setting_differences(earlier.settings, json.loads(json.dumps(self.settings))):
            lines = "\n".join(f"  {each}" for each in differences)
            raise InputError(
                f"--output {self.path} has an export with other settings:\n{lines}\n"
                "Use the same options to continue, or another folder"
            )
        for folder in (".", RECORDS, _MARKERS, *SPLITS):
            for aside in (self.path / folder).glob(ASIDE_PATTERN):
                aside.unlink()
        self._remove_begun()

    def _remove_begun(self) -> None:
        """Remove the files of an incomplete part: a trainer would use them as complete samples."""
        begun = self.path / _BEGUN_FILE
        try:
            values = parse_json(begun.read_bytes())
            name, files = str(values["name"]), [str(file) for file in values["files"]]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{begun} cannot be read ({error!r}); export again into another folder") from error
        if not self.marker_path(name).is_file():
            for file in files:
                path = path_inside(self.path, file)
                path.unlink(missing_ok=True)
                _aside_of(path).unlink(missing_ok=True)
        begun.unlink()

    @property
    def has_begun(self) -> bool:
        """Whether a stopped run has left an incomplete part."""
        return (self.path / _BEGUN_FILE).exists()

    def marker_path(self, name: str) -> Path:
        """Return the path of a part's marker."""
        return self.path / _MARKERS / f"{name}.json"

    def read_marker(self, name: str) -> dict[str, Any] | None:
        """Read the marker of a part; None if it is missing, was changed, or has other settings."""
        try:
            marker = read_sealed(self.marker_path(name))
        except (OSError, ValueError):
            return None
        return marker if marker["fingerprint"] == self.fingerprint else None

    def list_marked(self) -> list[str]:
        """List the parts that have a marker."""
        return sorted(path.stem for path in (self.path / _MARKERS).glob("*-*.json"))

    def find_done(self, part: ExportPart) -> dict[str, Any] | None:
        """Read the marker of a part; None if the part is incomplete, or a file is missing or has another length."""
        marker = self.read_marker(part.name)
        if marker is None or len(marker["rows"]) != len(part.places):
            return None
        try:
            is_whole = all((self.path / file).stat().st_size == size for file, (size, _) in marker["files"].items())
        except OSError:
            return None
        return marker if is_whole else None

    def write_part(self, part: ExportPart, exported: Sequence[ExportedPair]) -> dict[str, Any]:
        """Write the files of a part and then its marker; return the marker."""
        files = join_files(part, exported, FORMATS[self.settings["format"]].in_tars)
        marker = self.marker_path(part.name)
        # A pair that an earlier run could read may be unreadable now. A trainer would still find its files.
        outdated = [file for file in (self.read_marker(part.name) or {"files": {}})["files"] if file not in files]
        write_json(self.path / _BEGUN_FILE, {"name": part.name, "files": [*files, *outdated]})
        marker.unlink(missing_ok=True)
        for file in outdated:
            path_inside(self.path, file).unlink(missing_ok=True)
        for folder in {(self.path / file).parent for file in files}:
            folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            _write_whole(self.path / file, content)
        values = {
            "fingerprint": self.fingerprint,
            "rows": [each.row for each in exported],
            "files": {file: [len(content), hashlib.sha256(content).hexdigest()] for file, content in files.items()},
        }
        write_sealed(marker, values)
        (self.path / _BEGUN_FILE).unlink()
        return values


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Write a record as JSON, with a hash of its values, so that `read_sealed` detects any change."""
    write_json(path, {**values, "sha256": _hash_values(values)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a record of `write_sealed`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged or was changed.
    """
    values = parse_json(path.read_bytes())
    if not isinstance(values, dict) or values.pop("sha256", None) != _hash_values(values):
        raise ValueError("it has changed since it was written")
    return values


def _hash_values(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_export_folder(path: Path) -> ExportFolder | None:
    """Read the settings of an export; None if there is none.

    Raises:
        DataError: the settings cannot be read, or have another version.
    """

    def build(values: Mapping[str, Any]) -> ExportFolder:
        folder = ExportFolder(path, dict(values["settings"]))
        if folder.settings["format"] not in FORMATS:
            raise ValueError(f"unknown format {folder.settings['format']!r}")
        return folder

    return read_settings_file(path / _SETTINGS_FILE, _FORMAT, build, "export")


def join_files(part: ExportPart, exported: Sequence[ExportedPair], in_tars: bool) -> dict[str, bytes]:
    """Join the files of a part: path in the export -> content; with `in_tars`, into one tar with a fixed date."""
    files = {path: content for each in exported for path, content in each.files.items()}
    if not in_tars:
        return {f"{part.split}/{path}": content for path, content in files.items()}
    if not files:
        return {}
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return {f"{part.split}/{part.name}.tar": tar.getvalue()}


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, and rename it when it is complete."""
    aside = _aside_of(path)
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:  # if the disk is full, Python does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error


def _aside_of(path: Path) -> Path:
    """Return the hidden name of an incomplete file: always the same one, so that the next run finds it."""
    return path.with_name(f".{path.name}.tmp")
