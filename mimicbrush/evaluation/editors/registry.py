"""Editors to compare on the benchmark, by the name they have on a command line. Imports nothing heavy."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mimicbrush.errors import InputError
from mimicbrush.evaluation.editors.protocol import CaseEditor as CaseEditor
from mimicbrush.evaluation.editors.protocol import CaseInputs as CaseInputs
from mimicbrush.evaluation.editors.protocol import CaseResult as CaseResult
from mimicbrush.evaluation.editors.protocol import NotApplicableError as NotApplicableError
from mimicbrush.evaluation.editors.weights import (
    INPAINTING,
    IP_ADAPTER,
    PAINT_BY_EXAMPLE,
    STABLE_DIFFUSION,
    Repository,
    find_repository,
)
from mimicbrush.io.hashing import fingerprint
from mimicbrush.pipelines.small_model import SHIPPED_MODEL, SHIPPED_NAME

if TYPE_CHECKING:
    from mimicbrush.evaluation.editors.mimicbrush import ReferenceView

RESULTS, RELEASED, REFERENCE_ONLY = "results", "released", "reference_only"

#: Editors that need no model: their classes in `editors_without_model`.
_WITHOUT_MODEL = {
    "oracle": "OracleEditor",
    "source": "SourceEditor",
    "blur": "BlurEditor",
    "copy_in_place": "CopyEditor",
    "opencv_inpaint": "InpaintEditor",
    "sift_homography": "HomographyEditor",
}
#: Editors made of public weights, and the repositories that they need.
_PUBLIC: dict[str, tuple[Repository, ...]] = {
    "paint_by_example": (PAINT_BY_EXAMPLE,),
    "paint_by_example_box": (PAINT_BY_EXAMPLE,),
    "ip_adapter": (INPAINTING, IP_ADAPTER),
    REFERENCE_ONLY: (INPAINTING, STABLE_DIFFUSION),
}
#: Ways in which a pipeline can look at its reference; without one at all of it.
_LOOKS = ("auto_zoom", "boxed")
#: All names, and what each is.
KNOWN = {
    "oracle": "the ground truth, where there is one: the best that can be measured",
    "source": "the source as it is, on tracks without a ground truth",
    "blur": "the hole filled by a wide blur of what is around it",
    "copy_in_place": "the reference's pixels at the same place",
    "opencv_inpaint": "OpenCV's inpainting, without the reference",
    "sift_homography": "the reference warped by a homography of SIFT matches, as if all were one plane",
    SHIPPED_NAME: "the small model that comes with the project",
    RELEASED: "the released MimicBrush weights",
    "paint_by_example[:DIR]": "Paint-by-Example, of the whole reference",
    "paint_by_example_box[:DIR]": "Paint-by-Example, of the box around the reference's mask",
    "ip_adapter[:DIR]": "SD-1.5 inpainting with an IP-Adapter",
    "reference_only[:DIR]": "reference-only attention, nothing trained; DIR may be a pipeline folder of ours",
    "auto_zoom:DIR": "a pipeline that looks twice, see docs/editing.md; DIR may also be proof or released",
    "boxed:DIR": "a pipeline that sees only the box around the reference's mask; likewise",
    "results:FOLDER": "results of any other method, NNN_result.png",
    "DIR": "a pipeline folder",
}


@dataclass(frozen=True)
class _Named:
    name: str
    folder: Path | None
    look: ReferenceView = "whole"


def check_editor(text: str) -> None:
    """Whether `open_editor` can be expected to open this; quick, nothing heavy is imported.

    Raises:
        InputError: no editor is called that, or a folder is absent or something else.
        WeightsError: weights are absent; says where they were looked for.
    """
    named = _parse(text)
    if named.name in _WITHOUT_MODEL or named.name == RELEASED:
        return
    if named.name == RESULTS:
        if named.folder is None or not named.folder.is_dir():
            raise InputError(f"{text}: no such folder; name one of NNN_result.png after results:")
    elif named.name in _PUBLIC:
        if not (named.name == REFERENCE_ONLY and _is_pipeline(named.folder)):
            for repository in _PUBLIC[named.name]:
                find_repository(repository, named.folder)
    else:
        _check_pipeline(named)


def open_editor(
    text: str,
    *,
    device: str = "auto",
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> CaseEditor:
    """An editor by its name.

    Args:
        text: a name out of `KNOWN`, or a pipeline folder. DIR is where weights lie, see `editor_weights`; without it
            they are taken from the local Hugging Face cache. Nothing is fetched, except for "released".
        device: "auto", "cpu" or "cuda"; in half precision on a GPU.
        num_inference_steps: None: the editor's own; editors without a sampler have none.
        guidance_scale: likewise.

    Raises:
        InputError, WeightsError: see `check_editor`; or what lies there cannot be loaded.
    """
    if num_inference_steps is not None and num_inference_steps < 1:
        raise InputError(f"num_inference_steps must be 1 or more, got {num_inference_steps}")
    check_editor(text)
    named = _parse(text)
    if named.name in _WITHOUT_MODEL or named.name == RESULTS:
        from mimicbrush.evaluation.editors import without_model as editors_without_model

        if named.folder is not None:
            return editors_without_model.ResultsEditor(text, named.folder)
        editor: CaseEditor = getattr(editors_without_model, _WITHOUT_MODEL[named.name])()
        return editor
    editor = _open_model(text, named, (device, num_inference_steps, guidance_scale))
    editor.about["weights"] = fingerprint(_weight_files(named))  # the folder may hold others tomorrow
    return editor


def _open_model(text: str, named: _Named, choices: tuple[str, int | None, float | None]) -> CaseEditor:
    if named.name == REFERENCE_ONLY:
        from mimicbrush.evaluation.editors import reference_only

        if named.folder is not None and _is_pipeline(named.folder):
            return reference_only.open_reference_only_of_pipeline(text, named.folder, *choices)
        pair = [find_repository(repository, named.folder) for repository in _PUBLIC[named.name]]
        return reference_only.open_reference_only_of_sd(text, pair[0], pair[1], *choices)
    if named.name in _PUBLIC:
        from mimicbrush.evaluation.editors import diffusers_editors as editors_of_diffusers

        folders = [find_repository(repository, named.folder) for repository in _PUBLIC[named.name]]
        if named.name == "ip_adapter":
            return editors_of_diffusers.open_ip_adapter(text, folders[0], folders[1], *choices)
        return editors_of_diffusers.open_paint_by_example(text, folders[0], named.name.endswith("_box"), *choices)
    from mimicbrush.evaluation.editors import mimicbrush as editors_of_pipelines
    from mimicbrush.pipelines.folder import find_pipeline

    folder = find_pipeline(RELEASED) if named.name == RELEASED else named.folder
    assert folder is not None  # `_parse` sees to it
    return editors_of_pipelines.open_pipeline_editor(text, folder, *choices, named.look)


def _weight_files(named: _Named) -> list[Path]:
    """All that a model is loaded from."""
    from mimicbrush.pipelines.folder import find_pipeline

    if named.name in _PUBLIC and not _is_pipeline(named.folder):
        folders = [find_repository(repository, named.folder) for repository in _PUBLIC[named.name]]
    else:
        folders = [find_pipeline(RELEASED) if named.name == RELEASED else named.folder or Path()]
    suffixes = (".safetensors", ".bin", ".json")
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in suffixes]


def _parse(text: str) -> _Named:
    """The name before the colon, if it is known; otherwise the name is "" and all of it a pipeline folder."""
    name, colon, folder = text.partition(":")
    if _is_pipeline(Path(text)):
        return _Named("", Path(text))
    if name in _LOOKS and not Path(text).expanduser().is_dir():
        named = _parse(folder) if folder else None
        if named is None or named.name not in ("", SHIPPED_NAME, RELEASED) or named.look != "whole":
            raise InputError(f"{text}: after {name}: is to be a pipeline folder, {SHIPPED_NAME} or {RELEASED}")
        return replace(named, look=cast("ReferenceView", name))
    takes_folder = name in _PUBLIC or name == RESULTS
    if takes_folder and (folder or not colon):
        return _Named(name, Path(folder).expanduser() if folder else None)
    if not colon and (name in _WITHOUT_MODEL or name == RELEASED):
        return _Named(name, None)
    if text == SHIPPED_NAME:
        return _Named(SHIPPED_NAME, SHIPPED_MODEL)
    if Path(text).expanduser().is_dir():
        return _Named("", Path(text).expanduser())
    names = [known.partition("[")[0].partition(":")[0] for known in KNOWN if known != "DIR"]
    close = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    if name in names and colon:
        hint = f"; {name} " + ("needs the name of a folder after the colon" if takes_folder else "takes no folder")
    known = "\n".join(f"  {name:28}{meaning}" for name, meaning in KNOWN.items())
    raise InputError(f"{text!r} is neither a folder nor the name of an editor{hint}. Known are:\n{known}")


def _is_pipeline(folder: Path | None) -> bool:
    return folder is not None and (folder / "model_index.json").is_file()


def _check_pipeline(named: _Named) -> None:
    from mimicbrush.pipelines.folder import read_index

    folder = named.folder or Path()
    if named.name == SHIPPED_NAME and not _is_pipeline(folder):
        raise InputError(
            f"{SHIPPED_NAME}: the small model is not in this installation ({folder} is no pipeline folder); name a "
            "pipeline folder instead"
        )
    inner = folder / "pipeline"
    if not _is_pipeline(folder) and _is_pipeline(inner):
        raise InputError(f"{folder} is no pipeline folder (it has no model_index.json); did you mean {inner}?")
    index = read_index(folder)
    if named.look == "auto_zoom":
        from mimicbrush.pipelines.folder import class_names

        if "reference_unet" not in class_names(index):
            raise InputError(f"auto_zoom:{folder}: it needs a pipeline with a reference U-Net; this one has none")
