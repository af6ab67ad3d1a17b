"""HEIC, as telephones store photographs: read where pillow-heif is installed, and named where it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mimicbrush.app.mask_painter import check_kind
from mimicbrush.errors import InputError
from mimicbrush.io.images import read_image

ROOT = Path(__file__).parents[2]
INSTALL = r"it is a HEIC image\. To read it, install pillow-heif: pip install '\.\[heic\]'"


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1"])
def test_without_the_package_it_is_named(brand: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(200))
    with pytest.raises(InputError, match=INSTALL):
        read_image(tmp_path / "a.jpg", "RGB")
    with pytest.raises(InputError, match=INSTALL):
        check_kind(tmp_path / "a.jpg", "a.jpg")


def test_a_film_is_no_heic(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypisom\0\0\2\0isommp41" + bytes(200))
    with pytest.raises(InputError, match="no known image format"):
        read_image(tmp_path / "a.heic", "RGB")


def test_with_the_package_it_is_read(tmp_path: Path) -> None:
    script = str(ROOT / "tests" / "helpers" / "with_pillow_heif.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # without the folder that hides optional packages
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, str(tmp_path)], env=environment, check=True, capture_output=True
    )
    found = json.loads(done.stdout)
    assert found["plain"] <= 3 and found["written"] <= 3
    assert found["adobe"] <= 4 and found["adobe kept"] and found["p3"] <= 4
    assert found["turned"][:2] == [64, 96] and found["turned"][2] <= 3
    assert found["pq"] <= 3 and "it is HDR (PQ) and is read without tone mapping" in found["pq notes"]
    assert found["kind"] == "HEIF" and found["encoding"] is False
    assert all("cannot read the image" in message for message in found["damaged"])
