"""Benchmarks built from images and videos: what is in them, what is left out and named."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from benchmark_material import (
    MANIFEST,
    build,
    digests,
    facts,
    painted,
    pixels,
    source_hash,
    trained_on,
    view,
    write_photo,
)
from PIL import Image

from mimicbrush.cli import benchmark as benchmark_command
from mimicbrush.data.training_data import HASH_DIGITS
from mimicbrush.errors import DataError, InputError
from mimicbrush.evaluation.benchmark.layout import TRACKS, read_benchmark
from mimicbrush.evaluation.benchmark_builder.build import BuildOptions, build_benchmark
from mimicbrush.evaluation.benchmark_builder.part_boxes import PART_SIDE_RATIO
from mimicbrush.ops.masks import mask_box

ROOT = Path(__file__).parents[2]
SIDES = ("source", "reference")


# ---- the DreamBooth dataset


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


def test_damaged_and_missing_images_are_named_and_the_rest_goes_on(
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "dataset/../../secret.png"}, "leads outside of"),
        ({"part_box": [0.5, 0.5, 0.4, 0.6]}, "is not a valid box; expected left < right"),
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


def test_images_get_boxes_around_what_both_show_and_duplicates_are_no_pair(images: Path, tmp_path: Path) -> None:
    built = build(tmp_path, images=images)
    cases = facts(tmp_path / "benchmark", "part_inner")
    assert len(cases) == built.cases["part_inner"] == 6
    assert built.cases["texture_inner"] == built.cases["texture_inter"] == built.cases["part_inter"] == 0
    # SIFT does not know a mirrored thing again.
    assert [fault.path for fault in built.faults] == [images / "cup/02.png"]
    for case in cases.values():
        names = {case[side]["picture"] for side in SIDES}
        assert case["source"]["subject"] == case["reference"]["subject"]
        assert names != {"cup/00", "cup/02"}
        assert case["source"]["mask"] == "box around SIFT matches"
    assert [note for note in built.notes if "licence" in note] == []
    assert "see [pictures-LICENSE.md](licences/pictures-LICENSE.md)" in (tmp_path / "benchmark/LICENCES.md").read_text(
        encoding="utf-8"
    )
    (images / "LICENSE.md").unlink()
    assert any("come without a licence" in note for note in build(tmp_path, images=images).notes)


def test_painted_masks_make_texture_and_inter_id_cases(images: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    for key in ("tabby/00", "woman/01"):
        painted(masks, key, "part", (50, 60, 90, 100))
        painted(masks, key, "subject", (10, 20, 150, 155))
    painted(masks, "nobody/00", "part", (1, 1, 9, 9))
    painted(masks, "cup/00", "part", (1, 1, 9, 9), size=(159, 160))
    built = build(tmp_path, images=images, masks=masks)
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
    assert "--masks: no image belongs to part/nobody/00.png" in built.notes
    assert any("159 x 160 px, but its image is 160 x 160 px" in fault.reason for fault in built.faults)


def test_what_lacks_a_mask_can_be_painted_and_comes_back(images: Path, tmp_path: Path) -> None:
    todo = tmp_path / "todo"
    built = build(tmp_path, images=images, to_paint=todo)
    assert built.unmasked == {"part": 7, "subject": 7}
    waiting = sorted(path.relative_to(todo).as_posix() for path in todo.rglob("*.png"))
    assert len(waiting) == 14 and "subject/tabby/00.png" in waiting
    for name in waiting:
        with Image.open(todo / name) as image:
            painted(tmp_path / "masks", name.split("/", 1)[1][:-4], name.split("/")[0], (9, 9, 99, 99), image.size)
    built = build(tmp_path, images=images, masks=tmp_path / "masks")
    assert built.unmasked == {"part": 0, "subject": 0} and built.notes == []
    assert built.cases["texture_inner"] == built.cases["part_inner"] == 7
    assert built.cases["texture_inter"] == 2


@pytest.mark.parametrize("fill", [0, 255])
def test_an_empty_or_full_mask_is_named(images: Path, tmp_path: Path, fill: int) -> None:
    path = tmp_path / "masks/part/cup/00.png"
    path.parent.mkdir(parents=True)
    Image.new("L", (160, 160), fill).save(path)
    built = build(tmp_path, images=images, masks=tmp_path / "masks")
    (fault,) = [fault for fault in built.faults if "part_inner, cup/00" in fault.reason]
    assert "of the image; mask a part" in fault.reason


def test_large_images_are_reduced_together_with_their_masks(images: Path, tmp_path: Path) -> None:
    painted(tmp_path / "masks", "cup/00", "part", (20, 40, 100, 120))
    build(tmp_path, images=images, masks=tmp_path / "masks", long_side_px=80)
    cases = facts(tmp_path / "benchmark", "part_inner")
    number = next(number for number, case in cases.items() if case["source"]["picture"] == "cup/00")
    folder = tmp_path / "benchmark" / TRACKS["part_inner"].folder
    assert pixels(folder / f"{number}_source.png").shape == (80, 80)
    expected = np.zeros((80, 80), np.uint8)
    expected[20:60, 10:50] = 255
    np.testing.assert_array_equal(pixels(folder / f"{number}_source_mask.png"), expected)


def test_folders_that_cannot_be_used_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="no input was given; name at least one of --dreambooth, --pictures and --pairs"
    ):
        BuildOptions()
    with pytest.raises(InputError, match="would replace"):
        build_benchmark(images.parent, BuildOptions(images=images))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years of it")
    with pytest.raises(InputError, match="is not empty and not a benchmark"):
        build_benchmark(tmp_path / "work", BuildOptions(images=images))
    assert (tmp_path / "work" / "thesis.txt").is_file()
    with pytest.raises(InputError, match="expected masks in"):
        build(tmp_path, images=images, masks=tmp_path)
    with pytest.raises(InputError, match="expected one folder with images per subject"):
        build(tmp_path, images=images / "cup")
    with pytest.raises(InputError, match="have the same name cup/00"):
        shutil.copy(images / "cup/00.png", images / "cup/00.bmp")
        build(tmp_path, images=images)
    with pytest.raises(DataError, match="no benchmark case could be made"):
        lonely = tmp_path / "lonely"
        write_photo(lonely / "cup/00.png", view("coffee.png", 0))
        build(tmp_path, images=lonely)


# ---- mined videos


def test_only_videos_that_were_not_trained_on_are_used(mined: Path, tmp_path: Path) -> None:
    seen = ["astronaut.png", "chelsea.png", "coffee.png"]
    pipeline = trained_on(tmp_path / "pipeline", [source_hash(name) for name in seen])
    built = build(tmp_path, pairs=(mined,), against=(pipeline,))
    cases = facts(tmp_path / "benchmark", "part_inner")
    assert {case["subject"] for case in cases.values()} == {"rocket.jpg.mp4"}
    assert len(cases) == built.cases["part_inner"] == 3
    about = json.loads((tmp_path / "benchmark/benchmark.json").read_text())
    assert about["against"][0]["source_hashes"] == sorted(source_hash(name)[:HASH_DIGITS] for name in seen)
    with pytest.raises(DataError, match="pairs from videos may have been trained on"):
        build(tmp_path, pairs=(mined,), against=(mined,))


def test_without_a_pipeline_what_our_trainer_would_hold_out_is_used(mined: Path, tmp_path: Path) -> None:
    built = build(tmp_path, pairs=(mined,))
    assert len({case["subject"] for case in facts(tmp_path / "benchmark", "part_inner").values()}) == 2
    assert any("so only the videos that training would hold out are used" in note for note in built.notes)


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


# ---- the script


def test_the_script_says_what_it_built_and_what_is_missing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "cup/09.png").write_bytes(b"")
    command = ["build_benchmark.py", "--pictures", str(images), "--output", str(tmp_path / "benchmark")]
    monkeypatch.setattr(sys, "argv", command)
    benchmark_command.main()
    said = capsys.readouterr().out
    assert f"skipped: {images / 'cup/09.png'}: cannot read the image" in said
    assert "part composition, inter-ID: 0 cases; the paper has 120 (120 are missing)" in said
    monkeypatch.setattr(sys, "argv", [*command, "--most", "0"])
    with pytest.raises(SystemExit):
        benchmark_command.main()
    assert "argument --most: expected a whole number of at least 1, got '0'" in capsys.readouterr().err
