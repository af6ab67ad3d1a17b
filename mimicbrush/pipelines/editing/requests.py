"""Reads the edits that a folder or a list requests, with their outputs. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimicbrush.errors import InputError, choose_words
from mimicbrush.io.atomic import path_inside
from mimicbrush.io.text import parse_json
from mimicbrush.ops.crops import Box
from mimicbrush.ranges import MAX_REFERENCES, SEED_RANGE, suggest

#: Folder name of the benchmark's texture tracks, whose edits keep the shape of the source (released layout).
TEXTURE_FOLDER = "TextureTrans"
_REQUIRED = ("source", "mask", "reference")
_KEYS = (*_REQUIRED, "mask_box", "output", "seed", "keep_shape", "reference_crop")


@dataclass(frozen=True)
class Edit:
    """One requested edit.

    Attributes:
        source, mask, reference: files, not read yet. `mask` is None if `mask_box` is given.
        output: the file to write; with several images per edit see `number_outputs`.
        seed: seed of the noise of the first image; each further image has the next number.
        keep_shape: texture transfer: keep the shape of the source, by its depth.
        reference_crop: the box of the reference to imitate, in pixels of the upright image; None: all of it.
        mask_box: the box of the source to repaint, in pixels of the upright image; None: use `mask`.
        other_references: further references to imitate at the same time.

    Raises:
        InputError: there is neither a mask nor a box, or both; there are too many references, or several and a crop.
    """

    source: Path
    mask: Path | None
    reference: Path
    output: Path
    seed: int = 1
    keep_shape: bool = False
    reference_crop: Box | None = None
    mask_box: Box | None = None
    other_references: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if (self.mask is None) == (self.mask_box is None):
            raise InputError("an edit takes either a mask or a box (mask_box), got both")
        if len(self.references) > MAX_REFERENCES:
            raise InputError(f"an edit takes 1 to {MAX_REFERENCES} references, got {len(self.references)}")
        if self.other_references and self.reference_crop is not None:
            raise InputError("a crop works only with one reference; crop the files of several references yourself")

    @property
    def references(self) -> tuple[Path, ...]:
        """Files of all references, the first one first."""
        return self.reference, *self.other_references

    @property
    def inputs(self) -> list[Path]:
        """All files that the edit reads."""
        return [path for path in (self.source, self.mask, *self.references) if path is not None]


def number_outputs(path: Path, count: int) -> list[Path]:
    """List the output files: the file itself, or with several images name_0.png, name_1.png, ..."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}_{number}{path.suffix}") for number in range(count)]


def collect_edits(
    batch: Path, output_dir: Path, seed: int = 1, keep_shape: bool | None = None, num_images: int = 1
) -> list[Edit]:
    """List the edits of a folder in the benchmark's layout, or of a JSON-lines file.

    Args:
        batch: a folder (see `folder_edits`) or a file (see `list_edits`).
        output_dir: folder of the results.
        seed: default seed of an edit.
        keep_shape: default of an edit; None: True for the benchmark's texture tracks, otherwise False.
        num_images: number of results of each edit, see `number_outputs`.

    Raises:
        InputError: there is nothing to do, the list is wrong, or two edits have the same output.
    """
    if batch.is_dir():
        edits = folder_edits(batch, output_dir, seed, keep_shape)
    elif batch.is_file():
        edits = list_edits(batch, output_dir, seed, bool(keep_shape))
    else:
        raise InputError(f"{batch}: no such folder or list file")
    _check_outputs(edits, num_images)
    return edits


def folder_edits(folder: Path, output_dir: Path, seed: int, keep_shape: bool | None) -> list[Edit]:
    """List the edits of a folder and its subfolders in the layout of the released benchmark (paper Sec. 3.4).

    ``NNN_source.png``, ``NNN_source_mask.png`` and ``NNN_reference.png`` give ``NNN_result.png``, in a subfolder of
    the same name. A missing mask or reference is only reported when its edit is made.

    Raises:
        InputError: the folder has no source.
    """
    sources = sorted(folder.rglob("*_source.png"))
    if not sources:
        raise InputError(
            f"{folder} contains no NNN_source.png with NNN_source_mask.png and NNN_reference.png; "
            "list files with other names in LIST.jsonl"
        )
    edits = []
    for source in sources:
        number = source.name.removesuffix("_source.png")
        is_texture = TEXTURE_FOLDER in source.resolve().parent.parts
        edits.append(
            Edit(
                source=source,
                mask=source.with_name(f"{number}_source_mask.png"),
                reference=source.with_name(f"{number}_reference.png"),
                output=output_dir / source.relative_to(folder).with_name(f"{number}_result.png"),
                seed=seed,
                keep_shape=is_texture if keep_shape is None else keep_shape,
            )
        )
    return edits


def list_edits(path: Path, output_dir: Path, seed: int, keep_shape: bool) -> list[Edit]:
    """List the edits of a JSON-lines file with one object per line; empty lines are ignored.

    Keys: source, mask, reference (paths relative to the list, inside its folder; 2 to 4 references are a list of
    paths); optional are output (relative to `output_dir`, inside it; default: the source's name with ``_edited.png``),
    seed, keep_shape and reference_crop ([x0, y0, x1, y1]). Instead of mask, mask_box ([x0, y0, x1, y1]) repaints a
    box of the source.

    Raises:
        InputError: the list cannot be read, or a line is wrong; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a list with one JSON object per line ({error})") from error
    if next((line for line in lines if line.strip()), "").lstrip().startswith("["):
        raise InputError(
            f"{path} is a JSON array; expected JSON lines: one object {{...}} per line, without outer brackets"
        )
    edits = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            edits.append(_parse_edit(line, path.parent, output_dir, seed, keep_shape))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
    if not edits:
        raise InputError(f"{path} lists no edits")
    return edits


def _parse_edit(line: str, root: Path, output_dir: Path, seed: int, keep_shape: bool) -> Edit:
    try:
        values = parse_json(line)
    except ValueError as error:
        raise InputError(f"not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"expected an object {{...}}, got {line.strip()[:40]}")
    if unknown := [key for key in values if key not in _KEYS]:
        raise InputError(f"unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}{suggest(unknown[0], _KEYS)}")
    needed = [key for key in _REQUIRED if key != "mask" or "mask_box" not in values]
    if missing := [key for key in needed if key not in values]:
        raise InputError(f"{missing[0]!r} is missing; required: {', '.join(_REQUIRED)}")
    source = path_inside(root, _check_path(values, "source"))
    names = values["reference"] if isinstance(values["reference"], list) else [values["reference"]]
    references = [path_inside(root, _check_path({"reference": name}, "reference")) for name in names or [None]]
    output = _check_path(values, "output") if "output" in values else f"{source.stem}_edited.png"
    return Edit(
        source=source,
        mask=path_inside(root, _check_path(values, "mask")) if "mask" in values else None,
        reference=references[0],
        output=path_inside(output_dir, output),
        seed=check_seed(values.get("seed", seed)),
        keep_shape=_check_flag(values.get("keep_shape", keep_shape)),
        reference_crop=check_box(values["reference_crop"]) if "reference_crop" in values else None,
        mask_box=check_box(values["mask_box"], "mask_box") if "mask_box" in values else None,
        other_references=tuple(references[1:]),
    )


def _check_path(values: dict[str, Any], key: str) -> str:
    value = values[key]
    if not isinstance(value, str) or not value:
        raise InputError(f"{key!r} must be a path, got {value!r}")
    return value


def check_seed(value: Any) -> int:
    """Check a seed from a list or from the web page.

    Raises:
        InputError: it is not a valid seed.
    """
    if fault := SEED_RANGE.find_fault(value):
        raise InputError(f"'seed': {fault}, got {value!r}")
    return int(value)


def _check_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"'keep_shape' must be true or false, got {value!r}")
    return value


def check_box(value: Any, named: str = "reference_crop") -> Box:
    """Check a box from a list or the command line. Whether it is inside its image is checked later.

    Args:
        value: a list of four whole numbers.
        named: its key, for the error.

    Raises:
        InputError: it is not such a list.
    """
    is_box = isinstance(value, list) and all(isinstance(side, int) and not isinstance(side, bool) for side in value)
    if not is_box or len(value) != 4:
        raise InputError(f"{named!r} must be four whole numbers x0, y0, x1, y1 (pixels), got {value!r}")
    x0, y0, x1, y1 = value
    return x0, y0, x1, y1


def _check_outputs(edits: Sequence[Edit], num_images: int) -> None:
    """Check that no output is named twice or is an input: it would be skipped as finished, or overwrite the input."""
    inputs = {path.resolve() for edit in edits for path in edit.inputs}
    outputs: set[Path] = set()
    for output in (output for edit in edits for output in number_outputs(edit.output, num_images)):
        resolved = output.resolve()
        if resolved in outputs:
            raise InputError(f"two edits have the same output {output}; choose another output for one of them")
        if resolved in inputs:
            raise InputError(f"the output {output} is also one of the images to read; choose another output")
        outputs.add(resolved)


def check_one_reference(count: int) -> None:
    """Check that there is only one reference, as auto-zoom needs it.

    Raises:
        InputError: there are several references.
    """
    if count > 1:
        way = choose_words(
            python="edit without auto-zoom, and name the part of each with reference_crop",
            command="edit without --auto-zoom, and crop the files of the references",
            page="remove the others, or switch auto-zoom off and choose a part of each",
        )
        raise InputError(f"auto-zoom takes one reference, got {count}: {way}")
