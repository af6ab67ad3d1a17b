"""Where in the references each masked place looked: whole maps, not peaks alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mimicbrush.ops.crops import Placement

#: The most cells of a map: at 512 px, a hole of a quarter of the canvas has 32 x 32 cells for each place.
MOST_CELLS = 2**20


@dataclass(frozen=True, repr=False)
class ReferenceMaps:
    """Maps of the attention of M masked tokens, on grids of g x g over the canvases of r references.

    Attributes:
        attention: (M, r, g, g) float32, the part of a token's attention that went to a cell: the mean over heads,
            layers and steps. Its sum is `Correspondence.share`.
        head_peaks: of the same shape and sum. All that a head pays to the references counts in the cell where this head
            looks most: one cell where the heads agree, many where they do not.
        boxes: (r, 4) float32, where the grid lies on each reference: x0, y0, x1, y1 in its pixels, beyond its
            edges where the canvas has padding.
    """

    attention: np.ndarray
    head_peaks: np.ndarray
    boxes: np.ndarray

    @classmethod
    def pool(cls, attention: np.ndarray, head_peaks: np.ndarray, references: Sequence[Placement]) -> ReferenceMaps:
        """Pool maps so far that one has at most `MOST_CELLS` cells.

        Args:
            attention, head_peaks: (M, r n, n), the grids of r references one below the other.
            references: how they lie on their canvases.
        """
        n = attention.shape[-1]
        cells = len(attention) * len(references)
        side = next(g for g in range(n, 0, -1) if n % g == 0 and (g == 1 or cells * g**2 <= MOST_CELLS))
        shape = len(attention), len(references), side, n // side, side, n // side
        pooled, pooled_peaks = (
            maps.reshape(shape).sum(axis=(3, 5), dtype=np.float32) for maps in (attention, head_peaks)
        )
        corners = [each.to_image(np.array([[0, 0], [each.size_px, each.size_px]])).ravel() for each in references]
        return cls(pooled, pooled_peaks, np.array(corners, np.float32))

    def select(self, tokens: np.ndarray, reference: int) -> ReferenceMaps:
        """Select some of the tokens, (M,) bool, and one reference."""
        chosen = slice(reference, reference + 1)
        return ReferenceMaps(self.attention[tokens, chosen], self.head_peaks[tokens, chosen], self.boxes[chosen])
