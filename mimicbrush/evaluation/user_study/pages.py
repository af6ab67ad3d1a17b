"""A blind user study as in the paper (Sec. 4): raters rank results without knowing whose they are.

The page for the raters holds all images and no name; which letter is whose lies in a key that they do not get.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from PIL import Image

from mimicbrush.errors import DataError, InputError, MimicBrushError
from mimicbrush.evaluation.benchmark.layout import TRACKS, BenchmarkFault, Case, read_benchmark
from mimicbrush.io.atomic import replace_folder
from mimicbrush.io.images import MASK_THRESHOLD, read_image
from mimicbrush.ops import counter_rng

#: What is asked, and how it is put to the raters. The first is the best: rank 1.
QUESTIONS = {
    "fidelity": "In the marked region, which result best shows what the reference shows?",
    "harmony": "Which result fits best into its surroundings?",
    "quality": "Which result is the best image: sharp and without defects?",
}
KEY_FORMAT, ANSWERS_FORMAT = "mimicbrush user study key 1", "mimicbrush user study answers 1"
RATERS_FOLDER, PAGE_NAME, KEY_NAME = "for_raters", "study.html", "key.json"
STUDY_RESULTS_FOLDER = "results"
LETTERS = "ABCDEFGH"
_MASK_COLOUR = np.array([232, 46, 106], np.float64)


@dataclass(frozen=True)
class StudyFiles:
    """A study that was written.

    Attributes:
        study: its identity, which answers must name.
        editors: whose results are compared.
        cases: how many cases are asked about.
        faults: cases that cannot be asked about, and why.
    """

    study: str
    editors: tuple[str, ...]
    cases: int
    faults: list[BenchmarkFault]


def find_editors(evaluation: Path) -> list[str]:
    """List the names of the editors whose results an evaluation contains.

    Raises:
        InputError: fewer than two, or more than there are letters.
    """
    results = evaluation / STUDY_RESULTS_FOLDER
    names = sorted(path.name for path in results.iterdir() if path.is_dir()) if results.is_dir() else []
    names = [name for name in names if any((results / name / track.folder).is_dir() for track in TRACKS.values())]
    if len(names) < 2:
        raise InputError(
            f"{results}: expected the results of at least two editors, as EDITOR/{TRACKS['part_inter'].folder}/"
            f"001_result.png; found {names or 'none'}; make them with mimicbrush evaluate"
        )
    return names


def make_study(
    evaluation: Path,
    benchmark: Path,
    output: Path,
    *,
    editors: Sequence[str] = (),
    max_cases: int = 30,
    seed: int = 0,
    long_side_px: int = 512,
    pasted_back: bool = True,
) -> StudyFiles:
    """Write the page for the raters, and the key.

    Args:
        evaluation: holds results/EDITOR/TRACK/NNN_result.png.
        benchmark: what was edited.
        output: gets for_raters/study.html and key.json; an older one is replaced.
        editors: whose results to compare; empty: all.
        max_cases: at most so many, the tracks in turn.
        seed: of the choice and of the letters.
        long_side_px: images are shown at most this large.
        pasted_back: put the source's own pixels back outside of the mask, as the pipeline does when it edits.

    Raises:
        InputError: folders that cannot be used, unknown editors.
        DataError: no case has results of all.
    """
    known = find_editors(evaluation)
    names = list(editors) or known
    unknown = sorted(set(names) - set(known))
    if unknown or len(set(names)) != len(names) or not 2 <= len(names) <= len(LETTERS):
        raise InputError(
            f"editors {names}: expected 2 to {len(LETTERS)} different editors out of {known}"
            + (f"; unknown: {unknown}" if unknown else "")
        )
    read = read_benchmark(benchmark)
    usable, faults = [], list(read.faults)
    for case in read.cases:
        fault = _find_fault(case, evaluation, names)
        if fault:
            faults.append(fault)
        else:
            usable.append(case)
    if not usable:
        reasons = "; ".join(f"{fault.path}: {fault.reason}" for fault in faults[:3])
        raise DataError(
            f"no case has results of all editors {names} ({reasons}); make the missing results with mimicbrush evaluate"
        )
    chosen = _choose_cases(usable, max_cases, seed)
    questions, key = [], {}
    for number, case in enumerate(chosen, 1):
        order = [names[n] for n in counter_rng.generator(seed, number).permutation(len(names))]
        identity = f"q{number:03d}"
        letters = dict(zip(LETTERS, order, strict=False))
        questions.append({"id": identity} | _embed_images(case, evaluation, letters, long_side_px, pasted_back))
        key[identity] = {"track": case.track.name, "case": case.number, "letters": letters}
    study = hashlib.sha256(json.dumps([questions, key], sort_keys=True).encode()).hexdigest()[:16]
    page = _render_page(study, questions, len(names))
    about = {"format": KEY_FORMAT, "study": study, "editors": names, "pasted_back": pasted_back, "seed": seed}

    def write(folder: Path) -> None:
        (folder / RATERS_FOLDER).mkdir(parents=True)
        (folder / RATERS_FOLDER / PAGE_NAME).write_text(page, encoding="utf-8", newline="\n")
        (folder / KEY_NAME).write_text(json.dumps({**about, "cases": key}, indent=1) + "\n", encoding="utf-8")

    if output.is_dir() and any(output.iterdir()) and not (output / KEY_NAME).is_file():
        raise InputError(f"--output {output} is not empty and not a user study; name another folder")
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    replace_folder(output, write)
    return StudyFiles(study, tuple(names), len(chosen), faults)


def _find_fault(case: Case, evaluation: Path, editors: Sequence[str]) -> BenchmarkFault | None:
    size = read_image(case.source, "RGB").size
    for editor in editors:
        path = _result_path(case, evaluation, editor)
        try:
            found = read_image(path, "RGB").size
        except MimicBrushError as error:
            return BenchmarkFault(path, str(error).removeprefix(f"{path}: "))
        if found != size:
            return BenchmarkFault(
                path, f"the result is {found[0]} x {found[1]} px, but its source is {size[0]} x {size[1]} px"
            )
    return None


def _result_path(case: Case, evaluation: Path, editor: str) -> Path:
    return evaluation / STUDY_RESULTS_FOLDER / editor / case.result_path


def _choose_cases(cases: Sequence[Case], most: int, seed: int) -> list[Case]:
    """Choose at most this many cases from the tracks in turn, each in a random order, then shuffle them."""
    rng = counter_rng.generator(seed, len(cases))
    queues = [[case for case in cases if case.track.name == track] for track in TRACKS]
    queues = [[queue[n] for n in rng.permutation(len(queue))] for queue in queues]
    turns = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)][:most]
    return [turns[n] for n in rng.permutation(len(turns))]


def _embed_images(
    case: Case, evaluation: Path, letters: dict[str, str], long_side_px: int, pasted_back: bool
) -> dict[str, Any]:
    from mimicbrush.ops.canvas import paste_back  # torch comes along, and scoring does without

    source, mask = np.asarray(read_image(case.source, "RGB")), np.asarray(read_image(case.mask, "L"))
    # The masked part is hidden: of an inner-ID case it is the ground truth.
    masked = np.where(mask[..., None] > MASK_THRESHOLD, _MASK_COLOUR, source).astype(np.uint8)
    results = {}
    for letter, editor in letters.items():
        result = np.asarray(read_image(_result_path(case, evaluation, editor), "RGB"))
        if pasted_back:
            result = paste_back(result, source, mask).round().astype(np.uint8)
        results[letter] = _embed_jpeg(result, long_side_px)
    reference = np.asarray(read_image(case.reference, "RGB"))
    return {
        "source": _embed_jpeg(masked, long_side_px),
        "reference": _embed_jpeg(reference, long_side_px),
        "results": results,
    }


def _embed_jpeg(image: np.ndarray, long_side_px: int) -> str:
    """Make a data URL of an image, without the metadata of its file."""
    scale = long_side_px / max(image.shape[:2])
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _render_page(study: str, questions: Sequence[dict[str, Any]], options: int) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mimicbrush", "evaluation/user_study"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    data = {"study": study, "format": ANSWERS_FORMAT, "asked": QUESTIONS, "cases": list(questions)}
    return environment.get_template("user_study.html.jinja").render(data=data, options=options, cases=len(questions))
