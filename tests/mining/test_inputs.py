from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mining_inputs import photograph_with_segments, tree, write_clips, write_photograph, write_tar

from mimicbrush.data.manifest import read_manifest, read_rows
from mimicbrush.errors import DataError, InputError
from mimicbrush.mining.executors import Resources
from mimicbrush.mining.input_list import read_input_list
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.run import ArrayTask, mine_folder

OPTIONS = MiningOptions(pairs_per_clip=2, inputs_per_shard=1)
ONE_WORKER = Resources(workers=1, timeout_s=60)


def run(
    inputs: Path, output: Path, options: MiningOptions = OPTIONS, input_root: Path | None = None
) -> dict[str, dict[str, Any]]:
    mine_folder(inputs, output, options, resources=ONE_WORKER, progress=False, input_root=input_root)
    return {row["source_path"]: row for row in read_rows(output).to_pylist()}


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    write_clips(tmp_path / "videos", 3)
    return tmp_path / "videos"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_list_says_what_is_known_and_each_entry_is_counted(tmp_path: Path, videos: Path) -> None:
    jpeg, content = photograph_with_segments()
    write_tar(videos / "photos.tar", {"a.jpg": jpeg, "a.json": json.dumps(content).encode()})
    (videos / "notes.txt").write_text("")
    listed = videos / "list.csv"
    listed.write_text(
        "path,SHA256,license,url,title\n"
        f"clip0.mp4,{digest(videos / 'clip0.mp4').upper()},CC0,https://example.org/0,\n"
        f"clip1.mp4,{digest(videos / 'clip0.mp4')},,,\n"
        'photos.tar,,"SA-1B, research",,\n'
        "absent.mp4,,,,\n"
        "notes.txt,,,,\n"
    )
    mined = mine_folder(listed, tmp_path / "out", OPTIONS, resources=ONE_WORKER, progress=False)
    assert mined.notes == ["unused columns of list.csv: title"]
    assert mined.summary is not None and mined.summary.inputs == 5
    rows = {row["source_path"]: row for row in read_rows(tmp_path / "out").to_pylist()}
    assert {path: (row["reason"], row["licence"], row["url"]) for path, row in rows.items()} == {
        "absent.mp4": ("absent", "", ""),
        "clip0.mp4": ("", "CC0", "https://example.org/0"),
        "clip1.mp4": ("hash_mismatch", "", ""),
        "notes.txt": ("unknown_type", "", ""),
        "photos.tar/a.jpg": ("", "SA-1B, research", ""),
    }
    listed.write_text(listed.read_text().replace("CC0", "CC BY"))
    with pytest.raises(InputError, match=r"the size, hash, licence, URL or time range of 'clip0\.mp4' has changed"):
        mine_folder(listed, tmp_path / "out", OPTIONS, resources=ONE_WORKER, progress=False)


def test_csv_and_parquet_lists_are_the_same_and_may_lie_elsewhere(tmp_path: Path, videos: Path) -> None:
    (tmp_path / "list.csv").write_text("path,licence\nclip0.mp4,CC0\nclip2.mp4,\n")
    pq.write_table(pa.table({"path": ["clip2.mp4", "clip0.mp4"], "licence": [None, "CC0"]}), tmp_path / "list.parquet")
    from_csv = read_input_list(tmp_path / "list.csv", videos)
    assert from_csv == read_input_list(tmp_path / "list.parquet", videos)
    rows = run(tmp_path / "list.csv", tmp_path / "out", input_root=videos)
    assert {path: row["status"] for path, row in rows.items()} == {"clip0.mp4": "pair", "clip2.mp4": "pair"}


def test_pairs_come_from_the_part_of_a_video_that_a_list_names(tmp_path: Path, videos: Path) -> None:
    (videos / "list.csv").write_text("path,start_s,end_s\nclip0.mp4,0.5,1.5\nclip1.mp4,,\nclip2.mp4,30,\n")
    items, unused = read_input_list(videos / "list.csv", videos)
    assert [item.span_s for item in items] == [(0.5, 1.5), (0.0, math.inf), (30.0, math.inf)] and unused == []
    run(videos / "list.csv", tmp_path / "out")
    rows = read_rows(tmp_path / "out").to_pylist()
    times = {
        name: [row["a_time_s"] for row in rows if row["source_path"] == name] for name in ("clip0.mp4", "clip1.mp4")
    }
    ends = [row["b_time_s"] for row in rows if row["source_path"] == "clip0.mp4"]
    assert min(times["clip0.mp4"]) >= 0.5 - 1e-6 and max(ends) <= 1.5 + 1e-6 and min(times["clip1.mp4"]) < 0.5
    (beyond,) = (row for row in rows if row["source_path"] == "clip2.mp4")
    assert (beyond["status"], beyond["reason"]) == ("rejected", "too_short")
    # A plan of whole files is what it was before lists named parts: shards of earlier versions are still theirs.
    planned = [item for shard in json.loads((tmp_path / "out/plan.json").read_text())["shards"] for item in shard]
    assert [("start_s" in item, "end_s" in item) for item in planned] == [(True, True), (False, False), (True, True)]
    (videos / "list.csv").write_text("path,start_s,end_s\nclip0.mp4,0.5,1.4\n")
    with pytest.raises(InputError, match=r"or time range of .* has changed"):
        run(videos / "list.csv", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,licence\na.mp4,\n", r"has the columns file, licence; expected `path`"),
        ("path,licence,license\n", "each once"),
        ("path\n", "lists no files"),
        ("path\nclip0.mp4\n./clip0.mp4\n", r"entry 2: 'clip0\.mp4' is listed twice"),
        ("path\n../clip0.mp4\n", r"entry 1: '\.\./clip0\.mp4' leads outside of"),
        ("path\n/etc/hostname\n", "leads outside of"),
        ("path,sha256\nclip0.mp4,abc\n", "sha256 'abc': expected 64 hexadecimal digits"),
        ("path,licence\nclip0.mp4,CC0, really\n", "entry 1: more cells than in the header"),
        ("path\n\xff\n", "cannot be read as CSV in UTF-8"),
        ("path\n \n", "entry 1: the path is missing"),
        ("path,start_s\nclip0.mp4,-1\n", r"entry 1: start_s: expected a number of at least 0, got '-1'"),
        ("path,end_s\nclip0.mp4,soon\n", r"entry 1: end_s: expected a number of at least 0, got 'soon'"),
        ("path,start_s,end_s\nclip0.mp4,2,1.5\n", r"entry 1: end_s=1\.5 must be larger than start_s=2"),
    ],
)
def test_lists_that_cannot_be_used(videos: Path, text: str, message: str) -> None:
    (videos / "list.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        read_input_list(videos / "list.csv", videos)


def test_photographs_are_read_in_place_wherever_both_folders_move(tmp_path: Path) -> None:
    together, jpeg = tmp_path / "together", photograph_with_segments(1)[0]
    write_photograph(together / "in", "loose", seed=1)
    files = {"x/a.jpg": photograph_with_segments(2)[0], "x/a.json": (together / "in/loose.json").read_bytes()}
    write_tar(together / "in/photos.tar", files)
    run(together / "in", together / "out")
    together.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    pairs = {pair.source_path: pair for pair in read_manifest(moved / "out")}
    assert pairs["loose.jpg"].a_file == moved / "in/loose.jpg" and pairs["loose.jpg"].a_span == (0, len(jpeg))
    assert pairs["photos.tar/x/a.jpg"].a_file == moved / "in/photos.tar"
    for pair in pairs.values():
        assert pair.read_a().shape == (80, 96, 3) and pair.read_segment(0).sum() == 1600
    shutil.move(moved / "in", tmp_path / "elsewhere")
    with pytest.raises(DataError, match="cannot read"):
        read_manifest(moved / "out")[0].read_a()
    assert read_manifest(moved / "out", tmp_path / "elsewhere")[0].read_a().shape == (80, 96, 3)
    (moved / "out/plan.json").unlink()
    with pytest.raises(DataError, match=r"data\.input_root=FOLDER"):
        read_manifest(moved / "out")[0]


def test_copied_photographs_need_no_input(tmp_path: Path) -> None:
    write_photograph(tmp_path / "in", "loose")
    jpeg, content = photograph_with_segments(2)
    write_tar(tmp_path / "in/photos.tar", {"a.jpg": jpeg, "a.json": json.dumps(content).encode()})
    run(tmp_path / "in", tmp_path / "out", MiningOptions(copy_images=True))
    shutil.rmtree(tmp_path / "in")
    pairs = read_manifest(tmp_path / "out")
    assert len(pairs) == 2
    for pair in pairs:
        assert pair.a_file == tmp_path / "out/shards/shard-000000.tar"
        assert pair.read_a().shape == (80, 96, 3) and pair.read_segment(0)[10:50, 20:60].all()


def test_the_tasks_of_an_array_share_the_shards_and_the_last_one_finishes(tmp_path: Path, videos: Path) -> None:
    tasks = [
        mine_folder(videos, tmp_path / "array", OPTIONS, resources=ONE_WORKER, progress=False, task=ArrayTask(index, 2))
        for index in (1, 0)
    ]
    assert [(task.shards_mined, task.shards_done, task.shards) for task in tasks] == [(1, 1, 3), (2, 3, 3)]
    assert tasks[0].summary is None and tasks[1].summary is not None
    run(videos, tmp_path / "alone")
    assert tree(tmp_path / "array") == tree(tmp_path / "alone")
    with pytest.raises(InputError, match=r"task\.index=2 task\.count=2: expected an index from 0 to 1"):
        ArrayTask(2, 2)
