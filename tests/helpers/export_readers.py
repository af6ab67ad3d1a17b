"""Reads data sets of other trainers by their documented rules; each function names where these are written."""

from __future__ import annotations

import json
import re
import tarfile
import tomllib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class ReadSample:
    """What a trainer finds of a sample: its name, and arrays as they are stored."""

    name: str
    target: np.ndarray
    conditions: tuple[np.ndarray, ...]
    mask: np.ndarray
    caption: str


def pixels(file: Path | BytesIO) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def read_diffusers(folder: Path) -> list[ReadSample]:
    """huggingface/datasets, folder_based_builder.py: paths of *file_name are relative to metadata.jsonl."""
    samples = []
    for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        image = {key.removesuffix("file_name").rstrip("_"): path for key, path in row.items() if "file_name" in key}
        others = sorted(key for key in image if key.startswith("reference"))
        conditions = tuple(pixels(folder / image[key]) for key in ("source", *others))
        samples.append(
            ReadSample(
                Path(image[""]).stem,
                pixels(folder / image[""]),
                conditions,
                pixels(folder / image["mask"]),
                row["text"],
            )
        )
    return samples


def read_diffsynth(folder: Path) -> list[ReadSample]:
    """modelscope/DiffSynth-Studio, unified_dataset.py: opened in the locale's encoding; paths relative to the base."""
    rows = json.loads((folder / "metadata.json").read_text(encoding="ascii"))
    return [
        ReadSample(
            Path(row["image"]).stem,
            pixels(folder / row["image"]),
            tuple(pixels(folder / path) for path in row["edit_image"]),
            pixels(folder / row["mask"]),
            row["prompt"],
        )
        for row in rows
    ]


def find_image(folder: Path, stem: str) -> Path:
    (found,) = (folder / f"{stem}{suffix}" for suffix in IMAGE_SUFFIXES if (folder / f"{stem}{suffix}").exists())
    return found


def read_ai_toolkit(folder: Path) -> list[ReadSample]:
    """ostris/ai-toolkit, dataloader_mixins.py: a control image has the target's name, with any suffix."""
    controls = sorted(folder.glob("control_*"))
    return [
        ReadSample(
            path.stem,
            pixels(path),
            tuple(pixels(find_image(control, path.stem)) for control in controls),
            pixels(find_image(folder / "mask", path.stem)),
            path.with_suffix(".txt").read_text(encoding="utf-8").strip(),
        )
        for path in sorted((folder / "target").iterdir())
        if path.suffix in IMAGE_SUFFIXES
    ]


def read_onetrainer(folder: Path) -> list[ReadSample]:
    """Nerogar/OneTrainer, DataLoaderText2ImageMixin.py: postfixes with .png; each line of the text is a caption."""
    samples = []
    for path in sorted((folder / "concept").iterdir()):
        if path.suffix not in IMAGE_SUFFIXES or path.stem.endswith(("-masklabel", "-condlabel")):
            continue
        (caption,) = [line for line in path.with_suffix(".txt").read_text(encoding="utf-8").splitlines() if line]
        condition = pixels(path.with_name(f"{path.stem}-condlabel.png"))
        beside = [find_image(each, path.stem) for each in sorted(folder.glob("reference*"))]
        mask = pixels(path.with_name(f"{path.stem}-masklabel.png"))
        samples.append(ReadSample(path.stem, pixels(path), (condition, *map(pixels, beside)), mask, caption))
    return samples


def read_musubi(folder: Path) -> list[ReadSample]:
    """kohya-ss/musubi-tuner, docs/dataset_config.md and datasources.py: control_path_0 and on, opened as they are."""
    config = tomllib.loads((folder / "dataset.toml").read_text(encoding="utf-8"))
    (dataset,) = config["datasets"]
    assert dataset["cache_directory"] and config["general"]["resolution"]
    samples = []
    for line in Path(dataset["image_jsonl_file"]).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        controls = sorted((key for key in row if key.startswith("control_path_")), key=lambda key: int(key[13:]))
        assert controls == [f"control_path_{number}" for number in range(len(controls))]
        target = Path(row["image_path"])
        mask = pixels(target.parents[1] / "mask" / f"{target.stem}.png")
        conditions = tuple(pixels(Path(row[key])) for key in controls)
        assert list(pixels(target).shape[1::-1]) == config["general"]["resolution"]
        samples.append(ReadSample(target.stem, pixels(target), conditions, mask, row["caption"]))
    return samples


def read_webdataset(folder: Path) -> list[ReadSample]:
    """webdataset/webdataset, tariterators.py: the name up to the first dot, then the key; samples are in one piece."""
    samples = []
    for path in sorted(folder.glob("*.tar")):
        groups: dict[str, dict[str, bytes]] = defaultdict(dict)
        with tarfile.open(path) as archive:
            for member in archive:
                match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name)
                file = archive.extractfile(member)
                assert match is not None and file is not None
                assert match[1] == next(reversed(groups), match[1]) or match[1] not in groups
                groups[match[1]][match[2]] = file.read()
        for name, files in groups.items():
            image = {key.partition(".")[0]: pixels(BytesIO(data)) for key, data in files.items() if "." in key}
            conditions = tuple(image[key] for key in ("source", *sorted(each for each in image if "reference" in each)))
            assert json.loads(files["json"])["caption"] == files["txt"].decode()
            samples.append(ReadSample(name, image["target"], conditions, image["mask"], files["txt"].decode()))
    return samples


READERS: dict[str, Callable[[Path], list[ReadSample]]] = {
    "diffusers": read_diffusers,
    "diffsynth": read_diffsynth,
    "ai-toolkit": read_ai_toolkit,
    "onetrainer": read_onetrainer,
    "musubi": read_musubi,
    "webdataset": read_webdataset,
}
