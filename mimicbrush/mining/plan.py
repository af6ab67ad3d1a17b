"""The plan of a mined folder: its input files and their shards. A later run can only add files and shards."""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from mimicbrush.data.manifest import PLAN_NAME
from mimicbrush.errors import DataError, InputError
from mimicbrush.io.text import make_storable
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.segmented_images import (
    JPEG_SUFFIXES,
    annotation_names,
    find_annotation,
    is_storable_name,
    make_name_storable,
)
from mimicbrush.ops.similarity import SSIM_DEFINITION

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi")
ARCHIVE_SUFFIXES = (".tar",)
_PLAN_FORMAT = 2
#: Longest suffix that is counted, in characters; a longer one is probably text after a dot.
_LONGEST_SUFFIX = 16


@dataclass(frozen=True)
class Item:
    """An input of the miner: a video, a photograph with segments, a tar, or a file that is refused without opening it.

    Attributes:
        path: relative to the input folder, with forward slashes.
        kind: "video", "image" (with a .json of the same name), "archive", or "refused" (never opened).
        size: bytes, of an image together with its .json; -1 for "refused".
        reason, detail: for "refused": a key of `refusals.QUARANTINED`, and a text.
        sha256, licence, url: values from the input list (for a tar: of all its files); "" if there are none.
        start_s, end_s: for a video: the time range that pairs may come from; None: to its end.
    """

    path: str
    kind: str
    size: int = -1
    reason: str = ""
    detail: str = ""
    sha256: str = ""
    licence: str = ""
    url: str = ""
    start_s: float = 0.0
    end_s: float | None = None

    @property
    def row_kind(self) -> str:
        """The `kind` of this input's rows in the manifest; "" for a refused file."""
        return {"video": "video", "image": "image", "archive": "image"}.get(self.kind, "")

    @property
    def span_s(self) -> tuple[float, float]:
        """The time range of a video to mine: start and end in seconds."""
        return self.start_s, math.inf if self.end_s is None else self.end_s

    def to_json(self) -> dict[str, Any]:
        """Return the values. A time range is only included if there is one: plans of earlier versions had none."""
        is_whole = self.span_s == (0.0, math.inf)
        return {name: value for name, value in vars(self).items() if not (is_whole and name in ("start_s", "end_s"))}


@dataclass
class Plan:
    """The shards of an output folder, each a list of inputs, and the options they are mined with.

    Attributes:
        input_root: the input folder, relative to the output folder; the paths of the inputs are relative to it.
        options: the values of `MiningOptions` by name.
        ssim_definition: the definition of SSIM of the version that started the folder.
        shards: the inputs of each shard.
    """

    input_root: str
    options: dict[str, Any]
    ssim_definition: str
    shards: list[list[Item]] = field(default_factory=list)

    def to_json(self) -> str:
        """Return the plan as the text of its file."""
        shards = [[item.to_json() for item in shard] for shard in self.shards]
        return json.dumps({"format": _PLAN_FORMAT, **vars(self), "shards": shards}, indent=1) + "\n"


def suffix_of(name: str) -> str:
    """Return the lower-case suffix of a file name for counting, or "(none)"."""
    suffix = make_storable(PurePosixPath(name).suffix.lower())
    return suffix if 0 < len(suffix) <= _LONGEST_SUFFIX else "(none)"


def find_items(root: Path, output: Path) -> tuple[list[Item], Counter[str]]:
    """Walk the input folder, and list the files that can be mined.

    Args:
        root: the input folder, resolved.
        output: the output folder, resolved; it is skipped, as every other mined folder.

    Returns:
        The inputs, sorted by path, and the number of other files by suffix.

    Raises:
        InputError: the input folder itself cannot be read.
    """
    items: list[Item] = []
    ignored: Counter[str] = Counter()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            subfolders, names = _list_folder(folder)
        except OSError as error:
            if folder == root:
                raise InputError(f"cannot read the input {root} ({error.strerror}); check its permissions") from error
            items.append(refuse_item(folder.relative_to(root), "unreadable", error.strerror or str(error)))
            continue
        for name, is_link in subfolders:
            subfolder = folder / name
            if not is_link:
                if subfolder != output and not _is_mined_folder(subfolder):
                    waiting.append(subfolder)
            elif not _is_inside(subfolder, root):
                detail = "a link to a folder outside the input; copy the folder, or mine it separately"
                items.append(refuse_item(subfolder.relative_to(root), "outside_link", detail))
        beside = {next((each for each in annotation_names(name) if each in names), None) for name in names}
        for name in names:
            item = find_item(folder / name, root)
            if item is not None:
                items.append(item)
            elif name not in beside:
                ignored[suffix_of(name)] += 1
    return sorted(items, key=lambda item: item.path), ignored


def _list_folder(folder: Path) -> tuple[list[tuple[str, bool]], set[str]]:
    """List the subfolders of a folder, as (name, is it a link), and the names of everything else in it."""
    with os.scandir(folder) as entries:
        kinds = [(entry.name, _is_folder(entry), entry.is_symlink()) for entry in entries]
    return [(name, is_link) for name, is_folder, is_link in kinds if is_folder], {
        name for name, is_folder, _ in kinds if not is_folder
    }


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circular link, or one without permission
        return False


def find_item(path: Path, root: Path) -> Item | None:
    """Describe a file below `root` as an input; None if files with such a name are not mined."""
    name = path.relative_to(root)
    try:
        return _describe_file(path, name, root)
    except OSError as error:
        return refuse_item(name, "unreadable", error.strerror or str(error))


def _describe_file(path: Path, name: Path, root: Path) -> Item | None:
    suffix = path.suffix.lower()
    files = [path]
    if suffix in VIDEO_SUFFIXES:
        kind = "video"
    elif suffix in ARCHIVE_SUFFIXES:
        kind = "archive"
    elif suffix in JPEG_SUFFIXES and os.path.lexists(find_annotation(path)):
        kind = "image"
        files = [path, find_annotation(path)]
    else:
        return None
    if not is_storable_name(name.as_posix()):
        return refuse_item(name, "bad_name", "rename the file")
    size = 0
    for file in files:
        if file.is_symlink() and not _is_inside(file, root):
            return refuse_item(
                name, "outside_link", f"{file.name} is a link to a file outside the input, or a broken link"
            )
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            return refuse_item(name, "not_a_file", f"{file.name} is a folder, a pipe, a socket or a device")
        size += status.st_size
    return Item(name.as_posix(), kind, size)


def refuse_item(name: Path, reason: str, detail: str) -> Item:
    """Describe an input that is not opened: its only row has the reason."""
    return Item(make_name_storable(name.as_posix()), "refused", reason=reason, detail=make_storable(detail))


def _is_inside(path: Path, root: Path) -> bool:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a broken or circular link
        return False
    return target.is_relative_to(root)


def _is_mined_folder(folder: Path) -> bool:
    try:
        return (folder / PLAN_NAME).is_file() and (folder / "manifest").is_dir() and (folder / "shards").is_dir()
    except OSError:  # a folder that may not be read is refused when it is listed
        return False


#: Options that earlier versions did not have, with the values that describe what those versions did.
_EARLIER = {"hdr": "keep", "interlaced": "keep"}


def add_earlier_options(output: Path, options: MiningOptions) -> tuple[MiningOptions, list[str]]:
    """Set options that did not exist yet when a mined folder was started to what that version did.

    All shards of a folder are mined with the same options, also if a newer version adds some of them.

    Returns:
        The options, and notes for the user about options whose values were changed.
    """
    plan = read_plan(output / PLAN_NAME)
    missing: dict[str, Any] = {}
    if plan is not None:
        missing = {name: did for name, did in _EARLIER.items() if name not in plan.options}
    notes = [
        f"{name}={getattr(options, name)} is not possible here: {output} was started with {name}={did} by an earlier "
        f"version. Use {name}={did}, or a new output"
        for name, did in missing.items()
        if getattr(options, name) != did
    ]
    return replace(options, **missing), notes


def make_plan(output: Path, root: Path, items: Sequence[Item], options: MiningOptions) -> Plan:
    """Extend the plan of an earlier run with new files in new shards, or make a new plan.

    Args:
        output: the mined folder.
        root: the input folder.
        items: the inputs of this run.
        options: options of mining.

    Raises:
        InputError: other options than before, another input folder, or a file that has changed since.
        DataError: a plan file that cannot be read.
    """
    fresh = Plan(PurePosixPath(os.path.relpath(root, output)).as_posix(), asdict(options), SSIM_DEFINITION)
    plan = read_plan(output / PLAN_NAME) or fresh
    _check_same_options(plan, fresh, output)
    plan.input_root = fresh.input_root
    planned = {item.path: item for shard in plan.shards for item in shard}
    current = {item.path: item for item in items}
    if planned and not planned.keys() & current.keys():
        raise InputError(
            f"{output} was mined from another folder: none of its files is in this input; use a new output"
        )
    changed = [path for path, item in current.items() if path in planned and _differs(planned[path], item)]
    if changed:
        raise InputError(
            f"the size, hash, licence, URL or time range of {changed[0]!r} has changed since {output} was mined "
            f"({len(changed)} such files); use a new output, because a mined folder must describe the current files"
        )
    new = [item for item in items if item.path not in planned]
    size = options.inputs_per_shard
    plan.shards += [new[start : start + size] for start in range(0, len(new), size)]
    return plan


def _differs(planned: Item, current: Item) -> bool:
    facts = ("size", "sha256", "licence", "url", "span_s")
    return any(getattr(planned, fact) != getattr(current, fact) for fact in facts)


def _check_same_options(plan: Plan, fresh: Plan, output: Path) -> None:
    before = _EARLIER | plan.options | {"SSIM definition": plan.ssim_definition}
    now = fresh.options | {"SSIM definition": fresh.ssim_definition}
    differences = [
        f"{name}: was {before.get(name, 'not set')}, now {now.get(name, 'not set')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise InputError(
            f"{output} was mined with other options ({'; '.join(differences)}); use the same options, or a new output"
        )


def read_plan(path: Path) -> Plan | None:
    """Read the plan file of a mined folder; None if there is none.

    Raises:
        DataError: it cannot be read, or has another format.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _PLAN_FORMAT:
            raise DataError(
                f"{path} has format {content['format']}, and this version of mimicbrush writes {_PLAN_FORMAT}"
            )
        shards = [[Item(**item) for item in shard] for shard in content["shards"]]
        return Plan(content["input_root"], content["options"], content["ssim_definition"], shards)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error!r}); delete the folder and mine again") from error
