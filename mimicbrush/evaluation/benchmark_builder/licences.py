"""LICENCES.md of a benchmark: author, licence and address of each image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mimicbrush.evaluation.benchmark_builder.materials import Material
from mimicbrush.io.hashing import hash_file

LICENCES_NAME = "LICENCES.md"
TEXTS_FOLDER = "licences"


def write_licences(folder: Path, files: Sequence[tuple[str, Material]]) -> list[str]:
    """Write LICENCES.md, and copy the licence files that came with the images.

    Args:
        folder: of the benchmark.
        files: path in it, and what was written there.

    Returns:
        What a person should know: images of which nobody says a licence.
    """
    texts: dict[str, str] = {}  # SHA-256 -> name of the copy
    for path in dict.fromkeys(path for _, material in files for path in material.rights.texts):
        digest = hash_file(path)
        if digest in texts:
            continue
        name = f"{path.resolve().parent.name}-{path.name}"
        if name in texts.values():
            name = f"{digest[:8]}-{name}"
        texts[digest] = name
        (folder / TEXTS_FOLDER).mkdir(exist_ok=True)
        (folder / TEXTS_FOLDER / name).write_bytes(path.read_bytes())
    lines = [
        "# Licences of the images",
        "",
        "The author, licence and origin of every image, as far as its source states them. Changes: images are",
        "stored as PNG, and reduced if they were larger than `long_side_px` in benchmark.json.",
        "",
        "| file | image | credit | licence | address |",
        "|---|---|---|---|---|",
    ]
    unknown = 0
    for name, material in sorted(files, key=lambda each: each[0]):
        rights = material.rights
        copies = [f"[{texts[hash_file(path)]}]({TEXTS_FOLDER}/{texts[hash_file(path)]})" for path in rights.texts]
        licence = _format_cell(rights.licence) or ("see " + ", ".join(copies) if copies else "")
        unknown += not licence
        cells = [
            name,
            _format_cell(material.key),
            _format_cell(rights.credit),
            licence or "**not stated**",
            _format_cell(rights.url),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if texts:
        lines += ["", "Licence texts that came with the images:", ""]
        lines += [f"* [{name}]({TEXTS_FOLDER}/{name})" for name in sorted(texts.values())]
    (folder / LICENCES_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return [f"{unknown} of {len(files)} images come without a licence"] if unknown else []


def _format_cell(text: str) -> str:
    """Make a table cell from an untrusted text."""
    return re.sub(r"\s+", " ", text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").strip()
