"""Pairs that a homography joins, against OpenCV's warps and points."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from toy_data import photograph

from mimicbrush.data.training_data import HASH_DIGITS, TrainingData
from mimicbrush.errors import DataError, InputError, MimicBrushError
from mimicbrush.evaluation.keypoint_transfer.homographies import (
    STRENGTHS,
    find_unseen_photographs,
    make_photograph_tasks,
    read_homography,
    read_homography_tasks,
)
from mimicbrush.evaluation.keypoint_transfer.tasks import TransferTask
from mimicbrush.io.hashing import hash_file

#: From the 300 x 200 px of the first image to the 240 x 260 px of the others.
MATRICES = {
    2: np.array([[0.8, 0.1, 5], [-0.1, 1.1, 30], [0, 0, 1]]),
    4: np.array([[0.9, -0.2, 40], [0.15, 1.0, 20], [8e-4, 3e-4, 1]]),
}


def write_scene(folder: Path, image_name: str, matrix_name: str, matrices: dict[int, np.ndarray]) -> Path:
    """A photograph and its views, drawn by OpenCV."""
    folder.mkdir(parents=True)
    first = cv2.resize(photograph("coffee.png"), (300, 200), interpolation=cv2.INTER_AREA)
    Image.fromarray(first).save(folder / image_name.format(1))
    for number, matrix in matrices.items():
        view = cv2.warpPerspective(first, matrix, (240, 260), borderValue=(255, 255, 255))
        Image.fromarray(view).save(folder / image_name.format(number))
        np.savetxt(folder / matrix_name.format(number), matrix)
    return folder


def likeness(tasks: list[TransferTask]) -> float:
    """Mean correlation of what keypoints show in their two images, blurred grey."""
    alike = []
    for task in tasks:
        greys = []
        for image, xy in ((task.source, task.source_xy), (task.reference, task.reference_xy)):
            blurred = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), 1.5)
            greys.append(cv2.remap(blurred, *(xy.astype(np.float32)[None, :, k] for k in (0, 1)), 1)[0])
        alike.append(np.corrcoef(*greys)[0, 1])
    return float(np.mean(alike))


@pytest.mark.parametrize(("image_name", "matrix_name"), [("{}.ppm", "H_1_{}"), ("img{}.png", "H1to{}p")])
def test_folders_of_homographies_are_read(tmp_path: Path, image_name: str, matrix_name: str) -> None:
    write_scene(tmp_path / "v_cups", image_name, matrix_name, MATRICES)
    tasks, empty = read_homography_tasks(tmp_path, 96, None)
    assert [task.set_name for task in tasks] == ["1 to 2", "1 to 4"] and not empty
    assert {task.group for task in tasks} == {"v_cups"}
    for task, matrix in zip(tasks, MATRICES.values(), strict=True):
        # 300 x 200 px on 96: x 0.32, 16 px of white above; 240 x 260 px: x 96 / 260; edges are kept.
        in_first = (task.source_xy + 0.5 - [0, 16]) / 0.32 - 0.5
        in_second = cv2.perspectiveTransform(in_first[None], matrix)[0]
        expected = (in_second + 0.5) * 96 / 260 + [(96 - 240 * 96 / 260) / 2, 0] - 0.5
        np.testing.assert_allclose(task.reference_xy, expected, atol=1e-6)
        assert len(task.source_xy) > 30 and task.extent_px == 96
    assert likeness(tasks) > 0.95
    alone, _ = read_homography_tasks(tmp_path / "v_cups", 96, None)  # the scene itself
    assert all(np.array_equal(a.reference_xy, b.reference_xy) for a, b in zip(alone, tasks, strict=True))


def test_pairs_are_spread_over_the_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_scene(tmp_path / name, "{}.ppm", "H_1_{}", MATRICES)
    (tmp_path / "notes").mkdir()
    assert [task.group for task in read_homography_tasks(tmp_path, 32, 2)[0]] == ["a", "b"]


def test_the_sign_of_a_matrix_and_what_is_behind_the_camera_do_not_matter(tmp_path: Path) -> None:
    tilted = np.array([[1.0, 0, 0], [0, 1, 0], [-6e-3, 0, 1]])  # the horizon at x = 167: what is right of it is behind
    write_scene(tmp_path / "plus", "{}.ppm", "H_1_{}", {2: tilted})
    write_scene(tmp_path / "minus", "{}.ppm", "H_1_{}", {2: -tilted})
    minus, plus = read_homography_tasks(tmp_path, 96, None)[0]
    np.testing.assert_allclose(plus.reference_xy, minus.reference_xy, atol=1e-9)
    in_first = (plus.source_xy[:, 0] + 0.5) / 0.32 - 0.5
    assert len(in_first) and (in_first < 167).all()


def test_bad_files_are_named(tmp_path: Path) -> None:
    good = write_scene(tmp_path / "good", "{}.ppm", "H_1_{}", MATRICES)

    def broken(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name / "scene"))

    for text, message in (
        ("1 0 0\n0 1 x\n0 0 1\n", "cannot be read"),
        ("1 0 0\n0 1 0\n", "three lines of 3"),
        ("1 0 0\n0 1 0\n0 0 nan\n", "not a homography: its numbers are not finite"),
        ("1 2 3\n2 4 6\n0 0 1\n", "no inverse"),
    ):
        (tmp_path / "H_1_2").write_text(text)
        with pytest.raises(DataError, match=f"H_1_2 .*{message}"):
            read_homography(tmp_path / "H_1_2")
    scene = broken("no_picture")
    (scene / "4.ppm").unlink()
    with pytest.raises(DataError, match=r"H_1_4 needs exactly one image 4\.ppm.*found: none"):
        read_homography_tasks(scene.parent, 32, None)
    scene = broken("two_pictures")
    shutil.copy(scene / "1.ppm", scene / "img1.ppm")
    with pytest.raises(DataError, match=r"found: 1\.ppm, img1\.ppm"):
        read_homography_tasks(scene.parent, 32, None)
    scene = broken("two_matrices")
    shutil.copy(scene / "H_1_2", scene / "H1to2p")
    with pytest.raises(DataError, match="the same image"):
        read_homography_tasks(scene.parent, 32, None)
    scene = broken("damaged")
    (scene / "2.ppm").write_bytes((scene / "2.ppm").read_bytes()[:200])
    with pytest.raises(MimicBrushError, match=r"2\.ppm"):
        read_homography_tasks(scene.parent, 32, None)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"H_1_2 \.\. H_1_6"):
        read_homography_tasks(tmp_path / "none", 32, None)
    far = {2: np.array([[1.0, 0, 9e3], [0, 1, 0], [0, 0, 1]])}
    away = write_scene(tmp_path / "away" / "scene", "{}.ppm", "H_1_{}", far)
    with pytest.raises(DataError, match="no two images share a keypoint"):
        read_homography_tasks(away, 32, None)
    shutil.copytree(good, tmp_path / "away" / "other")
    tasks, empty = read_homography_tasks(tmp_path / "away", 32, None)
    assert len(tasks) == 2 and empty == [str(away / "H_1_2")]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs" / "deep"
    folder.mkdir(parents=True)
    for name in ("chelsea", "coffee", "rocket"):
        found = "rocket.jpg" if name == "rocket" else f"{name}.png"
        Image.fromarray(photograph(found)).save(folder / f"{name}.png")
    (folder / ".hidden.png").write_bytes(b"")
    return folder.parent


def test_views_of_photographs_show_the_same_at_growing_strength(photographs: Path) -> None:
    files, seen = find_unseen_photographs(photographs, None)
    assert [file.name for file in files] == ["chelsea.png", "coffee.png", "rocket.png"] and not seen
    tasks, empty = make_photograph_tasks(files, list(STRENGTHS), 96, None, seed=0)
    assert len(tasks) == 9 and not empty
    moved = {}
    for name in STRENGTHS:
        of_strength = [task for task in tasks if task.set_name == name]
        assert likeness(of_strength) > 0.75  # other colours, but what is bright stays bright
        moved[name] = np.mean([np.linalg.norm(t.source_xy - t.reference_xy, axis=1).mean() for t in of_strength])
        assert all(task.source.shape == task.reference.shape == (96, 96, 3) for task in of_strength)
    assert 2 < moved["weak"] < moved["medium"] < moved["strong"]
    assert len({task.group for task in tasks}) == 3


def test_views_hang_on_the_photograph_and_the_seed_alone(photographs: Path) -> None:
    files, _ = find_unseen_photographs(photographs, None)
    renamed = files[1].rename(files[1].with_name("other.png"))
    (one,) = make_photograph_tasks([renamed], ["strong"], 64, None, seed=0)[0]
    files[1] = renamed
    again = [
        task for task in make_photograph_tasks(files, list(STRENGTHS), 64, None, seed=0)[0] if task.group == one.group
    ]
    assert np.array_equal(one.reference, again[2].reference) and np.array_equal(one.reference_xy, again[2].reference_xy)
    (other,) = make_photograph_tasks([renamed], ["strong"], 64, None, seed=1)[0]
    assert not np.array_equal(one.reference, other.reference)
    assert len({task.group for task in make_photograph_tasks(files, ["weak", "strong"], 64, 4, seed=0)[0]}) == 2


def test_photographs_that_were_trained_on_are_left_out(photographs: Path, tmp_path: Path) -> None:
    files, _ = find_unseen_photographs(photographs, None)
    training = TrainingData(0.1, frozenset({hash_file(files[0])[:HASH_DIGITS]}))
    assert find_unseen_photographs(photographs, training) == (files[1:], files[:1])
    with pytest.raises(InputError, match="trained on all 3"):
        find_unseen_photographs(photographs, TrainingData(0.1, frozenset(hash_file(f)[:HASH_DIGITS] for f in files)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no photographs"):
        find_unseen_photographs(tmp_path / "empty", None)
