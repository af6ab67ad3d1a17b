from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mining_inputs import (
    moving_camera,
    photograph_with_segments,
    tree,
    write_clip,
    write_clips,
    write_photograph,
    write_tar,
)

from mimicbrush.data.manifest import read_manifest, read_rows
from mimicbrush.errors import DataError, InputError
from mimicbrush.mining.executors import Resources
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.plan import Item
from mimicbrush.mining.refusals import QUARANTINED, REJECTED
from mimicbrush.mining.run import mine_folder
from mimicbrush.mining.summary import Summary
from mimicbrush.mining.verify.folder import verify_folder
from mimicbrush.mining.video.strict_reader import PyAVReader, VideoFrame
from mimicbrush.mining.worker import mine_item

OPTIONS = MiningOptions(pairs_per_clip=2, inputs_per_shard=1)
ONE_WORKER = Resources(workers=1, timeout_s=60)


def run(input_dir: Path, output_dir: Path, options: MiningOptions = OPTIONS) -> Summary:
    summary = mine_folder(input_dir, output_dir, options, resources=ONE_WORKER, progress=False).summary
    assert summary is not None
    return summary


def reasons_by_path(output: Path) -> dict[str, str]:
    rows = read_rows(output, ["source_path", "reason"])
    return dict(zip(rows["source_path"].to_pylist(), rows["reason"].to_pylist(), strict=True))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An input folder with one of everything."""
    root = tmp_path_factory.mktemp("zoo")
    folder = root / "input"
    good, _ = write_clips(folder / "videos", 2)
    shutil.copy(good, folder / "videos/twin.mp4")
    (folder / "videos/cut.mp4").write_bytes(good.read_bytes()[:-60])
    (folder / "videos/text.mp4").write_text("hello")
    (folder / "videos/empty.mkv").write_bytes(b"")
    write_clip(folder / "videos/short.mov", moving_camera(6))
    write_clip(folder / "videos/UPPER.MP4", moving_camera(seed=3))
    write_photograph(folder / "images", "one")
    bad = {"annotations": [{"segmentation": {"size": [80, 96], "counts": "o"}}]}
    write_photograph(folder / "images", "bad", seed=5, content=bad)
    write_photograph(folder / "images", "none", seed=6, content={"annotations": []})
    (folder / "images/lonely.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("not an input")
    files = {}
    for name, seed in (("sa_1", 1), ("sa_2", 2), ("again", 0)):
        jpeg, content = photograph_with_segments(seed)
        files |= {f"part/{name}.jpg": jpeg, f"part/{name}.json": json.dumps(content).encode()}
    write_tar(folder / "archive.tar", files | {"part/licence.md": b"-"})
    original = write_tar(folder / "cut.tar", files).read_bytes()
    (folder / "cut.tar").write_bytes(original[:-11000])
    write_clips(root / "elsewhere", 1)
    (folder / "linked.mp4").symlink_to(root / "elsewhere/clip0.mp4")
    (folder / "linked_folder").symlink_to(root / "elsewhere")
    (folder / "nowhere.mp4").symlink_to(root / "absent.mp4")
    os.mkfifo(folder / "pipe.mp4")
    return folder


@pytest.fixture(scope="module")
def mined_zoo(zoo: Path) -> tuple[Path, Summary]:
    output = zoo / "mined"  # inside the input, where it must not be mined again
    return output, run(zoo, output, MiningOptions(pairs_per_clip=2, inputs_per_shard=5))


def test_each_file_has_its_reason_and_the_counts_add_up(mined_zoo: tuple[Path, Summary]) -> None:
    output, summary = mined_zoo
    reasons = reasons_by_path(output)
    assert reasons == {
        "archive.tar/part/again.jpg": "",
        "archive.tar/part/sa_1.jpg": "",
        "archive.tar/part/sa_2.jpg": "",
        "cut.tar": "bad_archive",
        "images/bad.jpg": "bad_segment",
        "images/none.jpg": "no_segment",
        "images/one.jpg": "duplicate",
        "linked.mp4": "outside_link",
        "linked_folder": "outside_link",
        "nowhere.mp4": "outside_link",
        "pipe.mp4": "not_a_file",
        "videos/UPPER.MP4": "",
        "videos/clip0.mp4": "",
        "videos/clip1.mp4": "",
        "videos/cut.mp4": "missing_packets",
        "videos/empty.mkv": "empty",
        "videos/short.mov": "too_short",
        "videos/text.mp4": "damaged",
        "videos/twin.mp4": "duplicate",
    }
    assert summary.inputs == len(reasons) == summary.accepted + summary.rejected + summary.quarantined
    assert summary.accepted == 6
    assert summary.rejected == sum(reason in REJECTED for reason in reasons.values()) == 4
    assert summary.quarantined == sum(reason in QUARANTINED for reason in reasons.values()) == 9
    assert summary.pairs_by_kind == {"image": 3, "video": 6}
    assert summary.pairs == len(read_manifest(output)) == 9
    assert summary.ignored == {".jpg": 1, ".md": 1, ".txt": 1}
    assert sum(summary.reasons.values()) == summary.rejected + summary.quarantined
    assert sum(summary.ssim_histogram) == 6
    assert json.loads((output / "summary.json").read_text())["inputs"] == summary.inputs


def test_the_manifest_leads_to_the_images(zoo: Path, mined_zoo: tuple[Path, Summary]) -> None:
    output, _ = mined_zoo
    pairs = read_manifest(output)
    assert len({pair.pair_id for pair in pairs}) == len(pairs)
    for pair in pairs:
        if pair.kind == "video":
            assert pair.read_a().shape == pair.read_b().shape == (64, 96, 3)
            assert len(pair.a_points) == len(pair.b_points) >= 6
            assert pair.a_points.max() < 96
        else:
            assert pair.read_a().shape == (80, 96, 3)
            assert pair.b_span is None
            assert pair.segment_ratios.tolist() == pytest.approx([1600 / (80 * 96)])
            assert pair.read_segment(0)[10:50, 20:60].all() and pair.read_segment(0).sum() == 1600
    loose, _ = photograph_with_segments(1)
    pair = next(pair for pair in pairs if pair.source_path.endswith("sa_1.jpg"))
    offset, length = pair.a_span
    assert pair.a_file == zoo / "archive.tar"  # in place
    assert pair.a_file.read_bytes()[offset : offset + length] == loose


def test_a_second_run_does_nothing_and_a_fresh_one_gives_the_same_bytes(
    zoo: Path, mined_zoo: tuple[Path, Summary], tmp_path: Path
) -> None:
    output, summary = mined_zoo
    options = MiningOptions(pairs_per_clip=2, inputs_per_shard=5)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert run(zoo, output, options) == summary
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    run(zoo, tmp_path / "fresh", options)
    assert tree(tmp_path / "fresh") == tree(output)


def test_other_options_are_refused_with_what_differs(zoo: Path, mined_zoo: tuple[Path, Summary]) -> None:
    with pytest.raises(InputError, match=r"min_ssim: was 0\.05, now 0\.3"):
        run(zoo, mined_zoo[0], MiningOptions(pairs_per_clip=2, inputs_per_shard=5, min_ssim=0.3))


def test_a_mined_folder_says_at_what_size_sift_looked(zoo: Path, mined_zoo: tuple[Path, Summary]) -> None:
    output, summary = mined_zoo
    assert json.loads((output / "plan.json").read_text())["options"]["match_side_px"] == 640
    assert summary.options["match_side_px"] == 640
    with pytest.raises(InputError, match=r"match_side_px: was 640, now 448"):
        run(zoo, output, MiningOptions(pairs_per_clip=2, inputs_per_shard=5, match_side_px=448))


def test_new_files_go_to_new_shards_and_harm_is_mended(tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    write_clips(folder, 2)
    assert run(folder, output).accepted == 2
    before = tree(output)
    write_clip(folder / "a_new_one.mp4", moving_camera(seed=5))
    shard = output / "shards/shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert run(folder, output).accepted == 3
    after = tree(output)
    same = [name for name in before if name.startswith(("shards", "manifest", "markers"))]
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert {Path(name).stem for name in after.keys() - before.keys()} == {"shard-000002", "part-000002"}

    write_clip(folder / "clip0.mp4", moving_camera(60))
    with pytest.raises(InputError, match=r"the size, .* of 'clip0\.mp4' has changed"):
        run(folder, output)
    write_clips(tmp_path / "other/deeper", 1)
    with pytest.raises(InputError, match="another folder"):
        run(tmp_path / "other", output)


def test_a_damaged_summary_is_written_again_and_a_damaged_marker_is_named(tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "empty.mp4").touch()
    run(folder, output)
    before = tree(output)
    (output / "summary.json").write_bytes(b"\xff\0")
    run(folder, output)
    assert tree(output) == before
    marker = output / "markers/shard-000000.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"ignored": [1]}))
    with pytest.raises(DataError, match=r"shard-000000\.json cannot be read .*; delete it and mine again"):
        run(folder, output)


def test_a_killed_run_is_finished_by_the_next_with_the_same_bytes(tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    write_clips(folder, 5)
    command = f"""
import sys
from pathlib import Path
from mimicbrush.mining.executors import Resources
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.run import mine_folder
if __name__ == "__main__":
    mine_folder(Path(sys.argv[1]), Path(sys.argv[2]), {OPTIONS!r}, resources={ONE_WORKER!r}, progress=False)
"""
    script = tmp_path / "mine_it.py"
    script.write_text(command)
    process = subprocess.Popen([sys.executable, str(script), str(folder), str(output)])
    marker = output / "markers/shard-000000.json"
    deadline = time.monotonic() + 60
    while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert len(list((output / "markers").iterdir())) < 5
    kept = marker.stat().st_mtime_ns
    assert run(folder, output).accepted == 5
    assert marker.stat().st_mtime_ns == kept
    run(folder, tmp_path / "straight")
    assert tree(output) == tree(tmp_path / "straight")


class DeadlyReader(PyAVReader):
    """Reads as usual, but one file kills the worker and another never ends."""

    def frames(self, path: Path) -> Iterator[VideoFrame]:
        if path.name == "clip1.mp4":
            os.kill(os.getpid(), signal.SIGKILL)
        if path.name == "clip2.mp4":
            time.sleep(600)
        yield from super().frames(path)


def test_a_worker_that_dies_or_hangs_costs_one_file(tmp_path: Path) -> None:
    write_clips(tmp_path / "in", 5)
    options = MiningOptions(pairs_per_clip=1)
    output = tmp_path / "out"
    resources = Resources(timeout_s=4.0)
    summary = mine_folder(
        tmp_path / "in", output, options, resources=resources, progress=False, reader=DeadlyReader()
    ).summary
    assert summary is not None
    assert reasons_by_path(output) == {
        "clip0.mp4": "",
        "clip1.mp4": "worker_died",
        "clip2.mp4": "timeout",
        "clip3.mp4": "",
        "clip4.mp4": "",
    }
    assert (summary.accepted, summary.quarantined, summary.pairs) == (3, 2, 3)


class FaultyReader(PyAVReader):
    """Reads as usual, but fails at one file in a way that mining does not know."""

    def frames(self, path: Path) -> Iterator[VideoFrame]:
        if path.name == "clip1.mp4":
            cv2.cvtColor(np.zeros(0, np.uint8), cv2.COLOR_RGB2GRAY)
        yield from super().frames(path)


def test_a_fault_in_a_worker_costs_one_file_and_is_named(tmp_path: Path) -> None:
    write_clips(tmp_path / "in", 3)
    output = tmp_path / "out"
    summary = mine_folder(
        tmp_path / "in", output, OPTIONS, resources=ONE_WORKER, progress=False, reader=FaultyReader()
    ).summary
    assert summary is not None
    assert (summary.inputs, summary.accepted, summary.reasons) == (3, 2, {"failed": 1})
    (row,) = [row for row in read_rows(output).to_pylist() if row["reason"] == "failed"]
    assert row["source_path"] == "clip1.mp4" and row["detail"].startswith("error: OpenCV")
    assert verify_folder(output, progress=False).faults == []


def test_what_a_killed_run_left_of_a_shard_is_removed(tmp_path: Path) -> None:
    write_clips(tmp_path / "in", 1)
    run(tmp_path / "in", tmp_path / "out")
    litter = tmp_path / "out/manifest/.part-000000.parquet.1.tmp"
    litter.write_text("")
    (tmp_path / "out/markers/shard-000000.json").unlink()
    run(tmp_path / "in", tmp_path / "out")
    assert not litter.exists()


@pytest.mark.parametrize("kind", ["video", "image", "archive"])
def test_a_file_that_grew_since_the_plan_is_quarantined(kind: str, tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", moving_camera())
    write_photograph(tmp_path, "a")
    jpeg, segments = photograph_with_segments()
    write_tar(tmp_path / "a.tar", {"a.jpg": jpeg, "a.json": json.dumps(segments).encode()})
    names = {"video": ["a.mp4"], "image": ["a.jpg", "a.json"], "archive": ["a.tar"]}[kind]
    size = sum((tmp_path / name).stat().st_size for name in names)
    for planned, status, reason in ((size, "pair", ""), (size - 1, "quarantined", "changed")):
        item = Item(names[0], kind, planned)
        rows = mine_item(tmp_path, item, PyAVReader(), OPTIONS, tmp_path / "spool").files[0].rows
        assert {(values["status"], values["reason"]) for values in rows} == {(status, reason)}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"workers": 1.5}, r"workers=1\.5: expected a whole number"),
        ({"workers": 0}, r"workers=0: expected a whole number from 1 to 4096"),
        ({"timeout_s": "long"}, "timeout_s=long: expected a number"),
        ({"engine": "slurm"}, "engine=slurm: expected one of local, ray"),
        ({"engine": "ray"}, "engine=ray needs the package ray"),
    ],
)
def test_choices_of_a_wrong_type_are_errors(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Resources(**choices)


@pytest.mark.parametrize("name", [option.name for option in fields(MiningOptions) if isinstance(option.default, float)])
def test_each_option_must_be_a_number(name: str) -> None:
    for value in ("abc", None, True, [1]):
        with pytest.raises(InputError, match=f"{name}=.* expected a"):
            MiningOptions(**{name: value})


def test_folders_that_cannot_be_mined(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="no files"):
        run(empty, tmp_path / "out")
    (empty / "a.txt").write_text("")
    with pytest.raises(InputError, match=r"1 x \.txt"):
        run(empty, tmp_path / "out")
    with pytest.raises(InputError, match="does not exist"):
        run(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(InputError, match="is a file"):
        run(empty / "a.txt", tmp_path / "out")
    with pytest.raises(InputError, match="same folder"):
        run(empty, empty)
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_not_utf8_is_a_row(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"")
    summary = run(folder, tmp_path / "out")
    assert summary.reasons == {"bad_name": 1}
