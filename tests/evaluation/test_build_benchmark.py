"""Benchmarks built from pictures and videos: what is in them, what is left out and named, and that nothing leaks."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from toy_data import photograph

from mimicbrush.errors import DataError, InputError
from mimicbrush.evaluation.benchmark.builder import BuildOptions, Built, build_benchmark
from mimicbrush.evaluation.benchmark.inter_id import same_part
from mimicbrush.evaluation.benchmark.layout import TRACKS, TrackName, read_benchmark
from mimicbrush.evaluation.benchmark.part_boxes import PART_SIDE_RATIO, best_boxes, look_at, matched_boxes
from mimicbrush.evaluation.heldout import HASH_DIGITS, TRAINING_DATA_FILE
from mimicbrush.ops.files import read_picture
from mimicbrush.ops.masks import mask_box

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "data_manifests/dreambooth_inner_id.jsonl"


def picture(path: Path, image: np.ndarray) -> Path:
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


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two subjects of one class and one without, three pictures each; one picture is a near duplicate."""
    root = tmp_path / "pictures"
    for subject, photo in (("tabby", "chelsea.png"), ("woman", "astronaut.png"), ("cup", "coffee.png")):
        for number in range(2):
            picture(root / subject / f"{number:02d}.png", view(photo, number))
    picture(root / "cup/02.png", view("coffee.png", 0)[:, ::-1])
    (root / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\ntabby,animal\nwoman,animal\n\nPrompts\n\ncup,nonsense\n"
    )
    (root / "LICENSE.md").write_text("CC0 for all\n")
    return root


def pixels(path: Path, mode: str = "L") -> np.ndarray:
    return np.asarray(read_picture(path, mode))


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


def build(tmp_path: Path, **options: Any) -> Built:
    return build_benchmark(tmp_path / "benchmark", BuildOptions(**options))


# ---- the DreamBooth dataset


@pytest.fixture
def dreambooth(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny dataset in the real layout, as a clone has it, and a list of its pairs in the real format."""
    root = tmp_path / "dreambooth"
    lines = [json.loads(line) for line in MANIFEST.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["subject"] in ("dog2", "dog3", "dog7", "cat", "vase")]
    for number, name in enumerate(sorted({line[side] for line in lines for side in ("source", "reference")})):
        photo = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")[number % 4]
        picture(root / name, view(photo, number, 160 + number))
    (root / "dataset/references_and_licenses.txt").write_text("who made what\n")
    manifest = tmp_path / "pairs.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root, manifest


def test_the_list_gives_all_four_tracks_with_its_boxes_and_licences(
    dreambooth: tuple[Path, Path], tmp_path: Path
) -> None:
    root, manifest = dreambooth
    built = build(tmp_path, dreambooth=root, manifest=manifest)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    benchmark = read_benchmark(tmp_path / "benchmark")
    assert benchmark.faults == [] and built.faults == []
    by_track = {name: [case for case in benchmark.cases if case.track.name == name] for name in TRACKS}
    assert {name: len(cases) for name, cases in by_track.items()} == built.cases
    assert built.cases["part_inner"] == built.cases["texture_inner"] == len(lines)
    # Heads of dog2 (its "face"), dog3 and dog7: every ordered pair of subjects. A cat is no dog.
    assert built.cases["part_inter"] == 6 and built.groups == {"animal": 6}
    assert built.cases["texture_inter"] == 6
    for track, column in (("part_inner", "part_box"), ("texture_inner", "subject_box")):
        for case, line in zip(by_track[track], lines, strict=True):
            mask, source = pixels(case.mask), pixels(case.source)
            assert mask.shape == source.shape
            found = mask_box(mask)
            expected = np.array(line[column]) * np.tile(source.shape[::-1], 2)
            np.testing.assert_allclose(found, expected, atol=0.5)
            assert case.subject == line["subject"]
    for case in by_track["part_inter"] + by_track["texture_inter"]:
        assert case.prompt == "a photo of a dog" and case.reference_mask
        known = facts(benchmark.root, case.track.name)[case.number]
        assert known["source"]["subject"] != known["reference"]["subject"]
    licences = (benchmark.root / "LICENCES.md").read_text(encoding="utf-8")
    for case in benchmark.cases:
        assert f"| {case.track.folder}/{case.source.name} | " in licences
    assert "@alvannee on Unsplash | Unsplash License | https://unsplash.com/photos/" in licences
    assert (benchmark.root / "licences/dataset-references_and_licenses.txt").read_text() == "who made what\n"


def test_what_is_missing_is_counted_against_the_paper(dreambooth: tuple[Path, Path], tmp_path: Path) -> None:
    build(tmp_path, dreambooth=dreambooth[0], manifest=dreambooth[1])
    about = json.loads((tmp_path / "benchmark/benchmark.json").read_text())
    assert about["tracks"]["part_inter"] == {"cases": 6, "paper": 120, "missing": 114}
    assert about["part_inter_groups"]["scenario"] == {"cases": 0, "paper": 30}
    assert "not published" in about["differs_from_the_paper"]
    assert str(tmp_path) not in (tmp_path / "benchmark/benchmark.json").read_text()


def test_damaged_and_missing_pictures_are_named_and_the_rest_goes_on(
    dreambooth: tuple[Path, Path], tmp_path: Path
) -> None:
    root, manifest = dreambooth
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    whole = build(tmp_path, dreambooth=root, manifest=manifest)
    missing, damaged = root / lines[0]["source"], root / lines[-1]["reference"]
    missing.unlink()
    damaged.write_bytes(damaged.read_bytes()[:300])
    built = build(tmp_path, dreambooth=root, manifest=manifest)
    affected = [line for line in lines if {str(missing), str(damaged)} & {str(root / line[s]) for s in SIDES}]
    assert built.cases["part_inner"] == whole.cases["part_inner"] - len(affected)
    assert {fault.path for fault in built.faults} == {missing, damaged}
    assert len(built.faults) == len(affected)
    about = json.loads((tmp_path / "benchmark/benchmark.json").read_text())
    assert {fault["file"] for fault in about["faults"]} == {"/".join(p.parts[-2:]) for p in (missing, damaged)}


SIDES = ("source", "reference")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "dataset/../../secret.png"}, "leads out of"),
        ({"part_box": [0.5, 0.5, 0.4, 0.6]}, "no box of ratios"),
        ({"part_box": None}, "line 1"),
        ({"source_licence": ...}, "source_licence"),
    ],
)
def test_a_list_that_is_wrong_is_refused_by_line(
    dreambooth: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    root, manifest = dreambooth
    line = json.loads(manifest.read_text().splitlines()[0]) | change
    manifest.write_text(json.dumps({key: value for key, value in line.items() if value is not ...}) + "\n")
    with pytest.raises(InputError, match=message):
        build(tmp_path, dreambooth=root, manifest=manifest)
    assert not (tmp_path / "benchmark").exists()


def test_the_same_input_gives_the_same_bytes_and_replaces_what_was_there(
    dreambooth: tuple[Path, Path], tmp_path: Path
) -> None:
    root, manifest = dreambooth
    build(tmp_path, dreambooth=root, manifest=manifest)
    first = digests(tmp_path / "benchmark")
    (tmp_path / "benchmark/PartComp/CrossInstance/999_source.png").write_bytes(b"old")
    shutil.move(root, tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere"
    moved.rename(tmp_path / "dreambooth")
    build(tmp_path, dreambooth=root / "dataset", manifest=manifest)
    second = digests(tmp_path / "benchmark")
    about = ("benchmark.json", "LICENCES.md")  # the first names the folder that was given
    assert {k: v for k, v in first.items() if k not in about} == {k: v for k, v in second.items() if k not in about}
    build(tmp_path, dreambooth=root / "dataset", manifest=manifest)
    assert digests(tmp_path / "benchmark") == second
    other = build_benchmark(tmp_path / "other", BuildOptions(dreambooth=root, manifest=manifest, seed=7))
    assert other.cases["texture_inter"] == 6
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_the_real_dataset_gives_what_the_documents_say(shared: Path, tmp_path: Path) -> None:
    built = build(tmp_path, dreambooth=shared / "data/dreambooth", manifest=MANIFEST)
    assert built.cases == {"part_inter": 20, "part_inner": 30, "texture_inter": 30, "texture_inner": 30}
    assert built.faults == [] and built.groups == {"animal": 20}
    assert len(read_benchmark(tmp_path / "benchmark").cases) == 110


# ---- any folder of folders, and masks


def test_pictures_get_boxes_around_what_both_show_and_duplicates_are_no_pair(pictures: Path, tmp_path: Path) -> None:
    built = build(tmp_path, pictures=pictures)
    cases = facts(tmp_path / "benchmark", "part_inner")
    assert len(cases) == built.cases["part_inner"] == 6
    assert built.cases["texture_inner"] == built.cases["texture_inter"] == built.cases["part_inter"] == 0
    # SIFT does not know a mirrored thing again.
    assert [fault.path for fault in built.faults] == [pictures / "cup/02.png"]
    for case in cases.values():
        names = {case[side]["picture"] for side in SIDES}
        assert case["source"]["subject"] == case["reference"]["subject"]
        assert names != {"cup/00", "cup/02"}
        assert case["source"]["mask"] == "box around SIFT matches"
    assert [note for note in built.notes if "licence" in note] == []
    assert "see [pictures-LICENSE.md](licences/pictures-LICENSE.md)" in (tmp_path / "benchmark/LICENCES.md").read_text(
        encoding="utf-8"
    )
    (pictures / "LICENSE.md").unlink()
    assert any("without a word on their licence" in note for note in build(tmp_path, pictures=pictures).notes)


def test_painted_masks_make_texture_and_inter_id_cases(pictures: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    for key in ("tabby/00", "woman/01"):
        painted(masks, key, "part", (50, 60, 90, 100))
        painted(masks, key, "subject", (10, 20, 150, 155))
    painted(masks, "nobody/00", "part", (1, 1, 9, 9))
    painted(masks, "cup/00", "part", (1, 1, 9, 9), size=(159, 160))
    built = build(tmp_path, pictures=pictures, masks=masks)
    assert built.cases["part_inter"] == built.cases["texture_inter"] == 2
    assert built.cases["texture_inner"] == 2
    benchmark = read_benchmark(tmp_path / "benchmark")
    inter = [case for case in benchmark.cases if case.track.name == "part_inter"]
    assert {case.prompt for case in inter} == {"a photo of an animal"}
    for case in inter:
        for path in (case.mask, case.reference_mask):
            assert path
            expected = np.zeros((160, 160), np.uint8)
            expected[60:100, 50:90] = 255
            np.testing.assert_array_equal(pixels(path), expected)
    assert "--masks: part/nobody/00.png belongs to no picture that was given" in built.notes
    assert any("159 x 160 px, its picture 160 x 160 px" in fault.reason for fault in built.faults)


def test_what_lacks_a_mask_can_be_painted_and_comes_back(pictures: Path, tmp_path: Path) -> None:
    todo = tmp_path / "todo"
    built = build(tmp_path, pictures=pictures, to_paint=todo)
    assert built.unmasked == {"part": 7, "subject": 7}
    waiting = sorted(path.relative_to(todo).as_posix() for path in todo.rglob("*.png"))
    assert len(waiting) == 14 and "subject/tabby/00.png" in waiting
    for name in waiting:
        with Image.open(todo / name) as image:
            painted(tmp_path / "masks", name.split("/", 1)[1][:-4], name.split("/")[0], (9, 9, 99, 99), image.size)
    built = build(tmp_path, pictures=pictures, masks=tmp_path / "masks")
    assert built.unmasked == {"part": 0, "subject": 0} and built.notes == []
    assert built.cases["texture_inner"] == built.cases["part_inner"] == 7
    assert built.cases["texture_inter"] == 2


@pytest.mark.parametrize("fill", [0, 255])
def test_an_empty_or_full_mask_is_named(pictures: Path, tmp_path: Path, fill: int) -> None:
    path = tmp_path / "masks/part/cup/00.png"
    path.parent.mkdir(parents=True)
    Image.new("L", (160, 160), fill).save(path)
    built = build(tmp_path, pictures=pictures, masks=tmp_path / "masks")
    (fault,) = [fault for fault in built.faults if "part_inner, cup/00" in fault.reason]
    assert "of the picture is masked" in fault.reason


def test_large_pictures_are_reduced_together_with_their_masks(pictures: Path, tmp_path: Path) -> None:
    painted(tmp_path / "masks", "cup/00", "part", (20, 40, 100, 120))
    build(tmp_path, pictures=pictures, masks=tmp_path / "masks", long_side_px=80)
    cases = facts(tmp_path / "benchmark", "part_inner")
    number = next(number for number, case in cases.items() if case["source"]["picture"] == "cup/00")
    folder = tmp_path / "benchmark" / TRACKS["part_inner"].folder
    assert pixels(folder / f"{number}_source.png").shape == (80, 80)
    expected = np.zeros((80, 80), np.uint8)
    expected[20:60, 10:50] = 255
    np.testing.assert_array_equal(pixels(folder / f"{number}_source_mask.png"), expected)


def test_folders_that_cannot_be_used_are_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to build from"):
        BuildOptions()
    with pytest.raises(InputError, match="would replace"):
        build_benchmark(pictures.parent, BuildOptions(pictures=pictures))
    with pytest.raises(InputError, match="expected masks in"):
        build(tmp_path, pictures=pictures, masks=tmp_path)
    with pytest.raises(InputError, match="expected a folder per subject"):
        build(tmp_path, pictures=pictures / "cup")
    with pytest.raises(InputError, match="both called cup/00"):
        shutil.copy(pictures / "cup/00.png", pictures / "cup/00.bmp")
        build(tmp_path, pictures=pictures)
    with pytest.raises(DataError, match="no case came of"):
        lonely = tmp_path / "lonely"
        picture(lonely / "cup/00.png", view("coffee.png", 0))
        build(tmp_path, pictures=lonely)


# ---- mined videos


def trained_on(folder: Path, hashes: list[str]) -> Path:
    folder.mkdir(parents=True)
    values = {"heldout_ratio": 0.1, "source_hashes": [each[:HASH_DIGITS] for each in hashes]}
    (folder / TRAINING_DATA_FILE).write_text(json.dumps(values))
    return folder


def source_hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def test_only_videos_that_were_not_trained_on_are_used(mined: Path, tmp_path: Path) -> None:
    seen = ["astronaut.png", "chelsea.png", "coffee.png"]
    pipeline = trained_on(tmp_path / "pipeline", [source_hash(name) for name in seen])
    built = build(tmp_path, pairs=(mined,), against=(pipeline,))
    cases = facts(tmp_path / "benchmark", "part_inner")
    assert {case["subject"] for case in cases.values()} == {"rocket.jpg.mp4"}
    assert len(cases) == built.cases["part_inner"] == 3
    about = json.loads((tmp_path / "benchmark/benchmark.json").read_text())
    assert about["against"][0]["source_hashes"] == sorted(source_hash(name)[:HASH_DIGITS] for name in seen)
    with pytest.raises(DataError, match="none is of a video that was not trained on"):
        build(tmp_path, pairs=(mined,), against=(mined,))


def test_without_a_pipeline_what_our_trainer_would_hold_out_is_used(mined: Path, tmp_path: Path) -> None:
    built = build(tmp_path, pairs=(mined,))
    assert len({case["subject"] for case in facts(tmp_path / "benchmark", "part_inner").values()}) == 2
    assert any("our trainer would hold out" in note for note in built.notes)


def test_the_part_boxes_of_a_mined_pair_show_the_same(mined: Path, tmp_path: Path) -> None:
    """The pairs of the fixture are two crops of one photograph: both masks must cover the same part of it."""
    build(tmp_path, pairs=(mined,))
    benchmark = read_benchmark(tmp_path / "benchmark")
    for case in benchmark.cases:
        assert case.reference_mask
        left, top, right, bottom = mask_box(pixels(case.reference_mask))
        small = pixels(case.reference)[top:bottom, left:right]
        large = np.pad(pixels(case.source), 40)
        score = cv2.matchTemplate(large, small, cv2.TM_CCOEFF_NORMED)
        left, top = cv2.minMaxLoc(score)[3]
        found = np.array([left + small.shape[1] / 2 - 40, top + small.shape[0] / 2 - 40])
        box = mask_box(pixels(case.mask))
        middle = np.array([box[0] + box[2], box[1] + box[3]]) / 2
        assert np.abs(found - middle).max() < PART_SIDE_RATIO / 2 * 160, case.number


def test_a_damaged_shard_is_named(mined: Path, tmp_path: Path) -> None:
    copy = tmp_path / "mined"
    shutil.copytree(mined, copy)
    shard = copy / "shards/shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    shard.write_bytes(data)
    whole = build(tmp_path, pairs=(mined,), most=12, against=(trained_on(tmp_path / "pipeline", []),))
    built = build(tmp_path, pairs=(copy,), most=12, against=(tmp_path / "pipeline",))
    assert 0 < built.cases["part_inner"] < whole.cases["part_inner"] == 12
    assert len(built.faults) == 12 - built.cases["part_inner"]


# ---- leaks


def test_a_picture_that_was_trained_on_is_refused_and_both_are_named(pictures: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256((pictures / "tabby/01.png").read_bytes()).hexdigest()
    pipeline = trained_on(tmp_path / "pipeline", [digest])
    with pytest.raises(DataError, match=rf"tabby/01 is source {digest[:16]}.* of {pipeline}"):
        build(tmp_path, pictures=pictures, against=(pipeline,))
    assert not (tmp_path / "benchmark").exists()


def test_a_subject_leaks_even_by_a_picture_that_no_case_uses(dreambooth: tuple[Path, Path], tmp_path: Path) -> None:
    root, manifest = dreambooth
    unused = picture(root / "dataset/cat/77.jpg", view("coffee.png", 3))
    pipeline = trained_on(tmp_path / "pipeline", [hashlib.sha256(unused.read_bytes()).hexdigest()])
    with pytest.raises(DataError, match=r"cat/77\.jpg is source"):
        build(tmp_path, dreambooth=root, manifest=manifest, against=(pipeline,))


@pytest.mark.parametrize("change", ["same", "mirrored", "shifted", "smaller", "a piece"])
def test_a_near_duplicate_of_a_training_frame_is_refused(mined: Path, tmp_path: Path, change: str) -> None:
    from mimicbrush.data.manifest import read_manifest

    frame = read_manifest(mined)[0].read_a()
    changed = {
        "same": frame,
        "mirrored": frame[:, ::-1],
        "shifted": cv2.warpAffine(frame, np.array([[1.0, 0, 25], [0, 1, 9]]), (160, 160)),
        "a piece": cv2.resize(frame[20:110, 30:120], (160, 160), interpolation=cv2.INTER_CUBIC),
        "smaller": cv2.resize(frame, (120, 120), interpolation=cv2.INTER_AREA),
    }[change]
    picture(tmp_path / "pictures/thing/00.png", np.ascontiguousarray(changed))
    for number in (1, 2):
        picture(tmp_path / f"pictures/thing/{number:02d}.png", view("coffee.png", number))
    # 00 needs no partner: a painted mask makes it a source.
    painted(tmp_path / "masks", "thing/00", "part", (9, 9, 60, 60), (changed.shape[1], changed.shape[0]))
    seen = r"is seen in the training set: thing/00 (looks like|shares a piece with) astronaut\.png"
    with pytest.raises(DataError, match=seen):
        build(tmp_path, pictures=tmp_path / "pictures", masks=tmp_path / "masks", against=(mined,))


def test_other_pictures_are_no_near_duplicates(shared: Path, mined: Path, tmp_path: Path) -> None:
    for number in (1, 2, 5):
        with Image.open(shared / f"data/dreambooth/backpack/{number:02d}.jpg") as image:
            painted(tmp_path / "masks", f"backpack/{number:02d}", "part", (9, 9, 99, 99), image.size)
            picture(tmp_path / f"pictures/backpack/{number:02d}.png", np.asarray(image))
    built = build(tmp_path, pictures=tmp_path / "pictures", masks=tmp_path / "masks", against=(mined,))
    about = json.loads((tmp_path / "benchmark/benchmark.json").read_text())
    assert built.cases["part_inner"] == 3
    assert about["against"][0]["compared"] == "hashes, pictures, and pieces of pictures"


def test_a_folder_that_says_nothing_of_a_training_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a pipeline folder"):
        build(tmp_path, pictures=pictures, against=(pictures,))


# ---- boxes


def test_the_best_box_is_where_the_moving_matches_are() -> None:
    rng = np.random.default_rng(0)
    still = rng.uniform(0, 999, (400, 2))
    moving = rng.uniform((600, 200), (800, 400), (30, 2))
    a = np.concatenate([still, moving])
    b = np.concatenate([still, moving - (300, 0)])
    own, other = best_boxes(a, b, (1000, 1000)) or pytest.fail("no box")
    assert own[0] <= 0.6 and own[2] >= 0.8 and own[1] <= 0.2 and own[3] >= 0.4
    partners = (moving - (300, 0)) / 1000
    assert (partners.min(0) >= np.array(other[:2]) - 0.001).all() and (partners.max(0) <= other[2:]).all()
    assert own[2] - own[0] == pytest.approx(PART_SIDE_RATIO)
    assert best_boxes(a[:3], b[:3], (1000, 1000)) is None
    assert best_boxes(a[:0], b[:0], (1000, 1000)) is None


def test_a_part_is_found_again_in_a_turned_picture() -> None:
    image = view("astronaut.png", 0, 330)
    turned = np.ascontiguousarray(np.rot90(image, 2))
    own, other = matched_boxes(look_at(image), look_at(turned)) or pytest.fail("no box")
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
    assert same_part(one, other) is same_part(other, one) is expected


# ---- the script


def test_the_script_says_what_it_built_and_what_is_missing(
    pictures: Path, tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    (pictures / "cup/09.png").write_bytes(b"")
    command = [sys.executable, "scripts/build_benchmark.py", "--pictures", str(pictures)]
    command += ["--output", str(tmp_path / "benchmark")]
    done = subprocess.run(command, cwd=ROOT, env=script_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"left out: {pictures / 'cup/09.png'}: not a picture" in done.stdout
    assert "part composition, inter-ID: 0 cases; the paper has 120, 120 are missing" in done.stdout
    command += ["--most", "0"]
    refused = subprocess.run(command, cwd=ROOT, env=script_environment(), capture_output=True, text=True)
    assert refused.returncode == 2 and "--most 0: must be at least 1" in refused.stderr
