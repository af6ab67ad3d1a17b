"""The one protocol of editors, and what an editor gets and gives back. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mimicbrush.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from mimicbrush.evaluation.benchmark.layout import Case
    from mimicbrush.ops.correspondence import Correspondence


class NotApplicableError(InputError):
    """An editor does not support this case or batch; this is counted separately from failures."""


@dataclass(frozen=True)
class EditorOptions:
    """Choices that hold for every editor with weights.

    Attributes:
        device: "auto", "cpu" or "cuda".
        num_inference_steps: of the sampler, 1 or more; None: the editor's own default.
        guidance_scale: of classifier-free guidance; None: the editor's own default.
        dtype: of the networks; None: half precision on a GPU, float32 on the CPU.
    """

    device: str = "auto"
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class PairBatch:
    """A batch of n held-out pairs on square canvases of side S.

    Attributes:
        sources: (n, S, S, 3) uint8 RGB, unmasked: the editor itself must not look inside the mask.
        masks: (n, S, S) uint8, 1 = repaint.
        references: (n, S, S, 3) uint8 RGB; None: edit without a reference.
        seeds: n seeds of the noise, below 2**63.
        source_areas: (n, S, S) uint8, 1 where the canvas shows the source, 0 on its padding.
        reference_areas: (n, S, S) uint8, the same of the references.
        other_references: (n, R-1, S, S, 3) uint8 RGB, more of the same shots, only for editors whose `most_references`
            is R or more; None for one reference.
    """

    sources: np.ndarray
    masks: np.ndarray
    references: np.ndarray | None
    seeds: Sequence[int]
    source_areas: np.ndarray
    reference_areas: np.ndarray
    other_references: np.ndarray | None = None


@dataclass(frozen=True)
class PairResults:
    """An edited batch.

    Attributes:
        images: (n, S, S, 3) uint8 RGB, the editor's own output also outside the masks (nothing pasted back).
        correspondences: which place of the reference filled which place of the mask, one for each of the n; None
            where nobody asked, or the editor cannot tell.
    """

    images: np.ndarray
    correspondences: Sequence[Correspondence] | None = None


@dataclass(frozen=True)
class CaseInputs:
    """The images of a benchmark case, and how to edit it.

    Attributes:
        source: "RGB", unmasked: the editor itself must not look inside the mask.
        mask: "L", of the source's size; above 128 = repaint.
        reference: "RGB", any size.
        keep_shape: texture transfer: the depth of the source may be used.
        seed: of all that is random.
    """

    source: Image.Image
    mask: Image.Image
    reference: Image.Image
    keep_shape: bool
    seed: int


@dataclass(frozen=True)
class CaseResult:
    """An edited benchmark case.

    Attributes:
        image: "RGB", of the source's size; the editor's own output also outside the mask (nothing pasted back).
        correspondence: which place of the reference filled which of the mask, where the editor can tell.
    """

    image: Image.Image
    correspondence: Correspondence | None = None


class Editor(Protocol):
    """Anything that repaints the masked part of a source.

    It has two methods, because the two evaluations ask for different things. Held-out pairs come in batches on
    square canvases, also without a reference. Benchmark cases come one by one, at their own size. An editor that is
    made for one of them alone raises `NotApplicableError` in the other; `CaseOnlyEditor` is a base for such.

    Attributes:
        name: as it was named to `registry.open_editor`.
        about: what its numbers depend on, for the metric card: weights, steps, guidance, how images are prepared.

    An editor that takes several references of a held-out pair has the attribute `most_references`.
    """

    name: str
    about: dict[str, str]

    @property
    def size_px(self) -> int | None:
        """Side of the square canvas that it edits on; None: any."""
        ...

    def edit_pairs(self, batch: PairBatch, *, with_correspondences: bool = False) -> PairResults:
        """Edit a batch of held-out pairs.

        Args:
            batch: n pairs on canvases of side `size_px`.
            with_correspondences: also tell which place of the reference filled which place of the mask, if it can.

        Raises:
            NotApplicableError: the editor is not made for such batches.
            MimicBrushError: it cannot do this one; the message says why.
        """
        ...

    def edit_case(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """Edit one benchmark case.

        Args:
            case: which; its prompt is for measuring and is no input of an editor.
            inputs: its images.

        Raises:
            NotApplicableError: the editor is not made for such cases.
            MimicBrushError: it cannot do this one; the message says why.
        """
        ...


class CaseOnlyEditor:
    """A base for editors of benchmark cases: it refuses held-out pairs."""

    name: str
    about: dict[str, str]

    @property
    def size_px(self) -> int | None:
        """Side of the square canvas that it edits on; None: any."""
        return None

    def edit_pairs(self, batch: PairBatch, *, with_correspondences: bool = False) -> PairResults:
        """Refuse a batch of held-out pairs.

        Raises:
            NotApplicableError: always.
        """
        raise NotApplicableError(f"{self.name} can edit benchmark cases, but not held-out pairs")
