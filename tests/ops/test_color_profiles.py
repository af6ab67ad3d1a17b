"""Colours of files: every profile is read as the colours that it stands for, and none ends a read."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from color_profiles import (
    ADOBE_GAMMA,
    ADOBE_PROFILE,
    ADOBE_RGB,
    DISPLAY_P3,
    REC_2020,
    SRGB,
    cmyk_profile,
    grey_profile,
    lab_to_srgb,
    to_srgb,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from mimicbrush.data.pair import decode_jpeg
from mimicbrush.io.color_profiles import can_return_to, convert_from_srgb, find_profile, make_profile
from mimicbrush.io.images import normalise_mode, read_image, write_image

SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
#: Large enough that what JPEG does at their edges does not reach the middles; neither dark nor bright.
PATCHES = np.repeat(np.repeat(np.random.default_rng(1).integers(70, 180, (4, 4, 3), np.uint8), 16, 0), 16, 1)
PATCHES_IMAGE = Image.fromarray(PATCHES)
COLORS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)


def with_profile(pixels: np.ndarray, icc: bytes) -> Image.Image:
    image = Image.fromarray(pixels)
    image.info["icc_profile"] = icc
    return image


@given(
    st.floats(1.0, 3.0),
    st.sampled_from([ADOBE_RGB, DISPLAY_P3, REC_2020, SRGB]),
    st.integers(0, 2**32 - 1),
)
def test_colours_become_those_of_srgb(exponent: float, primaries: tuple[float, ...], seed: int) -> None:
    exponent = round(exponent * 256) / 256  # as a profile stores it
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    expected = to_srgb(pixels, exponent, primaries)
    inside = ((expected >= 0) & (expected <= 255)).all(axis=-1)
    read = np.asarray(normalise_mode(with_profile(pixels, make_profile(exponent, primaries)), "RGB"))
    assert np.abs(read - expected)[inside].max(initial=0) <= 2


@given(st.floats(1.0, 3.0), st.sampled_from([ADOBE_RGB, DISPLAY_P3, REC_2020, SRGB]), st.integers(0, 2**32 - 1))
def test_colours_come_back(exponent: float, primaries: tuple[float, ...], seed: int) -> None:
    icc = make_profile(exponent, primaries)
    assert can_return_to(icc)
    shown = np.random.default_rng(seed).integers(60, 256, (8, 8, 3), np.uint8)
    back = normalise_mode(with_profile(convert_from_srgb(shown, icc), icc), "RGB")
    assert np.abs(np.asarray(back).astype(int) - shown).max() <= 4  # steps of the darker ones are wider in these


def test_srgb_with_and_without_a_profile_stays_bit_for_bit() -> None:
    for image in (Image.fromarray(COLORS), with_profile(COLORS, SRGB_PROFILE)):
        assert np.array_equal(np.asarray(normalise_mode(image, "RGB")), COLORS)
    assert convert_from_srgb(COLORS, SRGB_PROFILE) is COLORS


def test_an_image_is_converted_once() -> None:
    once = normalise_mode(with_profile(COLORS, ADOBE_PROFILE), "RGB")
    assert find_profile(once) is None
    assert np.array_equal(np.asarray(once), np.asarray(normalise_mode(once, "RGB")))
    kept = normalise_mode(with_profile(COLORS, ADOBE_PROFILE), "RGB", keep_profile=True)
    assert np.array_equal(np.asarray(kept), COLORS) and kept.info["icc_profile"] == ADOBE_PROFILE
    assert np.array_equal(np.asarray(normalise_mode(kept, "RGB")), np.asarray(once))


def test_the_numbers_of_a_mask_are_no_colours() -> None:
    mask = with_profile(COLORS[..., 0], grey_profile(1.0))
    assert np.array_equal(np.asarray(normalise_mode(mask, "L")), COLORS[..., 0])


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_with_a_profile_of_grey(mode: str) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.info["icc_profile"] = grey_profile(1.8)
    expected = to_srgb(np.repeat(grey[..., None], 3, axis=2), 1.8008, SRGB)
    assert np.abs(np.asarray(normalise_mode(image, "RGB")) - expected).max() <= 2
    assert "icc_profile" not in normalise_mode(image, "RGB", keep_profile=True).info  # it holds no colours


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_a_profile_of_colours_is_for_every_mode_of_them(mode: str) -> None:
    image = Image.fromarray(COLORS).convert(mode)
    expected = to_srgb(np.asarray(image.convert("RGB")), ADOBE_GAMMA, ADOBE_RGB).clip(0, 255)
    image.info["icc_profile"] = ADOBE_PROFILE
    assert np.abs(np.asarray(normalise_mode(image, "RGB")) - expected).max() <= 3


def test_cmyk_with_a_profile(tmp_path: Path) -> None:
    colors = {(0, 0, 0, 0): (100, 0, 0), (1, 0, 0, 0): (60, -10, -30), (0, 0, 1, 0): (70, 20, 40)}
    inks = np.repeat(np.repeat(np.array([[*colors, (0, 0, 0, 1)]], np.uint8) * 255, 16, 0), 16, 1)
    Image.fromarray(inks, "CMYK").save(tmp_path / "cmyk.jpg", quality=100, icc_profile=cmyk_profile(colors))
    expected = lab_to_srgb([*colors.values(), (0, 0, 0)])
    read = np.asarray(read_image(tmp_path / "cmyk.jpg", "RGB", keep_profile=True))
    assert np.abs(read[8, 8::16] - expected).max() <= 3
    assert not can_return_to(cmyk_profile(colors))


def test_lab_is_read_without_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    PATCHES_IMAGE.convert("LAB").save(tmp_path / "a.tif")
    read = np.asarray(read_image(tmp_path / "a.tif", "RGB")).astype(int)
    assert np.abs(read - PATCHES).max() <= 4 and not caplog.text


def test_a_profile_of_other_colours_is_noted_and_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, image, icc in (
        ("rgb.png", Image.fromarray(COLORS), grey_profile(1.0)),
        ("rgb2.png", Image.fromarray(COLORS), cmyk_profile({})),
        ("cmyk.tif", Image.fromarray(COLORS).convert("CMYK"), ADOBE_PROFILE),
        ("empty.png", Image.fromarray(COLORS), b"x"),
    ):
        image.save(tmp_path / name, icc_profile=icc)
        caplog.clear()
        for keep in (False, True):
            read = read_image(tmp_path / name, "RGB", keep_profile=keep)
            assert np.array_equal(np.asarray(read), np.asarray(image.convert("RGB"))) and find_profile(read) is None
            assert "colour profile" in caplog.text and "read as sRGB" in caplog.text, name


@given(st.data())
def test_no_damaged_profile_ends_a_read(data: st.DataObject) -> None:
    icc = bytearray(data.draw(st.sampled_from([ADOBE_PROFILE, SRGB_PROFILE, grey_profile(2.2), cmyk_profile({})])))
    for place in data.draw(st.lists(st.integers(0, len(icc) - 1), max_size=8)):
        icc[place] = data.draw(st.integers(0, 255))
    icc = icc[: data.draw(st.integers(1, len(icc)))]
    for mode in ("RGB", "L", "CMYK"):
        image = Image.fromarray(COLORS).convert(mode)
        image.info["icc_profile"] = bytes(icc)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shown = normalise_mode(image, "RGB")
            kept = normalise_mode(image, "RGB", keep_profile=True)
        assert shown.mode == kept.mode == "RGB" and shown.size == kept.size == image.size
        if "icc_profile" in kept.info:
            assert convert_from_srgb(np.asarray(shown), kept.info["icc_profile"]).shape == COLORS.shape


def png_with(gamma: float, chromaticity: tuple[float, ...] | None, is_srgb: bool = False) -> bytes:
    """A PNG that states its colours without a profile."""
    chunks = PngImagePlugin.PngInfo()
    if is_srgb:
        chunks.add(b"sRGB", b"\0")
    if chromaticity:
        chunks.add(b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in chromaticity)))
    chunks.add(b"gAMA", struct.pack(">I", round(gamma * 100_000)))
    buffer = io.BytesIO()
    Image.fromarray(COLORS).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("gamma", "chromaticity"), [(1.0, None), (0.5, SRGB), (0.45455, ADOBE_RGB), (1 / 2.2, DISPLAY_P3)]
)
def test_the_gamma_of_a_png_counts(gamma: float, chromaticity: tuple[float, ...] | None, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_with(gamma, chromaticity))
    expected = to_srgb(COLORS, 1 / gamma, chromaticity or SRGB)
    inside = ((expected >= 0) & (expected <= 255)).all(axis=-1)
    assert np.abs(np.asarray(read_image(tmp_path / "a.png", "RGB")) - expected)[inside].max() <= 2
    kept = read_image(tmp_path / "a.png", "RGB", keep_profile=True)
    assert np.array_equal(np.asarray(kept), COLORS) and can_return_to(kept.info["icc_profile"])


@pytest.mark.parametrize("stated", [(0.45455, None), (0.45455, SRGB), (1.0, ADOBE_RGB, True)])
def test_the_gamma_of_srgb_changes_nothing(stated: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_with(*stated))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", "RGB")), COLORS)


@pytest.mark.parametrize("stated", [(1e-5, None), (0.0, None), (0.5, (0.3,) * 8), (0.5, (0.3, 0.0) * 4)])
def test_a_gamma_without_sense_is_noted(
    stated: tuple[float, tuple[float, ...] | None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.png").write_bytes(png_with(*stated))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", "RGB")), COLORS)
    assert "make no sense: read as sRGB" in caplog.text


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".avif", ".bmp", ".ppm", ".jp2"])
def test_a_written_image_shows_the_same_colours(suffix: str, tmp_path: Path) -> None:
    image = with_profile(PATCHES, ADOBE_PROFILE)
    write_image(image, tmp_path / f"a{suffix}")
    shown = np.asarray(normalise_mode(image, "RGB")).astype(int)
    read = np.asarray(read_image(tmp_path / f"a{suffix}", "RGB")).astype(int)
    middles = np.s_[8::16, 8::16]  # WebP stores colours at half the size
    assert np.abs(shown[middles] - read[middles]).max() <= 8


@pytest.mark.parametrize("reduce", [1, 2])
def test_a_photograph_to_train_on_is_srgb(reduce: int) -> None:
    buffer = io.BytesIO()
    with_profile(PATCHES, ADOBE_PROFILE).save(buffer, "JPEG", quality=100, subsampling=0, icc_profile=ADOBE_PROFILE)
    expected = to_srgb(PATCHES, ADOBE_GAMMA, ADOBE_RGB).clip(0, 255)[::reduce, ::reduce]
    middles = np.s_[8 // reduce :: 16 // reduce, 8 // reduce :: 16 // reduce]
    assert np.abs(decode_jpeg(buffer.getvalue(), reduce)[middles] - expected[middles]).max() <= 5
