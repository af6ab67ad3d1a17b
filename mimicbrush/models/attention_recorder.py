"""Records which reference token filled which masked token: sums the reference attention while a pipeline denoises."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mimicbrush.errors import InputError


class RecordedAttention(NamedTuple):
    """Recorded attention of the M masked tokens of a row.

    Attributes:
        tokens: (M,) indices of the masked tokens on the finest grid.
        attention: (M, n side, side) mean probability; the grids of n references are concatenated vertically.
        head_peaks: the same shape; all attention of a head to the references is counted at the peak of this head.
    """

    tokens: torch.Tensor
    attention: torch.Tensor
    head_peaks: torch.Tensor


class CorrespondenceRecorder:
    """Recorder that sums the reference attention of the masked tokens.

    All heads, layers and steps have the same weight. Each adds ``blend * p``, where p is the probability of a reference
    token in the softmax over [own ; reference]; the probabilities of own tokens are not recorded. The probability of a
    coarse token is spread evenly over the fine tokens that it covers.

    Args:
        mask: (R, 1, h, w) on the grid of the latents, 1 = repaint, for the rows that have a reference.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self._mask = mask.float()
        #: Tokens along a side -> for each row (2, M, n * side * side) with M masked tokens: the summed probabilities,
        #: and the same with those of each head summed at its peak.
        self._sums: dict[int, list[torch.Tensor]] = {}
        self._heads = 0

    def add(self, path: str, query: torch.Tensor, reference_key: torch.Tensor, lse: torch.Tensor, blend: float) -> None:
        """Add one layer at one step; see `types.AttentionRecord`."""
        side = math.isqrt(query.shape[1])
        sums = self._sums.setdefault(side, [])
        for row in range(len(query)):
            masked = self._masked_tokens(side)[row]  # (N,) bool
            # log p = q k' / sqrt(d) - lse over [own ; reference]
            scores = torch.einsum("mhd,nhd->hmn", query[row, masked].float(), reference_key[row].float())
            log_probability = scores * query.shape[-1] ** -0.5 - lse[row, masked].T[..., None]  # (heads, M, N)
            of_heads = log_probability.exp_()
            peaks = torch.zeros_like(of_heads[0])
            peaks.scatter_add_(1, of_heads.argmax(dim=2).T, of_heads.sum(dim=2).T)
            both = torch.stack([of_heads.sum(dim=0), peaks]) * blend
            if len(sums) <= row:
                sums.append(both)
            else:
                sums[row] += both
        self._heads += query.shape[2]

    def attention(self) -> list[RecordedAttention]:
        """Return the average of the recorded attention, for each row.

        Raises:
            InputError: nothing was recorded.
        """
        if not self._sums:
            raise InputError(
                "no reference attention was recorded: a correspondence needs a reference, at least one step, and the "
                "default attention backend"
            )
        finest = max(self._sums)
        results = []
        for row, masked in enumerate(self._masked_tokens(finest)):
            count = self._sums[finest][row].shape[2] // finest**2
            total = torch.zeros(2, int(masked.sum()), count, finest, finest, device=masked.device)
            for side, sums in self._sums.items():
                factor = finest // side
                coarse = self._masked_tokens(side)[row].float().cumsum(0).long().view(side, side) - 1  # number in sums
                number = _spread(coarse, factor).flatten()[masked]
                maps = sums[row][:, number].view(2, -1, count, side, side)
                total += _spread(maps, factor) / factor**2
            results.append(RecordedAttention(masked.nonzero().squeeze(1), *total.flatten(2, 3) / self._heads))
        return results

    def _masked_tokens(self, side: int) -> torch.Tensor:
        """Find the tokens that contain a part of the mask, (R, side * side) bool."""
        return F.adaptive_max_pool2d(self._mask, side).flatten(1) > 0


def _spread(grid: torch.Tensor, factor: int) -> torch.Tensor:
    """Repeat every cell: (..., n, n) -> (..., n * factor, n * factor)."""
    return grid.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
