"""Names: in folders, in tars and in lists. Each input is one row, whatever it is called and wherever it lies."""

from __future__ import annotations

import inspect
import io
import json
import os
import socket
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mining_inputs import photograph_with_segments, write_photograph, write_tar

from mimicbrush.errors import DataError, InputError
from mimicbrush.mining import input_list
from mimicbrush.mining import plan as planning
from mimicbrush.mining.executors import Resources
from mimicbrush.mining.input_list import read_input_list
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.plan import Item, find_items, suffix_of
from mimicbrush.mining.run import mine_folder
from mimicbrush.mining.segmented_images import normalise_name
from mimicbrush.mining.shards import ShardJob, mine_shard
from mimicbrush.mining.verify.folder import verify_folder
from mimicbrush.mining.video.strict_reader import PyAVReader
from mimicbrush.mining.worker import mine_item

OPTIONS = MiningOptions()
JPEG, SEGMENTS = photograph_with_segments()
ANNOTATION = json.dumps(SEGMENTS).encode()


def tar_reasons(path: Path) -> dict[str, str]:
    """path -> reason of all rows of a tar."""
    outcome = mine_item(
        path.parent, Item(path.name, "archive", path.stat().st_size), PyAVReader(), OPTIONS, path.parent / "spool"
    )
    rows = [row for file in outcome.files for row in file.rows]
    assert rows, "every input has a row"
    return {row["source_path"]: row["reason"] for row in rows}


def found_reasons(root: Path) -> dict[str, str]:
    items, _ = find_items(root, root / "out")
    return {item.path: item.reason for item in items}


def listed_reasons(path: Path) -> dict[str, str]:
    items, _ = read_input_list(path, path.parent)
    return {item.path: item.reason for item in items}


@pytest.mark.parametrize(
    "spelling",
    ["{}", "./{}", ".//{}", "/{}", "x/../{}", "./x/./../{}"],
    ids=["plain", "of SA-1B", "two slashes", "absolute", "up and down", "both"],
)
def test_a_photograph_is_found_however_its_tar_spells_it(spelling: str, tmp_path: Path) -> None:
    one, other = (spelling.format(name) for name in ("sub/sa_1.jpg", "sub/sa_1.json"))
    for names in ((one, other), (one, "sub/sa_1.json"), ("sub/sa_1.jpg", other)):
        path = write_tar(tmp_path / "a.tar", dict(zip(names, (JPEG, ANNOTATION), strict=True)))
        assert tar_reasons(path) == {"a.tar/sub/sa_1.jpg": ""}


def test_a_tar_that_the_command_tar_makes_of_a_folder(tmp_path: Path) -> None:
    write_photograph(tmp_path / "in", "sa_1")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "in", ".")  # as `tar cf a.tar .` does
    assert tar_reasons(tmp_path / "a.tar") == {"a.tar/sa_1.jpg": ""}


def test_a_name_that_is_there_twice_costs_its_photograph_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (
            ("a.jpg", JPEG), ("./a.jpg", JPEG), ("a.json", ANNOTATION), ("b.JPG", JPEG), ("b.JSON", ANNOTATION),
            ("c.jpg", JPEG), ("c.json", ANNOTATION), ("x/../c.json", b"{}"), ("notes", b""), ("./notes", b""),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert tar_reasons(path) == {"a.tar/a.jpg": "ambiguous", "a.tar/b.JPG": "", "a.tar/c.jpg": "ambiguous"}


@pytest.mark.parametrize(
    ("files", "tail", "reason"),
    [
        ({}, b"", "bad_archive"),
        ({}, bytes(1 << 21), "bad_archive"),
        ({"notes.txt": b"a", "b/lonely.jpg": JPEG}, b"", "no_photograph"),
        ({"a.jpg": JPEG, "a.json": ANNOTATION}, bytes(1 << 21), "bad_archive"),
        ({"a.jpg": JPEG, "a.json": ANNOTATION}, b"ustar", "bad_archive"),
    ],
    ids=["empty", "zeros", "texts", "half downloaded", "two in one"],
)
def test_a_tar_without_photographs_is_one_row(
    files: dict[str, bytes], tail: bytes, reason: str, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "a.tar", files)
    path.write_bytes(path.read_bytes() + tail)
    assert tar_reasons(path) == {"a.tar": reason}


#: Of names as tars have them: bytes that are no UTF-8 are lone surrogates.
letters = st.text(st.characters(exclude_characters="\0/", codec="utf-8"), max_size=5)
names = st.lists(
    st.one_of(st.sampled_from([".", "..", "", "a", "\udcff", "a\n", "動", "x" * 300]), letters), min_size=1, max_size=4
).map("/".join)


@given(names, st.sampled_from([".jpg", ".JPG", ".jpeg"]), st.sampled_from([".json", ".JSON"]))
def test_any_name_in_a_tar_is_one_row(
    tmp_path_factory: pytest.TempPathFactory, name: str, image: str, json: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.tar"
    stem = f"{name}n"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
        for each, data in ((stem + image, JPEG), (f"./{stem}{json}", ANNOTATION)):
            info = tarfile.TarInfo(each)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (found,) = tar_reasons(path).items()
    pa.array([found[0]])
    assert found[1] == ("bad_name" if "\udcff" in normalise_name(stem) else ""), found
    assert normalise_name(normalise_name(stem)) == normalise_name(stem)


def test_a_folder_that_cannot_be_read_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root every folder can be read: so the system's answer is what is changed here."""
    write_photograph(tmp_path / "in/good", "a")
    for name in ("locked", "entered"):
        write_photograph(tmp_path / "in" / name, "b")
    scandir, stat_file = os.scandir, Path.stat

    def refuse(path: Any) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    def refuse_stat(self: Path, **options: Any) -> os.stat_result:
        if self.parent.name == "entered":  # its names may be read, and nothing else
            raise PermissionError(13, "Permission denied", str(self))
        return stat_file(self, **options)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(Path, "stat", refuse_stat)
    assert found_reasons(tmp_path / "in") == {"entered/b.jpg": "unreadable", "good/a.jpg": "", "locked": "unreadable"}
    with pytest.raises(InputError, match=r"cannot read the input .*locked \(Permission denied\)"):
        find_items(tmp_path / "in/locked", tmp_path / "out")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permissions_is_one_row(tmp_path: Path) -> None:
    write_photograph(tmp_path / "in/locked", "b")
    (tmp_path / "in/locked").chmod(0)
    assert found_reasons(tmp_path / "in") == {"locked": "unreadable"}
    (tmp_path / "in/locked").chmod(0o700)


def test_a_tree_deeper_than_python_calls_itself_is_walked_to_its_end(tmp_path: Path) -> None:
    deepest = (tmp_path / "in").joinpath(*["d"] * 200)
    deepest.mkdir(parents=True)
    (deepest / "clip.mp4").write_bytes(b"")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 60)
    try:
        reasons = found_reasons(tmp_path / "in")
    finally:
        sys.setrecursionlimit(limit)
    assert list(reasons.values()) == [""]


def test_a_tree_deeper_than_a_path_may_be_long_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    for _ in range(20):
        Path("d" * 255).mkdir()
        os.chdir("d" * 255)
    Path("clip.mp4").write_bytes(b"")
    ((path, reason),) = found_reasons(tmp_path / "in").items()
    assert reason == "unreadable" and len(path) < 4200


def test_what_is_no_file_is_one_row(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_photograph(folder, "a")
    os.mkfifo(folder / "pipe.mp4")
    os.mkfifo(folder / "b.json")
    (folder / "b.jpg").write_bytes(JPEG)
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "one.mov").symlink_to("two.mov")
    (folder / "two.mov").symlink_to("one.mov")
    (folder / "round").symlink_to(".")
    (folder / "c.mp4").symlink_to("/dev/zero")
    (folder / ("x" * 251 + ".mp4")).write_bytes(b"")
    (folder / ("x" * 251 + ".jpg")).write_bytes(JPEG)  # the name of its segments would be too long
    (folder / os.fsdecode(b"\xff\n.mp4")).write_bytes(b"")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(folder)  # the name of a socket is short
        server.bind("s.mp4")
        os.chdir(tmp_path)
        reasons = found_reasons(folder)
    assert reasons == {
        "a.jpg": "",
        "b.jpg": "not_a_file",
        "c.mp4": "outside_link",
        "loop.mp4": "outside_link",
        "one.mov": "outside_link",
        "pipe.mp4": "not_a_file",
        "s.mp4": "not_a_file",
        "two.mov": "outside_link",
        "x" * 251 + ".mp4": "",
        "\\udcff\\n.mp4": "bad_name",
    }


def test_suffixes_are_counted_and_never_long() -> None:
    assert [suffix_of(name) for name in ("a.TXT", "a", "a.\udcff", "a." + "x" * 99, "a.b\x1b[31m")] == [
        ".txt", "(none)", ".\\udcff", "(none)", ".b\\x1b[31m",
    ]  # fmt: skip


def test_an_input_folder_that_disappears_ends_the_run_and_not_its_inputs(tmp_path: Path) -> None:
    """A disk that is taken away would otherwise refuse a million clips for ever."""
    write_photograph(tmp_path / "in", "a")
    items, _ = find_items(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in").rename(tmp_path / "gone")
    (tmp_path / "out").mkdir()
    job = ShardJob(0, tuple(items), tmp_path / "in", tmp_path / "out", OPTIONS, PyAVReader(), "")

    class Here:
        def submit(self, *arguments: Any) -> Any:
            outcome = mine_item(*arguments)
            return type("Done", (), {"result": lambda _: outcome})()

    with pytest.raises(DataError, match="has disappeared"):
        mine_shard(job, Here())  # type: ignore[arg-type]
    assert not list((tmp_path / "out/markers").iterdir())
    (tmp_path / "gone").rename(tmp_path / "in")
    assert mine_shard(job, Here())  # type: ignore[arg-type]


def test_names_in_a_list_that_no_file_can_have_are_rows(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    long, longer = "x" * 300 + ".mp4", "x/" * 20_000 + ".mp4"
    table = {
        "path": ["a/../clip.mp4", long, longer, longer + "4", "nul\0.mp4", "folder.mp4", "loop.mp4", "pipe.mp4", "."]
    }
    pq.write_table(pa.table(table), tmp_path / "list.parquet")
    reasons = listed_reasons(tmp_path / "list.parquet")
    assert len(reasons) == 9 and all(len(path) < 4200 for path in reasons)
    assert reasons["clip.mp4"] == "" and reasons["nul\0.mp4"] == "bad_name" and reasons[long] == "bad_name"
    assert (reasons["folder.mp4"], reasons["pipe.mp4"]) == ("not_a_file", "not_a_file")
    assert (reasons["loop.mp4"], reasons["."]) == ("unreadable", "unknown_type")
    assert list(reasons.values()).count("bad_name") == 4


@pytest.mark.parametrize("name", ["list.csv", "list.parquet"])
def test_a_list_that_is_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="is a pipe"):
        mine_folder(tmp_path / name, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"path": ["a" * 50_000] * 600}, {"use_dictionary": False, "compression": "zstd"}, "bytes when decompressed"),
        ({"path": [f"a{n}" + "b" * 200_000 for n in range(2)]}, {}, "a cell of 200002 bytes"),
        ({"path": pa.array(["a.mp4"] * 2_000_000)}, {}, "'a.mp4' is listed twice"),
        ({"path": pa.nulls(2_000_000, pa.string())}, {}, "entry 1: the path is missing"),
        ({"path": [1, 2]}, {}, "the column `path` has type int64, expected text"),
        ({"path": [["a"]]}, {}, "has type list"),
        ({"path": [b"\xff"]}, {}, "has type binary"),
        ({"path": ["a"], "sha256": ["0" * 100_000]}, {}, "expected 64 hexadecimal digits"),
        ({"path": ["../" * 1300]}, {}, "leads outside of"),
        ({"\ud800".encode("utf-8", "replace").decode() * 9999: ["a"]}, {}, "expected `path`"),
    ],
    ids=["zeros", "long", "runs", "nulls", "numbers", "lists", "bytes", "hash", "dots", "columns"],
)  # fmt: skip
def test_parquet_bombs_are_one_short_message(
    columns: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_list, "_MAX_UNPACKED_BYTES", 1 << 22)
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table(columns), path, **options)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(InputError, match=message) as caught:
        read_input_list(path, tmp_path)
    assert len(str(caught.value)) < 1500


def test_text_that_is_not_utf8_in_a_parquet_list_is_a_message(tmp_path: Path) -> None:
    buffer = pa.py_buffer(b"a\xff.mp4")
    column = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\6\0\0\0"), buffer)
    pq.write_table(pa.table({"path": column}), tmp_path / "list.parquet")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read_input_list(tmp_path / "list.parquet", tmp_path)


cells = st.one_of(
    st.none(), st.text(max_size=12), st.sampled_from(["clip.mp4", "./clip.mp4", "x" * 5000, "\0", "..", "/etc"])
)


@given(
    st.lists(cells, min_size=1, max_size=4),
    st.lists(st.one_of(cells, st.floats()), min_size=4, max_size=4),
    st.booleans(),
)
def test_any_cells_are_inputs_or_one_message(
    tmp_path_factory: pytest.TempPathFactory, paths: list[Any], others: list[Any], as_csv: bool
) -> None:
    root = tmp_path_factory.getbasetemp() / "cells"
    root.mkdir(exist_ok=True)
    (root / "clip.mp4").write_bytes(b"")
    path = root / ("list.csv" if as_csv else "list.parquet")
    others = [each if isinstance(each, type(others[0])) else None for each in others]
    if as_csv:
        path.write_bytes(("path,url\n" + "\n".join(f"{a},{b}" for a, b in zip(paths, others, strict=False))).encode())
    else:
        pq.write_table(pa.table({"path": paths, "url": others[: len(paths)]}), path)
    try:
        items, _ = read_input_list(path, root)
    except InputError as error:
        assert len(str(error)) < 1500
        return
    pa.array([value for item in items for value in (item.path, item.url, item.detail)])
    assert len({item.path for item in items}) == len(items)


@given(st.binary(max_size=200), st.integers(0, 10_000), st.booleans())
def test_any_bytes_of_a_list_are_inputs_or_one_message(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, at: int, as_csv: bool
) -> None:
    root = tmp_path_factory.getbasetemp() / "cells"
    root.mkdir(exist_ok=True)
    path = root / ("any.csv" if as_csv else "any.parquet")
    if as_csv:
        path.write_bytes(b"path,sha256,licence,url\n" + data)
    else:
        pq.write_table(pa.table({"path": [f"{n}.mp4" for n in range(99)]}), path)
        whole = path.read_bytes()
        at %= len(whole)
        path.write_bytes(whole[:at] + data + whole[at + len(data) :])
    try:
        items, _ = read_input_list(path, root)
    except InputError as error:
        assert len(str(error)) < 1500
    else:
        pa.array([item.path for item in items])


def test_a_mined_list_of_such_names_is_counted_and_verified(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/zeros.tar", {})
    write_tar(tmp_path / "in/texts.tar", {"a.txt": b""})
    table = {"path": ["zeros.tar", "texts.tar", "x/" * 20_000, "nul\0.mp4"], "url": [None, "a\nb", "\x1b[31m", ""]}
    pq.write_table(pa.table(table), tmp_path / "in/list.parquet")
    mined = mine_folder(tmp_path / "in/list.parquet", tmp_path / "out", resources=Resources(workers=1), progress=False)
    assert mined.summary is not None
    assert (mined.summary.inputs, mined.summary.rejected, mined.summary.quarantined) == (4, 1, 3)
    assert verify_folder(tmp_path / "out", progress=False).faults == []
    assert planning.read_plan(tmp_path / "out/plan.json") is not None
