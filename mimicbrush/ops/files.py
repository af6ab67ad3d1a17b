"""Pictures from files and to files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mimicbrush.errors import InputError


def read_picture(path: Path, mode: str) -> Image.Image:
    """Open a picture whole, upright (EXIF) and in the given mode.

    Args:
        path: any format that Pillow reads.
        mode: "RGB" for pictures, "L" for masks. Transparent pictures are put on white; of a mask with
            transparency only the brightness counts.

    Raises:
        InputError: absent, no picture, or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if mode == "RGB" and upright.has_transparency_data:
                layers = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
            if upright.mode.startswith("I"):  # 16 bit: Pillow's own conversion would clip at 255, not scale
                upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
            return upright.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a picture that can be read whole ({error})") from error


def write_picture(image: Image.Image, path: Path) -> None:
    """Write aside, then rename: whoever looks at `path` sees a whole picture or none.

    Raises:
        InputError: the folder is missing or the format unknown.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist")
    if path.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"{path}: unknown picture format {path.suffix!r}; use for instance .png")
    aside = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        image.save(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
