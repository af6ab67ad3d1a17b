"""Colour profiles (ICC) for tests, of kinds that Pillow cannot make, and the arithmetic that they stand for."""

from __future__ import annotations

import struct

import numpy as np

from mimicbrush.io.color_profiles import make_profile

#: x and y of white (D65), red, green and blue.
ADOBE_RGB = (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
DISPLAY_P3 = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
REC_2020 = (0.3127, 0.329, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046)
SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
#: Of Adobe RGB, as its specification has it.
ADOBE_GAMMA = 563 / 256

ADOBE_PROFILE = make_profile(ADOBE_GAMMA, ADOBE_RGB)


def to_srgb(pixels: np.ndarray, exponent: float, chromaticity: tuple[float, ...]) -> np.ndarray:
    """What sRGB numbers the colours have, (..., 3) floats in 0..255, which may lie outside; white must be D65."""
    return _encode((pixels / 255.0) ** exponent @ (np.linalg.inv(_to_xyz(SRGB)) @ _to_xyz(chromaticity)).T)


def lab_to_srgb(colors: np.ndarray) -> np.ndarray:
    """What sRGB numbers colours of Lab (D50) have, (..., 3) floats in 0..255."""
    lightness, a, b = np.moveaxis(np.asarray(colors, float), -1, 0)
    middle = (lightness + 16) / 116
    roots = np.stack([middle + a / 500, middle, middle - b / 200], axis=-1)
    xyz = np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29)) * [0.9642, 1.0, 0.8249]
    return _encode(xyz @ np.array(_D50_TO_SRGB).T)


#: From XYZ relative to D50 to linear sRGB, adapted by Bradford's method (brucelindbloom.com).
_D50_TO_SRGB = (
    (3.1338561, -1.6168667, -0.4906146),
    (-0.9787684, 1.9161415, 0.0334540),
    (0.0719453, -0.2289914, 1.4052427),
)


def _encode(linear: np.ndarray) -> np.ndarray:
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.abs(linear) ** (1 / 2.4) - 0.055)


def _to_xyz(chromaticity: tuple[float, ...]) -> np.ndarray:
    x, y = np.array(chromaticity[::2]), np.array(chromaticity[1::2])
    xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    return xyz[:, 1:] * np.linalg.solve(xyz[:, 1:], xyz[:, 0])


def grey_profile(exponent: float) -> bytes:
    """A profile of a grey device of this gamma."""
    white = struct.pack(">3i", 63190, 65536, 54061)
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(exponent * 256))
    return _profile(b"GRAY", b"mntr", {b"wtpt": b"XYZ " + bytes(4) + white, b"kTRC": curve})


def cmyk_profile(inks: dict[tuple[int, int, int, int], tuple[int, int, int]]) -> bytes:
    """A profile of a printer, which leads from CMYK to colours alone.

    Args:
        inks: full or no ink (1 or 0) of each kind -> L in 0..100, a and b; all others are black.
    """
    ramp = bytes(range(256))
    grid = bytearray()
    for number in range(16):
        corner = tuple(number >> shift & 1 for shift in (3, 2, 1, 0))
        lightness, a, b = inks.get(corner, (0, 0, 0))
        grid += bytes([round(lightness * 2.55), a + 128, b + 128])
    identity = struct.pack(">9i", *(65536 if place % 4 == 0 else 0 for place in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp * 4 + bytes(grid) + ramp * 3
    white = struct.pack(">3i", 63190, 65536, 54061)
    return _profile(b"CMYK", b"prtr", {b"wtpt": b"XYZ " + bytes(4) + white, b"A2B0": table, b"A2B1": table})


def _profile(space: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    connection = b"Lab " if space == b"CMYK" else b"XYZ "
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"", 0x02400000, kind, space, connection)
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + body
