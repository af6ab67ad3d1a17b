"""`pairs export --format`: equal pixels in every layout, counts that add up, and a run that may be stopped anywhere."""

from __future__ import annotations

import csv
import errno
import json
import shutil
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from export_readers import READERS, ReadSample
from toy_data import write_mined_folder

from mimicbrush.cli import pairs as command
from mimicbrush.data.dataset import FixedViewDataset, Sample
from mimicbrush.data.manifest import read_manifest, split_pairs
from mimicbrush.data.options import DataOptions, MaskOptions
from mimicbrush.data.pair import Pair
from mimicbrush.data.pair_sources import load_pair_sources
from mimicbrush.errors import DataError, InputError
from mimicbrush.mining.exports import parts
from mimicbrush.mining.exports.formats.registry import FORMATS
from mimicbrush.mining.exports.options import DEFAULT_CAPTIONS, ExportOptions, clean_caption
from mimicbrush.mining.exports.run import export_pairs
from mimicbrush.mining.exports.verify import verify_export
from mimicbrush.mining.input_list import read_list_column

SIZE_PX, VIEWS = 16, 2
HOSTILE = ['=HYPERLINK("x")', 'two\nlines, "quoted"\r\n', "  NA ", "火 \u2028 caf\u00e9 \U0001f600 <x> {y} \\n '"]


def options_of(name: str = "webdataset", **more: object) -> ExportOptions:
    return ExportOptions(format=name, size_px=SIZE_PX, **{"views": VIEWS, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pairs of videos and four of photographs."""
    return write_mined_folder(tmp_path_factory.mktemp("few") / "pairs", pairs_per_photo=1)


def export(mined: Path, output: Path, options: ExportOptions, **more: int | None) -> dict[str, object]:
    return export_pairs(mined, output, options, progress=False, samples_per_part=4, **more)  # type: ignore[arg-type]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_records(output: Path) -> dict[tuple[str, str], dict[str, str]]:
    lines = (output / "records" / "samples.jsonl").read_text().splitlines()
    return {(row["split"], row["name"]): row for row in map(json.loads, lines)}


def read_all(output: Path, name: str) -> dict[tuple[str, str], ReadSample]:
    return {(split, each.name): each for split in ("train", "heldout") for each in READERS[name](output / split)}


@cache
def views_of_training(mined: Path) -> dict[tuple[str, int], Sample]:
    """What training with data.fixed_views sees of all pairs that are not held out."""
    options = DataOptions(root=str(mined), fixed_views=VIEWS)
    pair_sources = load_pair_sources(options)
    dataset = FixedViewDataset(pair_sources, SIZE_PX, options)
    found = {}
    for row in range(len(dataset)):
        component, item, view = dataset.fixed.locate(row)
        sample = dataset[row]
        assert isinstance(sample, Sample)
        found[pair_sources[component].pairs[item].pair_id, view] = sample
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_a_trainer_finds_the_pixels_of_training_and_the_counts_add_up(name: str, few: Path, tmp_path: Path) -> None:
    summary = export(few, tmp_path / "out", options_of(name))
    read, records = read_all(tmp_path / "out", name), read_records(tmp_path / "out")
    assert summary["written"] == {"train": 4, "heldout": 4} and summary["pairs"] == 8 and not summary["refused"]
    assert summary["samples"] == {"train": 8, "heldout": 8} and summary["not_written_yet"] == 0
    assert read.keys() == records.keys() and len(read) == 16
    expected = views_of_training(few)
    seen = set()
    for key, found in read.items():
        assert found.caption == DEFAULT_CAPTIONS[0]
        source, reference = found.conditions
        hole = found.mask == 255
        assert found.mask.dtype == np.uint8 and set(np.unique(found.mask)) == {0, 255}
        assert not source[hole].any() and np.array_equal(source[~hole], found.target[~hole])
        place = records[key]["pair_id"], int(records[key]["view"])
        if key[0] == "train":
            seen.add(place)
            assert np.array_equal(found.target, expected[place].source)
            assert np.array_equal(reference, expected[place].reference)
            assert np.array_equal(hole, expected[place].mask == 1)
    assert seen == expected.keys()
    assert verify_export(tmp_path / "out", progress=False)[0] == []


def test_train_and_heldout_show_no_file_together_and_are_those_of_training(mined: Path, tmp_path: Path) -> None:
    export(mined, tmp_path / "out", options_of(views=1))
    pairs = read_manifest(mined)
    for split in ("train", "heldout"):
        rows = [row for (where, _), row in read_records(tmp_path / "out").items() if where == split]
        expected = split_pairs(pairs, split)  # type: ignore[arg-type]
        assert sorted(row["pair_id"] for row in rows) == sorted(pair.pair_id for pair in expected)
    everything = options_of(views=1, data=DataOptions(heldout_ratio=0.0))
    summary = export(mined, tmp_path / "all", everything)
    assert summary["written"] == {"train": 16, "heldout": 0} and not (tmp_path / "all" / "heldout").exists()
    assert verify_export(tmp_path / "all", progress=False)[0] == []


class Killed(BaseException):
    """A process that ends: nothing but the kernel sees it."""


@pytest.mark.parametrize(("name", "step"), [("onetrainer", 20), ("webdataset", 4)])
def test_an_export_that_is_stopped_anywhere_ends_with_the_same_bytes(
    name: str, step: int, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, options = tmp_path / "out", options_of(name, views=1, data=DataOptions(heldout_ratio=0.0))
    export(few, output, options)
    expected, replace = bytes_of(output), Path.replace
    num_stops = 0
    while True:
        shutil.rmtree(output)
        left = num_stops * step

        def count(self: Path, target: Path) -> Path:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return replace(self, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", count)
            try:
                export(few, output, options)
                break
            except Killed:
                num_stops += 1
        (output / "records" / "markers" / ".train-000000.json.ab12.tmp").write_text("half")
        export(few, output, options)
        assert bytes_of(output) == expected, left
    assert bytes_of(output) == expected and num_stops > 2


def test_a_limit_stops_with_a_whole_data_set_and_more_room_goes_on(few: Path, tmp_path: Path) -> None:
    whole = export(few, tmp_path / "whole", options_of("ai-toolkit"))
    size = int(str(whole["bytes"]))
    output = tmp_path / "out"
    for limit in (0, size // 2, size - 1):
        summary = export(few, output, options_of("ai-toolkit"), max_bytes=limit)
        written = sum(summary["written"].values())  # type: ignore[attr-defined]
        assert int(str(summary["bytes"])) <= limit and summary["not_written_yet"] == 8 - written
        assert (written > 0) == (limit > 0) and verify_export(output, progress=False)[0] == []
        if limit:
            assert len(read_all(output, "ai-toolkit")) == written * VIEWS
    # A part that was begun beyond the limit is no part of the data set.
    kept = bytes_of(output)
    begun = {"name": "train-000001", "files": ["train/target/x.png"]}
    (output / "records" / "begun.json").write_text(json.dumps(begun))
    (output / "train" / "target" / "x.png").touch()
    missing = not (output / "records" / "markers" / "train-000001.json").exists()
    export(few, output, options_of("ai-toolkit"), max_bytes=size - 1)
    assert (bytes_of(output) == kept) == missing
    (output / "train" / "target" / "x.png").unlink(missing_ok=True)
    # Less room than an earlier run had takes nothing away.
    assert export(few, output, options_of("ai-toolkit"), max_bytes=1)["written"] == summary["written"]
    assert export(few, output, options_of("ai-toolkit")) == whole
    assert bytes_of(output) == bytes_of(tmp_path / "whole")


def test_verify_names_what_is_wrong_and_the_same_command_mends_it(few: Path, tmp_path: Path) -> None:
    output, options = tmp_path / "out", options_of("diffusers")
    export(few, output, options)
    expected = bytes_of(output)
    target = next((output / "train" / "target").iterdir())
    content = target.read_bytes()
    target.write_bytes(content[:-1] + b"x")
    next((output / "heldout" / "mask").iterdir()).unlink()
    (output / "train" / "target" / "mine.png").touch()
    (output / "train" / "metadata.jsonl").write_text("{}")
    faults = "\n".join(verify_export(output, progress=False)[0])
    for expected_fault in (
        f"{target.name} has changed since it was written; delete it, and run the export command again",
        "cannot be read (No such file or directory)",
        "mine.png is not a file of this export",
        "train/metadata.jsonl has changed since it was written",
    ):
        assert expected_fault in faults
    assert len(faults.splitlines()) == 4
    target.unlink()
    (output / "train" / "target" / "mine.png").unlink()
    export(few, output, options)
    assert bytes_of(output) == expected
    (output / "records" / "markers" / "train-000000.json").write_text("{}")
    faults = "\n".join(verify_export(output, progress=False)[0])
    assert "the marker of part train-000000 is missing or damaged" in faults and "samples" in faults


def test_records_that_were_changed_are_found_and_written_again(few: Path, tmp_path: Path) -> None:
    output, options = tmp_path / "out", options_of("musubi", views=1)
    export(few, output, options)
    expected = bytes_of(output)
    summary, marker = output / "records" / "summary.json", output / "records" / "markers" / "train-000000.json"
    changes: list[tuple[Path, str, object]] = [(summary, key, 5) for key in json.loads(summary.read_bytes())]
    changes += [(marker, "rows", [{}] * 4), (marker, "files", {"../x": 1})]
    for path, key, value in changes:
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {key: value}))
        if path == summary:
            message = r"is not finished, or records/summary.json is damaged \(it has changed since it was written\)"
            with pytest.raises(DataError, match=message):
                verify_export(output, progress=False)
            (output / "records" / "summary.json").write_bytes(expected["records/summary.json"])
        else:
            assert "the marker of part train-000000" in verify_export(output, progress=False)[0][0]
            export(few, output, options)
        assert bytes_of(output) == expected
    # A run that added parts was stopped before it wrote the lists, or in the middle of a part.
    marker.with_name("train-000001.json").touch()
    for left in (marker.with_name("train-000001.json"), output / "records" / "begun.json"):
        left.touch()
        with pytest.raises(DataError, match="is not finished: a run that continued it was stopped"):
            verify_export(output, progress=False)
        left.unlink()


def test_pairs_that_could_not_be_read_are_read_again(few: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    shutil.copytree(few, folder)
    (folder / "shards").rename(tmp_path / "shards")
    options = options_of("diffsynth", views=1)
    assert export(folder, tmp_path / "out", options)["refused"] == {"unreadable": 8}
    (tmp_path / "shards").rename(folder / "shards")
    assert export(folder, tmp_path / "out", options)["written"] == {"train": 4, "heldout": 4}
    export(folder, tmp_path / "whole", options)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_pair_that_has_become_unreadable_leaves_no_files(few: Path, tmp_path: Path) -> None:
    folder, options = tmp_path / "pairs", options_of("diffsynth", views=1)
    shutil.copytree(few, folder)
    export(few, tmp_path / "whole", options)
    train = {row["pair_id"] for (split, _), row in read_records(tmp_path / "whole").items() if split == "train"}
    first, second = [pair for pair in read_manifest(few) if pair.pair_id in train and pair.kind == "video"][:2]

    def damage(pair: Pair) -> None:
        path = folder / pair.a_file.relative_to(few)
        data = bytearray(pair.a_file.read_bytes())
        data[pair.a_span[0] : sum(pair.a_span)] = bytes(pair.a_span[1])
        path.write_bytes(data)

    damage(first)
    assert export(folder, tmp_path / "out", options)["refused"] == {"unreadable": 1}
    shutil.copyfile(first.a_file, folder / first.a_file.relative_to(few))
    damage(second)
    assert export(folder, tmp_path / "out", options)["refused"] == {"unreadable": 1}
    assert verify_export(tmp_path / "out", progress=False)[0] == []
    export(folder, tmp_path / "anew", options)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "anew")


def test_a_split_that_has_lost_all_samples_leaves_no_list(few: Path, tmp_path: Path) -> None:
    folder, options = tmp_path / "pairs", options_of("diffsynth", views=1)
    shutil.copytree(few, folder)
    export(folder, tmp_path / "out", options)
    heldout = tmp_path / "out/heldout"
    assert (heldout / "metadata.json").is_file()
    for image in heldout.rglob("*.png"):
        image.unlink()  # so that the part is written again
    shutil.rmtree(folder / "shards")
    assert export(folder, tmp_path / "out", options)["written"] == {"train": 4, "heldout": 0}
    assert not any(path.is_file() for path in heldout.rglob("*"))
    assert verify_export(tmp_path / "out", progress=False)[0] == []


def test_a_full_disk_is_named_and_the_same_command_goes_on(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    options = options_of("webdataset", views=1)
    export(few, tmp_path / "out", options, max_bytes=0)
    with monkeypatch.context() as patched:
        patched.setattr(parts, "_write_whole", partial(with_fsync, refuse, parts._write_whole))
        with pytest.raises(OSError, match=r"train-000000\.tar"):
            export(few, tmp_path / "out", options)
    assert export(few, tmp_path / "out", options)["not_written_yet"] == 0
    assert verify_export(tmp_path / "out", progress=False)[0] == []


def with_fsync(fsync: Callable[[int], None], write: Callable[[Path, bytes], None], path: Path, content: bytes) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parts.os, "fsync", fsync)
        write(path, content)


def write_list(path: Path, captions: dict[str, str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "Caption", "licence"])
        writer.writerows([f"./{name}", text, "CC0"] for name, text in captions.items())
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_captions_come_from_a_column_as_one_line_whatever_they_hold(name: str, few: Path, tmp_path: Path) -> None:
    videos = sorted({pair.source_path for pair in read_manifest(few) if pair.kind == "video"})
    captions = read_list_column(write_list(tmp_path / "list.csv", dict(zip(videos, HOSTILE, strict=True))), "caption")
    options = options_of(name, views=1, caption="", captions=captions)
    summary = export(few, tmp_path / "out", options)
    assert summary["refused"] == {"no_caption": 4} and summary["written"] == {"train": 2, "heldout": 2}
    refused = (tmp_path / "out" / "records" / "refused.jsonl").read_text().splitlines()
    assert len(refused) == 4 and all("has no caption in the list" in json.loads(line)["detail"] for line in refused)
    records = read_records(tmp_path / "out")
    seen = set()
    for key, found in read_all(tmp_path / "out", name).items():
        text = HOSTILE[videos.index(records[key]["source_path"])]
        assert found.caption == clean_caption(text) == records[key]["caption"]
        assert found.caption.isprintable() and found.caption.split() == text.replace("\u2028", " ").split()
        seen.add(found.caption)
    assert len(seen) == 4


def test_a_list_of_captions_may_be_parquet_and_must_have_the_column(tmp_path: Path) -> None:
    table = pa.table({"path": ["a//b.mp4", "c.tar"], "caption": ["one", None], "note": ["x", "y"]})
    pq.write_table(table, tmp_path / "list.parquet")
    texts = read_list_column(tmp_path / "list.parquet", "caption")
    assert texts == {"a/b.mp4": "one", "c.tar": ""}
    options = ExportOptions(captions={"c.tar": "of the tar", "c.tar/x.jpg": "its own"}, caption="else")
    assert [options.find_caption(path) for path in ("c.tar/x.jpg", "c.tar/y.jpg", "d")] == [
        "its own", "of the tar", "else"
    ]  # fmt: skip
    with pytest.raises(InputError, match="no column `text`; in addition to `path`, it has: caption, note"):
        read_list_column(tmp_path / "list.parquet", "text")
    with pytest.raises(InputError, match=r"the column .* has another meaning"):
        read_list_column(tmp_path / "list.parquet", "path")
    (tmp_path / "twice.csv").write_text("path,caption\na.mp4,one\n./a.mp4,two\n")
    with pytest.raises(InputError, match=r"'a\.mp4' is listed twice, with different texts"):
        read_list_column(tmp_path / "twice.csv", "caption")
    with pytest.raises(InputError, match="does not exist"):
        read_list_column(tmp_path / "none.csv", "caption")


def test_a_pair_that_cannot_be_read_is_refused_with_its_reason(mined: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(mined, folder)
    tar = folder / "shards" / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    bad = next(pair for pair in read_manifest(mined) if pair.kind == "video")
    data[bad.a_span[0] : sum(bad.a_span)] = bytes(bad.a_span[1])
    tar.write_bytes(data)
    summary = export(folder, tmp_path / "out", options_of("musubi"))
    assert summary["refused"] == {"unreadable": 1} and sum(summary["written"].values()) == 15  # type: ignore[attr-defined]
    (line,) = (tmp_path / "out" / "records" / "refused.jsonl").read_text().splitlines()
    assert json.loads(line)["pair_id"] == bad.pair_id and "not a complete JPEG" in json.loads(line)["detail"]
    assert bad.pair_id not in {row["pair_id"] for row in read_records(tmp_path / "out").values()}
    band = export(mined, tmp_path / "band", options_of(views=1, data=DataOptions(max_ssim=0.4)))
    assert band["refused"] == {"outside_ssim_band": 12} and band["written"] == {"train": 2, "heldout": 2}
    with pytest.raises(DataError, match="there are no pairs to export"):
        export(folder_of_videos(mined, tmp_path), tmp_path / "none", options_of(data=DataOptions(max_ssim=0.4)))


def folder_of_videos(mined: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    shutil.copytree(mined, folder)
    part = folder / "manifest" / "part-000000.parquet"
    rows = pq.read_table(part)
    pq.write_table(rows.filter(pa.compute.equal(rows["kind"], "video")), part)
    return folder


def test_licences_of_the_list_stand_beside_the_samples(few: Path, tmp_path: Path) -> None:
    folder = folder_of_videos(few, tmp_path)
    part = folder / "manifest" / "part-000000.parquet"
    rows = pq.read_table(part)
    licences = ["CC BY 4.0" if "coffee" in path else "" for path in rows["source_path"].to_pylist()]
    rows = rows.set_column(rows.column_names.index("licence"), "licence", pa.array(licences))
    pq.write_table(rows, part)
    export(folder, tmp_path / "out", options_of(views=1))
    text = (tmp_path / "out" / "LICENCES.txt").read_text()
    assert "CC BY 4.0: files 1, samples 1\n" in text and "the list of inputs has none: files 3, samples 3\n" in text
    origins = [json.loads(line) for line in (tmp_path / "out" / "records" / "origins.jsonl").read_text().splitlines()]
    assert {row["source_path"]: row["licence"] for row in origins}["coffee.png.mp4"] == "CC BY 4.0"
    assert sum(row["samples"] for row in origins) == 4 and all(len(row["source_hash"]) == 64 for row in origins)


def test_images_side_by_side_have_the_references_left_and_no_hole_there(few: Path, tmp_path: Path) -> None:
    data = DataOptions(num_references=2)
    export(few, tmp_path / "plain", options_of("onetrainer", views=1, data=data))
    export(few, tmp_path / "out", options_of("onetrainer", views=1, data=data, side_by_side=True))
    plain, beside = (read_all(tmp_path / name, "onetrainer") for name in ("plain", "out"))
    assert len(plain) == 8 and plain.keys() == beside.keys()
    for key, found in beside.items():
        source, *references = plain[key].conditions
        assert len(references) == 2 and not np.array_equal(*references)
        assert np.array_equal(found.target, np.hstack([*references, plain[key].target]))
        assert np.array_equal(found.conditions[0], np.hstack([*references, source]))
        assert not found.mask[:, : 2 * SIZE_PX].any()
        assert np.array_equal(found.mask[:, 2 * SIZE_PX :], plain[key].mask)
    export(few, tmp_path / "musubi", options_of("musubi", views=1, side_by_side=True))
    assert "resolution = [32, 16]" in (tmp_path / "musubi" / "train" / "dataset.toml").read_text()
    (tmp_path / "musubi").rename(tmp_path / "moved")
    export(few, tmp_path / "moved", options_of("musubi", views=1, side_by_side=True))
    assert {found.caption for found in read_all(tmp_path / "moved", "musubi").values()} == {DEFAULT_CAPTIONS[1]}


def test_seed_mask_strategy_and_quality_decide_the_pixels(few: Path, tmp_path: Path) -> None:
    def draw(name: str, **more: object) -> dict[str, ReadSample]:
        export(few, tmp_path / name, options_of("diffsynth", views=1, **more))
        records = read_records(tmp_path / name)
        return {records[key]["pair_id"]: found for key, found in read_all(tmp_path / name, "diffsynth").items()}

    first, second, jpeg = draw("first"), draw("second", seed=1), draw("jpeg", jpeg_quality=90)
    box = draw("box", data=DataOptions(mask=MaskOptions(strategy="box", image_strategy="box")))
    for pair_id, found in first.items():
        assert not np.array_equal(found.target, second[pair_id].target)
        error = np.abs(found.target.astype(int) - jpeg[pair_id].target)
        assert 0 < error.mean() < 8 and np.array_equal(found.mask, jpeg[pair_id].mask)
        hole = box[pair_id].mask > 0
        rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert len(first) == 8
    train = tmp_path / "jpeg" / "train"
    assert {path.suffix for path in (train / "target").iterdir()} == {".jpg"}
    assert {path.suffix for path in (train / "mask").iterdir()} == {".png"}


def test_a_folder_with_other_settings_or_other_things_is_refused(mined: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export(mined, output, options_of("diffsynth"), max_bytes=0)
    with pytest.raises(InputError, match=r"other settings:\n  format: 'diffsynth' in the folder, 'musubi' now"):
        export(mined, output, options_of("musubi"))
    with pytest.raises(InputError, match="captions: '' in the folder"):
        export(mined, output, options_of("diffsynth", captions={"a": "b"}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(InputError, match="has files that do not belong to an export"):
        export(mined, tmp_path / "other", options_of())
    with pytest.raises(InputError, match="is inside, the mined folder"):
        export(mined, mined / "out", options_of())
    assert not (mined / "out").exists()
    with pytest.raises(InputError, match="expected a multiple of 16"):
        ExportOptions(size_px=40)
    with pytest.raises(InputError, match="is empty"):
        ExportOptions(caption=" \n")
    (output / "records" / "export.json").write_text('{"format": 2}')
    with pytest.raises(DataError, match="has version 2, and this version of mimicbrush reads 1"):
        verify_export(output)
    assert parts.read_export_folder(mined) is None


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["pairs", *map(str, arguments)])
    try:
        command.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_exports_stops_goes_on_and_verifies(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    line = [
        "export",
        few,
        "--format",
        "diffsynth",
        "-o",
        output,
        "--size",
        16,
        "--views",
        2,
        "--augmentation",
        "weak",
    ]
    line += [
        "--mask-strategy",
        "box",
        "--set",
        "data.mask.box_sides=[0.5,0.6]",
        "data.heldout_ratio=0.3",
        "--workers",
        1,
    ]
    assert run(monkeypatch, *line, "--no-progress", "--max-gib", 1e-9) == 0
    said = capsys.readouterr().out
    assert "of 8 pairs, 0 pairs as 0 samples in train/" in said and "run the same command with a larger --max" in said
    assert "There are no samples yet. To continue, run" in said
    assert run(monkeypatch, *line, "--no-progress") == 0
    said = capsys.readouterr()
    assert "of 8 pairs, 4 pairs as 8 samples in train/, 4 pairs as 8" in said.out and said.err == ""
    assert run(monkeypatch, "verify", output, "--no-progress") == 0
    assert "everything is as it was written" in capsys.readouterr().out
    settings = json.loads((output / "records" / "export.json").read_text())["settings"]
    assert settings["data.heldout_ratio"] == 0.3 and settings["data.jitter"]["brightness"] == 0
    assert settings["data.mask"]["box_sides"] == [0.5, 0.6] and settings["data.mask"]["strategy"] == "box"
    next((output / "train" / "target").iterdir()).unlink()
    assert run(monkeypatch, "verify", output, "--no-progress") == 1
    assert "1 faults were found (see above)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--views 2 --side-by-side", r"--views, --side-by-side can only be used with --format \(one of diffusers,"),
        ("--format musubi", "--format needs -o OUT"),
        (
            "--format musubi -o OUT --set train.max_steps=1",
            "--set train.max_steps=1: expected OPTION=VALUE with one of",
        ),
        ("--format musubi -o OUT --mask-strategy box_", "data.mask.strategy=box_"),
        ("--format musubi -o OUT --size 40", "expected a multiple of 16"),
        ("--format musubi -o OUT --captions none.csv", "none.csv does not exist"),
        ("--format musubi -o OUT --caption-column text", "--caption-column text: give the list, too"),
    ],
)
def test_wrong_options_of_an_export_are_one_message_and_leave_nothing(
    arguments: str, message: str, mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with pytest.raises(InputError, match=message):
        run(monkeypatch, "export", mined, *arguments.replace("OUT", str(output)).split())
    assert not output.exists()
