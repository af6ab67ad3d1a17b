"""scripts/infer.py as a user runs it, on files of all kinds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_data import photograph

from mimicbrush.assembly import build_noise_scheduler
from mimicbrush.errors import InputError
from mimicbrush.models.options import ToyModel
from mimicbrush.models.parts import toy_parts
from mimicbrush.ops.files import read_picture, write_picture
from mimicbrush.pipelines import MimicBrushPipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smallest: ToyModel) -> Path:
    """A pipeline, a reference, an EXIF-rotated source and its mask."""
    folder = tmp_path_factory.mktemp("infer")
    MimicBrushPipeline(**vars(toy_parts(smallest)), scheduler=build_noise_scheduler("epsilon")).save_pretrained(
        folder / "pipeline"
    )
    Image.fromarray(photograph("chelsea.png")).save(folder / "ref.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be shown upright
    Image.fromarray(photograph("coffee.png")[:60, :90]).save(folder / "src.jpg", exif=exif, quality=95)
    mask = np.zeros((90, 60), np.uint8)
    mask[40:60, 20:40] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


@pytest.fixture
def infer(
    folder: Path, script_environment: Callable[[], dict[str, str]]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "infer.py"), *arguments]
        return subprocess.run(
            command, cwd=folder, env=script_environment(), capture_output=True, text=True, check=False
        )

    return run


def test_an_edit(folder: Path, infer: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    arguments = ("ref.jpg", "src.jpg", "mask.png", "--model", "pipeline", "--steps", "2", "-o", "out.png")
    done = infer(*arguments)
    assert done.returncode == 0, done.stderr
    result, source = Image.open(folder / "out.png"), read_picture(folder / "src.jpg", "RGB")
    assert result.size == source.size == (60, 90)
    assert np.array_equal(np.asarray(result)[:28], np.asarray(source)[:28])
    again = infer(*arguments)
    assert again.returncode == 2 and "--force" in again.stderr and "Traceback" not in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ref.jpg", "src.jpg", "mask.png"], "runs/smoke/pipeline"),
        (["ref.jpg", "src.jpg", "mask.png", "--model", "nowhere"], "is no pipeline folder"),
        (["ref.jpg", "nothing.jpg", "mask.png", "--model", "pipeline"], "nothing.jpg: no such file"),
        (["ref.jpg", "ref.jpg", "mask.png", "--model", "pipeline"], "mask.png is 60 x 90 px but ref.jpg is 451 x 300"),
    ],
)
def test_errors_are_plain(
    infer: Callable[..., subprocess.CompletedProcess[str]], arguments: list[str], message: str
) -> None:
    done = infer(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_reading_pictures(tmp_path: Path, folder: Path) -> None:
    whole = (folder / "ref.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("cut.jpg", "text.png"):
        with pytest.raises(InputError, match="not a picture that can be read whole"):
            read_picture(tmp_path / name, "RGB")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png", "RGB").getpixel((0, 0)) == (255, 255, 255)
    Image.new("P", (4, 4), 0).save(tmp_path / "palette.png")
    assert read_picture(tmp_path / "palette.png", "RGB").mode == "RGB"
    Image.new("1", (4, 4), 1).save(tmp_path / "bilevel.png")
    assert read_picture(tmp_path / "bilevel.png", "L").getpixel((0, 0)) == 255
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png", "L").getpixel((0, 0)) == 255
    Image.fromarray(np.full((4, 4), 30000, np.uint16)).save(tmp_path / "half.png")
    assert read_picture(tmp_path / "half.png", "L").getpixel((0, 0)) == 30000 // 256


def test_writing_pictures(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4))
    with pytest.raises(InputError, match=r"unknown picture format '.xyz'"):
        write_picture(picture, tmp_path / "a.xyz")
    with pytest.raises(InputError, match=r"does not exist"):
        write_picture(picture, tmp_path / "no" / "a.png")
    write_picture(picture, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
