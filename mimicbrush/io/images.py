"""Reading and writing images: EXIF, colours, transparency, 16 bits, damage."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mimicbrush.errors import InputError, describe_os_error
from mimicbrush.io.atomic import write_aside
from mimicbrush.io.color_profiles import can_return_to, convert_to_srgb, drop_profile, find_profile
from mimicbrush.io.image_formats import (
    DAMAGED_IMAGE,
    HEIF_START_BYTES,
    WITH_PROFILE,
    WRITABLE,
    ImageEncoding,
    find_encoding,
    find_save_options,
    prepare_heif,
)
from mimicbrush.io.outputs import check_output_file

#: A mask value above this (of 255) means "repaint" (released code).
MASK_THRESHOLD = 128
#: An image of more pixels is refused before it is decoded: at 4 bytes each, this many already take 1.6 GB.
MAX_PIXELS = 400_000_000

#: Narrow side of the images by which a format is asked for its limits.
_THIN_PX = 16

_SETTINGS_LOCK = threading.RLock()
_log = logging.getLogger(__name__)


def read_image(path: Path, mode: str, *, keep_profile: bool = False) -> Image.Image:
    """Read a whole image, and convert it with `normalise_mode`.

    Of a file with several images (an animation, a TIFF with pages) the first is taken; that, and what Pillow warns
    of, such as damaged EXIF data, is logged as a warning.

    Args:
        path: any format that Pillow reads; HEIC where pillow-heif is installed.
        mode: "RGB" for images, "L" for masks.
        keep_profile: see `normalise_mode`.

    Raises:
        InputError: absent, no image, damaged, or of more than `MAX_PIXELS`.
    """
    _check_file(path)
    try:
        with path.open("rb") as file:
            prepare_heif(file.read(HEIF_START_BYTES))
        with _pillow_settings() as notes:
            image, frames = _decode(path, mode, keep_profile)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path}: the image is too large, expected at most {MAX_PIXELS / 1e6:.0f} megapixels"
        ) from error
    except MemoryError as error:
        raise InputError(f"{path}: the image is too large for the memory of this machine") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: cannot read the image (no known image format)") from error
    except DAMAGED_IMAGE as error:
        raise InputError(f"{path}: cannot read the image ({error})") from error
    for note in dict.fromkeys(str(note.message).strip() for note in notes):
        _log.warning("%s: %s", path, note)
    if frames > 1:
        _log.warning("%s: the file has %d images; the first one is used", path, frames)
    return image


def _decode(path: Path, mode: str, keep_profile: bool) -> tuple[Image.Image, int]:
    """The image, and how many of them the file holds."""
    with Image.open(path) as image:
        # Cameras append previews to a JPEG, which is then an MPO: its first image is the right one.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        image.load()
        return normalise_mode(image, mode, keep_profile=keep_profile), frames


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path}: this is a folder, not an image")
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_file():
        raise InputError(f"{path}: this is a pipe or a device, not a regular file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: cannot read the image (the file is empty, 0 bytes)")


@contextmanager
def _pillow_settings() -> Iterator[list[warnings.WarningMessage]]:
    """Pillow's limit, which is global, as `MAX_PIXELS` and an error; other warnings are collected.

    Everything is restored for other users of Pillow.
    """
    with _SETTINGS_LOCK, warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS
        try:
            yield notes
        finally:
            Image.MAX_IMAGE_PIXELS = theirs


def normalise_mode(image: Image.Image, mode: str, *, keep_profile: bool = False) -> Image.Image:
    """Convert an image to 8 bit in the mode "RGB" or "L", rotated as its EXIF says.

    * The colours of images ("RGB") become sRGB, see `mimicbrush.io.color_profiles`. The numbers of masks stay.

    * Whole numbers of 16 or 32 bits are 0..255 where all of them are, otherwise 0..65535; the first is worth a
      Python warning, and so is a maximum of 12 bits. Floats are 0..1 where all of them are, otherwise 0..255.
    * Images ("RGB") with transparency are put on white.
    * Of a mask ("L") the brightness counts. With transparency, what is not opaque is not painted: it lies on
      black; and where all that is opaque has one colour, whatever colour, the transparency alone is the mask.

    Args:
        image: in any mode.
        mode: "RGB" or "L".
        keep_profile: leave the colours of an image as they are stored, where a result can be given back in them;
            ``info["icc_profile"]`` then says which they are.

    Raises:
        InputError: numbers outside these ranges, a mode that Pillow cannot convert, or a mask that looks like a
            image with a hole erased into it.
    """
    icc = find_profile(image) if mode == "RGB" else None
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bit(image)
    is_grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        if mode == "L":
            return _read_painted_mask(layers)
        # Without a palette's or a chunk's own note of what is transparent: it has been seen to.
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert(mode)
    if mode != "RGB":
        return image.convert(mode)
    if keep_profile and icc is not None and image.mode != "CMYK" and can_return_to(icc):
        image = image.convert(mode)
        drop_profile(image)
        image.info["icc_profile"] = icc
        return image
    return convert_to_srgb(image, icc, is_grey)


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """A grey image of floats or of 16 or 32 bits -> "L"; Pillow's own conversion would clip at 255, not scale."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    top = 1 if image.mode == "F" and high <= 1 else 255 if image.mode == "F" else 65535
    if not (low >= 0 and high <= top):  # so that NaN is refused, too
        expected = "0 to 1 or 0 to 255" if image.mode == "F" else "0 to 65535"
        raise InputError(f"its values are from {low} to {high}; mode {image.mode!r} needs values from {expected}")
    if image.mode == "F":
        return Image.fromarray((values * (255 / top)).round().astype(np.uint8))
    if high <= 255:
        if high > 0:
            note = f"none of its values (mode {image.mode!r}) is above {high}: read as 0 to 255, not as 0 to 65535"
            warnings.warn(note, stacklevel=3)
        return Image.fromarray(values.astype(np.uint8))
    if high <= 4095:
        note = f"it is dark: its largest value (mode {image.mode!r}) is {high} of 65535; scale values of 12 bits"
        warnings.warn(note, stacklevel=3)
    return Image.fromarray((values >> 8).astype(np.uint8))


def brightest_stored_value(path: Path) -> float | None:
    """Read the largest value of an image that `normalise_mode` scales to 8 bit; None if it does not.

    Args:
        path: of an image that `read_image` could read.
    """
    with _pillow_settings(), Image.open(path) as image:
        if not (image.mode.startswith("I") or image.mode == "F"):
            return None
        return float(np.asarray(image).max())


def read_encoding(path: Path) -> ImageEncoding:
    """Read how a file stores its image, so that a result can be stored in the same way.

    Args:
        path: of an image that `read_image` could read.
    """
    with _pillow_settings(), Image.open(path) as image:
        return find_encoding(image, path)


def _read_painted_mask(layers: Image.Image) -> Image.Image:
    """The mask that an RGBA image shows, see `normalise_mode`."""
    alpha = np.asarray(layers.getchannel("A"))
    if alpha.min() == alpha.max():
        return layers.convert("L")
    opaque = np.asarray(layers)[alpha > MASK_THRESHOLD][:, :3]
    if len(opaque) and (opaque == opaque[0]).all():
        return Image.fromarray(alpha)
    if _is_photograph(opaque):
        raise InputError(
            "the opaque part of this mask is neither one colour nor black and white, so it looks like an image with a "
            "hole. Expected a mask that is white where to repaint, or a transparent layer with one painted shape"
        )
    return Image.alpha_composite(Image.new("RGBA", layers.size, "black"), layers).convert("L")


def _is_photograph(pixels: np.ndarray) -> bool:
    """Whether more than a tenth of the pixels (N, 3) uint8 are coloured, or mid-tones as no painted mask has them."""
    darkest, brightest = pixels.min(axis=1), pixels.max(axis=1)
    is_coloured = brightest - darkest > 32
    is_mid_tone = (darkest >= 64) & (brightest <= 192)
    return float((is_coloured | is_mid_tone).mean()) > 0.1 if len(pixels) else False


def check_writable(path: Path, size: tuple[int, int] | None = None, *, is_tried: bool = True) -> None:
    """Check that `write_image` can write to this path, before the image is made.

    Args:
        path: of the image.
        size: width and height of the image, where they are known: formats have limits.
        is_tried: see `check_output_file`.

    Raises:
        InputError: the file cannot be written, no image format that can be written goes by this suffix, or the format
            cannot hold an RGB image of this size.
    """
    check_output_file(path, is_tried=is_tried)
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format not in WRITABLE or image_format not in Image.SAVE:
        raise InputError(f"{path}: unknown image format {path.suffix!r}; use .png, for example")
    if size is not None and not _can_hold(image_format, size):
        raise InputError(
            f"{path}: {image_format} cannot store an image of {size[0]} x {size[1]} px; use .png, for example"
        )


def _can_hold(image_format: str, size: tuple[int, int]) -> bool:
    """Whether a format can hold an RGB image, by thin images of its width and of its height."""
    for thin in ((size[0], min(size[1], _THIN_PX)), (min(size[0], _THIN_PX), size[1])):
        file = io.BytesIO()
        try:
            Image.new("RGB", thin).save(file, format=image_format)
            if image_format in Image.OPEN:  # some formats reduce an image without a warning
                with Image.open(file, formats=[image_format]) as written:
                    if written.size != thin:
                        return False
        except DAMAGED_IMAGE:
            return False
    return True


def write_image(image: Image.Image, path: Path, like: ImageEncoding | None = None) -> None:
    """Write an image in the format of its suffix (see `write_aside`), with the profile in its ``info``.

    A format that holds no profile gets sRGB.

    Args:
        image: as it is to be seen.
        path: its suffix chooses the format.
        like: how the image was stored that this was made of; it decides the quality, see `find_save_options`.

    Raises:
        InputError: see `check_writable`; or the disk refuses it, or the format this image.
    """
    check_writable(path, is_tried=False)
    image_format = Image.registered_extensions()[path.suffix.lower()]
    icc = image.info.get("icc_profile")
    if icc and image_format not in WITH_PROFILE:
        image, icc = convert_to_srgb(image, icc), None
    options = find_save_options(image_format, like)
    if image_format in WITH_PROFILE:
        options["icc_profile"] = icc
    try:
        write_aside(path, lambda aside: image.save(aside, format=image_format, **options))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({describe_os_error(error)})") from error
