from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import warm_scripts
from hypothesis import given
from hypothesis import strategies as st
from mining_inputs import photograph_with_segments, write_clips, write_photograph, write_tar

from mimicbrush.data.manifest import read_manifest, read_rows
from mimicbrush.data.pair import Pair
from mimicbrush.data.schema import SCHEMA
from mimicbrush.errors import DataError, InputError
from mimicbrush.mining.executors import Resources
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.run import mine_folder
from mimicbrush.mining.verify.folder import verify_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mined_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with in/ and out/: clips (one twice), loose photographs, a tar of them, and files that are refused."""
    folder = tmp_path_factory.mktemp("verify")
    write_clips(folder / "in", 3)
    shutil.copy(folder / "in/clip0.mp4", folder / "in/twin.mp4")
    write_photograph(folder / "in", "loose", seed=5)
    image, segments = photograph_with_segments(seed=9)
    files = {"sa_1.jpg": image, "sa_1.json": json.dumps(segments).encode()}
    write_tar(folder / "in/sa.tar", files)
    (folder / "in/broken.mp4").write_text("text")
    options = MiningOptions(pairs_per_clip=2, inputs_per_shard=2)
    mine_folder(folder / "in", folder / "out", options, resources=Resources(workers=1), progress=False)
    return folder


@pytest.fixture
def folder(mined_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(mined_once, tmp_path / "copy")


def faults(folder: Path) -> list[str]:
    return [str(fault) for fault in verify_folder(folder / "out", progress=False).faults]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_folder_as_it_was_mined_passes(folder: Path) -> None:
    verdict = verify_folder(folder / "out", progress=False)
    assert verdict.faults == []
    assert verdict.shards == 4
    assert verdict.pairs == len(read_manifest(folder / "out")) + 2  # the shards hold the twin's two pairs, too
    assert verdict.images == 2 * (verdict.pairs - 2) + 2


def test_two_processes_find_the_same(folder: Path) -> None:
    flip(folder / "out/shards/shard-000001.tar", 700)
    one, two = (verify_folder(folder / "out", workers=workers, progress=False) for workers in (1, 2))
    assert one == two
    assert one.faults


def test_a_bit_of_each_stored_image_is_missed_by_nobody(folder: Path) -> None:
    pair = next(iter(read_manifest(folder / "out")))
    assert pair.kind == "video"
    flip(pair.a_file, pair.a_span[0] + pair.a_span[1] // 2)
    found = faults(folder)
    name = pair.a_file.relative_to(folder / "out").as_posix()
    assert any(fault.startswith(f"{name}: SHA-256") for fault in found)
    assert any(fault.startswith(f"{name}, pair {pair.pair_id}: image a has SHA-256") for fault in found)
    assert all("markers/shard-" in fault for fault in found)
    assert len(found) == 2


@pytest.mark.parametrize("name", ["manifest/part-000001.parquet", "audit/part-000001.parquet"])
def test_a_bit_of_a_table(name: str, folder: Path) -> None:
    flip(folder / "out" / name, 100)
    assert any(fault.startswith(f"{name}: SHA-256") for fault in faults(folder))


def test_a_photograph_in_place_that_has_changed(folder: Path) -> None:
    flip(folder / "in/loose.jpg", -100)
    (fault,) = faults(folder)
    assert fault.startswith("loose.jpg, pair ")
    assert "Restore the file" in fault


def test_a_photograph_in_a_tar_that_has_changed_or_moved(folder: Path) -> None:
    flip(folder / "in/sa.tar", 512 + 300)
    (fault,) = faults(folder)
    assert fault.startswith("sa.tar, pair ")
    image, segments = photograph_with_segments(seed=9)
    write_tar(folder / "in/sa.tar", {"0": b"", "sa_1.jpg": image, "sa_1.json": json.dumps(segments).encode()})
    assert "at byte 512: '0' of 0 bytes; expected a file of" in faults(folder)[0]


def test_segments_that_have_changed(folder: Path) -> None:
    annotation = folder / "in/loose.json"
    text = annotation.read_text()
    content = json.loads(text)
    content["annotations"][0], content["annotations"][1] = content["annotations"][1], content["annotations"][0]
    annotation.write_text(json.dumps(content))
    (fault,) = faults(folder)
    assert fault.startswith("loose.json, pair ")
    assert "segment 0 covers" in fault
    annotation.write_text("{}".ljust(len(text)))
    (fault,) = faults(folder)
    assert "no segments" in fault


def test_an_input_that_is_gone_or_somewhere_else(folder: Path) -> None:
    (folder / "in").rename(folder / "moved")
    (fault,) = faults(folder)
    assert "--input-root" in fault
    assert verify_folder(folder / "out", input_root=folder / "moved", progress=False).faults == []
    (folder / "moved/loose.jpg").unlink()
    found = verify_folder(folder / "out", input_root=folder / "moved", progress=False).faults
    assert [fault.file for fault in found] == ["loose.jpg"]


def test_a_marker_that_is_gone(folder: Path) -> None:
    (folder / "out/markers/shard-000002.json").unlink()
    found = faults(folder)
    for start in ("markers/shard-000002.json: no marker", "manifest/part-000002.parquet: a part without a marker"):
        assert any(fault.startswith(start) for fault in found), start
    assert any(fault.startswith("shards/shard-000002.tar: it belongs to no") for fault in found)
    assert any(fault.startswith("index.arrow:") for fault in found)
    assert any(fault.startswith("summary.json: inputs:") for fault in found)


def test_two_shards_that_have_changed_places(folder: Path) -> None:
    for name in ("shards/shard-{}.tar", "manifest/part-{}.parquet", "audit/part-{}.parquet", "markers/shard-{}.json"):
        one, two = (folder / "out" / name.format(number) for number in ("000001", "000002"))
        one.rename(folder / "aside")
        two.rename(one)
        (folder / "aside").rename(two)
    found = faults(folder)
    for number in ("000001", "000002"):
        assert any(fault.startswith(f"markers/shard-{number}.json: fingerprint") for fault in found)
        assert any(fault.startswith(f"manifest/part-{number}.parquet: no row for") for fault in found)


@pytest.mark.parametrize("place", [0.25, 0.5, 0.75])
def test_an_index_that_is_damaged(place: float, folder: Path) -> None:
    index = folder / "out/index.arrow"
    data = bytearray(index.read_bytes())
    middle = int(len(data) * place)
    data[middle : middle + 400] = bytes(value ^ 0x55 for value in data[middle : middle + 400])
    index.write_bytes(data)
    (fault,) = faults(folder)
    assert fault.startswith("index.arrow: it ")
    index.unlink()
    assert faults(folder)[0].startswith("index.arrow: it does not exist")


def test_a_bit_of_the_footer_of_the_index_hides_no_other_fault(folder: Path) -> None:
    index = folder / "out/index.arrow"
    flip(index, -10 - int.from_bytes(index.read_bytes()[-10:-6], "little") + 3)
    (folder / "out/stray.txt").write_text("")
    stray, damaged = faults(folder)
    assert stray.startswith("stray.txt: ")
    assert damaged.startswith("index.arrow: it is damaged")


def test_a_name_from_outside_is_one_line_and_no_order_to_the_terminal(folder: Path) -> None:
    (folder / "out/a\nb\x1b[31m\u202e.txt").write_text("")
    (fault,) = faults(folder)
    assert fault.startswith(r"a\nb\x1b[31m\u202e.txt: ")


def test_files_that_belong_to_nothing(folder: Path) -> None:
    for name in ("shards/extra.tar", "stray.txt", "manifest/part-000009.parquet", "markers/shard-000009.json"):
        (folder / "out" / name).write_bytes(b"{}")
    found = faults(folder)
    for name in ("shards/extra.tar", "stray.txt", "manifest/part-000009.parquet", "markers/shard-000009.json"):
        assert any(fault.startswith(f"{name}: ") for fault in found), name


@pytest.mark.parametrize("ignored", [[], 3, "no", None, [[1, 2], ["a", 3]]])
def test_a_summary_of_another_kind(ignored: object, folder: Path) -> None:
    path = folder / "out/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ignored": ignored}))
    assert any(fault.startswith("summary.json: ") for fault in faults(folder))


def test_a_photograph_whose_name_no_file_can_have(folder: Path) -> None:
    part = next(
        path
        for path in sorted((folder / "out/manifest").glob("*.parquet"))
        if "loose.jpg" in pq.read_table(path)["file"].to_pylist()
    )
    rows = pq.read_table(part).to_pylist()
    changed = [values | ({"file": "loose\0.jpg"} if values["file"] == "loose.jpg" else {}) for values in rows]
    _write_part(folder / "out", changed, part.stem.removeprefix("part-"))
    assert any("file 'loose\\x00.jpg'" in fault for fault in faults(folder))


def test_a_row_that_says_what_is_not_so(folder: Path) -> None:
    """Each with a hash in the marker that fits, as if the miner itself had been wrong."""
    part = folder / "out/manifest/part-000000.parquet"
    rows = pq.read_table(part).to_pylist()
    number = next(n for n, values in enumerate(rows) if values["status"] == "pair")
    for change, said in (
        ({"width_px": 90}, "96 x 64 px; expected 90 x 64"),
        ({"a_offset": rows[number]["a_offset"] + 1}, "no file starts there"),
        ({"a_length": 2**40}, "expected 1099511627776 bytes"),
        ({"file": "../in/clip1.mp4"}, "file '../in/clip1.mp4'"),
        ({"a_points": [0, 16 * 64 + 1] * (len(rows[number]["b_points"]) // 2)}, "points of image a are outside"),
        ({"b_points": rows[number]["b_points"][:-1]}, "two coordinates for each match"),
        ({"ssim": 3.0}, "SSIM 3.0"),
        ({"status": "rejected"}, "the same status in all rows"),
        ({"source_path": "elsewhere.mp4"}, "a row for 'elsewhere.mp4'"),
        ({"pair_id": "twin"}, "twin.a.jpg of"),
        ({"pair_id": rows[number + 1]["pair_id"]}, "2 rows of this id"),
    ):
        changed = [values | (change if n == number else {}) for n, values in enumerate(rows)]
        _write_part(folder / "out", changed)
        found = faults(folder)
        assert any(said in fault for fault in found), (change, found)


def _write_part(root: Path, rows: list[dict[str, object]], number: str = "000000") -> None:
    part, marker = root / f"manifest/part-{number}.parquet", root / f"markers/shard-{number}.json"
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), part)
    content = json.loads(marker.read_text()) | {"part_sha256": hashlib.sha256(part.read_bytes()).hexdigest()}
    marker.write_text(json.dumps(content))


READ_FROM = ["out/shards/shard-000000.tar", "out/shards/shard-000001.tar", "in/loose.jpg", "in/loose.json", "in/sa.tar"]


def read_all(pair: Pair) -> list[bytes] | None:
    """The pixels and segments of a pair; None where they are refused."""
    try:
        masks = [pair.read_segment(number) for number in range(len(pair.segments))]
        return [array.tobytes() for array in (pair.read_a(), pair.read_b(), *masks)]
    except DataError:
        return None


@given(name=st.sampled_from(READ_FROM), place=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_bit_of_what_pairs_are_read_from_is_refused_or_harmless(
    mined_once: Path, name: str, place: int, bit: int
) -> None:
    path = mined_once / name
    pairs = [
        pair for pair in read_manifest(mined_once / "out") if path.resolve() in (pair.a_file, pair.annotation_file)
    ]
    original, expected = path.read_bytes(), [read_all(pair) for pair in pairs]
    assert pairs and None not in expected
    damaged = bytearray(original)
    damaged[place % len(damaged)] ^= 1 << bit
    try:
        path.write_bytes(damaged)
        assert all(read_all(pair) in (None, before) for pair, before in zip(pairs, expected, strict=True))
    finally:
        path.write_bytes(original)


def test_what_is_no_mined_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a mined folder"):
        verify_folder(tmp_path, progress=False)


def test_the_commands(folder: Path, script_environment: Callable[[], dict[str, str]]) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts/pairs.py"), *arguments]
        return warm_scripts.run(command, cwd=folder, env=script_environment(), capture_output=True, text=True)

    passed = call("verify", "out", "--workers", "1")
    assert (passed.returncode, passed.stdout.count("\n")) == (0, 1), passed.stderr
    (folder / "out/stray.txt").write_text("")
    failed = call("verify", "out", "--no-progress", "--workers", "1")
    assert (failed.returncode, failed.stderr) == (1, "")
    assert failed.stdout.startswith("stray.txt: ")
    absent = call("export", "absent")
    assert absent.returncode == 2
    assert absent.stderr.startswith("error: absent has no mined pairs")
    exported = call("export", "out", "-o", "rows.jsonl")
    assert exported.returncode == 0, exported.stderr
    text = (folder / "rows.jsonl").read_text()
    assert call("export", "out").stdout == text
    example = (ROOT / "data_manifests/example.jsonl").read_text().splitlines()[0]
    assert [list(json.loads(line)) for line in text.splitlines()] == [list(json.loads(example))] * text.count("\n")
    _check_exported([json.loads(line) for line in text.splitlines()], folder / "out")


def _check_exported(lines: list[dict[str, object]], root: Path) -> None:
    rows = read_rows(root).to_pylist()
    assert len(lines) == len(rows)
    assert [line["source_path"] for line in lines if line["reason"] == "duplicate"] == ["twin.mp4"]
    for line, values in zip(lines, rows, strict=True):
        for name, value in values.items():
            exported = np.nan if line[name] is None else line[name]
            if name in ("ssim", "segment_ratios"):
                np.testing.assert_array_equal(np.asarray(exported, np.float32), np.asarray(value, np.float32))
            else:
                np.testing.assert_equal(exported, value)
