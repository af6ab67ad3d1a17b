"""Download missing starting weights, check all of them, and report part by part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mimicbrush.errors import WeightsError
from mimicbrush.models.options import PretrainedModel
from mimicbrush.models.pretrained.check import CLASSES, check_every_byte, check_weights
from mimicbrush.models.pretrained.files import DamagedFileError
from mimicbrush.models.pretrained.requirements import PartReport, add_together, inspect_part, name_option
from mimicbrush.models.pretrained.weights import LAYOUTS, fetch_network, locate_weights


def check_or_fetch_weights(
    options: PretrainedModel, *, fetching: bool, deep: bool, say: Callable[[str], None] = print
) -> list[PartReport]:
    """Check all starting weights, and download missing or damaged ones.

    Args:
        options: state the weights.
        fetching: whether to download; False: only check what is on this machine.
        deep: also read every byte, see `check_every_byte`.
        say: prints what is being downloaded.

    Returns:
        One report per part; it has a problem if the part cannot be used.
    """
    reports = [
        check_or_fetch_part(part, getattr(options, part), fetching=fetching, deep=deep, say=say)
        for part in options.weight_options()
    ]
    add_together(reports)
    return reports


def check_or_fetch_part(
    part: str, name: str, *, fetching: bool, deep: bool, say: Callable[[str], None] = print
) -> PartReport:
    """Check the starting weights of one part, and download missing or damaged ones; see `check_or_fetch_weights`.

    Args:
        part: a key of `weights.LAYOUTS`.
        name: value of its option.
        fetching, deep, say: see `check_or_fetch_weights`.
    """
    report, tried = _inspect(part, name, deep), list[Path | None]()
    while fetching and not Path(name).is_dir() and _can_be_fetched(report) and _damaged_file(report) not in tried:
        tried.append(_damaged_file(report))
        what = f"{part.partition('.')[2]} of {report.named}".removeprefix(" of ")
        say(f"downloading {what}" + (f" again: {report.problem}" if tried[-1] else ""))
        try:
            fetch_network(part, name, damaged=tried[-1])
        except WeightsError as error:
            report.problem = error
            break
        report = _inspect(part, name, deep)
    return report


def _inspect(part: str, name: str, deep: bool) -> PartReport:
    folder = locate_weights(part, name)
    if folder is None:
        absent = WeightsError("neither a folder nor (completely) in the local Hugging Face cache")
        return PartReport(part, name_option(part, name), problem=absent)
    root = folder.parent if folder.name == LAYOUTS[part].subfolder else folder
    if lacking := [pattern for pattern in LAYOUTS[part].beside if not any(root.glob(pattern))]:
        lacks = WeightsError(f"{root} has no {', '.join(lacking)}")
        return PartReport(part, name_option(part, name), problem=lacks)
    report = inspect_part(part, name, folder)
    try:
        if report.problem is None and report.network is not None:
            check_weights(part, CLASSES[part], report.network)
            if deep:
                check_every_byte(report.network)
    except WeightsError as error:
        report.problem = error
    return report


def _can_be_fetched(report: PartReport) -> bool:
    """Whether a download may help: files are missing or damaged, but they are not those of another network."""
    return report.network is None or _damaged_file(report) is not None


def _damaged_file(report: PartReport) -> Path | None:
    return report.problem.file if isinstance(report.problem, DamagedFileError) else None
