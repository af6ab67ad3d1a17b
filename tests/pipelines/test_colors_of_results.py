"""What an edit does not repaint stays as it is stored, in the colours and at the quality of its file."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from color_profiles import ADOBE_PROFILE, grey_profile
from PIL import Image, JpegImagePlugin
from toy_data import photograph

from mimicbrush.io.color_profiles import make_profile
from mimicbrush.io.images import normalise_mode, read_image
from mimicbrush.models.components import toy_components
from mimicbrush.models.options import ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.editing.batch import BatchCounts, EditGroups
from mimicbrush.pipelines.editing.inputs import EditInputs, read_inputs
from mimicbrush.pipelines.editing.requests import Edit
from mimicbrush.pipelines.open_pipeline import seeded_generator

Run = Callable[[str, str], Path]
#: Pixels that an edit may change: the hole, and ten around it.
TOUCHED = np.s_[20:60, 30:80]


@pytest.fixture(scope="module")
def pipe(smallest: ToyModel) -> MimicBrushPipeline:
    pipe = MimicBrushPipeline(**vars(toy_components(smallest)), scheduler=noise_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.fromarray(photograph("chelsea.png")[:80, :80]).save(tmp_path / "ref.png")
    Image.fromarray(hole()).save(tmp_path / "mask.png")
    return tmp_path


def hole() -> np.ndarray:
    mask = np.zeros((96, 128), np.uint8)
    mask[30:50, 40:70] = 255
    return mask


def photo(icc: bytes | None = None) -> Image.Image:
    image = Image.fromarray(photograph("coffee.png")[:96, :128])
    if icc is not None:
        image.info["icc_profile"] = icc
    return image


def edit(pipe: MimicBrushPipeline, source: Image.Image, **options: object) -> Image.Image:
    reference = Image.fromarray(photograph("chelsea.png")[:80, :80])
    options = {"num_inference_steps": 1, "generator": seeded_generator(0), **options}
    return pipe(source, Image.fromarray(hole()), reference, **options).images[0]


def outside(pixels: np.ndarray) -> np.ndarray:
    """The pixels that an edit may not change, (N, 3)."""
    kept = np.ones(pixels.shape[:2], bool)
    kept[TOUCHED] = False
    return pixels[kept]


@pytest.fixture
def run(folder: Path, pipe: MimicBrushPipeline) -> Run:
    """Edits files as the commands do."""

    class Editor:
        pastes_back = True

        def read(self, wanted: Edit) -> EditInputs:
            return read_inputs(wanted)

        def load(self) -> MimicBrushPipeline:
            return pipe

        def edit(self, wanted: Edit, inputs: EditInputs, seeds: Sequence[int]) -> list[Image.Image]:
            generator = [seeded_generator(seed) for seed in seeds]
            images = inputs.source, inputs.mask, inputs.reference
            return pipe(*images, num_inference_steps=1, generator=generator).images

    def run(source: str, output: str) -> Path:
        tally = BatchCounts()
        wanted = Edit(folder / source, folder / "mask.png", folder / "ref.png", folder / output)
        EditGroups(Editor(), tally, force=True).add(wanted)
        assert not tally.failures
        return folder / output

    return run


def squared_error(a: np.ndarray, b: np.ndarray) -> float:
    """The mean of the squares of what differs, of 255 * 255: 2.6 is 44 dB."""
    return float(((a.astype(float) - b) ** 2).mean())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_outside_of_the_hole_the_stored_numbers_stay(pipe: MimicBrushPipeline, mode: str) -> None:
    source = photo().convert(mode)
    source.info["icc_profile"] = ADOBE_PROFILE
    result = edit(pipe, source)
    assert result.info["icc_profile"] == ADOBE_PROFILE
    assert np.array_equal(outside(np.asarray(result)), outside(np.asarray(source.convert("RGB"))))


def test_in_the_hole_the_colours_are_those_of_the_model(pipe: MimicBrushPipeline) -> None:
    source = photo(ADOBE_PROFILE)
    plain = edit(pipe, normalise_mode(source, "RGB"))
    assert "icc_profile" not in plain.info
    shown = np.asarray(normalise_mode(edit(pipe, source), "RGB")).astype(int)
    differences = np.abs(shown - np.asarray(plain))[32:48, 42:68]
    assert differences.mean() < 1.5 and np.quantile(differences, 0.99) <= 6
    as_array = edit(pipe, source, output_type="np")  # an array has no profile: it is sRGB
    assert np.abs(as_array * 255 - np.asarray(plain)).max() <= 0.51


def test_a_reference_counts_in_its_colours(pipe: MimicBrushPipeline) -> None:
    reference = Image.fromarray(photograph("chelsea.png")[:80, :80])
    reference.info["icc_profile"] = make_profile(1.0, (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06))
    options = {"num_inference_steps": 1, "paste_back": False}
    results = [
        np.asarray(pipe(photo(), Image.fromarray(hole()), image, generator=seeded_generator(0), **options).images[0])
        for image in (reference, normalise_mode(reference, "RGB"), Image.fromarray(np.asarray(reference)))
    ]
    assert np.array_equal(results[0], results[1]) and not np.array_equal(results[0], results[2])


def test_the_soft_edge_keeps_colours_that_srgb_has_not(pipe: MimicBrushPipeline) -> None:
    green = np.zeros((96, 128, 3), np.uint8)
    green[..., 1] = 255  # of Adobe RGB: sRGB would need less than no red
    source = Image.fromarray(green)
    source.info["icc_profile"] = ADOBE_PROFILE
    after = np.asarray(edit(pipe, source)).astype(int)
    ring = np.ones((96, 128), bool)
    ring[24:56, 34:76] = False  # where the blurred mask is above 2 of 255
    assert np.abs(after - green)[ring].max() <= 4


@pytest.mark.parametrize("icc", [grey_profile(1.0), b"no profile"])
def test_a_profile_that_cannot_be_given_back_leaves_srgb(pipe: MimicBrushPipeline, icc: bytes) -> None:
    source = photo().convert("L")
    source.info["icc_profile"] = icc
    if icc.startswith(b"no"):
        with pytest.warns(UserWarning, match="read as sRGB"):
            result = edit(pipe, source)
    else:
        result = edit(pipe, source)
        assert np.array_equal(outside(np.asarray(result)), outside(np.asarray(normalise_mode(source, "RGB"))))
    assert "icc_profile" not in result.info


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jp2"])
def test_a_lossless_file_of_a_lossless_file_is_exact_outside(suffix: str, folder: Path, run: Run) -> None:
    photo().save(folder / "plain.png")
    photo().save(folder / "own.png", icc_profile=ADOBE_PROFILE)
    before = outside(np.asarray(photo()))
    assert np.array_equal(outside(np.asarray(Image.open(run("plain.png", f"a{suffix}")))), before)
    with Image.open(run("own.png", f"b{suffix}")) as after:
        if suffix != ".jp2":  # which holds no profile, and gets sRGB
            assert after.info["icc_profile"] == ADOBE_PROFILE and np.array_equal(outside(np.asarray(after)), before)
    shown = [np.asarray(read_image(folder / name, "RGB")) for name in ("own.png", f"b{suffix}")]
    assert np.array_equal(*map(outside, shown))


@pytest.mark.parametrize(
    ("orientation", "subsampling", "quality"),
    [(1, 0, 50), (1, 1, 92), (1, 2, 92), (3, 2, 50), (6, 0, 92), (6, 1, 92), (6, 2, 50)],
)
def test_a_jpeg_of_a_jpeg_keeps_its_tables(
    orientation: int, subsampling: int, quality: int, folder: Path, run: Run
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = photo().rotate({1: 0, 3: 180, 6: 90}[orientation], expand=True)
    stored.save(folder / "s.jpg", quality=quality, subsampling=subsampling, exif=exif, icc_profile=ADOBE_PROFILE)
    with Image.open(folder / "s.jpg") as before, Image.open(run("s.jpg", "r.jpg")) as after:
        turned = orientation == 6
        tables = [np.reshape(before.quantization[number], (8, 8)) for number in (0, 1)]
        assert [table.T.ravel().tolist() if turned else table.ravel().tolist() for table in tables] == [
            after.quantization[number] for number in (0, 1)
        ]
        assert JpegImagePlugin.get_sampling(after) == (0 if turned and subsampling == 1 else subsampling)
        assert after.info["icc_profile"] == ADOBE_PROFILE and 0x0112 not in after.getexif()
        pixels = [outside(np.asarray(normalise_mode(image, "RGB"))) for image in (before, after)]
    assert squared_error(*pixels) < (2.6 if subsampling == 0 or turned else 10)


@pytest.mark.parametrize(("suffix", "most"), [(".jpg", 6), (".webp", 25), (".avif", 4)])
@pytest.mark.parametrize("source", ["s.png", "s.jpg"])
def test_other_formats_lose_little_outside(suffix: str, most: float, source: str, folder: Path, run: Run) -> None:
    photo().save(folder / source)
    with Image.open(run(source, f"r{suffix}")) as after:
        if suffix == ".jpg" and source == "s.png":
            assert JpegImagePlugin.get_sampling(after) == 0
        pixels = outside(
            np.asarray(normalise_mode(photo() if source == "s.png" else Image.open(folder / source), "RGB"))
        )
        assert squared_error(pixels, outside(np.asarray(after))) < most


def test_webp_is_lossless_where_the_source_is(folder: Path, run: Run) -> None:
    for name, options in (("a.webp", {"lossless": True}), ("b.webp", {"quality": 80})):
        photo().save(folder / name, icc_profile=ADOBE_PROFILE, **options)
        kind = run(name, "r.webp").read_bytes()
        assert (b"VP8L" in kind, b"VP8 " in kind) == (name == "a.webp", name == "b.webp")


def test_a_grey_or_cmyk_jpeg_gives_a_jpeg_of_colours(folder: Path, run: Run) -> None:
    for mode in ("L", "CMYK"):
        photo().convert(mode).save(folder / "s.jpg", quality=90)
        with Image.open(run("s.jpg", "r.jpg")) as after:
            assert after.mode == "RGB" and JpegImagePlugin.get_sampling(after) == 0
            pixels = outside(np.asarray(read_image(folder / "s.jpg", "RGB")))
            assert squared_error(pixels, outside(np.asarray(after))) < 6


def test_an_mpo_of_a_telephone_is_a_jpeg_with_more_behind_it(folder: Path, run: Run) -> None:
    buffer = io.BytesIO()
    first = photo()
    first.save(buffer, "MPO", save_all=True, append_images=[photo().rotate(180)], quality=90, icc_profile=ADOBE_PROFILE)
    (folder / "s.jpg").write_bytes(buffer.getvalue())
    with Image.open(folder / "s.jpg") as before, Image.open(run("s.jpg", "r.jpg")) as after:
        assert before.format == "MPO" and after.format == "JPEG" and after.quantization == before.quantization
        assert after.info["icc_profile"] == ADOBE_PROFILE
        assert squared_error(outside(np.asarray(before)), outside(np.asarray(after))) < 10
