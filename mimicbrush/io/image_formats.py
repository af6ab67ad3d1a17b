"""How image files are stored: damage, the quality of a result, and formats that need another package."""

from __future__ import annotations

import importlib
import logging
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, JpegImagePlugin

from mimicbrush.errors import InputError

#: What Pillow raises on damaged files (found by damaging some).
DAMAGED_IMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, RuntimeError),
    *(struct.error, zlib.error),
)
#: Formats in which Pillow stores a colour profile.
WITH_PROFILE = frozenset({"PNG", "JPEG", "MPO", "WEBP", "TIFF", "AVIF", "HEIF"})
#: Formats that can store an image of any size with all colours. In other formats, Pillow may crop, reduce or wrap it.
WRITABLE = WITH_PROFILE | {"BMP", "DIB", "PPM", "TGA", "JPEG2000", "PCX", "SGI", "GIF"}
#: Number of colours of a GIF.
_GIF_COLORS = 256
#: Formats that give back every number. Most TIFF files do, too, and some WebP files.
_LOSSLESS = frozenset({"PNG", "BMP", "DIB", "PPM", "TGA", "GIF", "PCX", "SGI", "QOI"})
_LOSSY_TIFF = frozenset({"jpeg", "tiff_jpeg", "webp"})
#: Quality of a result whose source says nothing about it, of 100; and no colour is stored at half the size.
_QUALITY, _FULL_COLOR = 95, 0
_JPEG_LAYERS = 3
#: Kinds of the container of HEIC and AVIF, in its first bytes.
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")
#: Number of bytes of a file that `prepare_heif` reads.
HEIF_START_BYTES = 256
#: Orientations of EXIF in which rows and columns change places.
_TURNED = (5, 6, 7, 8)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageEncoding:
    """How a file stores its image, so that a result can be stored in the same way.

    Attributes:
        is_lossless: the file gives back every number that was stored.
        qtables: of a JPEG: 64 steps each, row by row, as the image is seen.
        subsampling: of a JPEG, as Pillow names it: 0 is 4:4:4, 1 is 4:2:2, 2 is 4:2:0.
    """

    is_lossless: bool = False
    qtables: tuple[tuple[int, ...], ...] = ()
    subsampling: int = _FULL_COLOR


def find_encoding(image: Image.Image, path: Path) -> ImageEncoding:
    """Find how the file of an opened image stores it, without decoding pixels."""
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        return _read_jpeg(image)
    if image.format == "TIFF":
        return ImageEncoding(image.info.get("compression") not in _LOSSY_TIFF)
    if image.format == "WEBP":
        return ImageEncoding(_is_lossless_webp(path))
    return ImageEncoding(image.format in _LOSSLESS)


def _read_jpeg(image: JpegImagePlugin.JpegImageFile) -> ImageEncoding:
    subsampling = JpegImagePlugin.get_sampling(image)
    tables = [tuple(image.quantization[number]) for number in sorted(image.quantization)]
    if image.layers not in (1, _JPEG_LAYERS):  # CMYK: its tables are of other layers than those of a result
        return ImageEncoding()
    if image.getexif().get(0x0112) in _TURNED:
        tables = [tuple(table[8 * column + row] for row in range(8) for column in range(8)) for table in tables]
        subsampling = subsampling if subsampling != 1 else _FULL_COLOR  # 4:2:2 on its side is none that Pillow writes
    return ImageEncoding(qtables=tuple(tables), subsampling=max(subsampling, _FULL_COLOR))


def _is_lossless_webp(path: Path) -> bool:
    """Whether the image of a WebP file, or the first of several, lies in a chunk "VP8L"."""
    with path.open("rb") as file:
        file.seek(12)
        while len(header := file.read(8)) == 8:
            name, size = header[:4], int.from_bytes(header[4:], "little")
            if name in (b"VP8 ", b"VP8L"):
                return name == b"VP8L"
            # A frame of an animation holds chunks of its own, behind 16 bytes.
            file.seek(16 if name == b"ANMF" else size + size % 2, 1)
    return False


def find_save_options(image_format: str, like: ImageEncoding | None) -> dict[str, Any]:
    """Find the options of Pillow that keep the best quality of a format.

    Args:
        image_format: as Pillow names it.
        like: how the source is stored. A JPEG of a JPEG gets its tables and subsampling, so that what was not
            changed is hardly changed by storing it again; a WebP of a lossless file is lossless. None, or nothing of
            that: quality 95, with colours at full size.
    """
    like = like or ImageEncoding()
    if image_format in ("JPEG", "MPO"):
        if like.qtables:
            return {"qtables": [list(table) for table in like.qtables], "subsampling": like.subsampling}
        return {"quality": _QUALITY, "subsampling": _FULL_COLOR}
    if image_format == "WEBP":
        return {"lossless": True} if like.is_lossless else {"quality": _QUALITY}
    if image_format == "AVIF":
        return {"quality": 100 if like.is_lossless else _QUALITY, "subsampling": "4:4:4"}
    if image_format == "HEIF":
        return {"quality": _QUALITY, "chroma": 444}
    if image_format == "GIF":
        _log.warning(
            "a GIF has at most %d colours, so the whole image changes; use .png to keep its colours", _GIF_COLORS
        )
    return {}


def prepare_heif(start: bytes) -> None:
    """Let Pillow read HEIC, the format of many phones, if a file is of this kind.

    Args:
        start: the first `HEIF_START_BYTES` of the file.

    Raises:
        InputError: the package for it is not installed; names what is to be installed.
    """
    length = int.from_bytes(start[:4])
    brands = start[8:length] if start[4:8] == b"ftyp" else b""
    if any(brand in brands for brand in _AVIF_BRANDS):
        Image.init()
        if "AVIF" not in Image.OPEN:
            raise InputError(
                "it is an AVIF image, which the installed Pillow cannot read: pip install --upgrade pillow"
            )
    elif brands[:4] in _HEIF_BRANDS:
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError as error:
            raise InputError("it is a HEIC image. To read it, install pillow-heif: pip install '.[heic]'") from error
