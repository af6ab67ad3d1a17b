from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFilter

from mimicbrush.errors import InputError
from mimicbrush.io.atomic import ASIDE_PATTERN, path_inside, replace_folder, write_aside, write_json
from mimicbrush.io.images import brightest_stored_value, check_writable, normalise_mode, read_image, write_image


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


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    write_json(path, {"name": "käse", "steps": [1, 2.5, None]})
    assert path.read_bytes() == b'{\n "name": "k\\u00e4se",\n "steps": [\n  1,\n  2.5,\n  null\n ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text())["name"] == "käse"
    write_json(path, {"name": "käse"}, ensure_ascii=False)
    assert path.read_bytes() == '{\n "name": "käse"\n}\n'.encode()
    assert [each.name for each in tmp_path.iterdir()] == ["values.json"]


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
    write_image(Image.new("RGB", (4, 4)), path)
    assert list(tmp_path.iterdir()) == [path]
    with Image.open(path) as image:
        assert image.format == Image.registered_extensions()[path.suffix.lower()]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/a.png", "does not exist"),
        ("a.xyz", r"unknown image format '\.xyz'"),
        ("a", "unknown image format ''"),
        ("a.psd", r"unknown image format '\.psd'"),  # Pillow reads these only
        ("a.ico", r"unknown image format '\.ico'"),  # it would be reduced to 256 px
        ("a.pdf", r"unknown image format '\.pdf'"),
    ],
)
def test_what_cannot_be_written_is_known_before(name: str, message: str, tmp_path: Path) -> None:
    for attempt in (check_writable, lambda path: write_image(Image.new("RGB", (4, 4)), path)):
        with pytest.raises(InputError, match=message):
            attempt(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_every_format_that_can_be_written_holds_the_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = np.asarray(Image.effect_noise((300, 40), 60).convert("RGB")) // 3 + np.arange(0, 150, 50, np.uint8)
    for suffix, name in Image.registered_extensions().items():
        path = tmp_path / f"a{suffix}"
        try:
            check_writable(path)
        except InputError:
            continue
        write_image(Image.fromarray(pixels), path)
        back = np.asarray(read_image(path, "RGB")).astype(int)
        assert back.shape == pixels.shape and np.abs(back - pixels).mean() < (40 if name == "WEBP" else 4), suffix
    assert "a GIF has at most 256 colours" in caplog.text


def test_a_folder_is_no_output_and_a_refusing_disk_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InputError, match="this is a folder"):
        check_writable(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"b\.jpg: cannot be written"):  # JPEG holds no transparency
        write_image(Image.new("RGBA", (4, 4)), tmp_path / "b.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def _ramp(dtype: type[np.generic], top: float) -> np.ndarray:
    return (np.linspace(0, top, 48).reshape(6, 8)).astype(dtype)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("16 bit.png", _ramp(np.uint16, 65535)),
        ("16 bit.tiff", _ramp(np.uint16, 65535)),
        ("32 bit.tiff", _ramp(np.int32, 65535)),
        ("float of 1.tiff", _ramp(np.float32, 1)),
        ("float of 255.tiff", _ramp(np.float32, 255)),
    ],
)
def test_deep_images_are_scaled_to_8_bit(name: str, stored: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(stored).save(tmp_path / name)
    expected = np.linspace(0, 255, 48).reshape(6, 8)
    for mode in ("RGB", "L"):
        got = np.asarray(read_image(tmp_path / name, mode))
        assert np.abs(got.reshape(6, 8, -1) - expected[..., None]).max() <= 1


@pytest.mark.parametrize(("dtype", "name"), [(np.uint16, "a.png"), (np.int32, "a.tiff")])
def test_deep_images_whose_values_are_not_deep(
    dtype: type[np.generic], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / name
    stored = _ramp(dtype, 255)
    Image.fromarray(stored).save(path)
    assert np.array_equal(np.asarray(read_image(path, "L")), stored)
    assert len(caplog.messages) == 1 and "none of its values" in caplog.text and "read as 0 to 255" in caplog.text
    assert str(path) in caplog.text and brightest_stored_value(path) == 255

    caplog.clear()
    stored = _ramp(dtype, 4095)  # 12 bits
    Image.fromarray(stored).save(path)
    assert np.array_equal(np.asarray(read_image(path, "L")), stored >> 8)
    assert "it is dark" in caplog.text and brightest_stored_value(path) == 4095

    caplog.clear()
    Image.fromarray(_ramp(dtype, 4096)).save(path)
    assert read_image(path, "L").getextrema() == (0, 16) and not caplog.messages
    Image.new("L", (4, 4), 9).save(path)
    assert brightest_stored_value(path) is None


def test_16_bit_colour(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 65536, (4, 5, 3)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), stored)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", "RGB")), stored[..., ::-1] >> 8)


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, 256.0], [0.0, np.nan], [0.0, np.inf]])
def test_floats_of_no_known_range_are_refused(values: list[float], tmp_path: Path) -> None:
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match=r"a\.tiff: its values are from .* needs values from 0 to 1 or 0 to 255"):
        read_image(tmp_path / "a.tiff", "RGB")


def _transparent(mode: str) -> Image.Image:
    """Left half red and opaque, right half clear."""
    image = Image.new("RGBA", (8, 4), (0, 0, 255, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 4))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_images_with_transparency_are_put_on_white(mode: str) -> None:
    got = normalise_mode(_transparent(mode), "RGB")
    assert got.mode == "RGB" and got.getpixel((6, 1)) == (255, 255, 255)
    assert got.getpixel((1, 1)) == _transparent(mode).convert("RGB").getpixel((1, 1))
    assert (
        normalise_mode(got, "RGB").tobytes() == got.tobytes()
    )  # again changes nothing: scripts and pipeline both do it


def test_a_palette_with_transparency(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "one.png", transparency=0)
    palette.save(tmp_path / "bytes.png", transparency=bytes([0, 255]))
    palette.save(tmp_path / "none.png")
    for name, first in (("one.png", (255,) * 3), ("bytes.png", (255,) * 3), ("none.png", (10, 20, 30))):
        got = read_image(tmp_path / name, "RGB")
        assert got.getpixel((0, 0)) == first and got.getpixel((1, 0)) == (200, 100, 50)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV"])
def test_other_modes(mode: str) -> None:
    for value in ("black", "white"):
        image = Image.new("RGB", (4, 2), value).convert(mode)
        grey = 255 if value == "white" else 0
        assert normalise_mode(image, "RGB").getpixel((0, 0)) == (grey,) * 3
        assert normalise_mode(image, "L").getpixel((0, 0)) == grey


def _mask(painted: tuple[int, ...], rest: tuple[int, ...]) -> Image.Image:
    """What is painted is the left half."""
    image = Image.new("RGBA", (8, 4), rest)
    image.paste(painted, (0, 0, 4, 4))
    return image


@pytest.mark.parametrize(
    ("mask", "left", "right"),
    [
        (_mask((0, 0, 0, 255), (0, 0, 0, 0)), 255, 0),  # black on nothing: the shape is in the alpha channel
        (_mask((255, 0, 0, 255), (0, 0, 0, 0)), 255, 0),  # red is too dark to count as bright
        (_mask((255, 255, 255, 255), (255, 255, 255, 0)), 255, 0),
        (_mask((255, 255, 255, 255), (0, 0, 0, 255)), 255, 0),  # all opaque: brightness
        (_mask((255, 255, 255, 90), (0, 0, 0, 90)), 255, 0),  # a constant alpha says nothing
        (_mask((255, 255, 255, 0), (0, 0, 0, 0)), 255, 0),
    ],
)
def test_masks_with_transparency(mask: Image.Image, left: int, right: int) -> None:
    got = normalise_mode(mask, "L")
    assert got.mode == "L" and (got.getpixel((1, 1)), got.getpixel((6, 1))) == (left, right)


def test_what_is_clear_in_a_mask_of_several_colours_is_not_painted() -> None:
    mask = _mask((255, 255, 255, 255), (0, 0, 0, 255))
    mask.paste((255, 255, 255, 0), (0, 2, 8, 4))
    got = normalise_mode(mask, "L")
    assert [got.getpixel(at) for at in ((1, 1), (6, 1), (1, 3), (6, 3))] == [255, 0, 0, 0]


def test_an_image_with_a_hole_is_no_mask(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, channels in enumerate((1, 3)):  # grey, and in colours
        image = rng.integers(0, 256, (40, 60, channels)).astype(np.uint8).repeat(3 // channels, axis=2)
        alpha = np.full((40, 60, 1), 255, np.uint8)
        alpha[10:20, 10:20] = 0
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.concatenate([image, alpha], axis=2)).save(path)
        with pytest.raises(
            InputError, match=rf"{number}\.png: .*looks like an image with a hole.*a mask that is white"
        ):
            read_image(path, "L")
        assert read_image(path, "RGB").getpixel((15, 15)) == (255, 255, 255)  # an image it is
    # Black and white with soft edges stays a mask.
    painted = Image.new("L", (60, 40))
    painted.paste(255, (20, 10, 40, 30))
    painted = painted.filter(ImageFilter.GaussianBlur(1))
    alpha_layer = Image.new("L", painted.size, 255)
    alpha_layer.paste(0, (0, 0, 5, 40))
    assert np.array_equal(normalise_mode(Image.merge("LA", (painted, alpha_layer)), "L"), painted)


def test_exif_turns_every_mode(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: a quarter clockwise makes it upright
    for number, image in enumerate([Image.fromarray(_ramp(np.uint16, 65535)), Image.new("RGBA", (8, 6), "red")]):
        image.save(tmp_path / f"{number}.png", exif=exif)
        assert read_image(tmp_path / f"{number}.png", "RGB").size == (6, 8)
    top_row = np.asarray(read_image(tmp_path / "0.png", "L"))[0]
    assert (np.diff(top_row.astype(int)) < 0).all()  # the left column from below


def _damage(tmp_path: Path) -> dict[str, Callable[[Path], object]]:
    intact = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(intact, "JPEG")
    return {
        "cut.jpg": lambda path: path.write_bytes(intact.getvalue()[: len(intact.getvalue()) // 2]),
        "text.png": lambda path: path.write_text("no image"),
        "nothing.png": lambda path: path.touch(),
        "folder.png": lambda path: path.mkdir(),
        "absent.png": lambda path: None,
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut.jpg", "cannot read the image"),
        ("text.png", "no known image format"),
        ("nothing.png", "0 bytes"),
        ("folder.png", "this is a folder"),
        ("absent.png", "no such file"),
    ],
)
def test_what_is_no_image_is_named(name: str, message: str, tmp_path: Path) -> None:
    _damage(tmp_path)[name](tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}: .*{message}"):
        read_image(tmp_path / name, "RGB")


def test_pillows_limit_is_ours_only_while_we_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow itself would refuse anything above 20
    assert read_image(tmp_path / "a.png", "L").size == (100, 100)
    assert Image.MAX_IMAGE_PIXELS == 10
    for limit in (9_999, 100):  # Pillow would warn of the first and refuse the second
        monkeypatch.setattr("mimicbrush.io.images.MAX_PIXELS", limit)
        for filters in ("error", "ignore"):
            with warnings.catch_warnings():
                warnings.simplefilter(filters)
                with pytest.raises(InputError, match=r"a\.png: the image is too large, expected at most 0 megapixels"):
                    read_image(tmp_path / "a.png", "L")
        assert Image.MAX_IMAGE_PIXELS == 10


def test_of_an_animation_the_first_image_is_taken_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    for name in ("a.gif", "a.tiff", "a.webp"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            red, _, blue = read_image(tmp_path / name, "RGB").getpixel((4, 4))
        assert red > 200 and blue < 50
        assert caplog.messages == [f"{tmp_path / name}: the file has 2 images; the first one is used"]


def test_damaged_exif_is_a_note_and_no_reason_to_refuse(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x09\x01"
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg", exif=exif)
    with caplog.at_level(logging.WARNING):
        assert read_image(tmp_path / "a.jpg", "RGB").size == (8, 8)
    assert any("EXIF" in message for message in caplog.messages)


def test_paths_of_a_list_stay_in_its_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path)
    assert path_inside(root, "sub/../a.png") == root / "sub/../a.png"
    for name in ("../a.png", str(tmp_path / "a.png"), "link/a.png", "sub/../../a.png"):
        with pytest.raises(InputError, match="leads outside of"):
            path_inside(root, name)
    with pytest.raises(InputError, match="is not a valid path"):
        path_inside(root, "a\0.png")


def test_nothing_heavy_is_imported() -> None:
    # Nor by what scripts/infer.py checks before it loads a model.
    modules = "mimicbrush.io.images, mimicbrush.pipelines.editing.batch"
    code = f"import sys, {modules}; print({{'torch', 'cv2', 'skimage', 'scipy', 'pyarrow'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "pipeline"

    def write(text: str) -> None:
        replace_folder(final, lambda folder: (folder.mkdir(), (folder / "f").write_text(text)))

    def fail(folder: Path) -> None:
        folder.mkdir()
        raise OSError("disk full")

    write("one")
    write("two")
    with pytest.raises(OSError, match="disk full"):
        replace_folder(final, fail)
    assert (final / "f").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    # Killed after the old one was moved away, and before the new one had its name.
    final.rename(tmp_path / ".pipeline.old.tmp")
    with pytest.raises(OSError, match="disk full"):
        replace_folder(final, fail)
    assert (final / "f").read_text() == "two"
