"""Small images, masks and folders to build benchmarks from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from toy_data import photograph

from mimicbrush.data.training_data import HASH_DIGITS, TrainingData, write_training_data
from mimicbrush.evaluation.benchmark.layout import TRACKS, TrackName
from mimicbrush.evaluation.benchmark_builder.build import BuildOptions, BuildResult, build_benchmark
from mimicbrush.io.images import read_image

MANIFEST = Path(__file__).parents[2] / "data_manifests/dreambooth_inner_id.jsonl"


def write_photo(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def view(name: str, number: int, size_px: int = 160) -> np.ndarray:
    """A photograph, turned and scaled: another number, another view. No two are near duplicates."""
    photo = photograph(name)
    height, width = photo.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), 25 * number, size_px / min(height, width) * 1.1**number)
    turn[:, 2] += size_px / 2 - width / 2, size_px / 2 - height / 2
    return cv2.warpAffine(photo, turn, (size_px, size_px), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT)


def pixels(path: Path, mode: str = "L") -> np.ndarray:
    return np.asarray(read_image(path, mode))


Box = tuple[int, int, int, int]


def painted(masks: Path, key: str, kind: str, box: Box, size: tuple[int, int] = (160, 160)) -> None:
    mask = Image.new("L", size)
    mask.paste(255, box)
    path = masks / kind / f"{key}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    mask.save(path)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def facts(root: Path, track: TrackName) -> dict[str, Any]:
    path = root / TRACKS[track].folder / "cases.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def build(tmp_path: Path, **options: Any) -> BuildResult:
    return build_benchmark(tmp_path / "benchmark", BuildOptions(**options))


def write_images(root: Path) -> Path:
    """Two subjects of one class and one without, three images each; one image is a near duplicate."""
    for subject, photo in (("tabby", "chelsea.png"), ("woman", "astronaut.png"), ("cup", "coffee.png")):
        for number in range(2):
            write_photo(root / subject / f"{number:02d}.png", view(photo, number))
    write_photo(root / "cup/02.png", view("coffee.png", 0)[:, ::-1])
    (root / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\ntabby,animal\nwoman,animal\n\nPrompts\n\ncup,nonsense\n"
    )
    (root / "LICENSE.md").write_text("CC0 for all\n")
    return root


def trained_on(folder: Path, hashes: list[str]) -> Path:
    folder.mkdir(parents=True)
    write_training_data(folder, TrainingData(0.1, frozenset(each[:HASH_DIGITS] for each in hashes)))
    return folder


def source_hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def write_dreambooth(root: Path, manifest: Path) -> None:
    """A tiny dataset in the real layout, as a clone has it, and a list of its pairs in the real format."""
    lines = [json.loads(line) for line in MANIFEST.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["subject"] in ("dog2", "dog3", "dog7", "cat", "vase")]
    for number, name in enumerate(sorted({line[side] for line in lines for side in ("source", "reference")})):
        photo = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")[number % 4]
        write_photo(root / name, view(photo, number, 160 + number))
    (root / "dataset/references_and_licenses.txt").write_text("who made what\n")
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
