"""The lists in data_manifests/ are complete and lie within their root. They are true where the images are there."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mimicbrush.ops.similarity import (
    LIKELY_AGREEMENT,
    NEAR_DUPLICATE_SSIM,
    highest_ssim,
    phase_signature,
    signature_agreement,
)

FOLDER = Path(__file__).parents[2] / "data_manifests"
INNER_ID = FOLDER / "dreambooth_inner_id.jsonl"
COLUMNS = [
    *("number", "subject", "class", "source", "reference", "part", "part_box", "subject_box"),
    *("source_credit", "source_licence", "source_url", "reference_credit", "reference_licence", "reference_url"),
    "note",
]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    return read_lines(INNER_ID)


@pytest.fixture
def images(shared: Path) -> Path:
    """The dataset at hand: its folder stands for `dataset/` of the public repository."""
    return shared / "data/dreambooth"


def images_ssim(a: Path, b: Path) -> float:
    one, two = (np.asarray(Image.open(path).convert("RGB")) for path in (a, b))
    return highest_ssim(one, two)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.jsonl")), ids=lambda path: path.name)
def test_every_list_has_one_object_a_line_with_the_same_columns_and_no_path_that_leaves_its_root(path: Path) -> None:
    lines = read_lines(path)
    assert lines
    assert {tuple(line) for line in lines} == {tuple(lines[0])}
    for line in lines:
        for key in ("source", "reference", "source_path", "shard"):
            name = PurePosixPath(line.get(key, ""))
            assert not name.is_absolute() and ".." not in name.parts and "\\" not in str(name)


def test_thirty_pairs_of_twenty_subjects(pairs: list[dict[str, Any]]) -> None:
    assert [pair["number"] for pair in pairs] == list(range(1, 31))
    assert len({pair["subject"] for pair in pairs}) == 20
    assert len({frozenset((pair["source"], pair["reference"])) for pair in pairs}) == 30
    for pair in pairs:
        assert list(pair) == COLUMNS
        assert pair["source"] != pair["reference"]
        for name in (pair["source"], pair["reference"]):
            assert re.fullmatch(rf"dataset/{pair['subject']}/\d\d\.jpg", name), name


def test_the_part_lies_within_the_subject_and_the_subject_within_the_image(pairs: list[dict[str, Any]]) -> None:
    for pair in pairs:
        (left, top, right, bottom), subject_box = pair["part_box"], pair["subject_box"]
        assert 0 <= subject_box[0] <= left < right <= subject_box[2] <= 1, pair["number"]
        assert 0 <= subject_box[1] <= top < bottom <= subject_box[3] <= 1, pair["number"]
        assert (right - left) * (bottom - top) < 0.6 * (subject_box[2] - subject_box[0]) * (
            subject_box[3] - subject_box[1]
        ), pair["number"]


def test_every_text_and_licence_field_is_filled(pairs: list[dict[str, Any]]) -> None:
    hosts = {"CC BY 4.0": "https://github.com/google/dreambooth/", "Unsplash License": "https://unsplash.com/"}
    for pair in pairs:
        assert all(pair[key].strip() for key in COLUMNS if isinstance(pair[key], str))
        for image in ("source", "reference"):
            assert pair[f"{image}_url"].startswith(hosts[pair[f"{image}_licence"]]), pair["number"]


def test_the_document_names_every_column() -> None:
    text = (FOLDER / "DREAMBOOTH.md").read_text(encoding="utf-8")
    for column in COLUMNS:
        assert f"`{column}`" in text, column


def test_credits_and_classes_are_those_of_the_dataset(pairs: list[dict[str, Any]], images: Path) -> None:
    references = (images / "references_and_licenses.txt").read_text(encoding="utf-8")
    classes = (images / "prompts_and_classes.txt").read_text(encoding="utf-8").splitlines()
    for pair in pairs:
        assert f"{pair['subject']},{pair['class']}" in classes
        entry = re.search(rf"^{pair['subject']}:.*?(?=^\s*$)", references, re.MULTILINE | re.DOTALL)
        assert entry, pair["subject"]
        for image in ("source", "reference"):
            author, url = pair[f"{image}_credit"].removesuffix(" on Unsplash"), pair[f"{image}_url"]
            assert author in entry[0], pair["number"]
            if pair[f"{image}_licence"] == "Unsplash License":
                number = PurePosixPath(pair[image]).stem
                assert re.search(rf"^{number}: .*{re.escape(url)} *$", entry[0], re.MULTILINE), pair["number"]
            else:
                assert "unsplash" not in entry[0] and url.endswith(pair[image]), pair["number"]


@pytest.mark.parametrize(("a", "b"), [("cat/02.jpg", "cat/03.jpg"), ("dog5/02.jpg", "dog5/03.jpg")])
def test_the_duplicates_that_the_dataset_itself_names_are_found(images: Path, a: str, b: str) -> None:
    """One is shifted, the other mirrored, so plain SSIM would find neither."""
    assert images_ssim(images / a, images / b) > NEAR_DUPLICATE_SSIM
    one, two = (np.asarray(Image.open(images / name).convert("RGB")) for name in (a, b))
    others = np.stack([phase_signature(image) for image in (two, two[:, ::-1])])
    assert signature_agreement(phase_signature(one), others).max() > 1.5 * LIKELY_AGREEMENT


def test_no_pair_is_a_near_duplicate(pairs: list[dict[str, Any]], images: Path) -> None:
    for pair in pairs:
        source, reference = (images / pair[key].removeprefix("dataset/") for key in ("source", "reference"))
        assert images_ssim(source, reference) < NEAR_DUPLICATE_SSIM, pair["number"]
