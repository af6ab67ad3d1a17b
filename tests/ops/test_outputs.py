"""Outputs are asked for before the work, and kept elsewhere where they cannot be written after it."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError

from mimicbrush.errors import InputError, OutputError
from mimicbrush.io import outputs
from mimicbrush.io.atomic import ASIDE_PATTERN, leftover_pattern, replace_folder, write_aside
from mimicbrush.io.images import check_writable, write_image
from mimicbrush.io.outputs import check_output_file, check_output_folder, write_or_keep, write_results

#: Names of files: of up to 255 bytes, of any characters but two.
NAMES = (
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=255)
    | st.integers(1, 255).map("a".__mul__)
    | st.integers(1, 127).map("ä".__mul__)
    | st.integers(1, 63).map("🖌".__mul__)
    | st.binary(min_size=1, max_size=255).map(lambda data: os.fsdecode(data.replace(b"/", b"_").replace(b"\0", b"_")))
).filter(lambda name: name not in (".", "..") and len(os.fsencode(name)) <= 255)


@given(NAMES)
def test_whatever_name_a_file_may_have_it_is_written_and_nothing_else_stays(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        check_output_file(path)
        seen: list[list[Path]] = []

        def write(aside: Path) -> None:
            aside.write_text("whole")
            assert aside.match(ASIDE_PATTERN) and aside.parent == path.parent
            seen.append(sorted(path.parent.glob(leftover_pattern(path.name))))
            assert seen[-1] == [aside]

        write_aside(path, write)
        assert path.read_text() == "whole" and [each.name for each in Path(folder).iterdir()] == [name]
        (path.parent / f".{'x' * 8}.1234.tmp").touch()  # of another file
        assert not list(path.parent.glob(leftover_pattern(path.name))) or name == "x" * 8


@given(NAMES)
def test_whatever_name_a_folder_may_have_it_is_replaced_whole(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        check_output_folder(path, is_replaced=True)
        for text in ("one", "two"):
            replace_folder(path, lambda aside, text=text: (aside.mkdir(), (aside / "f").write_text(text)))  # type: ignore[misc]
        assert (path / "f").read_text() == "two" and [each.name for each in Path(folder).iterdir()] == [name]


def test_what_stands_in_the_way_of_a_file_is_said_before(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("older")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, message in {
        "folder": "this is a folder",
        "pipe": "a pipe or a device",
        "socket": "a pipe or a device",
        "absent/x": "does not exist",
        "file/x": "is not a folder",
        "x" * 256: r"256 bytes\)",
        "ä" * 128: r"256 bytes\)",
        "x/" * 2100: "does not exist|too long for this file system",
        "nul\0": "cannot be written",
        "": "this is a folder",
    }.items():
        with pytest.raises(InputError, match=message):
            check_output_file(tmp_path / name)
    for path in ("/dev/null", "/proc/x", "/proc/version"):
        with pytest.raises(InputError):
            check_output_file(Path(path))
    check_output_file(tmp_path / "file")
    check_output_file(tmp_path / "loop")  # a link is replaced, not followed
    with pytest.raises(InputError, match="overwrite it with --force"):
        check_output_file(tmp_path / "file", force=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_stands_in_the_way_of_a_folder_is_said_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "file/x", "file/x/y", "loop", "loop/x", "new/" + "x" * 256, "new/" * 1100, "nul\0"):
        with pytest.raises(InputError):
            check_output_folder(tmp_path / name)
    for path in ("/proc/x", "/sys/x/y", "/dev/null"):
        with pytest.raises(InputError, match=r"cannot be written|is a file"):
            check_output_folder(Path(path), "output=")
    check_output_folder(tmp_path / "new" / "deep", is_replaced=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_disk_without_room_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"needs about .* GB, and the disk has .* left"):
        check_output_folder(tmp_path, needed_bytes=10**18)
    with pytest.raises(InputError, match=r"needs about .* GB"):
        check_output_file(tmp_path / "x", needed_bytes=10**18)

    def refuse(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(InputError, match=r"the disk is full, or your quota on it is used up. Free some space"):
        check_output_file(tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "size", "fits"),
    [
        ("a.jpg", (65500, 3), True),
        ("a.jpg", (65501, 3), False),
        ("a.jpg", (3, 65501), False),
        ("a.webp", (16383, 3), True),
        ("a.webp", (3, 16384), False),
        ("a.gif", (65536, 3), False),
        ("a.ico", (300, 200), False),  # would be made smaller
        ("a.xbm", (3, 3), False),  # holds no colours
        ("a.png", (70000, 3), True),
        ("a.tiff", (70000, 3), True),
    ],
)
def test_whether_a_format_can_hold_an_image_is_known_before(
    name: str, size: tuple[int, int], fits: bool, tmp_path: Path
) -> None:
    if fits:
        check_writable(tmp_path / name, size)
        write_image(Image.new("RGB", size), tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert image.size == size
    else:
        refused_always = name.endswith((".ico", ".xbm"))
        message = "unknown image format" if refused_always else rf"cannot store an image of {size[0]} x {size[1]} px"
        with pytest.raises(InputError, match=rf"{message}.*; use \.png, for example"):
            check_writable(tmp_path / name, size)


def test_a_result_that_cannot_be_written_is_kept_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wanted = tmp_path / "gone" / "result.txt"
    kept = write_or_keep(wanted, lambda path: path.write_text("result"))
    assert kept != wanted and kept.read_text() == "result"
    assert f"The result was saved as {kept}" in capsys.readouterr().err
    assert write_or_keep(tmp_path / "b", lambda path: path.write_text("b")) == tmp_path / "b"
    with pytest.raises(OutputError, match=r"(?s)saved as .*gain \+3 dB"):
        write_results(wanted, lambda path: path.write_text("result"), "gain +3 dB")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(OutputError, match=r"(?s)The result cannot be saved elsewhere.*gain \+3 dB"):
        write_results(wanted, lambda path: path.write_text("result"), "gain +3 dB")


def test_a_full_disk_is_named_whatever_a_library_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_python(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def as_a_library(path: Path) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    def in_words(path: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for write in (write_aside, replace_folder):
        with pytest.raises(OSError, match="no space left on the disk") as refused:
            write(tmp_path / "x", as_python)
        assert refused.value.filename == str(tmp_path)
        with pytest.raises(RuntimeError, match="PytorchStreamWriter"):
            write(tmp_path / "x", as_a_library)
        with pytest.raises(OSError, match="no space left on the disk"):
            write(tmp_path / "x", in_words)
    monkeypatch.setattr("mimicbrush.io.atomic._FULL_BELOW_BYTES", 1 << 62)
    for write in (write_aside, replace_folder):
        with pytest.raises(OSError, match="no space left on the disk"):
            write(tmp_path / "x", as_a_library)
    assert outputs.describe_os_error(OSError(errno.EDQUOT, "x", str(tmp_path / "f"))) == (
        f"the disk of {tmp_path} is full, or your quota on it is used up. "
        "Free some space, then run the same command again"
    )
