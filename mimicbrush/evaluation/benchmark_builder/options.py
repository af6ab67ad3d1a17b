"""Options of a benchmark that is built. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mimicbrush.errors import InputError
from mimicbrush.ranges import SEED_RANGE, check_options, number

if TYPE_CHECKING:
    from mimicbrush.evaluation.benchmark.layout import TrackName

#: Cases of the paper's benchmark (Sec. 3.4, App. A).
PAPER_CASES: dict[TrackName, int] = {"part_inter": 120, "part_inner": 30, "texture_inter": 30, "texture_inner": 30}


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build: what to build from (at least one of the first three), and how.

    Attributes:
        dreambooth: the DreamBooth dataset; its pairs are those of `manifest`.
        images: a folder per subject.
        pairs: mined folders, whose unseen videos give inner-ID cases.
        manifest: list of inner-ID pairs, see data_manifests/DREAMBOOTH.md.
        masks: painted or imported masks, see `MaskFolder`; they go before boxes.
        against: pipelines and mined folders that nothing of the benchmark may come from.
        seed: of every choice.
        most: at most so many cases per track and kind of source; None: as many as the paper has in the track.
        long_side_px: larger images are reduced to this; None: as they are.
        to_paint: gets every image that lacks a mask, to be painted over; None: they are only counted.
    """

    dreambooth: Path | None = None
    images: Path | None = None
    pairs: tuple[Path, ...] = ()
    manifest: Path | None = None
    masks: Path | None = None
    against: tuple[Path, ...] = ()
    seed: int = number(0, SEED_RANGE)
    most: int | None = number(None, at_least=1, whole=True, null="as many as the paper has")
    long_side_px: int | None = number(1024, at_least=64, at_most=16384, null="as they are")
    to_paint: Path | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            InputError: nothing to build from, or numbers that mean nothing.
        """
        if not (self.dreambooth or self.images or self.pairs):
            raise InputError("no input was given; name at least one of --dreambooth, --pictures and --pairs")
        if self.dreambooth and not self.manifest:
            raise InputError("--dreambooth also needs --manifest, the list of its pairs")
        check_options(self)

    def limit(self, track: TrackName) -> int:
        """Return the most cases that one kind of origin may give to a track."""
        return PAPER_CASES[track] if self.most is None else self.most
