from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_data import write_mined_folder

from mimicbrush.data.manifest import (
    INDEX_NAME,
    PairTable,
    find_index_fault,
    is_index_current,
    read_manifest,
    read_rows,
    split_pairs,
    write_index,
)
from mimicbrush.data.pair import Pair, decode_jpeg
from mimicbrush.data.schema import MAX_POINT_SIDE_PX, SCHEMA, manifest_row, pack_points, unpack_points
from mimicbrush.errors import DataError
from mimicbrush.io.hashing import hash_file


def same(a: Pair, b: Pair) -> bool:
    values = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(np.array_equal(x, y, equal_nan=isinstance(x, float)) for x, y in values)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_mined_folder(tmp_path / "pairs")


def test_points_keep_a_thirty_second_of_a_pixel() -> None:
    points = np.random.default_rng(0).uniform(-0.5, MAX_POINT_SIDE_PX - 0.5, (1000, 2)).astype(np.float32)
    assert np.abs(unpack_points(np.array(pack_points(points), np.uint16)) - points).max() <= 1 / 32 + 1e-3
    assert pack_points(np.zeros((0, 2))) == [] and unpack_points(np.zeros(0, np.uint16)).shape == (0, 2)
    for outside in (-1.0, MAX_POINT_SIDE_PX + 2.0):
        with pytest.raises(ValueError, match="lie outside"):
            pack_points(np.array([[outside, 3.0]]))


def test_the_index_gives_the_pairs_of_the_parts_and_is_pickled_by_its_path(root: Path) -> None:
    from_parts = read_manifest(root)
    assert not is_index_current(root)
    write_index(root, root / INDEX_NAME)
    assert is_index_current(root)
    mapped = read_manifest(root)
    train = split_pairs(mapped, "train")
    assert mapped.digest() == from_parts.digest() != train.digest()
    for table in (from_parts, split_pairs(from_parts, "train"), train, mapped[3:7]):
        again = pickle.loads(pickle.dumps(table))
        assert isinstance(again, PairTable) and len(again) == len(table) > 0
        assert all(same(a, b) for a, b in zip(again, table, strict=True))
    assert all(same(a, b) for a, b in zip(mapped, from_parts, strict=True))
    assert len(pickle.dumps(train)) < 2000 < len(pickle.dumps(from_parts))


def test_an_index_of_other_parts_is_not_used(root: Path) -> None:
    write_index(root, root / INDEX_NAME)
    part = root / "manifest/part-000000.parquet"
    pq.write_table(pq.read_table(part).slice(0, 5), part)
    assert not is_index_current(root) and len(read_manifest(root)) == 5
    original = (root / INDEX_NAME).read_bytes()
    (root / INDEX_NAME).write_bytes(original[: len(original) // 2])
    assert len(read_manifest(root)) == 5


@given(place=st.integers(min_value=0), value=st.integers(1, 255), length=st.integers(0, 300))
def test_damaged_bytes_of_an_index_are_never_read(stored: Path, place: int, value: int, length: int) -> None:
    """One byte, or all from there on: Arrow itself would give other points, or crash."""
    index = stored / INDEX_NAME
    original = index.read_bytes()
    damaged = bytearray(original)
    place %= len(damaged)
    damaged[place : place + length + 1] = bytes(byte ^ value for byte in damaged[place : place + length + 1])
    try:
        index.write_bytes(damaged)
        assert not is_index_current(stored)
        assert find_index_fault(stored) == "it is damaged, or was made from other parts"
        index.write_bytes(damaged[:place])
        assert not is_index_current(stored)
    finally:
        index.write_bytes(original)
    assert is_index_current(stored, needs_checksum=True)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one part of few rows, with a marker and an index."""
    root = tmp_path_factory.mktemp("stored") / "pairs"
    toy = write_mined_folder(root)
    part = root / "manifest/part-000000.parquet"
    pq.write_table(pq.read_table(part).slice(0, 3), part)
    (root / "markers").mkdir()
    (root / "markers/shard-000000.json").write_text(json.dumps({"part_sha256": hash_file(part)}))
    write_index(toy, toy / INDEX_NAME)
    return root


@given(
    place=st.integers(min_value=0),
    value=st.integers(1, 255),
    of=st.sampled_from(["manifest/part-000000.parquet", "markers/shard-000000.json"]),
)
def test_a_damaged_byte_of_a_part_or_marker_is_refused_or_harmless(
    stored: Path, place: int, value: int, of: str
) -> None:
    path, expected = stored / of, read_rows(stored)
    original = path.read_bytes()
    damaged = bytearray(original)
    damaged[place % len(damaged)] ^= value
    try:
        path.write_bytes(damaged)
        try:
            found = read_rows(stored)
        except DataError as error:
            assert "mine again" in str(error)
        else:
            assert of.startswith("markers") and all(
                _same_column(found, expected, name) for name in expected.column_names
            )
    finally:
        path.write_bytes(original)


def _same_column(one: pa.Table, other: pa.Table, name: str) -> bool:
    return str(one[name].to_pylist()) == str(other[name].to_pylist())  # NaN is not NaN


def test_an_index_of_an_earlier_version_has_no_checksum_and_is_read_if_it_is_whole(root: Path) -> None:
    index, expected = root / INDEX_NAME, read_manifest(root).digest()
    write_index(root, index)
    table = pa.ipc.open_file(pa.BufferReader(index.read_bytes())).read_all()
    metadata = {key: value for key, value in table.schema.metadata.items() if key != b"mimicbrush_checksum"}
    table = table.replace_schema_metadata(metadata)
    with pa.OSFile(str(index), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert is_index_current(root) and not is_index_current(root, needs_checksum=True)
    assert read_manifest(root).digest() == expected and not find_index_fault(root)
    index.write_bytes(index.read_bytes()[:-100])
    assert not is_index_current(root)


def test_an_image_that_is_not_what_was_mined_is_an_error_though_it_decodes(root: Path) -> None:
    part, shard = root / "manifest/part-000000.parquet", root / "shards/shard-000000.tar"
    table, original = pq.read_table(part), shard.read_bytes()
    spans = zip(table["a_offset"].to_pylist(), table["a_length"].to_pylist(), strict=True)
    hashes = [hashlib.sha256(original[offset : offset + length]).hexdigest() for offset, length in spans]
    place = table.schema.get_field_index("a_sha256")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(hashes)), part)
    pair = read_manifest(root)[0]
    assert pair.read_a().shape == (160, 160, 3)
    offset, length = pair.a_span
    harmed = bytearray(original)
    harmed[offset + length - 200 : offset + length - 2] = bytes(198)
    shard.write_bytes(harmed)
    decode_jpeg(bytes(harmed[offset : offset + length]))  # Pillow sees nothing wrong
    with pytest.raises(DataError, match="are not what was mined"):
        pair.read_a()


def test_parts_without_their_marker_do_not_count(root: Path) -> None:
    (root / "markers").mkdir()
    shutil.copy(root / "manifest/part-000000.parquet", root / "manifest/part-000001.parquet")
    (root / "markers/shard-000000.json").write_text("{}")
    assert len(read_rows(root)) == 16


@pytest.mark.parametrize("cuts", [[0, 7], [0, 2, 4, 7], [0, 3, 5, 6, 7]])
def test_the_second_file_of_one_content_is_one_duplicate(cuts: list[int], tmp_path: Path) -> None:
    def pair(path: str, source_hash: str, number: int) -> dict[str, object]:
        common = {"status": "pair", "kind": "video", "store": "mined", "file": "shards/x.tar", "ssim": 0.5}
        return manifest_row(source_path=path, source_hash=source_hash, pair_id=f"{source_hash[:16]}-{number}", **common)

    one, two = "1" * 64, "2" * 64
    rows = [pair("a", one, 0), pair("a", one, 1), pair("b", two, 0), pair("c", one, 0), pair("c", one, 1)]
    rows += [manifest_row(status="quarantined", reason="empty", source_path=path) for path in "de"]
    (tmp_path / "manifest").mkdir()
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        part = pa.Table.from_pylist(rows[start:stop], SCHEMA)
        pq.write_table(part, tmp_path / f"manifest/part-{number:06d}.parquet")
    assert [pair.source_path for pair in read_manifest(tmp_path)] == ["a", "a", "b"]
    # In one piece, a list column could not hold the points of all pairs.
    assert read_rows(tmp_path)["a_points"].num_chunks == len(cuts) - 1
    rows = read_rows(tmp_path, ["source_path", "status", "reason", "ssim"]).to_pylist()
    assert [(each["source_path"], each["reason"]) for each in rows] == [
        ("a", ""),
        ("a", ""),
        ("b", ""),
        ("c", "duplicate"),
        ("d", "empty"),
        ("e", "empty"),
    ]
    assert np.isnan(rows[3]["ssim"])
