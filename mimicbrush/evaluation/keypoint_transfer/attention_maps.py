"""Reference attention of a few tokens, kept apart by layer and by third of the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from mimicbrush.errors import InputError
from mimicbrush.ops.correspondence import Correspondence
from mimicbrush.ops.crops import Placement

#: Of the sampler's steps, in order: the first third sees the most noise.
THIRDS = ("early", "middle", "late")


@dataclass
class AttentionMaps:
    """Attention maps of K tokens, summed over the heads and steps of each layer and third of the steps.

    Attributes:
        are_scores: the maps hold scores before the softmax, standardised (see `AttentionAtTokens`), not probabilities.
        sums: (module path, number in `THIRDS`) -> (K, n, n), on the grid of that layer's tokens.
        counts: how many maps were summed there: heads x steps of probabilities, steps of scores.
    """

    are_scores: bool
    sums: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    counts: dict[tuple[str, int], int] = field(default_factory=dict)

    @property
    def sides(self) -> dict[str, int]:
        """Tokens along a side by module path, in the order in which the layers attend."""
        return {path: maps.shape[-1] for (path, _), maps in self.sums.items()}

    def average(self, path: str | None = None, third: int | None = None) -> torch.Tensor:
        """Average over heads, layers and steps, of one layer or third or (None) of all: (K, n, n), the finest n.

        A coarse layer's probability is spread evenly over the fine tokens that a coarse one covers; a score is theirs.

        Raises:
            InputError: nothing was recorded.
        """
        chosen = {key: maps for key, maps in self.sums.items() if path in (None, key[0]) and third in (None, key[1])}
        if not chosen:
            raise InputError(
                "no reference attention was recorded: recording needs a reference U-Net, at least one step in every "
                "third, and the default attention backend"
            )
        finest = max(maps.shape[-1] for maps in chosen.values())
        total = torch.zeros_like(_spread(next(iter(chosen.values())), finest, divide=False))
        for maps in chosen.values():
            total += _spread(maps, finest, divide=not self.are_scores)
        return total / sum(self.counts[key] for key in chosen)

    def find_places(self, size_px: int, path: str | None = None, third: int | None = None) -> np.ndarray:
        """Find the peaks of the `average`: (K, 2) float32, px of a canvas of this side, pixel centres at integers.

        The place is the centre of what the peak and the eight tokens around it hold, as in
        `Correspondence.from_attention`; of scores, what their softmax holds.
        """
        maps = self.average(path, third)
        if self.are_scores:
            maps = maps.flatten(1).softmax(dim=1).view_as(maps)
        canvas = Placement((0, 0, size_px, size_px), size_px)
        no_tokens = np.zeros(len(maps), np.int64)  # where they look from is not asked for
        correspondence = Correspondence.from_attention(no_tokens, maps.cpu().numpy(), canvas, canvas)
        return correspondence.reference_xy - 0.5  # from edges to pixel centres

    def merge(self, is_own: torch.Tensor, other: AttentionMaps) -> AttentionMaps:
        """Merge the maps of two edits: ours for tokens that are True in (K,), the other's for the rest."""
        sums = {key: torch.where(is_own[:, None, None], maps, other.sums[key]) for key, maps in self.sums.items()}
        return AttentionMaps(self.are_scores, sums, dict(self.counts))


class AttentionAtTokens:
    """A record of the reference attention of K tokens; an `AttentionRecord` for edits of one source.

    Probabilities are what `CorrespondenceRecorder` adds up: blend times the probability in the softmax over
    [own ; reference], of every head.

    Scores are q k / sqrt(d) before the softmax, mean over heads (ZeroCo, arXiv 2412.09072). Their size differs between
    layers, so that one could outvote the rest: from each token's scores its mean over all reference tokens is taken
    away, and what is left divided by the layer's standard deviation at that step, over all tokens. Layers then count
    alike.

    Args:
        tokens: (K,) numbers of tokens on a grid of `side` x `side`; in a coarser layer, the token that covers it.
        side: of that grid, at least that of the finest layer.
        num_steps: how often each layer will attend.
        scores: keep scores instead of probabilities.
        transposed: keep how much every token of the source looks at these K of the *reference*, instead of where
            these K of the source look.
    """

    def __init__(
        self, tokens: torch.Tensor, side: int, num_steps: int, scores: bool = False, transposed: bool = False
    ) -> None:
        self.tokens, self.side, self.num_steps = tokens, side, num_steps
        self.scores, self.transposed = scores, transposed
        self.maps = AttentionMaps(scores)
        self._steps_seen: dict[str, int] = {}

    def add(self, path: str, query: torch.Tensor, reference_key: torch.Tensor, lse: torch.Tensor, blend: float) -> None:
        """Add one layer at one step; see `types.AttentionRecord`.

        Raises:
            InputError: more than one row has a reference, or there are more steps than were announced.
        """
        step = self._steps_seen.get(path, 0)
        if len(query) != 1 or step >= self.num_steps:
            raise InputError(
                f"got {len(query)} rows at step {step + 1}, but this record takes one source and {self.num_steps} steps"
            )
        self._steps_seen[path] = step + 1
        q, k = query[0].float(), reference_key[0].float()  # (N, heads, d), (M, heads, d)
        at = self._tokens_of(math.isqrt(len(k if self.transposed else q)))
        if self.scores:
            rows, columns = (q, k[at]) if self.transposed else (q[at], k)
            maps, count = _standardise_scores(q, k, rows, columns), 1
        else:
            rows, columns, row_lse = (q, k[at], lse[0]) if self.transposed else (q[at], k, lse[0, at])
            scores = torch.einsum("ahd,bhd->hab", rows, columns) * q.shape[-1] ** -0.5 - row_lse.T[..., None]
            maps, count = scores.exp_().sum(dim=0) * blend, q.shape[1]
        maps = (maps.T if self.transposed else maps).cpu()  # small, and there to stay
        side = math.isqrt(maps.shape[1])
        key = path, len(THIRDS) * step // self.num_steps
        self.maps.sums[key] = self.maps.sums.get(key, 0) + maps.reshape(-1, side, side)
        self.maps.counts[key] = self.maps.counts.get(key, 0) + count

    def _tokens_of(self, side: int) -> torch.Tensor:
        """(K,) numbers of the tokens that cover ours in a layer with so many along a side."""
        row, column = self.tokens // self.side, self.tokens % self.side
        return (row * side // self.side) * side + column * side // self.side


def _standardise_scores(q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Scores of some queries (A, heads, d) and keys (B, heads, d) of a layer's (N, ...) and (M, ...): (A, B).

    See `AttentionAtTokens`. The mean and deviation are those of all N x M scores, which are never held: they follow
    from the keys' mean and covariance.
    """
    q, k, rows, columns = (part.flatten(1) for part in (q, k, rows, columns))
    centre = k.mean(dim=0)
    covariance = (k - centre).T @ (k - centre) / len(k)
    deviation = ((q @ covariance) * q).sum(dim=1).mean().sqrt()
    return rows @ (columns - centre).T / deviation.clamp(min=torch.finfo(q.dtype).tiny)


def _spread(maps: torch.Tensor, side: int, divide: bool) -> torch.Tensor:
    """(K, n, n) -> (K, side, side), each token's value given to, or divided among, the finer ones that it covers."""
    covering = torch.arange(side, device=maps.device) * maps.shape[-1] // side
    spread = maps[:, covering][:, :, covering]
    if not divide:
        return spread
    share = 1 / covering.bincount()[covering].float()
    return spread * (share[:, None] * share)
