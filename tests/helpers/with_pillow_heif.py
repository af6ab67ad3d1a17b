"""HEIC files, read where pillow-heif is installed: python with_pillow_heif.py FOLDER -> JSON.

A process of its own: the others pretend that pillow-heif is absent. FOLDER gets the files, too.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pillow_heif
from color_profiles import ADOBE_GAMMA, ADOBE_PROFILE, ADOBE_RGB, DISPLAY_P3, to_srgb
from PIL import Image

from mimicbrush.app.mask_painter import check_kind
from mimicbrush.errors import InputError
from mimicbrush.io.images import read_encoding, read_image, write_image


def main(folder: Path) -> None:
    notes = io.StringIO()
    logging.basicConfig(stream=notes, format="%(message)s")
    patches = np.random.default_rng(0).integers(70, 180, (4, 6, 3), np.uint8)
    pixels = np.repeat(np.repeat(patches, 16, 0), 16, 1)
    middles = np.s_[8::16, 8::16]
    found: dict[str, object] = {}

    def save(name: str, **options: object) -> Path:
        heif = pillow_heif.from_pillow(Image.fromarray(pixels))
        heif.save(folder / name, quality=-1, chroma=444, **options)
        return folder / name

    def worst(name: str, expected: np.ndarray) -> int:
        return int(np.abs(np.asarray(read_image(folder / name, "RGB"))[middles] - expected[middles]).max())

    found["plain"] = worst(save("plain.heic").name, pixels.astype(int))
    heif = pillow_heif.from_pillow(Image.fromarray(pixels))
    heif.info["icc_profile"], heif.info["icc_profile_type"] = ADOBE_PROFILE, "prof"
    heif.save(folder / "adobe.heic", quality=-1, chroma=444)
    found["adobe"] = worst("adobe.heic", to_srgb(pixels, ADOBE_GAMMA, ADOBE_RGB))
    kept = read_image(folder / "adobe.heic", "RGB", keep_profile=True)
    found["adobe kept"] = kept.info["icc_profile"] == ADOBE_PROFILE
    save("p3.heic", color_primaries=12, transfer_characteristics=13)
    linear = np.where(pixels <= 10, pixels / 3294.6, ((pixels / 255 + 0.055) / 1.055) ** 2.4)
    found["p3"] = worst("p3.heic", to_srgb(255 * linear, 1.0, DISPLAY_P3))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "turned.heic", quality=-1, chroma=444, exif=exif.tobytes())
    shown = read_image(folder / "turned.heic", "RGB")
    found["turned"] = [*shown.size, int(np.abs(np.asarray(shown).astype(int) - np.rot90(pixels, -1))[middles].max())]
    notes.truncate(0)
    deep = np.repeat(np.linspace(0, 65535, 96).astype(np.uint16)[None, :, None], 64, 0).repeat(3, 2)
    heif = pillow_heif.from_bytes(mode="RGB;16", size=(96, 64), data=deep.tobytes())
    heif.save(folder / "pq.heic", quality=-1, chroma=444, color_primaries=9, transfer_characteristics=16)
    found["pq"] = int(np.abs(np.asarray(read_image(folder / "pq.heic", "RGB"))[32, :, 0] - deep[32, :, 0] / 257).max())
    found["pq notes"] = notes.getvalue()
    found["encoding"] = read_encoding(folder / "plain.heic").is_lossless
    write_image(Image.fromarray(pixels), folder / "written.heic")
    found["written"] = worst("written.heic", pixels.astype(int))
    found["kind"] = check_kind(folder / "plain.heic", "plain.heic")
    found["damaged"] = [outcome(folder, cut) for cut in (24, 200, 400, 600, -20)]
    print(json.dumps(found))


def outcome(folder: Path, cut: int) -> str:
    (folder / "cut.heic").write_bytes((folder / "plain.heic").read_bytes()[:cut])
    try:
        read_image(folder / "cut.heic", "RGB")
    except InputError as error:
        return str(error)
    return "read"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
