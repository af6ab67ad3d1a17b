"""The released folder layout: four tracks of numbered cases, read and written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal

import numpy as np
from PIL import Image

from mimicbrush.errors import DataError, InputError, MimicBrushError
from mimicbrush.io.atomic import hidden_stem, replace_folder, write_json
from mimicbrush.io.images import MASK_THRESHOLD, read_image
from mimicbrush.io.text import parse_json

TrackName = Literal["part_inter", "part_inner", "texture_inter", "texture_inner"]
ABOUT_NAME, PROMPTS_NAME, CASES_NAME = "benchmark.json", "prompts.json", "cases.json"


@dataclass(frozen=True)
class Track:
    """A track of the benchmark: one of the paper's four kinds of cases.

    Attributes:
        folder: in the released layout.
        keep_shape: texture transfer: the depth map of the source is given.
        has_truth: the unmasked source is the ground truth.
    """

    name: TrackName
    folder: str
    title: str
    keep_shape: bool
    has_truth: bool


TRACKS: dict[TrackName, Track] = {
    track.name: track
    for track in (
        Track("part_inter", "PartComp/CrossInstance", "part composition, inter-ID", False, False),
        Track("part_inner", "PartComp/WithinInstance", "part composition, inner-ID", False, True),
        Track("texture_inter", "TextureTrans/CrossInstance", "texture transfer, inter-ID", True, False),
        Track("texture_inner", "TextureTrans/WithinInstance", "texture transfer, inner-ID", True, True),
    )
}


@dataclass(frozen=True)
class Case:
    """A case whose files are all there; the bootstrap resamples the cases of one `group` together."""

    track: Track
    number: str
    source: Path
    mask: Path
    reference: Path
    reference_mask: Path | None = None
    prompt: str | None = None
    subject: str | None = None
    group: str | None = None

    @property
    def result_path(self) -> PurePosixPath:
        """The path of its result, relative to a folder of results."""
        return PurePosixPath(self.track.folder) / f"{self.number}_result.png"


@dataclass(frozen=True)
class BenchmarkFault:
    """A file that is missing, damaged or does not fit, and the reason."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Benchmark:
    """The cases of a benchmark's folder, and its faults."""

    root: Path
    cases: list[Case]
    faults: list[BenchmarkFault]
    about: dict[str, Any] = field(default_factory=dict)


def read_benchmark(root: Path) -> Benchmark:
    """Read a benchmark's folder, and check that every mask fits its image.

    Raises:
        InputError: it holds none of the four tracks.
        DataError: one of its JSON files cannot be read.
    """
    cases, faults = [], []
    for track in TRACKS.values():
        folder = root / track.folder
        prompts, facts = _read_json(folder / PROMPTS_NAME), _read_json(folder / CASES_NAME)
        for number in _list_numbers(folder):
            source, mask = folder / f"{number}_source.png", folder / f"{number}_source_mask.png"
            reference = folder / f"{number}_reference.png"
            reference_mask = folder / f"{number}_reference_mask.png"
            try:
                _check_mask(mask, read_image(source, "RGB"), "source")
                shown = read_image(reference, "RGB")
                if reference_mask.is_file():
                    _check_mask(reference_mask, shown, "reference")
            except MimicBrushError as error:
                faults.append(BenchmarkFault(mask, str(error)))
                continue
            known = facts.get(number, {})
            cases.append(
                Case(
                    track=track,
                    number=number,
                    source=source,
                    mask=mask,
                    reference=reference,
                    reference_mask=reference_mask if reference_mask.is_file() else None,
                    prompt=prompts.get(number),
                    subject=known.get("subject"),
                    group=known.get("group"),
                )
            )
    if not cases and not faults:
        raise InputError(f"{root} is not a benchmark; expected cases in {', '.join(t.folder for t in TRACKS.values())}")
    return Benchmark(root, cases, faults, _read_json(root / ABOUT_NAME))


def _check_mask(path: Path, image: Image.Image, name: str) -> None:
    mask = read_image(path, "L")
    if mask.size != image.size:
        raise InputError(
            f"{path} is {mask.width} x {mask.height} px, but its {name} is {image.width} x {image.height} px"
        )
    if not (np.asarray(mask) > MASK_THRESHOLD).any():
        raise InputError(f"{path}: the mask is empty (no pixel is above {MASK_THRESHOLD} of 255)")


def _list_numbers(folder: Path) -> list[str]:
    """List the numbers of all cases that have any file; a case with a missing mask counts, too."""
    parts = ("_source.png", "_source_mask.png", "_reference.png")
    return sorted({path.name.removesuffix(part) for part in parts for path in folder.glob(f"*{part}")})


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); build the benchmark again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


class BenchmarkWriter:
    """A writer of a benchmark in a temporary folder; `finish` moves it into place and replaces an older one.

    Args:
        root: the folder to be made.

    Attributes:
        folder: where it is written meanwhile; other files may be put there, too.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self.folder = self._root.with_name(f"{hidden_stem(self._root.name)}.building.tmp")
        self._prompts: dict[TrackName, dict[str, str]] = {track: {} for track in TRACKS}
        self._facts: dict[TrackName, dict[str, Any]] = {track: {} for track in TRACKS}
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def __enter__(self) -> BenchmarkWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what was not finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(
        self,
        track: TrackName,
        source: Image.Image,
        mask: Image.Image,
        reference: Image.Image,
        reference_mask: Image.Image | None = None,
        prompt: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> str:
        """Write the images of a case.

        Returns:
            Its number in the track, such as "001".

        Raises:
            InputError: a mask has not its image's size, or is empty.
        """
        for image, its_mask, name in ((source, mask, "source"), (reference, reference_mask, "reference")):
            if its_mask is not None and its_mask.size != image.size:
                raise InputError(
                    f"the mask of the {name} is {its_mask.width} x {its_mask.height} px, "
                    f"but the image is {image.width} x {image.height} px"
                )
            if its_mask is not None and not (np.asarray(its_mask.convert("L")) > MASK_THRESHOLD).any():
                raise InputError(f"the mask of the {name} is empty")
        number = f"{len(self._facts[track]) + 1:03d}"
        folder = self.folder / TRACKS[track].folder
        folder.mkdir(parents=True, exist_ok=True)
        files = {"source": source, "source_mask": mask, "reference": reference, "reference_mask": reference_mask}
        for name, shown in files.items():
            if shown is not None:
                shown.save(folder / f"{number}_{name}.png")
        self._facts[track][number] = dict(facts or {})
        if prompt is not None:
            self._prompts[track][number] = prompt
        return number

    def finish(self, about: Mapping[str, Any]) -> None:
        """Write the facts and prompts, and give the folder its name."""
        for track, facts in self._facts.items():
            folder = self.folder / TRACKS[track].folder
            for name, values in ((PROMPTS_NAME, self._prompts[track]), (CASES_NAME, facts)):
                if values:
                    write_json(folder / name, values, ensure_ascii=False)
        write_json(self.folder / ABOUT_NAME, about, ensure_ascii=False)
        replace_folder(self._root, lambda aside: self.folder.rename(aside))
