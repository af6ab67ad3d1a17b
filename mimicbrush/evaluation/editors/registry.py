"""Editors by the name that they have on a command line. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mimicbrush.errors import InputError
from mimicbrush.evaluation.editors.protocol import EditorOptions
from mimicbrush.evaluation.editors.weights import (
    FLUX2_KLEIN,
    INPAINTING,
    IP_ADAPTER,
    PAINT_BY_EXAMPLE,
    STABLE_DIFFUSION,
    Repository,
    find_repository,
)
from mimicbrush.io.hashing import fingerprint
from mimicbrush.pipelines.folder import RELEASED_NAME, is_pipeline_folder, resolve_pipeline_folder
from mimicbrush.pipelines.klein.folder import check_klein, find_klein_folder, is_klein
from mimicbrush.pipelines.small_model import SHIPPED_NAME, SHIPPED_NAMES, model_folder
from mimicbrush.ranges import suggest

if TYPE_CHECKING:
    import torch

    from mimicbrush.evaluation.editors.mimicbrush import ReferenceView
    from mimicbrush.evaluation.editors.protocol import Editor

RESULTS, RELEASED, REFERENCE_ONLY, KLEIN = "results", RELEASED_NAME, "reference_only", "flux2_klein"

#: Editors that need no model and no folder: `baselines.open_baseline` makes them.
_BASELINES = ("oracle", "source", "blur", "copy_in_place", "opencv_inpaint", "sift_homography")
#: Those of them that also edit held-out pairs. There the source is the ground truth, which `oracle` returns.
_PAIR_BASELINES = tuple(name for name in _BASELINES if name != "source")
#: Editors made of public weights, and the repositories that they need.
_PUBLIC: dict[str, tuple[Repository, ...]] = {
    "paint_by_example": (PAINT_BY_EXAMPLE,),
    "paint_by_example_box": (PAINT_BY_EXAMPLE,),
    "ip_adapter": (INPAINTING, IP_ADAPTER),
    REFERENCE_ONLY: (INPAINTING, STABLE_DIFFUSION),
    KLEIN: (FLUX2_KLEIN,),
}
#: Ways in which a pipeline can look at its reference; without one at all of it.
_REFERENCE_VIEWS = ("auto_zoom", "boxed")
#: All names, and what each is.
KNOWN = {
    "oracle": "the ground truth, on tracks that have one: the best possible result",
    "source": "the unedited source, on tracks without a ground truth",
    "blur": "the hole filled with a wide blur of its surroundings",
    "copy_in_place": "the reference's pixels at the same place",
    "opencv_inpaint": "OpenCV's inpainting, without the reference",
    "sift_homography": "the reference warped by a homography from SIFT matches, as if the scene were one plane",
    SHIPPED_NAME: "the small model that comes with the project",
    RELEASED: "the released MimicBrush weights",
    "paint_by_example[:DIR]": "Paint-by-Example with the whole reference",
    "paint_by_example_box[:DIR]": "Paint-by-Example with the box around the reference's mask",
    "ip_adapter[:DIR]": "SD-1.5 inpainting with an IP-Adapter",
    "reference_only[:DIR]": "reference-only attention without training; DIR may also be a MimicBrush pipeline folder",
    "flux2_klein[:DIR]": "FLUX.2 klein without training; DIR may also be a LoRA file, or the folder of a training run",
    "auto_zoom:DIR": "a pipeline with auto-zoom (docs/editing.md); DIR may also be small or released",
    "boxed:DIR": "a pipeline with only the box around the reference's mask; DIR may also be small or released",
    "results:FOLDER": "a folder with results of any other method, NNN_result.png",
    "DIR": "a pipeline folder, or the folder of a training run that has one",
}


@dataclass(frozen=True)
class _Named:
    """A name, taken apart: a name out of `KNOWN` or "" for a pipeline folder, and the folder that it names."""

    name: str
    folder: Path | None
    reference_view: ReferenceView = "whole"


def check_editor(text: str, *, for_pairs: bool = False) -> None:
    """Check that `open_editor` can be expected to open this; quick, nothing heavy is imported.

    Args:
        text: see `open_editor`.
        for_pairs: it must also edit held-out pairs.

    Raises:
        InputError: no editor is called that, a folder is absent or something else, or it edits no pairs.
        WeightsError: weights are absent; says where they were looked for.
    """
    named = _parse(text)
    if for_pairs and named.name not in ("", SHIPPED_NAME, RELEASED, KLEIN, *_PAIR_BASELINES):
        raise InputError(
            f"{text} can edit only benchmark cases; for pairs use a pipeline, {', '.join(_PAIR_BASELINES)}"
        )
    if for_pairs and named.reference_view != "whole":
        raise InputError(f"{text} can edit only benchmark cases; for pairs use a pipeline with the whole reference")
    if named.name in _BASELINES or named.name == RELEASED:
        return
    if named.name == RESULTS:
        if named.folder is None or not named.folder.is_dir():
            raise InputError(f"{text}: no such folder; name a folder with NNN_result.png after results:")
    elif named.name == KLEIN:
        _find_klein(named)
    elif named.name in _PUBLIC:
        if not (named.name == REFERENCE_ONLY and _is_pipeline(named.folder)):
            for repository in _PUBLIC[named.name]:
                find_repository(repository, named.folder)
    else:
        _check_pipeline(named)


def find_editor_pipeline(text: str) -> Path | None:
    """Find the pipeline folder that a name stands for; None for an editor that is no MimicBrush pipeline.

    Args:
        text: a name that `check_editor` accepts. "released" is fetched and converted where it is not there yet.
    """
    named = _parse(text)
    if named.name == RELEASED:
        from mimicbrush.pipelines.find_pipeline import find_pipeline

        return find_pipeline(RELEASED)
    if named.name == KLEIN and named.folder is not None:
        # Of a LoRA file of anybody else, its folder; an untrained model has none.
        return find_klein_folder(named.folder) or (named.folder.parent if named.folder.is_file() else None)
    return named.folder if named.name in ("", SHIPPED_NAME) else None


def open_editor(
    text: str,
    *,
    device: str = "auto",
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> Editor:
    """Open an editor by its name, for held-out pairs and for benchmark cases.

    Args:
        text: a name out of `KNOWN`, or a pipeline folder. DIR is where weights lie, see `weights.find_repository`;
            without it they are taken from the local Hugging Face cache. Nothing is fetched, except for "released".
        device: "auto", "cpu" or "cuda".
        num_inference_steps: None: the editor's own; editors without a sampler have none.
        guidance_scale: likewise.
        dtype: of the networks; None: half precision on a GPU, float32 on the CPU.

    Raises:
        InputError, WeightsError: see `check_editor`; or what lies there cannot be loaded.
    """
    if num_inference_steps is not None and num_inference_steps < 1:
        raise InputError(f"num_inference_steps must be 1 or more, got {num_inference_steps}")
    check_editor(text)
    named = _parse(text)
    if named.name in _BASELINES or named.name == RESULTS:
        from mimicbrush.evaluation.editors import baselines

        return baselines.open_baseline(text) if named.folder is None else baselines.ResultsEditor(text, named.folder)
    editor = _open_model(text, named, EditorOptions(device, num_inference_steps, guidance_scale, dtype))
    editor.about["weights"] = fingerprint(_list_weight_files(named))  # the folder may hold others tomorrow
    return editor


def _open_model(text: str, named: _Named, options: EditorOptions) -> Editor:
    from mimicbrush.pipelines.open_pipeline import choose_device

    choose_device(options.device)  # an absent one must show before gigabytes are read
    if named.name in _PUBLIC:
        return _open_public(text, named, options)
    from mimicbrush.evaluation.editors.mimicbrush import open_mimicbrush

    folder = find_editor_pipeline(text) if named.name == RELEASED else named.folder
    assert folder is not None  # `_parse` sees to it
    return open_mimicbrush(text, folder, options, named.reference_view)


def _open_public(text: str, named: _Named, options: EditorOptions) -> Editor:
    """An editor of public weights, or `REFERENCE_ONLY` of a pipeline."""
    if named.name == REFERENCE_ONLY and named.folder is not None and _is_pipeline(named.folder):
        from mimicbrush.evaluation.editors.reference_only import open_reference_only_of_pipeline

        return open_reference_only_of_pipeline(text, named.folder, options)
    if named.name == KLEIN:
        from mimicbrush.evaluation.editors.flux2_klein import open_flux2_klein

        return open_flux2_klein(text, _find_klein(named), options)
    folders = [find_repository(repository, named.folder) for repository in _PUBLIC[named.name]]
    if named.name == REFERENCE_ONLY:
        from mimicbrush.evaluation.editors.reference_only import open_reference_only_of_sd

        return open_reference_only_of_sd(text, folders[0], folders[1], options)
    from mimicbrush.evaluation.editors import diffusers_editors

    if named.name == "ip_adapter":
        return diffusers_editors.open_ip_adapter(text, folders[0], folders[1], options)
    return diffusers_editors.open_paint_by_example(text, folders[0], named.name.endswith("_box"), options)


def _list_weight_files(named: _Named) -> list[Path]:
    """The files that a model is loaded from."""
    from mimicbrush.pipelines.find_pipeline import find_pipeline

    if named.name == KLEIN:
        from mimicbrush.pipelines.flux2_klein import list_klein_folders

        folders = list_klein_folders(_find_klein(named))
    elif named.name in _PUBLIC and not _is_pipeline(named.folder):
        folders = [find_repository(repository, named.folder) for repository in _PUBLIC[named.name]]
    else:
        folders = [find_pipeline(RELEASED) if named.name == RELEASED else named.folder or Path()]
    suffixes = (".safetensors", ".bin", ".json")
    files = [path for folder in folders for path in ([folder] if folder.is_file() else sorted(folder.rglob("*")))]
    return [path for path in files if path.suffix in suffixes]


def _find_klein(named: _Named) -> Path:
    """What `open_klein` is to open: what a run left, a LoRA file, or the folder of an untrained model.

    Raises:
        InputError, WeightsError: it is not there, or not whole.
    """
    path = named.folder
    if path is None or not is_klein(path):
        path = find_repository(FLUX2_KLEIN, path)
    check_klein(path)
    return path


def _parse(text: str) -> _Named:
    """The name before the colon, if it is known; otherwise the name is "" and all of it a pipeline folder."""
    name, colon, folder = text.partition(":")
    if _is_pipeline(Path(text)):
        return _name_pipeline(Path(text))
    if name in _REFERENCE_VIEWS and not Path(text).expanduser().is_dir():
        named = _parse(folder) if folder else None
        if named is None or named.name not in ("", SHIPPED_NAME, RELEASED) or named.reference_view != "whole":
            raise InputError(f"{text}: expected a pipeline folder, {SHIPPED_NAME} or {RELEASED} after {name}:")
        return replace(named, reference_view=cast("ReferenceView", name))
    takes_folder = name in _PUBLIC or name == RESULTS
    if takes_folder and (folder or not colon):
        return _Named(name, Path(folder).expanduser() if folder else None)
    if not colon and (name in _BASELINES or name == RELEASED):
        return _Named(name, None)
    if text in SHIPPED_NAMES:
        return _Named(SHIPPED_NAME, model_folder(text))
    if Path(text).expanduser().is_dir():
        return _name_pipeline(resolve_pipeline_folder(Path(text).expanduser()))  # of a run, its pipeline
    names = [each.partition("[")[0].partition(":")[0] for each in KNOWN if each != "DIR"]
    hint = suggest(name, names)
    if name in names and colon:
        hint = f". {name} " + ("needs the name of a folder after the colon" if takes_folder else "takes no folder")
    listed = "\n".join(f"  {name:28}{meaning}" for name, meaning in KNOWN.items())
    raise InputError(f"{text!r} is neither a folder nor the name of an editor{hint}\nKnown editors:\n{listed}")


def _name_pipeline(folder: Path | None) -> _Named:
    return _Named(KLEIN if folder is not None and is_klein(folder) else "", folder)


def _is_pipeline(folder: Path | None) -> bool:
    return folder is not None and is_pipeline_folder(folder)


def _check_pipeline(named: _Named) -> None:
    from mimicbrush.pipelines.folder import read_index

    folder = named.folder or Path()
    index = read_index(folder)
    if named.reference_view == "auto_zoom":
        from mimicbrush.pipelines.folder import class_names, find_reference_network_name

        if find_reference_network_name(class_names(index)) is None:
            raise InputError(
                f"auto_zoom:{folder}: auto-zoom needs a pipeline with a reference U-Net, but this one has none"
            )
