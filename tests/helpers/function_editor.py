"""Editors of held-out pairs that are plain functions of arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mimicbrush.evaluation.benchmark.layout import Case
from mimicbrush.evaluation.editors.protocol import CaseInputs, CaseResult, NotApplicableError, PairBatch, PairResults

#: Sources, masks, references or None, and seeds, see `PairBatch` -> images.
EditFunction = Callable[[np.ndarray, np.ndarray, np.ndarray | None, Sequence[int]], np.ndarray]


class FunctionEditor:
    """A function as an `Editor` of pairs; it also decorates."""

    def __init__(self, edit: EditFunction) -> None:
        self.name, self.about, self.edit = edit.__name__, {"editor": "a function"}, edit

    @property
    def size_px(self) -> None:
        return None

    def edit_pairs(self, batch: PairBatch, *, with_correspondences: bool = False) -> PairResults:
        return PairResults(self.edit(batch.sources, batch.masks, batch.references, batch.seeds))

    def edit_case(self, case: Case, inputs: CaseInputs) -> CaseResult:
        raise NotApplicableError("pairs alone")


def make_pair_batch(
    sources: np.ndarray, masks: np.ndarray, references: np.ndarray | None, seeds: Sequence[int]
) -> PairBatch:
    """A batch whose images have no padding."""
    everywhere = np.ones_like(masks)
    return PairBatch(sources, masks, references, seeds, everywhere, everywhere)
