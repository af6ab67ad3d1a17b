"""Options of an export, which decide every byte of it. This module imports nothing heavy."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mimicbrush.data.options import DataOptions
from mimicbrush.errors import InputError
from mimicbrush.mining.exports.formats.registry import FORMATS
from mimicbrush.ranges import SEED_RANGE, check_options, number, word

#: Largest number of views of a pair: they are held in memory together.
MAX_VIEWS = 1000
#: Sides of images are multiples of this: trainers crop other sizes.
SIDE_STEP_PX = 16
#: Default captions: for separate images, and for images side by side.
DEFAULT_CAPTIONS = (
    "Fill the hole of the first image with what the second image shows there.",
    "Fill the hole on the right with what the left shows there.",
)
#: The options of the training data that an export follows.
DATA_OPTIONS = ("geometry", "jitter", "share_flips", "mask", "min_ssim", "max_ssim", "heldout_ratio", "num_references")


@dataclass
class ExportOptions:
    """Options of an export.

    Attributes:
        format: trainer to export for, one of `FORMATS`.
        data: augmentation, masks, SSIM range and held-out share, as for training; the other options have no effect.
        views: samples per pair, each with another augmentation and mask.
        size_px: side of the square canvas.
        seed: seed of augmentations, masks and the order of the pairs. 0: the samples of `data.fixed_views`.
        jpeg_quality: quality of JPEG images; masks are always PNG. None: lossless PNG images.
        side_by_side: put the references to the left of target, source and mask, for trainers that use one condition
            image. The mask is 0 on the references.
        caption: caption of the samples that have none in `captions`; "": no caption. None: see `DEFAULT_CAPTIONS`.
        captions: path of a mined file -> caption; None: all samples have `caption`.
    """

    format: str = word("webdataset", FORMATS)
    data: DataOptions = field(default_factory=DataOptions)
    views: int = number(1, at_least=1, at_most=MAX_VIEWS)
    size_px: int = number(512, at_least=SIDE_STEP_PX, at_most=4096, note=f"a multiple of {SIDE_STEP_PX}")
    seed: int = number(0, SEED_RANGE)
    jpeg_quality: int | None = number(None, at_least=1, at_most=100, whole=True, null="PNG")
    side_by_side: bool = False
    caption: str | None = None
    captions: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        check_options(self)
        if self.size_px % SIDE_STEP_PX:
            raise InputError(
                f"size_px={self.size_px}: expected a multiple of {SIDE_STEP_PX}, because trainers crop other sizes"
            )
        if self.caption is None:
            self.caption = DEFAULT_CAPTIONS[self.side_by_side]
        if self.captions is None and not clean_caption(self.caption):
            raise InputError(f"the caption {self.caption!r} is empty; give some text")

    @property
    def canvas_px(self) -> tuple[int, int]:
        """Height and width of target, source and mask."""
        count = 1 + self.data.num_references if self.side_by_side else 1
        return self.size_px, count * self.size_px

    @property
    def suffix(self) -> str:
        """Suffix of the images."""
        return ".png" if self.jpeg_quality is None else ".jpg"

    def find_caption(self, source_path: str) -> str:
        """Find the caption of a mined file; "" if there is none.

        If a path is not listed or has an empty caption, its nearest listed parent is used, such as the tar
        of a photograph.
        """
        path = source_path
        while self.captions and path:
            if caption := clean_caption(self.captions.get(path, "")):
                return caption
            path = path.rpartition("/")[0]
        return clean_caption(self.caption or "")

    def as_settings(self) -> dict[str, Any]:
        """List everything that decides the content, for a comparison with an earlier run."""
        captions = "".join(f"{path}\0{text}\0" for path, text in sorted((self.captions or {}).items()))
        data = asdict(self.data)
        own = {name: value for name, value in vars(self).items() if name not in ("data", "captions")}
        digest = hashlib.sha256(captions.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        own["canvas_px"] = list(self.canvas_px)
        return own | {f"data.{name}": data[name] for name in DATA_OPTIONS} | {"captions": digest if captions else ""}


def clean_caption(text: str) -> str:
    """Turn a caption into one line of valid Unicode: several trainers read each line as a separate caption."""
    visible = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(visible.split())
