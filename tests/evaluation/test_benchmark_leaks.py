"""Nothing in a benchmark was trained on, and parts are where two images show the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from benchmark_material import build, painted, trained_on, view, write_photo
from PIL import Image

from mimicbrush.data.manifest import read_manifest
from mimicbrush.errors import DataError, InputError
from mimicbrush.evaluation.benchmark_builder.inter_id import is_same_part
from mimicbrush.evaluation.benchmark_builder.part_boxes import (
    PART_SIDE_RATIO,
    extract_match_features,
    find_best_boxes,
    find_matched_boxes,
)


def test_a_image_that_was_trained_on_is_refused_and_both_are_named(images: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256((images / "tabby/01.png").read_bytes()).hexdigest()
    pipeline = trained_on(tmp_path / "pipeline", [digest])
    with pytest.raises(DataError, match=rf"tabby/01 is source {digest[:16]}.* of {pipeline}"):
        build(tmp_path, images=images, against=(pipeline,))
    assert not (tmp_path / "benchmark").exists()


def test_a_subject_leaks_even_by_a_image_that_no_case_uses(dreambooth: tuple[Path, Path], tmp_path: Path) -> None:
    root, manifest = dreambooth
    unused = write_photo(root / "dataset/cat/77.jpg", view("coffee.png", 3))
    pipeline = trained_on(tmp_path / "pipeline", [hashlib.sha256(unused.read_bytes()).hexdigest()])
    with pytest.raises(DataError, match=r"cat/77\.jpg is source"):
        build(tmp_path, dreambooth=root, manifest=manifest, against=(pipeline,))


@pytest.mark.parametrize("change", ["same", "mirrored", "shifted", "smaller", "a piece"])
def test_a_near_duplicate_of_a_training_frame_is_refused(mined: Path, tmp_path: Path, change: str) -> None:
    frame = read_manifest(mined)[0].read_a()
    changed = {
        "same": frame,
        "mirrored": frame[:, ::-1],
        "shifted": cv2.warpAffine(frame, np.array([[1.0, 0, 25], [0, 1, 9]]), (160, 160)),
        "a piece": cv2.resize(frame[20:110, 30:120], (160, 160), interpolation=cv2.INTER_CUBIC),
        "smaller": cv2.resize(frame, (120, 120), interpolation=cv2.INTER_AREA),
    }[change]
    write_photo(tmp_path / "pictures/thing/00.png", np.ascontiguousarray(changed))
    for number in (1, 2):
        write_photo(tmp_path / f"pictures/thing/{number:02d}.png", view("coffee.png", number))
    # 00 needs no partner: a painted mask makes it a source.
    painted(tmp_path / "masks", "thing/00", "part", (9, 9, 60, 60), (changed.shape[1], changed.shape[0]))
    seen = r"appear in the training set: thing/00 (looks like|shares a piece with) astronaut\.png"
    with pytest.raises(DataError, match=seen):
        build(tmp_path, images=tmp_path / "pictures", masks=tmp_path / "masks", against=(mined,))


def test_other_images_are_no_near_duplicates(shared: Path, mined: Path, tmp_path: Path) -> None:
    for number in (1, 2, 5):
        with Image.open(shared / f"data/dreambooth/backpack/{number:02d}.jpg") as image:
            painted(tmp_path / "masks", f"backpack/{number:02d}", "part", (9, 9, 99, 99), image.size)
            write_photo(tmp_path / f"pictures/backpack/{number:02d}.png", np.asarray(image))
    built = build(tmp_path, images=tmp_path / "pictures", masks=tmp_path / "masks", against=(mined,))
    about = json.loads((tmp_path / "benchmark/benchmark.json").read_text())
    assert built.cases["part_inner"] == 3
    assert about["against"][0]["compared"] == "hashes, images, and pieces of images"


def test_a_folder_that_says_nothing_of_a_training_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a pipeline folder"):
        build(tmp_path, images=images, against=(images,))


# ---- boxes


def test_the_best_box_is_where_the_moving_matches_are() -> None:
    rng = np.random.default_rng(0)
    still = rng.uniform(0, 999, (400, 2))
    moving = rng.uniform((600, 200), (800, 400), (30, 2))
    a = np.concatenate([still, moving])
    b = np.concatenate([still, moving - (300, 0)])
    own, other = find_best_boxes(a, b, (1000, 1000)) or pytest.fail("no box")
    assert own[0] <= 0.6 and own[2] >= 0.8 and own[1] <= 0.2 and own[3] >= 0.4
    partners = (moving - (300, 0)) / 1000
    assert (partners.min(0) >= np.array(other[:2]) - 0.001).all() and (partners.max(0) <= other[2:]).all()
    assert own[2] - own[0] == pytest.approx(PART_SIDE_RATIO)
    assert find_best_boxes(a[:3], b[:3], (1000, 1000)) is None
    assert find_best_boxes(a[:0], b[:0], (1000, 1000)) is None


def test_a_part_is_found_again_in_a_turned_image() -> None:
    image = view("astronaut.png", 0, 330)
    turned = np.ascontiguousarray(np.rot90(image, 2))
    own, other = find_matched_boxes(extract_match_features(image), extract_match_features(turned)) or pytest.fail(
        "no box"
    )
    middle, partner = np.add(own[:2], own[2:]) / 2, np.add(other[:2], other[2:]) / 2
    np.testing.assert_allclose(middle, 1 - partner, atol=0.1)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("head with both ears", "face", True),
        ("head", "head", True),
        ("muzzle with tongue", "head", False),
        ("heading", "head", False),
        ("lid", "lid", True),
        ("", "", True),
    ],
)
def test_which_parts_are_the_same(one: str, other: str, expected: bool) -> None:
    assert is_same_part(one, other) is is_same_part(other, one) is expected
