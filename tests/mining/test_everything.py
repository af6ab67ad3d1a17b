"""The miner on a folder that holds one of everything, and on a thousand small files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import warm_scripts
from mining_inputs import moving_camera, photograph_with_segments, write_clip, write_clips, write_photograph, write_tar

from mimicbrush.data.manifest import read_rows
from mimicbrush.mining.executors import Resources
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.plan import find_items
from mimicbrush.mining.refusals import QUARANTINED, REJECTED
from mimicbrush.mining.run import mine_folder

ROOT = Path(__file__).parents[2]
JPEG, SEGMENTS = photograph_with_segments()
ANNOTATION = json.dumps(SEGMENTS).encode()
#: Segments that break what reads them without doubt.
BOMBS = {
    "sum": b'{"annotations":[{"segmentation":{"size":[80,96],"counts":[%s]}}]}' % b",".join([b"9" * 4300] * 9),
    "number": b'{"annotations":[{"segmentation":{"size":[80,96],"counts":[%s]}}]}' % (b"9" * 9000),
    "infinite": b'{"annotations":[{"segmentation":{"size":[80,96],"counts":[1e999]}}]}',
    "nan": b'{"annotations":[{"segmentation":{"size":[NaN,96],"counts":"o"}}]}',
    "true": b'{"annotations":[{"segmentation":{"size":[true,false],"counts":[true]}}]}',
    "deep": b'{"annotations":%s' % (b"[" * 10**6),
    "zeros": b'{"annotations":[{"segmentation":{"size":[80,96],"counts":"%s"}}]}' % (b"0" * 10**6),
    "surrogate": b'{"annotations":[{"segmentation":{"size":["\\ud800"],"counts":"\\ud800"}}]}',
    "nothing": b"",
    "null": b"null",
    "utf16": "{}".encode("utf-16"),
}


def write_everything(folder: Path) -> None:
    """Videos, photographs and tars, whole, damaged, strange and no files at all."""
    good = write_clips(folder / "videos", 2)[0].read_bytes()
    rng = random.Random(0)
    for number in range(6):
        (folder / f"videos/cut{number}.mp4").write_bytes(good[: rng.randrange(len(good))])
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (folder / f"videos/flip{number}.mp4").write_bytes(data)
    write_clip(folder / "videos/sub/動画 (1) = #3\n\x1b[31m.MP4", moving_camera(seed=3))
    (folder / ("videos/" + "x" * 251 + ".mp4")).write_bytes(good + b"\0\0\0\x08free")
    others = {
        "ts": b"\x47" + bytes(187),
        "flv": b"FLV\x01",
        "page": b"<!DOCTYPE html>",
        "list": b"#EXTM3U\n",
        "zeros": bytes(9),
    }
    for name, data in others.items():
        (folder / f"videos/{name}.mkv").write_bytes(data * 400)
    for name in ("empty.avi", "empty.tar"):
        (folder / name).write_bytes(b"")
    for name, data in BOMBS.items():
        write_photograph(folder / "bombs", name)
        (folder / f"bombs/{name}.jpg").write_bytes(JPEG + name.encode())  # else they were duplicates
        (folder / f"bombs/{name}.json").write_bytes(data)
    write_photograph(folder / "upper", "A", seed=7)
    (folder / "upper/A.jpg").rename(folder / "upper/A.JPG")
    (folder / "upper/A.json").rename(folder / "upper/A.JSON")
    (folder / "upper/IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "upper/notes.txt").write_text("")
    write_tars(folder / "tars")
    write_what_is_no_file(folder / "strange")


def write_tars(folder: Path) -> None:
    inner = {
        f"./sa_{n}.{suffix}": data
        for n in (1, 2)
        for suffix, data in (("jpg", photograph_with_segments(n)[0]), ("json", ANNOTATION))
    }
    whole = write_tar(folder / "sa1b.tar", inner).read_bytes()
    write_tar(folder / "texts.tar", {"a.txt": b"a", "lonely.jpg": JPEG})
    for name, data in {
        "zeros": bytes(1 << 20),
        "cut": whole[:-12_000],
        "half": whole + bytes(1 << 21),
        "two": whole * 2,
    }.items():
        (folder / f"{name}.tar").write_bytes(data)
    bombs = {f"a/../{name}.json": bomb for name, bomb in BOMBS.items()}
    bombs |= {f"./{name}.JPG": JPEG + name.encode() + b"tar" for name in BOMBS}
    write_tar(folder / "bombs.tar", bombs)
    with tarfile.open(folder / "names.tar", "w", errors="surrogateescape") as tar:
        for name in ("\udcff.jpg", "\udcff.json", "b.jpg", "./b.jpg", "b.json", "c.jpg", "c.json"):
            data = JPEG + b"named" if name.endswith("jpg") else ANNOTATION
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("d.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "c.jpg"
        tar.addfile(link)
        link.name = "d.json"
        tar.addfile(link)


def write_what_is_no_file(folder: Path) -> None:
    folder.mkdir()
    os.mkfifo(folder / "pipe.mp4")
    os.mkfifo(folder / "pipe.json")
    (folder / "pipe.jpg").write_bytes(JPEG)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "s.mp4"))
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "round").symlink_to(".")
    (folder / "outside").symlink_to("/usr/share")
    (folder / "device.mov").symlink_to("/dev/zero")
    (folder / "nowhere.tar").symlink_to("nothing")
    (folder / os.fsdecode(b"\xff.mp4")).write_bytes(b"")
    (folder / "folder.mp4").mkdir()
    folder.joinpath("deep", *["d"] * 150).mkdir(parents=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_of_everything(
    tmp_path: Path, script_environment: Callable[[], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_everything(tmp_path / "in")

    def call(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
        return warm_scripts.run(command, cwd=tmp_path, env=script_environment(), capture_output=True, text=True)

    done = call("mine_pairs.py", "input=in", "output=out", "pairs_per_clip=2", "progress=false")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    rows = read_rows(tmp_path / "out").to_pylist()
    files = {row["source_path"]: (row["status"], row["reason"]) for row in rows}
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["inputs"] == len(files) == summary["accepted"] + summary["rejected"] + summary["quarantined"]
    assert summary["accepted"] == sum(status == "pair" for status, _ in files.values())
    assert summary["ignored"] == {".heic": 1, ".jpg": 1, ".txt": 2}
    assert all(reason in {**REJECTED, **QUARANTINED, "": ""} for _, reason in files.values())
    assert not {"failed", "worker_died", "timeout", "out_of_memory"} & {reason for _, reason in files.values()}, files
    for planned in find_items(tmp_path / "in", tmp_path / "out")[0]:  # each input, and each photograph of a tar
        assert any(path == planned.path or path.startswith(f"{planned.path}/") for path in files), planned
    expected = {
        "bad_json": ["bombs/deep.jpg"],
        "bad_segment": ["bombs/infinite.jpg", "bombs/sum.jpg", "tars/bombs.tar/sum.JPG"],
        "empty": ["bombs/nothing.jpg", "empty.avi"],
        "bad_archive": ["empty.tar", "tars/cut.tar", "tars/half.tar", "tars/two.tar", "tars/zeros.tar"],
        "bad_name": ["strange/\\udcff.mp4", "tars/names.tar/\\udcff.jpg"],
        "outside_link": ["strange/device.mov", "strange/loop.mp4", "strange/nowhere.tar", "strange/outside"],
        "not_a_file": ["strange/pipe.jpg", "strange/pipe.mp4", "strange/s.mp4", "tars/names.tar/d.jpg"],
        "ambiguous": ["tars/names.tar/b.jpg"],
        "": [
            "tars/names.tar/c.jpg",
            "tars/sa1b.tar/sa_1.jpg",
            "tars/sa1b.tar/sa_2.jpg",
            "upper/A.JPG",
            "videos/clip0.mp4",
            "videos/clip1.mp4",
            "videos/sub/動画 (1) = #3\n\x1b[31m.MP4",
            f"videos/{'x' * 251}.mp4",
        ],
        "no_photograph": ["tars/texts.tar"],
        "other_format": ["videos/flv.mkv", "videos/list.mkv", "videos/page.mkv", "videos/ts.mkv"],
        "damaged": ["videos/zeros.mkv"],
    }
    for reason, paths in expected.items():
        assert {path: files[path][1] for path in paths} == dict.fromkeys(paths, reason)
    verified = call("pairs.py", "verify", "out", "--workers", "1", "--no-progress")
    assert (verified.returncode, verified.stderr) == (0, ""), verified.stdout
    report = (tmp_path / "out/report.html").read_text()
    for path, (status, reason) in files.items():
        if status == "quarantined":
            assert path in report and reason in report, path
    again = call("mine_pairs.py", "input=in", "output=out", "pairs_per_clip=2", "progress=false")
    assert again.returncode == 0 and "nothing to do" in again.stdout


FILES, WARM, IN_SHARD = 1000, 200, 20


def write_small_files(folder: Path) -> None:
    """A thousand inputs of different content: clips, photographs, small tars, and damaged ones of each."""
    clip = write_clip(folder / "first.mp4", moving_camera(24, (64, 48))).read_bytes()
    (folder / "first.mp4").unlink()
    for number in range(FILES):
        mark = b"\0\0\0\x0cfree%04d" % number
        video = {0: clip + mark, 1: clip[: -1 - number] + mark}.get(number % 8)
        if video is not None:
            (folder / f"{number}.mp4").write_bytes(video)
        elif number % 8 == 2:
            files = {"a.jpg": JPEG + mark, "a.json": ANNOTATION[: -(number % 16) or None]}
            write_tar(folder / f"{number}.tar", files)
        else:
            (folder / f"{number}.jpg").write_bytes(JPEG[: -(number % 32) or None] + mark)
            (folder / f"{number}.json").write_bytes(ANNOTATION)


@dataclass(frozen=True)
class Sample:
    """What the processes of a run hold: of the run itself, and of its one worker."""

    files: int
    memory: tuple[int, int]
    descriptors: tuple[int, int]


def watch(output: Path, samples: list[Sample], ended: threading.Event) -> None:
    run = psutil.Process()
    while not ended.wait(0.1):
        done = len(list((output / "markers").glob("*.json"))) * IN_SHARD
        with contextlib.suppress(psutil.NoSuchProcess):  # it ends
            workers = [child for child in run.children() if "spawn_main" in " ".join(child.cmdline())]
            if len(workers) == 1 and WARM <= done < FILES:
                memory, held = [(each.memory_info().rss, each.num_fds()) for each in (run, workers[0])]
                samples.append(Sample(done, (memory[0], held[0]), (memory[1], held[1])))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("spawned_workers")
def test_memory_and_descriptors_stay_flat_over_a_thousand_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_small_files(tmp_path / "in")
    samples: list[Sample] = []
    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(tmp_path / "out", samples, ended))
    before = psutil.Process().num_fds()
    watcher.start()
    options = MiningOptions(pairs_per_clip=2, inputs_per_shard=IN_SHARD)
    try:
        resources = Resources(workers=1, memory_gib=0)
        mined = mine_folder(tmp_path / "in", tmp_path / "out", options, resources=resources, progress=False)
    finally:
        ended.set()
        watcher.join()
    assert mined.summary is not None and mined.summary.inputs == FILES
    assert mined.summary.accepted > 300 and mined.summary.quarantined > 300
    assert psutil.Process().num_fds() <= before + 4
    first, last = samples[0], samples[-1]
    assert first.files <= 2 * WARM and last.files >= FILES - 5 * IN_SHARD
    growth = [(end - start) / 2**20 for start, end in zip(first.memory, last.memory, strict=True)]
    print(f"from {first.files} to {last.files} files: {growth} MiB more, {first.descriptors} -> {last.descriptors}")
    assert max(growth) < 24
    assert all(end <= start + 4 for start, end in zip(first.descriptors, last.descriptors, strict=True))
