from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mimicbrush.errors import InputError
from mimicbrush.ops.files import ASIDE_PATTERN, check_writable, write_aside, write_picture


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"

    def write(aside: Path) -> None:
        aside.write_text("half")
        assert aside.parent == tmp_path
        assert aside.match(ASIDE_PATTERN)
        assert not list(tmp_path.glob("*.parquet"))  # whoever collects these meets no half file
        aside.write_text("whole")

    write_aside(path, write)
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("older")

    def write(aside: Path) -> None:
        aside.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_aside(path, write)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.jpg", "a.webp"])
def test_the_suffix_chooses_the_format(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    check_writable(path)
    write_picture(Image.new("RGB", (4, 4)), path)
    assert list(tmp_path.iterdir()) == [path]
    with Image.open(path) as image:
        assert image.format == Image.registered_extensions()[path.suffix.lower()]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/a.png", "does not exist"),
        ("a.xyz", r"unknown picture format '\.xyz'"),
        ("a", "unknown picture format ''"),
        ("a.psd", r"unknown picture format '\.psd'"),  # Pillow reads these only
    ],
)
def test_what_cannot_be_written_is_known_before(name: str, message: str, tmp_path: Path) -> None:
    for attempt in (check_writable, lambda path: write_picture(Image.new("RGB", (4, 4)), path)):
        with pytest.raises(InputError, match=message):
            attempt(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, mimicbrush.ops.files; print({'torch', 'cv2', 'skimage', 'scipy', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
