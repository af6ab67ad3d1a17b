"""Which reference token filled which token of the hole: reference attention, summed as it happens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from mimicbrush.errors import InputError


class CorrespondenceRecorder:
    """Adds up where the reference attention of the hole's tokens goes.

    Every head, layer and step counts alike, by what it really paid: the blend times the probability in the softmax
    over [own ; reference], in which the reference's tokens share what the own tokens leave. A coarse layer's
    probability is spread evenly over the fine tokens that a coarse one covers.

    Args:
        mask: (R, 1, h, w) on the latents' grid, 1 = repaint; of the rows that have a reference.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self._mask = mask.float()
        #: tokens along a side -> for each row the summed probabilities (M, side * side), M tokens of the hole.
        self._sums: dict[int, list[torch.Tensor]] = {}
        self._heads = 0

    def add(self, path: str, query: torch.Tensor, reference_key: torch.Tensor, lse: torch.Tensor, blend: float) -> None:
        """Note one layer at one step; see `types.AttentionRecord`."""
        side = math.isqrt(query.shape[1])
        sums = self._sums.setdefault(side, [])
        for row in range(len(query)):
            hole = self._hole(side)[row]
            scores = torch.einsum("mhd,nhd->hmn", query[row, hole].float(), reference_key[row].float())
            scores = scores * query.shape[-1] ** -0.5 - lse[row, hole].T[..., None]
            probability = scores.exp_().sum(dim=0) * blend  # (M, N)
            if len(sums) <= row:
                sums.append(probability)
            else:
                sums[row] += probability
        self._heads += query.shape[2]

    def attention(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each row: the hole's tokens (M,) on the finest grid, and their mean attention (M, side, side).

        Raises:
            InputError: nothing was noted.
        """
        if not self._sums:
            raise InputError(
                "no reference attention was recorded: a correspondence needs a reference, at least one step, and the "
                "default attention back end"
            )
        finest = max(self._sums)
        results = []
        for row, hole in enumerate(self._hole(finest)):
            total = torch.zeros(int(hole.sum()), finest, finest, device=hole.device)
            for side, sums in self._sums.items():
                factor = finest // side
                coarse = self._hole(side)[row].float().cumsum(0).long().view(side, side) - 1  # number in sums
                number = _spread(coarse, factor).flatten()[hole]
                maps = sums[row][number].view(-1, side, side)
                total += _spread(maps, factor) / factor**2
            results.append((hole.nonzero().squeeze(1), total / self._heads))
        return results

    def _hole(self, side: int) -> torch.Tensor:
        """(R, side * side) bool: tokens that hold any of the hole."""
        return F.adaptive_max_pool2d(self._mask, side).flatten(1) > 0


def _spread(grid: torch.Tensor, factor: int) -> torch.Tensor:
    """(..., n, n) -> (..., n * factor, n * factor), every cell repeated."""
    return grid.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
