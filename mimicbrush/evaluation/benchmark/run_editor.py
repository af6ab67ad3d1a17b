"""Editors over a benchmark: images in the released layout, scores of every case, and what could not be done."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mimicbrush.errors import DataError, InputError, MimicBrushError, describe_os_error
from mimicbrush.evaluation.benchmark.backbones import Backbones
from mimicbrush.evaluation.benchmark.layout import Benchmark, Case
from mimicbrush.evaluation.benchmark.metrics import CasePixels, score_case
from mimicbrush.evaluation.editors.baselines import ResultsEditor
from mimicbrush.evaluation.editors.protocol import CaseInputs, Editor, NotApplicableError
from mimicbrush.io.atomic import write_json
from mimicbrush.io.images import read_image, write_image
from mimicbrush.ops.canvas import MASK_THRESHOLD, paste_back
from mimicbrush.ops.correspondence import Correspondence

RESULTS_FOLDER = "results"
#: In the folder of an editor's results: what each was made of, so that a run that goes on takes no other's results.
MADE_OF_FILE = "made_of.json"
#: How results are scored: with the source's own pixels around the hole, and as the editor painted them.
VARIANTS = ("pasted", "painted")


@dataclass(frozen=True)
class CaseScores:
    """The outcome and scores of one editor on one case.

    Attributes:
        outcome: "scored", "not applicable" or "failed".
        reason: of the latter two.
        scores: variant -> metric -> value, or why there is none.
        result: the image, as painted; None where there is none.
        correspondence: file of the map of places, where the editor tells.
    """

    case: Case
    outcome: str
    reason: str = ""
    scores: dict[str, dict[str, float | str]] = field(default_factory=dict)
    result: Path | None = None
    correspondence: Path | None = None


@dataclass(frozen=True)
class EditorRun:
    """The outcomes of one editor on all cases."""

    name: str
    folder: Path
    about: dict[str, str]
    cases: list[CaseScores]

    def count(self, outcome: str, track: str | None = None) -> int:
        """Count the cases with an outcome, of one track or of all."""
        return sum(each.outcome == outcome and track in (None, each.case.track.name) for each in self.cases)


def name_folder(editor: str) -> str:
    """Name the folder of an editor's results: its name, without characters that folder names cannot have."""
    return re.sub(r"[^\w.=+-]+", "_", editor).strip("_.") or "_"


def check_result_folders(editors: Sequence[str]) -> None:
    """Check that each editor gets a folder of its own.

    Raises:
        InputError: two would share one.
    """
    folders: dict[str, str] = {}
    for editor in editors:
        other = folders.setdefault(name_folder(editor).casefold(), editor)
        if other != editor:
            raise InputError(f"{other} and {editor} would write to the same results folder; rename one of them")


def run_editor(editor: Editor, benchmark: Benchmark, output: Path, backbones: Backbones, seed: int) -> EditorRun:
    """Edit and score every case; results of the same editor, images and seed are not made again.

    What another program left in a folder is read again each time: it may have changed since.

    Args:
        editor: see `registry.open_editor`.
        benchmark: its cases.
        output: of the evaluation; results come to ``results/EDITOR/TRACK/NNN_result.png``.
        backbones: what measures.
        seed: of the editor's noise, the same for every case.

    Raises:
        InputError: `output` cannot be written.
    """
    folder = output / RESULTS_FOLDER / name_folder(editor.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output={output} cannot be written ({error}); name another folder") from error
    made_of = _read_made_of(folder / MADE_OF_FILE)
    is_kept = not isinstance(editor, ResultsEditor)
    editor_key = _hash_bytes(json.dumps([editor.name, editor.about, seed], sort_keys=True).encode())
    cases = []
    for case in tqdm(benchmark.cases, desc=editor.name, unit="case", disable=None):
        result = folder / case.result_path
        place = result.with_name(f"{case.number}_places.npz")
        key = f"{editor_key} {_hash_case(case)}"
        name = str(case.result_path)
        try:
            inputs = _read_inputs(case, seed)
            if not is_kept or made_of.get(name) != key or not result.is_file():
                made_of.pop(name, None)
                _edit_case(editor, case, inputs, result, place)
                made_of[name] = key
                _write_made_of(folder / MADE_OF_FILE, made_of)
            scores = _score_variants(case, inputs, result, backbones)
        except NotApplicableError as error:
            cases.append(CaseScores(case, "not applicable", str(error)))
        except MimicBrushError as error:
            cases.append(CaseScores(case, "failed", str(error)))
        except OSError as error:  # what was edited before stays
            cases.append(CaseScores(case, "failed", describe_os_error(error)))
        else:
            found = place if place.is_file() else None
            cases.append(CaseScores(case, "scored", "", scores, result, found))
    return EditorRun(editor.name, folder, dict(editor.about), cases)


def _edit_case(editor: Editor, case: Case, inputs: CaseInputs, result: Path, place: Path) -> None:
    result.unlink(missing_ok=True)
    place.unlink(missing_ok=True)
    made = editor.edit_case(case, inputs)
    if made.image.size != inputs.source.size or made.image.mode != "RGB":
        raise DataError(
            f"{editor.name} returned {made.image.width} x {made.image.height} px {made.image.mode} for a source of "
            f"{inputs.source.width} x {inputs.source.height} px RGB"
        )
    result.parent.mkdir(parents=True, exist_ok=True)
    if made.correspondence is not None:
        made.correspondence.save(place)
    write_image(made.image, result)


def _read_inputs(case: Case, seed: int) -> CaseInputs:
    return CaseInputs(
        source=read_image(case.source, "RGB"),
        mask=read_image(case.mask, "L"),
        reference=read_image(case.reference, "RGB"),
        keep_shape=case.track.keep_shape,
        seed=seed,
    )


def _score_variants(
    case: Case, inputs: CaseInputs, result: Path, backbones: Backbones
) -> dict[str, dict[str, float | str]]:
    source, reference = np.asarray(inputs.source), np.asarray(inputs.reference)
    reference_mask = None
    if case.reference_mask is not None:
        reference_mask = (np.asarray(read_image(case.reference_mask, "L")) > MASK_THRESHOLD).astype(np.uint8)
    mask = np.asarray(inputs.mask)
    return {
        variant: score_case(
            CasePixels(
                result=pixels,
                mask=(mask > MASK_THRESHOLD).astype(np.uint8),
                truth=source if case.track.has_truth else None,
                reference=reference,
                reference_mask=reference_mask,
                prompt=case.prompt,
            ),
            backbones,
        )
        for variant, pixels in paste_variants(np.asarray(read_image(result, "RGB")), source, mask).items()
    }


def paste_variants(painted: np.ndarray, source: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Make the `VARIANTS` of a result: (H, W, 3) uint8 each; the mask is (H, W) in 0..255."""
    return {"pasted": paste_back(painted, source, mask).round().astype(np.uint8), "painted": painted}


def read_correspondence(scores: CaseScores) -> Correspondence | None:
    """Read which place of the reference filled which place of the mask; None where the editor gave none."""
    return None if scores.correspondence is None else Correspondence.load(scores.correspondence)


def read_case_images(case: Case) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Read the source, mask and reference of a case."""
    return read_image(case.source, "RGB"), read_image(case.mask, "L"), read_image(case.reference, "RGB")


def _hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _hash_case(case: Case) -> str:
    parts = [case.source, case.mask, case.reference, *([case.reference_mask] if case.reference_mask else [])]
    return _hash_bytes(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in parts))


def _read_made_of(path: Path) -> dict[str, str]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # nothing is known of what lies there, so all of it is made again
    return {str(key): str(value) for key, value in values.items()} if isinstance(values, dict) else {}


def _write_made_of(path: Path, made_of: Mapping[str, Any]) -> None:
    write_json(path, dict(sorted(made_of.items())))
