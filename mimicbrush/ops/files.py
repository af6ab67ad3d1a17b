"""Pictures from files, and files that are whole as soon as they have their name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mimicbrush.errors import InputError

#: What `write_aside` leaves beside its files when the process is killed.
ASIDE_PATTERN = ".*.tmp"


def read_picture(path: Path, mode: str) -> Image.Image:
    """Open a picture whole, and bring it into shape with `upright`.

    Args:
        path: any format that Pillow reads.
        mode: "RGB" for pictures, "L" for masks.

    Raises:
        InputError: absent, no picture, or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with Image.open(path) as image:
            return upright(image, mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a picture that can be read whole ({error})") from error


def upright(image: Image.Image, mode: str) -> Image.Image:
    """A picture as it is meant to be seen: turned as its EXIF says, 8 bit, in the mode "RGB" or "L".

    Transparent pictures are put on white; of a mask with transparency only the brightness counts.
    """
    image = ImageOps.exif_transpose(image)
    if mode == "RGB" and image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    if image.mode.startswith("I"):  # 16 bit: Pillow's own conversion would clip at 255, not scale
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert(mode)


def check_writable(path: Path) -> None:
    """Whether `write_picture` will take this path; to be asked before the picture is made.

    Raises:
        InputError: the folder is missing, or no picture format that can be written goes by this suffix.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise InputError(f"{path}: unknown picture format {path.suffix!r}; use for instance .png")


def write_picture(image: Image.Image, path: Path) -> None:
    """Write a picture in the format of its suffix (see `write_aside`).

    Raises:
        InputError: see `check_writable`.
    """
    check_writable(path)
    picture_format = Image.registered_extensions()[path.suffix.lower()]
    write_aside(path, lambda aside: image.save(aside, format=picture_format))


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that gets its name only when it is whole and on the disk.

    Args:
        path: the file; an older one stays as it is until the new one replaces it.
        write: called with a hidden name in the same folder (`ASIDE_PATTERN`), to write the content there; what
            it returns is not looked at. Where it raises, nothing is left behind.
    """
    # No suffix of the file's own: whoever collects for instance *.parquet must not meet half a file.
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    if os.name == "posix":  # the new name must be on the disk, too; Windows opens no folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
