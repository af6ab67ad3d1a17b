"""What an editor that is compared on the benchmark gets, gives back, and must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mimicbrush.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from mimicbrush.evaluation.benchmark.layout import Case
    from mimicbrush.ops.correspondence import Correspondence


class NotApplicableError(InputError):
    """A case that an editor is not made for: no failure, and counted apart from those."""


@dataclass(frozen=True)
class CaseInputs:
    """The images of a case, and how to edit it.

    Attributes:
        source: "RGB", unmasked: the editor itself must not look into the hole.
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
    """What an editor made of a case.

    Attributes:
        image: "RGB", of the source's size; the editor's own output also outside the mask (nothing pasted back).
        correspondence: which place of the reference filled which of the hole, where the editor can tell.
    """

    image: Image.Image
    correspondence: Correspondence | None = None


class CaseEditor(Protocol):
    """Edits one case at a time.

    Attributes:
        name: as it was named to `open_editor`.
        about: what its numbers depend on, for the metric card: weights, steps, guidance, how images are prepared.
    """

    name: str
    about: dict[str, str]

    def __call__(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """Edit.

        Args:
            case: which; its prompt is for measuring, no editor is told it.
            inputs: its images.

        Raises:
            NotApplicableError: the editor is not made for such cases.
            MimicBrushError: it cannot do this one; the message says why.
        """
        ...
