"""Queries of target tokens and keys of reference tokens, taken from the attention of FLUX.2 klein.

The stock processors of diffusers compute the attention, always. Ours catch what the norms of queries and keys put out
on the way, and rotate it as the stock processors do. So the numbers of the transformer stay the same to the bit,
whether something is handed out or not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor
from torch import nn

from mimicbrush.models.flux2_klein.sequence import TokenLayout

if TYPE_CHECKING:
    from mimicbrush.types import KeysValues

#: What the transformer passes on to its processors (``joint_attention_kwargs``) under this name is a `AttentionTap`.
TAP = "tap"


class AttentionTap:
    """Receiver of the queries of target tokens and the keys of reference tokens, layer by layer.

    No dataclass: FSDP copies those on their way through a network, and what is written into a copy is lost.

    Args:
        layout: of the sequence.
        paths: module paths of the layers that are asked for; None: all layers.
        keys: the tokens whose keys are asked for, as a slice over the whole sequence; None: those of all references.
    """

    def __init__(self, layout: TokenLayout, paths: Collection[str] | None = None, keys: slice | None = None) -> None:
        self.layout, self.paths = layout, paths
        self.keys = layout.references if keys is None else keys
        #: path -> queries (B, N, heads, d) and keys (B, M, heads, d), with their rotation; the default of `add`.
        self.queries_and_keys: dict[str, KeysValues] = {}

    def add(self, path: str, query: torch.Tensor, key: torch.Tensor) -> None:
        """Take one layer; a recorder that sums up instead of keeping overrides this.

        A layer comes a second time where its activations are computed again for the backward pass.

        Args:
            path: of the layer's module, such as ``transformer_blocks.0.attn``.
            query: (B, N, heads, d), of the target tokens; score of a pair of tokens is q k / sqrt(d).
            key: (B, M, heads, d), of the tokens `keys`.
        """
        self.queries_and_keys.setdefault(path, (query, key))

    def wants(self, path: str) -> bool:
        """Tell whether a layer is asked for."""
        return self.paths is None or path in self.paths

    def take(self, path: str, query: torch.Tensor, key: torch.Tensor, rotation: tuple[torch.Tensor, ...]) -> None:
        """Choose the rows of a layer, rotate them by their positions, and add them.

        Args:
            path: of the layer.
            query, key: (B, S, heads, d), of the whole sequence, normalised and not yet rotated.
            rotation: cosines and sines, (S, d) each.
        """
        rotated = [
            apply_rotary_emb(states[:, rows], tuple(each[rows] for each in rotation), sequence_dim=1)
            for states, rows in ((query, self.layout.target), (key, self.keys))
        ]
        self.add(path, *rotated)


class TappedDoubleProcessor(Flux2AttnProcessor):
    """Attention of a block with a stream for the text and one for the images; see `AttentionTap`.

    Args:
        path: of its attention module.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        tap: AttentionTap | None = None,
    ) -> Any:
        """Compute what the stock processor computes, and fill the tap, if there is one."""
        inputs = (attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if tap is None or not tap.wants(self.path):
            return super().__call__(*inputs)
        assert image_rotary_emb is not None
        with _catch_outputs(attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k) as caught:
            result = super().__call__(*inputs)
        query, key, text_query, text_key = caught
        tap.take(self.path, torch.cat([text_query, query], dim=1), torch.cat([text_key, key], dim=1), image_rotary_emb)
        return result


class TappedSingleProcessor(Flux2ParallelSelfAttnProcessor):
    """Attention of a block with one stream for everything; see `AttentionTap`.

    Args:
        path: of its attention module.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        tap: AttentionTap | None = None,
    ) -> Any:
        """Compute what the stock processor computes, and fill the tap, if there is one."""
        inputs = (attn, hidden_states, attention_mask, image_rotary_emb)
        if tap is None or not tap.wants(self.path):
            return super().__call__(*inputs)
        assert image_rotary_emb is not None
        with _catch_outputs(attn.norm_q, attn.norm_k) as caught:
            result = super().__call__(*inputs)
        query, key = caught
        tap.take(self.path, query, key, image_rotary_emb)
        return result


def set_tapped_processors(transformer: Flux2Transformer2DModel) -> None:
    """Let a transformer fill a tap that is passed as ``joint_attention_kwargs={"tap": AttentionTap(...)}``."""
    kinds = ((transformer.transformer_blocks, TappedDoubleProcessor),
             (transformer.single_transformer_blocks, TappedSingleProcessor))  # fmt: skip
    paths = iter(klein_attention_paths(transformer))
    for blocks, kind in kinds:
        for block in blocks:
            processor = kind(next(paths))
            processor._attention_backend = block.attn.processor._attention_backend
            block.attn.set_processor(processor)


def klein_attention_paths(transformer: Flux2Transformer2DModel) -> list[str]:
    """List the module paths of all attention layers, in the order in which they run."""
    return [
        f"{name}.{number}.attn"
        for name in ("transformer_blocks", "single_transformer_blocks")
        for number in range(len(getattr(transformer, name)))
    ]


@contextmanager
def _catch_outputs(*modules: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Give a list that holds the output of each module, in this order, once all of them have run."""
    outputs: list[torch.Tensor] = [torch.empty(0)] * len(modules)

    def catch(number: int) -> Any:
        return lambda _module, _inputs, output: outputs.__setitem__(number, output)

    handles = [module.register_forward_hook(catch(number)) for number, module in enumerate(modules)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
