"""Record the attention from target tokens to the references, with the same recorders as for the U-Nets."""

from __future__ import annotations

import torch

from mimicbrush.models.flux2_klein.attention import AttentionTap
from mimicbrush.models.flux2_klein.sequence import TokenLayout
from mimicbrush.types import AttentionRecord


class RecordingTap(AttentionTap):
    """A tap that fills an `AttentionRecord` with the attention from the target to the references.

    The attention of a token sums to 1; the rest goes to the text, the source and the target.

    Args:
        layout: positions of the tokens in the sequence.
        record: the record to fill.
        passes: passes of the transformer in each step. If there are two, only the first, with the prompt, is recorded.
    """

    def __init__(self, layout: TokenLayout, record: AttentionRecord, passes: int = 1) -> None:
        super().__init__(layout, keys=slice(0, layout.num_tokens))
        self.record, self.passes = record, passes
        self._seen: dict[str, int] = {}

    def add(self, path: str, query: torch.Tensor, key: torch.Tensor) -> None:
        """Add one layer of one step to the record."""
        seen = self._seen.get(path, 0)
        self._seen[path] = seen + 1
        if seen % self.passes == 0:
            self.record.add(path, query, key[:, self.layout.references], _log_sum_exp(query, key), 1.0)


def _log_sum_exp(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Compute log-sum-exp of the scores of queries (B, N, heads, d) over keys (B, S, heads, d): (B, N, heads)."""
    per_head = []
    for head in range(query.shape[2]):  # all heads at once would take gigabytes at full size
        q, k = query[:, :, head].float(), key[:, :, head].float()
        per_head.append((q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).logsumexp(dim=-1))
    return torch.stack(per_head, dim=-1)
