"""The lists in data_manifests/: whole, within their root, and, where the pictures are at hand, true."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from mimicbrush.ops.similarity import SSIM_LONG_SIDE_PX, ssim_luma, ssim_thumbnail

FOLDER = Path(__file__).parents[2] / "data_manifests"
INNER_ID = FOLDER / "dreambooth_inner_id.jsonl"
COLUMNS = [
    *("number", "subject", "class", "source", "reference", "part", "part_box", "subject_box"),
    *("source_credit", "source_licence", "source_url", "reference_credit", "reference_licence", "reference_url"),
    "note",
]
# Among all pairs of pictures of one subject, the two known duplicates have 0.995 and more; the next are drawings on
# white with 0.88, photographs on white with 0.83.
NEAR_DUPLICATE_SSIM = 0.9


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    return read_lines(INNER_ID)


@pytest.fixture
def pictures(shared: Path) -> Path:
    """The dataset at hand: its folder stands for `dataset/` of the public repository."""
    return shared / "data/dreambooth"


def highest_ssim(a: Path, b: Path) -> float:
    """The highest SSIM of two pictures as they are or one mirrored, in place or shifted (phase correlation)."""
    size = (SSIM_LONG_SIDE_PX, SSIM_LONG_SIDE_PX)
    one, two = (
        ssim_thumbnail(cv2.resize(np.asarray(Image.open(path).convert("RGB")), size, interpolation=cv2.INTER_AREA))
        for path in (a, b)
    )
    found = []
    for other in (two, np.ascontiguousarray(two[:, ::-1])):
        window = cv2.createHanningWindow(size, cv2.CV_64F)
        (dx, dy), _ = cv2.phaseCorrelate(one.astype(np.float64), other.astype(np.float64), window)
        found += [ssim_luma(one, other), _ssim_of_overlap(one, other, round(dx), round(dy))]
    return max(found)


def _ssim_of_overlap(one: np.ndarray, two: np.ndarray, dx: int, dy: int) -> float:
    """SSIM where `two`, moved back by (dx, dy) px, covers `one`; -1 where that is less than half of a side."""
    height, width = one.shape
    if max(abs(dx) / width, abs(dy) / height) > 0.5:
        return -1.0
    rows, columns = slice(max(0, -dy), height - max(0, dy)), slice(max(0, -dx), width - max(0, dx))
    moved_rows, moved_columns = slice(max(0, dy), height - max(0, -dy)), slice(max(0, dx), width - max(0, -dx))
    return ssim_luma(np.ascontiguousarray(one[rows, columns]), np.ascontiguousarray(two[moved_rows, moved_columns]))


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


def test_the_part_lies_within_the_subject_and_the_subject_within_the_picture(pairs: list[dict[str, Any]]) -> None:
    for pair in pairs:
        (left, top, right, bottom), whole = pair["part_box"], pair["subject_box"]
        assert 0 <= whole[0] <= left < right <= whole[2] <= 1, pair["number"]
        assert 0 <= whole[1] <= top < bottom <= whole[3] <= 1, pair["number"]
        assert (right - left) * (bottom - top) < 0.6 * (whole[2] - whole[0]) * (whole[3] - whole[1]), pair["number"]


def test_every_text_and_licence_field_is_filled(pairs: list[dict[str, Any]]) -> None:
    hosts = {"CC BY 4.0": "https://github.com/google/dreambooth/", "Unsplash License": "https://unsplash.com/"}
    for pair in pairs:
        assert all(pair[key].strip() for key in COLUMNS if isinstance(pair[key], str))
        for picture in ("source", "reference"):
            assert pair[f"{picture}_url"].startswith(hosts[pair[f"{picture}_licence"]]), pair["number"]


def test_the_document_names_every_column() -> None:
    text = (FOLDER / "DREAMBOOTH.md").read_text(encoding="utf-8")
    for column in COLUMNS:
        assert f"`{column}`" in text, column


def test_credits_and_classes_are_those_of_the_dataset(pairs: list[dict[str, Any]], pictures: Path) -> None:
    references = (pictures / "references_and_licenses.txt").read_text(encoding="utf-8")
    classes = (pictures / "prompts_and_classes.txt").read_text(encoding="utf-8").splitlines()
    for pair in pairs:
        assert f"{pair['subject']},{pair['class']}" in classes
        entry = re.search(rf"^{pair['subject']}:.*?(?=^\s*$)", references, re.MULTILINE | re.DOTALL)
        assert entry, pair["subject"]
        for picture in ("source", "reference"):
            author, url = pair[f"{picture}_credit"].removesuffix(" on Unsplash"), pair[f"{picture}_url"]
            assert author in entry[0], pair["number"]
            if pair[f"{picture}_licence"] == "Unsplash License":
                number = PurePosixPath(pair[picture]).stem
                assert re.search(rf"^{number}: .*{re.escape(url)} *$", entry[0], re.MULTILINE), pair["number"]
            else:
                assert "unsplash" not in entry[0] and url.endswith(pair[picture]), pair["number"]


@pytest.mark.parametrize(("a", "b"), [("cat/02.jpg", "cat/03.jpg"), ("dog5/02.jpg", "dog5/03.jpg")])
def test_the_duplicates_that_the_dataset_itself_names_are_found(pictures: Path, a: str, b: str) -> None:
    """One is shifted, the other mirrored, so plain SSIM would find neither."""
    assert highest_ssim(pictures / a, pictures / b) > NEAR_DUPLICATE_SSIM


def test_no_pair_is_a_near_duplicate(pairs: list[dict[str, Any]], pictures: Path) -> None:
    for pair in pairs:
        source, reference = (pictures / pair[key].removeprefix("dataset/") for key in ("source", "reference"))
        assert highest_ssim(source, reference) < NEAR_DUPLICATE_SSIM, pair["number"]
