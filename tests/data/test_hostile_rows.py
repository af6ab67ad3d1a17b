"""Rows of a manifest that may hold anything: each is replaced and counted; none ends the loading or hangs it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_data import write_mined_folder

from mimicbrush.data import pair as pair_module
from mimicbrush.data.dataset import PairDataset, Sample
from mimicbrush.data.manifest import read_manifest
from mimicbrush.data.options import DataOptions
from mimicbrush.data.pair_sources import load_pair_sources
from mimicbrush.data.schema import SCHEMA
from mimicbrush.errors import DataError
from mimicbrush.evaluation.heldout.samples import plan_samples
from mimicbrush.io.text import make_storable

SIZE = 16


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mined_folder(tmp_path_factory.mktemp("good") / "pairs", size_px=32)


def rows_of(root: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(root / "manifest" / "part-000000.parquet").to_pylist()
    return rows


def write_rows(root: Path, rows: list[dict[str, Any]]) -> None:
    (root / "manifest").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), root / "manifest" / "part-000000.parquet")


def with_row(good: Path, root: Path, kind: str, values: dict[str, Any]) -> Path:
    """A folder with the same shard, in which the first row of a kind has other values."""
    rows = rows_of(good)
    place = next(number for number, row in enumerate(rows) if row["kind"] == kind)
    rows[place] |= values
    write_rows(root, rows)
    if not (root / "shards").exists():
        (root / "shards").mkdir()
        (root / "shards" / "shard-000000.tar").hardlink_to(good / "shards" / "shard-000000.tar")
    return root


def read_all(root: Path, kind: str, only_first: bool = False) -> tuple[int, list[str]]:
    """Read every pair of a kind once, or the first; the number of pairs and what was wrong with them."""
    options = DataOptions(root=str(root), heldout_ratio=0.0, video_ratio=float(kind == "video"))
    dataset = PairDataset(load_pair_sources(options), SIZE, options, seed=0, num_matches=8)
    faults: list[str] = []
    count = len(dataset.pair_sources[0].pairs)
    for number in range(count):
        if only_first and dataset.mixture.locate(number)[1] != 0:
            continue
        sample = dataset[number]
        assert isinstance(sample, Sample) and sample.source.shape == sample.reference.shape == (SIZE, SIZE, 3)
        assert sample.mask.shape == (SIZE, SIZE) and 0 < sample.mask.mean() < 1
        faults += sample.faults
    assert all(fault == make_storable(fault, len(fault)) for fault in faults)
    return count, faults


HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "a NUL in a name": ("video", {"file": "shards/\0.tar"}),
    "a name that no file can have": ("video", {"file": "x" * 5000}),
    "a path out of the folder": ("video", {"file": "../../../etc/passwd"}),
    "an absolute path": ("video", {"file": "/etc/passwd"}),
    "no file": ("video", {"file": ""}),
    "an endless device": ("image", {"store": "mined", "file": "/dev/zero"}),
    "another store": ("video", {"store": "moon"}),
    "a length of 2^62": ("video", {"a_length": 2**62}),
    "a negative length": ("video", {"b_length": -5}),
    "a negative offset": ("video", {"a_offset": -7}),
    "an offset beyond the file": ("video", {"b_offset": 2**62}),
    "no second image": ("video", {"b_offset": -1}),
    "points of other lengths": ("video", {"a_points": [100, 100, 200, 200]}),
    "half a point": ("video", {"a_points": [100, 100, 200], "b_points": [100, 100, 200]}),
    "points outside of the image": ("video", {"a_points": [65535, 9], "b_points": [9, 9]}),
    "points that are null": ("video", {"a_points": None}),
    "a null for a number": ("video", {"a_length": None}),
    "a null for a name": ("video", {"file": None}),
    "an SSIM that is no number": ("video", {"ssim": float("nan")}),
    "an image of no size": ("video", {"width_px": 0}),
    "an image of a negative size": ("video", {"height_px": -32}),
    "a huge image": ("image", {"height_px": 2**31 - 1, "width_px": 2**31 - 1}),
    "another size than the image's": ("image", {"height_px": 31}),
    "another hash than the image's": ("video", {"a_sha256": "0" * 64}),
    "a segment that is not there": ("image", {"segments": [7]}),
    "a negative segment": ("image", {"segments": [-1]}),
    "segments without areas": ("image", {"segment_ratios": []}),
    "an area that is no number": ("image", {"segment_ratios": [float("nan")]}),
    "segments out of a JPEG": ("image", {"annotation_offset": 0}),
    "segments out of the folder": ("image", {"annotation_file": "../x.json"}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_row_is_replaced_and_counted(case: str, good: Path, tmp_path: Path) -> None:
    kind, values = HOSTILE[case]
    count, faults = read_all(with_row(good, tmp_path / "pairs", kind, values), kind)
    assert count == (12 if kind == "video" else 4)
    # Once for itself, and once more for each time that it was to replace itself.
    assert 1 <= len(faults) <= 3 and all(fault.startswith("sample ") for fault in faults), faults


TEXTS = st.text(max_size=40) | st.sampled_from(["", "\0", "..", "/", "x" * 300, "shards", "/dev/zero", "shards/../.."])
WHOLE = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([-1, 0, 1, 2**31, 2**62])
VALUES: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("file", "store", "pair_id", "source_path", "source_hash", "annotation_file", "a_sha256"), TEXTS),
    **dict.fromkeys(("a_offset", "a_length", "b_offset", "b_length", "annotation_offset", "annotation_length"), WHOLE),
    **dict.fromkeys(("width_px", "height_px"), st.integers(-(2**31), 2**31 - 1) | st.sampled_from([0, 1, 31, 33])),
    **dict.fromkeys(("a_points", "b_points"), st.lists(st.integers(0, 65535), max_size=60)),
    "segments": st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5),
    "segment_ratios": st.lists(st.floats(width=32), max_size=5),
    "ssim": st.floats(width=32),
}  # fmt: skip


@given(
    kind=st.sampled_from(["video", "image"]),
    values=st.fixed_dictionaries({}, optional={name: st.none() | values for name, values in VALUES.items()}),
)
def test_no_row_ends_the_loading(
    tmp_path_factory: pytest.TempPathFactory, good: Path, kind: str, values: dict[str, Any]
) -> None:
    root = tmp_path_factory.getbasetemp() / "hostile"
    count, _ = read_all(with_row(good, root, kind, values), kind, only_first=True)
    # Fewer where the row makes others its duplicates, or where its SSIM lies outside of the band.
    assert count >= (9 if kind == "video" else 3)


def test_a_held_out_row_that_names_no_pair_is_left_out_and_told(good: Path, tmp_path: Path) -> None:
    pairs = read_manifest(with_row(good, tmp_path, "video", {"a_points": [1, 2, 3], "file": "../../x"}))
    with pytest.warns(UserWarning, match="a held-out pair is left out: pair .* outside"):
        plans = plan_samples(pairs, None, 0)
    assert 12 <= len(plans) < 16  # it may be the wrong reference of others


def fifo(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.skipif(os.name != "posix", reason="there are no such files")
@pytest.mark.parametrize("replace", [fifo, folder, device])
@pytest.mark.timeout(60)
def test_what_takes_the_place_of_a_shard_is_not_waited_for(
    good: Path, tmp_path: Path, replace: Callable[[Path], None]
) -> None:
    root = tmp_path / "pairs"
    shutil.copytree(good, root)
    (root / "shards" / "other.tar").hardlink_to(root / "shards" / "shard-000000.tar")
    rows = rows_of(root)
    rows[0]["file"] = "shards/other.tar"
    write_rows(root, rows)
    assert read_all(root, "video") == (12, [])
    # While it is in use, as far as the loader knows.
    options = DataOptions(root=str(root), heldout_ratio=0.0, video_ratio=1.0)
    dataset = PairDataset(load_pair_sources(options), SIZE, options, seed=0)
    (root / "shards" / "other.tar").unlink()
    replace(root / "shards" / "other.tar")
    faults = [fault for number in range(12) for fault in dataset[number].faults]
    assert faults and all("other.tar" in fault for fault in faults)


@pytest.mark.skipif(os.name != "posix", reason="there are no such files")
@pytest.mark.parametrize("has_markers", [True, False])
@pytest.mark.parametrize("replace", [fifo, folder, device])
@pytest.mark.timeout(60)
def test_what_takes_the_place_of_a_part_is_not_waited_for(
    good: Path, tmp_path: Path, replace: Callable[[Path], None], has_markers: bool
) -> None:
    root = tmp_path / "pairs"
    shutil.copytree(good, root)
    part = next((root / "manifest").glob("*.parquet"))
    part.unlink()
    replace(part)
    (root / "index.arrow").unlink(missing_ok=True)
    if has_markers:
        (root / "markers").mkdir()
        (root / "markers" / f"{part.stem.replace('part', 'shard')}.json").write_text('{"part_sha256": "0"}')
    with pytest.raises(DataError, match=r"cannot be read .*not a regular file"):
        read_manifest(root)


def test_a_shard_that_is_cut_while_it_is_used_costs_what_was_cut(good: Path, tmp_path: Path) -> None:
    root = tmp_path / "pairs"
    shutil.copytree(good, root)
    options = DataOptions(root=str(root), heldout_ratio=0.0, video_ratio=1.0)
    dataset = PairDataset(load_pair_sources(options), SIZE, options, seed=0)
    assert not dataset[0].faults
    last = max(read_manifest(root).where(read_manifest(root).column("kind") == "video"), key=lambda each: each.a_span)
    os.truncate(root / "shards" / "shard-000000.tar", last.a_span[0] + 10)
    faults = [fault for number in range(12) for fault in dataset[number].faults]
    assert faults and all(f"pair {last.pair_id}" in fault and "end after" in fault for fault in faults)


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("too deep"), KeyError("x"), OSError(errno.EIO, "I/O")])
def test_any_error_at_one_pair_costs_this_pair(good: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    bad = read_manifest(good)[0].pair_id
    honest = pair_module.Pair._bytes

    def failing(pair: Any, file: Path, span: Any) -> bytes:
        if pair.pair_id == bad:
            raise error
        return honest(pair, file, span)

    monkeypatch.setattr(pair_module.Pair, "_bytes", failing)
    count, faults = read_all(good, "video")
    assert count == 12 and faults and all(type(error).__name__ in fault for fault in faults)


def test_a_full_disk_is_no_fault_of_a_pair(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pair_module.Pair, "_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        read_all(good, "video")


def test_a_folder_of_bad_rows_is_an_error_all_the_same(good: Path, tmp_path: Path) -> None:
    write_rows(tmp_path, [row | {"a_offset": -1} for row in rows_of(good)])
    with pytest.raises(DataError, match=r"16 consecutive pairs of the source 'video'.* cannot be read.*a_offset=-1"):
        read_all(tmp_path, "video")


@pytest.mark.parametrize(
    ("column", "values"),
    [("a_offset", pa.array(["x"] * 16)), ("file", pa.array([["x"]] * 16)), ("a_points", pa.array([1.5] * 16))],
)
def test_columns_of_other_types_are_named(good: Path, tmp_path: Path, column: str, values: pa.Array) -> None:
    table = pq.read_table(good / "manifest" / "part-000000.parquet")
    table = table.set_column(table.schema.get_field_index(column), column, values)
    (tmp_path / "manifest").mkdir()
    pq.write_table(table, tmp_path / "manifest" / "part-000000.parquet")
    with pytest.raises(DataError, match=r"part-000000\.parquet cannot be read"):
        read_manifest(tmp_path)[0].check()


def test_text_that_is_no_utf8_and_a_missing_column_are_named(good: Path, tmp_path: Path) -> None:
    table = pq.read_table(good / "manifest" / "part-000000.parquet")
    (tmp_path / "manifest").mkdir()
    raw = pa.array([b"\xff\xfe"] * len(table), pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    place = table.schema.get_field_index("pair_id")
    for damaged in (table.set_column(place, "pair_id", text), table.remove_column(place)):
        pq.write_table(damaged, tmp_path / "manifest" / "part-000000.parquet")
        with pytest.raises(DataError, match=r"part-000000\.parquet cannot be read"):
            read_manifest(tmp_path)


def test_a_hash_that_is_none_still_gives_a_key(good: Path, tmp_path: Path) -> None:
    rows = rows_of(good)
    for row, text in zip(rows, ["", "zz", "-1" * 8, "ÿ" * 64, None], strict=False):
        row["source_hash"] = text
    write_rows(tmp_path, rows)
    keys = read_manifest(tmp_path).column("source_key")
    assert keys.dtype == np.uint64 and len(np.unique(keys[:4])) == 4
