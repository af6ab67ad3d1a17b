"""Lists of clips from the web: a CSV with address, licence, author, hash and time range."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath

from mimicbrush.errors import InputError
from mimicbrush.io.atomic import write_aside
from mimicbrush.io.download import check_address
from mimicbrush.io.text import make_storable
from mimicbrush.mining.input_list import SHA256, read_seconds
from mimicbrush.mining.plan import VIDEO_SUFFIXES

#: Other files in a folder of clips: the list, the authors, and hashes that the list did not have.
LIST_NAME, CREDITS_NAME, PINS_NAME = "clips.csv", "ATTRIBUTION.md", "pins.json"
_OWN_NAMES = (LIST_NAME, CREDITS_NAME, PINS_NAME)
#: Longest name of a file or folder, in bytes: temporary files of a download have slightly longer names.
_LONGEST_PART = 200
_SIZE = re.compile(r"[0-9]{1,18}")
_NEEDED = ("path", "url", "licence", "attribution")
#: Key of the cells beyond the header: a name that no sensible column has.
_MORE_CELLS = "\0more cells"
#: Licences, and where their text is.
LICENCE_TEXTS = {
    "CC0 1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC BY 4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC BY 3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC BY 2.5": "https://creativecommons.org/licenses/by/2.5/",
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
}


@dataclass(frozen=True)
class Clip:
    """One clip of a list.

    Attributes:
        path: path of the file, relative to the folder of the clips.
        url: its address.
        licence: name of its licence, such as "CC BY 4.0".
        attribution: its authors, in the words that the licence asks for.
        sha256: hex; "" if it is not known yet.
        bytes: its size; "" if it is not known.
        start_s, end_s: time range in seconds that pairs may come from; "": from the beginning, to the end.
    """

    path: str
    url: str
    licence: str
    attribution: str
    sha256: str = ""
    bytes: str = ""
    start_s: str = ""
    end_s: str = ""

    @property
    def num_bytes(self) -> int | None:
        """Size in bytes; None if it is not known."""
        return int(self.bytes) if self.bytes else None


_COLUMNS = [each.name for each in fields(Clip)]


def read_clip_list(path: Path) -> list[Clip]:
    """Read a list of clips: a CSV in UTF-8 with the columns of `Clip`. The first four are required.

    Raises:
        InputError: the list does not exist, cannot be read, or has a wrong entry, which the message names.
    """
    if not path.exists():
        raise InputError(f"there is no list {path}; give a CSV file with the columns {', '.join(_NEEDED)}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey=_MORE_CELLS, restval="", strict=True)
            columns = list(reader.fieldnames or [])
            if twice := sorted({name for name in columns if columns.count(name) > 1}):
                raise InputError(f"{path} has the column {make_storable(twice[0])!r} twice; remove one")
            if missing := [name for name in _NEEDED if name not in columns]:
                raise InputError(f"{path} has no column {missing[0]}; expected the columns {', '.join(_COLUMNS)}")
            rows = [{str(name): str(cell).strip() for name, cell in row.items()} for row in reader]
    except (OSError, UnicodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV in UTF-8 ({make_storable(str(error))})") from error
    clips = [_build_clip(row, f"{path}, entry {number}") for number, row in enumerate(rows, start=1)]
    if not clips:
        raise InputError(f"{path} lists no clips")
    _check_apart(path, clips)
    return clips


def _check_apart(path: Path, clips: Sequence[Clip]) -> None:
    """Check that the paths of the clips do not conflict, also on disks where upper and lower case are equal."""
    names: set[str] = set()
    for clip in clips:
        if clip.path.casefold() in names:
            raise InputError(f"{path}: {clip.path!r} is listed twice (upper and lower case are equal)")
        names.add(clip.path.casefold())
    for clip in clips:
        for folder in PurePosixPath(clip.path.casefold()).parents:
            if str(folder) in names:
                raise InputError(f"{path}: {clip.path!r} is in a folder with the name of another clip")


def _build_clip(row: Mapping[str, str], where: str) -> Clip:
    values = {name: row.get(name, "") for name in _COLUMNS}
    # Without line breaks: the file of the authors has one line for each clip.
    clip = Clip(**values | {name: " ".join(values[name].split()) for name in ("licence", "attribution")})
    clip = replace(clip, sha256=clip.sha256.lower())
    if _MORE_CELLS in row:
        raise InputError(f"{where}: more cells than in the header; put quotes around cells with commas")
    if absent := [name for name in _NEEDED if not getattr(clip, name)]:
        raise InputError(
            f"{where}: {absent[0]} is empty. A clip without licence and author must not be used for training"
        )
    name = PurePosixPath(clip.path)
    is_inside = not name.is_absolute() and ".." not in name.parts and "\\" not in clip.path
    if not is_inside or name.suffix.lower() not in VIDEO_SUFFIXES:
        raise InputError(
            f"{where}: path {make_storable(clip.path, 80)!r}: expected the name of a video inside the folder"
        )
    if clip.path.endswith("/") or not _has_plain_name(name):
        raise InputError(
            f"{where}: path {make_storable(clip.path, 80)!r}: a name must be printable, must not start with a dot, "
            f"must not be {', '.join(_OWN_NAMES)}, and each part can have at most {_LONGEST_PART} bytes"
        )
    try:
        check_address(clip.url)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if clip.sha256 and not SHA256.fullmatch(clip.sha256):
        raise InputError(f"{where}: sha256 {make_storable(clip.sha256, 80)!r}: expected 64 hexadecimal digits")
    if clip.bytes and not (_SIZE.fullmatch(clip.bytes) and int(clip.bytes) > 0):
        raise InputError(f"{where}: bytes {make_storable(clip.bytes, 40)!r}: expected a whole number above 0")
    start_s, end_s = (read_seconds(getattr(clip, each), f"{where}: {each}") for each in ("start_s", "end_s"))
    if end_s is not None and end_s <= (start_s or 0.0):
        raise InputError(f"{where}: end_s={clip.end_s} must be larger than start_s={clip.start_s or 0}")
    return replace(clip, path=str(name))


def _has_plain_name(name: PurePosixPath) -> bool:
    return name.parts[0].casefold() not in map(str.casefold, _OWN_NAMES) and all(
        part.isprintable() and part[0] != "." and len(part.encode()) <= _LONGEST_PART for part in name.parts
    )


def write_clip_list(folder: Path, clips: Sequence[Clip]) -> None:
    """Write the list of the clips in a folder, for the miner, and their authors.

    Args:
        folder: folder of the clips; `LIST_NAME` and `CREDITS_NAME` are written there.
        clips: the clips, with their hashes.
    """

    def write(aside: Path) -> None:
        with aside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(vars(clip) for clip in clips)

    write_aside(folder / LIST_NAME, write)
    makers = _describe_makers(clips)
    write_aside(folder / CREDITS_NAME, lambda aside: aside.write_text(makers, encoding="utf-8"))


def _describe_makers(clips: Sequence[Clip]) -> str:
    lines = [
        "# Authors of these clips",
        "",
        "Name the authors wherever you publish the clips or frames of them. Mined frames are changed: they are",
        "single images, and large ones were reduced.",
        "",
    ]
    for clip in clips:
        text = LICENCE_TEXTS.get(clip.licence)
        licence = f"[{clip.licence}]({text})" if text else clip.licence
        lines.append(
            f"* `{clip.path}`: {clip.attribution}. Licence: {licence}. From <{clip.url}>. SHA-256: `{clip.sha256}`"
        )
    return "\n".join(lines) + "\n"
