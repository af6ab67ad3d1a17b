"""Colour profiles (ICC) of images. Everything is computed in sRGB, and results get the profile of their source.

Numbers of 0..255 are colours only together with a profile. Cameras and phones write Display P3 or Adobe RGB; the
models know sRGB. An image without a profile is sRGB, and is never changed here.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from mimicbrush.io.text import make_storable

#: Keys of `Image.info` that say what its numbers mean; the others are those of a PNG or HEIC without a profile.
_PROFILE_KEYS = ("icc_profile", "gamma", "chromaticity", "nclx_profile")
#: Transfer functions of a HEIC, as ISO/IEC 23091-2 numbers them: of SDR (BT.709, unknown, BT.601, sRGB) and of HDR.
_SDR_TRANSFERS, _HDR_TRANSFERS = (1, 2, 6, 13), {16: "PQ", 18: "HLG"}
_UNKNOWN_PRIMARIES = 2
#: Device links and named colours are profiles, too, but not of images.
_IMAGE_CLASSES = ("mntr", "scnr", "prtr", "spac")
#: x and y of white, red, green and blue, and the gamma that PNG files of sRGB state.
_SRGB_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
_SRGB_GAMMA = 0.45455
_GAMMA_TOLERANCE, _CHROMATICITY_TOLERANCE = 0.01, 0.002
#: A profile that changes no colour by more than this (of 255) is sRGB, whatever its name.
_SAME_COLOR = 1
_COLUMNS = (b"rXYZ", b"gXYZ", b"bXYZ")
# Of ICC's reference white D50, and Bradford's matrix from XYZ to the responses of the eye's cones.
_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
#: What littleCMS raises about a damaged profile, by way of Pillow.
_DAMAGED = (ImageCms.PyCMSError, OSError, ValueError, TypeError)


def find_profile(image: Image.Image) -> bytes | None:
    """Find the profile of an image; None if it is sRGB.

    It is the ICC profile, even one that says sRGB, and one that may be damaged. Without one it is made of the gamma
    and chromaticities of a PNG, or of those of a HEIC. HDR is worth a Python warning: nothing here makes SDR of it.
    """
    icc = image.info.get("icc_profile")
    if icc and isinstance(icc, bytes | bytearray):
        return bytes(icc)
    stated = _read_gamma(image) or _read_nclx(image)
    if stated is None:
        return None
    exponent, chromaticity = stated
    is_srgb = exponent is None or abs(exponent * _SRGB_GAMMA - 1) <= _GAMMA_TOLERANCE
    try:
        if is_srgb and np.allclose(chromaticity, _SRGB_CHROMATICITY, rtol=0, atol=_CHROMATICITY_TOLERANCE):
            return None
        return make_profile(exponent, chromaticity)
    except (ArithmeticError, ValueError, struct.error):
        made_of = f"the gamma {exponent or 'of sRGB'} and the chromaticities {chromaticity}"
        warnings.warn(f"{made_of} in the file make no sense: read as sRGB", stacklevel=2)
        return None


def _read_gamma(image: Image.Image) -> tuple[float | None, tuple[float, ...]] | None:
    """Exponent and chromaticities that a PNG states without a profile."""
    gamma = image.info.get("gamma")
    if gamma is None or "srgb" in image.info:
        return None
    return 1 / gamma if gamma else math.inf, tuple(image.info.get("chromaticity") or _SRGB_CHROMATICITY)


def _read_nclx(image: Image.Image) -> tuple[None, tuple[float, ...]] | None:
    """Chromaticities that a HEIC states without a profile; its curve is taken as that of sRGB."""
    nclx = image.info.get("nclx_profile") or {}
    transfer = nclx.get("transfer_characteristics", 0)
    if transfer in _HDR_TRANSFERS:
        warnings.warn(
            f"it is HDR ({_HDR_TRANSFERS[transfer]}) and is read without tone mapping, so it looks flat; "
            "export it as SDR for correct colours",
            stacklevel=3,
        )
    if transfer not in _SDR_TRANSFERS or nclx.get("color_primaries") == _UNKNOWN_PRIMARIES:
        return None
    colors = ("white", "red", "green", "blue")
    return None, tuple(nclx[f"color_primary_{color}_{axis}"] for color in colors for axis in "xy")


def drop_profile(image: Image.Image) -> None:
    """Remove the profile of an image, in place: its values are then sRGB."""
    for key in _PROFILE_KEYS:
        image.info.pop(key, None)


def convert_to_srgb(image: Image.Image, icc: bytes | None, is_grey: bool = False) -> Image.Image:
    """Convert an image without transparency from its profile to sRGB.

    A profile that is damaged, or of other colours than the image has, is worth a Python warning; the image is then
    taken as sRGB, as it is without a profile.

    Args:
        image: of 8 bits, in any mode that Pillow can convert to "RGB".
        icc: the profile, see `find_profile`; None: the image is sRGB.
        is_grey: the image is "RGB", but was grey when it was stored.

    Returns:
        "RGB", without a profile.
    """
    converted = None if icc is None else _apply_profile(image, icc, is_grey)
    if converted is None:
        converted = image.convert("RGB")
    drop_profile(converted)
    return converted


def _apply_profile(image: Image.Image, icc: bytes, is_grey: bool) -> Image.Image | None:
    """The image in sRGB; None if it is that already."""
    try:
        if image.mode == "LAB":  # which Pillow converts by itself
            return None
        space = _read_space(icc)
        if space == "RGB" and image.mode != "CMYK":
            mode = "RGB"
        elif space == "GRAY" and (is_grey or image.mode in ("1", "L")):
            mode = "L"
        elif space == image.mode == "CMYK":
            mode = "CMYK"
        else:
            kind = f"for {space!r}" if space else "not for images"
            warnings.warn(f"its colour profile is {kind}, but its mode is {image.mode!r}: read as sRGB", stacklevel=3)
            return None
        transform = _build_transform(icc, mode, True)
        return None if transform is None else ImageCms.applyTransform(image.convert(mode), transform)
    except _DAMAGED as error:
        warnings.warn(f"its colour profile cannot be read ({make_storable(str(error))}): read as sRGB", stacklevel=3)
        return None


def can_return_to(icc: bytes) -> bool:
    """Return whether colours can be converted from sRGB to a profile, so that a result can be stored with it.

    False for profiles of CMYK and grey, which hold no result in "RGB", for those of scanners that only lead away from
    the device, and for damaged ones.
    """
    try:
        if _read_space(icc) != "RGB":
            return False
        _build_transform(icc, "RGB", True)
        _build_transform(icc, "RGB", False)
    except _DAMAGED:
        return False
    return True


def convert_from_srgb(pixels: np.ndarray, icc: bytes) -> np.ndarray:
    """Convert colours from sRGB to a profile that `can_return_to` accepts, (H, W, 3) uint8."""
    transform = _build_transform(icc, "RGB", False)
    if transform is None:
        return pixels
    return np.asarray(ImageCms.applyTransform(Image.fromarray(pixels), transform))


@lru_cache(maxsize=16)
def _read_space(icc: bytes) -> str:
    """The kind of colours of a profile, such as "RGB"; "" for profiles that are not of images."""
    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc)).profile
    return profile.xcolor_space.strip() if profile.device_class in _IMAGE_CLASSES else ""


@lru_cache(maxsize=16)
def _build_transform(icc: bytes, mode: str, to_srgb: bool) -> ImageCms.ImageCmsTransform | None:
    """A transform between a profile and sRGB; None if it would change nothing that can be seen."""
    profile, srgb = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(
        profile if to_srgb else srgb,
        srgb if to_srgb else profile,
        mode if to_srgb else "RGB",
        "RGB" if to_srgb else mode,
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 16).round().astype(np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(16, -1, 3)
    probe = Image.fromarray(colors if mode == "RGB" else colors[..., 0])
    shown = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
    return None if np.abs(shown - np.asarray(probe.convert("RGB"))).max() <= _SAME_COLOR else transform


def make_profile(exponent: float | None, chromaticity: tuple[float, ...]) -> bytes:
    """Make the ICC profile of an RGB device.

    Args:
        exponent: intensity = (number / 255) ** exponent; None for the curve of sRGB.
        chromaticity: x and y of white, red, green and blue.

    Raises:
        ArithmeticError, ValueError, struct.error: numbers that are of no device.
    """
    if len(chromaticity) != 8 or not 0.1 <= (exponent or 1) <= 10 or not all(map(math.isfinite, chromaticity)):
        raise ValueError(f"exponent {exponent}, chromaticities {chromaticity}")
    white, *primaries = (
        np.array([x / y, 1.0, (1 - x - y) / y]) for x, y in zip(chromaticity[::2], chromaticity[1::2], strict=True)
    )
    try:
        columns = np.stack(primaries, axis=1)
        columns = columns * np.linalg.solve(columns, white)  # red + green + blue = white
    except np.linalg.LinAlgError as error:
        raise ValueError("the primaries lie on a line") from error
    adapted = np.linalg.inv(_BRADFORD) @ np.diag((_BRADFORD @ _D50) / (_BRADFORD @ white)) @ _BRADFORD @ columns
    if exponent is None:
        levels = np.linspace(0, 1, 1024)
        steps = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4) * 65535
        curve = b"curv" + bytes(4) + struct.pack(">I1024H", 1024, *steps.round().astype(int).tolist())
    else:
        curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(exponent * 2**8))
    text = b"RGB device"
    description = b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + bytes(1 + 8 + 3 + 67)
    tags = {
        b"desc": description,
        b"cprt": b"text" + bytes(4) + b"no copyright\0",
        b"wtpt": b"XYZ " + bytes(4) + _fixed(*_D50),
        **{name: b"XYZ " + bytes(4) + _fixed(*column) for name, column in zip(_COLUMNS, adapted.T, strict=True)},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + _fixed(*_D50) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + body


def _fixed(*values: float) -> bytes:
    """Numbers as ICC stores them: 16 bits before the point, and 16 behind it."""
    return struct.pack(f">{len(values)}i", *(round(value * 2**16) for value in values))
