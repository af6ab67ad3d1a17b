"""The builder: inner-ID and inter-ID cases from images and videos that no model was trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from mimicbrush.errors import DataError, InputError, MimicBrushError
from mimicbrush.evaluation.benchmark.layout import ABOUT_NAME, TRACKS, BenchmarkFault, BenchmarkWriter, TrackName
from mimicbrush.evaluation.benchmark_builder.contamination import (
    TrainingOrigins,
    check_hashes,
    check_images,
    read_training_origins,
)
from mimicbrush.evaluation.benchmark_builder.inner_id import (
    InnerPair,
    choose_folder_pairs,
    list_siblings,
    read_dreambooth_pairs,
    read_folder_materials,
    read_mined_pairs,
)
from mimicbrush.evaluation.benchmark_builder.inter_id import (
    PAPER_GROUPS,
    InterPair,
    choose_inter_pairs,
    find_paper_group,
)
from mimicbrush.evaluation.benchmark_builder.licences import write_licences
from mimicbrush.evaluation.benchmark_builder.materials import (
    BOX_OF_MATCHES,
    REGION_NAMES,
    MaskFolder,
    Material,
    RegionName,
)
from mimicbrush.evaluation.benchmark_builder.options import PAPER_CASES, BuildOptions
from mimicbrush.io.hashing import hash_file
from mimicbrush.io.images import write_image

_INNER: dict[TrackName, RegionName] = {"part_inner": "part", "texture_inner": "subject"}
_INTER: dict[TrackName, RegionName] = {"part_inter": "part", "texture_inter": "subject"}


@dataclass(frozen=True)
class BuildResult:
    """The cases that were built, and the faults.

    Attributes:
        cases: in each track.
        groups: of `part_inter`, by the paper's four groups.
        faults: what was missing, damaged or could not be used.
        notes: what a person should know.
        unmasked: images that lack a mask, by its kind.
    """

    cases: dict[TrackName, int]
    groups: dict[str, int]
    faults: list[BenchmarkFault]
    notes: list[str]
    unmasked: dict[RegionName, int]


@dataclass(frozen=True)
class _Proposal:
    track: TrackName
    source: Material
    reference: Material
    origin: str
    prompt: str | None = None


@dataclass(frozen=True)
class _Gathered:
    """The inner-ID pairs by their origin, and all images."""

    inner: dict[str, list[InnerPair]]
    materials: dict[str, Material]
    files: list[tuple[str, str]]
    faults: list[BenchmarkFault]
    notes: list[str]
    about: list[dict[str, Any]]


def build_benchmark(output: Path, options: BuildOptions) -> BuildResult:
    """Build a benchmark in the released layout; the same input gives the same bytes.

    Args:
        output: the folder; an older one is replaced when the new one is whole.
        options: what to build from.

    Raises:
        InputError: folders or lists that cannot be used.
        DataError: something was trained on, or no case came of it.
    """
    _check_apart(output, options)
    masks = MaskFolder(options.masks)
    origins = [read_training_origins(folder) for folder in options.against]
    gathered = _gather(options, masks, origins)
    check_hashes(gathered.files, origins)
    proposals = _propose(gathered, options)
    chosen = {each.key: each for case in proposals for each in (case.source, case.reference)}
    check_images([(key, material.read) for key, material in chosen.items()], origins)
    faults, notes = list(gathered.faults), list(gathered.notes)
    unused = masks.list_unused(gathered.materials.values())
    notes += [f"--masks: no image belongs to {name}" for name in unused]

    writer = BenchmarkWriter(output)
    cases: Counter[TrackName] = Counter()
    groups: Counter[str] = Counter()
    files: list[tuple[str, Material]] = []
    with writer:
        for case in proposals:
            try:
                number = _write_case(writer, case, options.long_side_px)
            except MimicBrushError as error:
                faults.append(BenchmarkFault(case.source.path, f"{case.track}, {case.source.key}: {error}"))
                continue
            cases[case.track] += 1
            if case.track == "part_inter":
                groups[find_paper_group(case.source.kind)] += 1
            folder = TRACKS[case.track].folder
            files += [
                (f"{folder}/{number}_source.png", case.source),
                (f"{folder}/{number}_reference.png", case.reference),
            ]
        if not cases:
            raise DataError(_explain_no_cases(faults, notes))
        notes += write_licences(writer.folder, files)
        unmasked = _write_unmasked(gathered, options.to_paint)
        built = BuildResult({track: cases[track] for track in TRACKS}, dict(groups), faults, notes, unmasked)
        writer.finish(_describe_build(options, gathered, built, origins))
    return built


def _check_apart(output: Path, options: BuildOptions) -> None:
    inputs = [options.dreambooth, options.images, options.masks, options.manifest, *options.pairs, *options.against]
    for folder in filter(None, inputs):
        if folder.resolve().is_relative_to(output.resolve()):
            raise InputError(f"--output {output} would replace the input {folder}; name another folder")
    if options.to_paint and options.to_paint.resolve().is_relative_to(output.resolve()):
        raise InputError(f"--to-paint {options.to_paint} is inside --output, which is replaced; name another folder")
    if output.exists() and not (output / ABOUT_NAME).is_file() and (output.is_file() or any(output.iterdir())):
        raise InputError(
            f"--output {output} is not empty and not a benchmark, so it is not replaced; name another folder"
        )


def _gather(options: BuildOptions, masks: MaskFolder, origins: Sequence[TrainingOrigins]) -> _Gathered:
    gathered = _Gathered({}, {}, [], [], [], [])

    def keep(origin: str, folder: Path, pairs: list[InnerPair], faults: list[BenchmarkFault], **facts: Any) -> None:
        gathered.inner.setdefault(origin, []).extend(pairs)
        gathered.faults.extend(faults)
        gathered.about.append({"from": origin, "name": folder.resolve().name, "inner_id_pairs": len(pairs), **facts})
        for material in (each for pair in pairs for each in (pair.source, pair.reference)):
            _add_material(gathered.materials, material)

    if options.dreambooth and options.manifest:
        pairs, faults = read_dreambooth_pairs(options.dreambooth, options.manifest, masks)
        manifest = {"manifest": options.manifest.name, "manifest_sha256": hash_file(options.manifest)}
        keep("list", options.dreambooth, pairs, faults, **manifest)
        gathered.files.extend(list_siblings(each for pair in pairs for each in (pair.source, pair.reference)))
    if options.images:
        materials, faults = read_folder_materials(options.images, masks)
        most = max(options.limit(track) for track in _INNER)
        pairs, without = choose_folder_pairs(materials, options.seed, most)
        keep("pictures", options.images, pairs, faults + without, images=len(materials))
        for material in materials:
            _add_material(gathered.materials, material)
        gathered.files.extend((material.key, material.sha256) for material in materials)
    for folder in options.pairs:
        pairs, faults, notes = read_mined_pairs(folder, masks, origins, options.limit("part_inner"))
        keep("mined videos", folder, pairs, faults)
        gathered.notes.extend(notes)
        gathered.files.extend((f"{pair.source.subject} of {folder}", pair.source.sha256) for pair in pairs)
    return gathered


def _add_material(materials: dict[str, Material], material: Material) -> None:
    """Keep an image once, with the regions of all its pairs."""
    other = materials.get(material.key)
    if other is not None and other.path.resolve() != material.path.resolve():
        raise InputError(
            f"{other.path} and {material.path} have the same name {material.key}; build from one of them, or rename one"
        )
    regions = {**material.regions, **(other.regions if other else {})}
    # A box around matches belongs to one pair: it means nothing with another image.
    materials[material.key] = replace(material, regions={k: v for k, v in regions.items() if v.how != BOX_OF_MATCHES})


def _propose(gathered: _Gathered, options: BuildOptions) -> list[_Proposal]:
    proposals = []
    for track, region in _INNER.items():
        for origin, pairs in gathered.inner.items():
            usable = [pair for pair in pairs if region in pair.source.regions][: options.limit(track)]
            proposals += [_Proposal(track, pair.source, pair.reference, origin) for pair in usable]
    materials = [gathered.materials[key] for key in sorted(gathered.materials)]
    for track, region in _INTER.items():
        chosen: list[InterPair] = choose_inter_pairs(materials, region, options.seed, options.limit(track))
        proposals += [_Proposal(track, pair.source, pair.reference, "classes", pair.prompt) for pair in chosen]
    return proposals


def _write_case(writer: BenchmarkWriter, case: _Proposal, long_side_px: int | None) -> str:
    region: RegionName = ({**_INNER, **_INTER})[case.track]
    images: dict[str, Image.Image] = {}
    masks: dict[str, Image.Image] = {}
    facts: dict[str, Any] = {"from": case.origin, "subject": case.source.subject, "group": case.source.subject}
    if case.source.kind:
        facts |= {"class": case.source.kind, "paper_group": find_paper_group(case.source.kind)}
    for side, material in (("source", case.source), ("reference", case.reference)):
        images[side] = material.read()
        facts[side] = material.describe()
        if region in material.regions:
            chosen = material.regions[region]
            masks[side] = chosen.render(images[side].size)
            facts[side] |= {"mask": chosen.how, "covers": chosen.label}
            masks[side] = _reduce(masks[side], long_side_px)
        images[side] = _reduce(images[side], long_side_px)
    return writer.add(
        case.track,
        source=images["source"],
        mask=masks["source"],
        reference=images["reference"],
        reference_mask=masks.get("reference"),
        prompt=case.prompt,
        facts=facts,
    )


def _reduce(image: Image.Image, long_side_px: int | None) -> Image.Image:
    scale = 1 if long_side_px is None else long_side_px / max(image.size)
    if scale >= 1:
        return image
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.LANCZOS)


def _write_unmasked(gathered: _Gathered, folder: Path | None) -> dict[RegionName, int]:
    """Count the images without a region, and write them where they can be painted over."""
    counts: dict[RegionName, int] = {}
    for name in REGION_NAMES:
        without = [each for each in gathered.materials.values() if name not in each.regions]
        counts[name] = len(without)
        for material in without if folder else ():
            path = folder / name / f"{material.key}.png"  # type: ignore[operator]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(material.read(), path)
    return counts


def _describe_build(
    options: BuildOptions, gathered: _Gathered, built: BuildResult, origins: Sequence[TrainingOrigins]
) -> dict[str, Any]:
    return {
        "made_by": "mimicbrush benchmark",
        "differs_from_the_paper": "the paper's benchmark was not published; this one has other images, pairs and masks",
        "seed": options.seed,
        "long_side_px": options.long_side_px,
        "sources": gathered.about,
        "tracks": {
            track: {"cases": n, "paper": PAPER_CASES[track], "missing": max(0, PAPER_CASES[track] - n)}
            for track, n in built.cases.items()
        },
        "part_inter_groups": {
            group: {"cases": built.groups.get(group, 0), "paper": PAPER_CASES["part_inter"] // len(PAPER_GROUPS)}
            for group in PAPER_GROUPS
        }
        | ({"other": {"cases": built.groups["other"], "paper": 0}} if "other" in built.groups else {}),
        "pictures_without_mask": built.unmasked,
        "faults": [{"file": "/".join(fault.path.parts[-2:]), "reason": fault.reason} for fault in built.faults],
        "notes": built.notes,
        "against": [origin.describe() for origin in origins],
        "licences": "LICENCES.md",
    }


def _explain_no_cases(faults: Sequence[BenchmarkFault], notes: Sequence[str]) -> str:
    reasons = [f"{fault.path}: {fault.reason}" for fault in faults[:5]] + list(notes[:3])
    why = "; ".join(reasons) if reasons else "no two images of one subject or class have the masks that a case needs"
    return (
        f"no benchmark case could be made ({why}); fix this, or paint masks (--to-paint DIR, mimicbrush paint, "
        "--masks DIR)"
    )
