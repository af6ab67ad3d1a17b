"""Materials of cases: images with their facts and rights, and regions on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from mimicbrush.errors import InputError
from mimicbrush.io.atomic import path_inside
from mimicbrush.io.images import MASK_THRESHOLD, read_image

#: `part`: what part composition repaints; `subject`: all of the object, for texture transfer.
RegionName = Literal["part", "subject"]
REGION_NAMES: tuple[RegionName, ...] = ("part", "subject")
#: Left, top, right, bottom as ratios 0..1 of width and height.
RatioBox = tuple[float, float, float, float]
HAND_PLACED_BOX, BOX_OF_MATCHES, IMPORTED_MASK = "hand-placed box", "box around SIFT matches", "imported mask"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Region:
    """A region of an image that a mask covers: a box, or a mask file.

    Attributes:
        how: `HAND_PLACED_BOX`, `BOX_OF_MATCHES` or `IMPORTED_MASK`: a case says so.
        label: what it covers, such as "head"; "" where nobody says.
        box: of a box.
        path: of an imported mask, which has its image's own size.
    """

    how: str
    label: str = ""
    box: RatioBox | None = None
    path: Path | None = None

    def render(self, size: tuple[int, int]) -> Image.Image:
        """Render the mask: "L", 255 = repaint, 0 = keep.

        Args:
            size: (width, height) of the image in px.

        Raises:
            InputError: an imported mask that cannot be read, has another size, or is empty or full.
        """
        width, height = size
        if self.box is not None:
            left, top, right, bottom = self.box
            mask = np.zeros((height, width), np.uint8)
            mask[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = 255
            what = f"the box {self.box}"
        else:
            assert self.path is not None, "a region is a box or a file"
            what = str(self.path)
            image = read_image(self.path, "L")
            if image.size != size:
                raise InputError(
                    f"{self.path}: the mask is {image.width} x {image.height} px, but its image is {width} x "
                    f"{height} px"
                )
            mask = (np.asarray(image) > MASK_THRESHOLD).astype(np.uint8) * 255
        if not mask.any() or mask.all():
            raise InputError(
                f"{what}: the mask covers {'all' if mask.any() else 'nothing'} of the image; mask a part of the image"
            )
        return Image.fromarray(mask)


@dataclass(frozen=True)
class Rights:
    """Author, licence and address of an image; "" where nobody says.

    Attributes:
        texts: licence files that came with it; they are copied.
    """

    credit: str = ""
    licence: str = ""
    url: str = ""
    texts: tuple[Path, ...] = ()


@dataclass(frozen=True, eq=False)  # told apart as objects, and so keys of a cache
class Material:
    """An image that a case can be made of.

    Attributes:
        key: of its own, such as "dog/01"; masks are named by it: MASKS/part/dog/01.png.
        subject: the instance or video that it shows; images of one subject are drawn together by the bootstrap.
        kind: class of the subject, such as "dog"; "" where nobody says.
        sha256: of the file it comes from, hex: what the training set is compared by. Of a frame: of its video.
        rights: whose it is.
        path: the file, for messages.
        read: gives it upright, "RGB", in its own size; may raise a MimicBrushError.
        regions: what can be masked.
    """

    key: str
    subject: str
    kind: str
    sha256: str
    rights: Rights
    path: Path
    read: Callable[[], Image.Image]
    regions: Mapping[RegionName, Region] = field(default_factory=dict)

    def with_region(self, name: RegionName, region: Region) -> Material:
        """Return the same with one more region, or another one of this name."""
        return replace(self, regions={**self.regions, name: region})

    def describe(self) -> dict[str, str]:
        """Return what a case states about it."""
        rights = {"credit": self.rights.credit, "licence": self.rights.licence, "url": self.rights.url}
        return {"picture": self.key, "subject": self.subject, "sha256": self.sha256, **rights}


@dataclass(frozen=True)
class MaskFolder:
    """A folder of masks that were painted or made elsewhere: FOLDER/part/KEY.png and FOLDER/subject/KEY.png.

    Attributes:
        folder: None: there are none.
    """

    folder: Path | None

    def __post_init__(self) -> None:
        """Check the layout.

        Raises:
            InputError: no such folder, or neither of its two folders is there.
        """
        if self.folder is not None and not any((self.folder / name).is_dir() for name in REGION_NAMES):
            raise InputError(
                f"--masks {self.folder}: expected masks in {self.folder / 'part'} (for part composition) or in "
                f"{self.folder / 'subject'} (for texture transfer), named like their images, such as dog/01.png"
            )

    def add_to(self, material: Material) -> Material:
        """Return the material with the masks of this folder, which go before its own boxes."""
        for name in REGION_NAMES:
            if self.folder is None:
                break
            path = path_inside(self.folder, f"{name}/{material.key}.png")
            if path.is_file():
                own = material.regions.get(name)
                region = Region(IMPORTED_MASK, label=own.label if own else "", path=path)
                material = material.with_region(name, region)
        return material

    def list_unused(self, materials: Iterable[Material]) -> list[str]:
        """List the masks of the folder that belong to none of these images, as names relative to it."""
        if self.folder is None:
            return []
        keys = {material.key for material in materials}
        unused = []
        for region in REGION_NAMES:
            root = self.folder / region
            names = [path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.png")]
            unused += [f"{region}/{name}.png" for name in names if name not in keys]
        return sorted(unused)


def list_image_files(folder: Path) -> list[Path]:
    """List the image files right in a folder, by name; hidden ones are left out."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def list_licence_files(folder: Path) -> tuple[Path, ...]:
    """List the files of a folder whose names say that they are about licences."""
    return tuple(
        sorted(
            path
            for path in folder.iterdir()
            if path.is_file() and any(word in path.name.lower() for word in ("licence", "license", "copying"))
        )
    )
