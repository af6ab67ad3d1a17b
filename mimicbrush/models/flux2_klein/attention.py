"""Queries of target tokens and keys of reference tokens, taken from the attention of FLUX.2 klein.

The attention itself is always computed by the processors of diffusers. Our subclasses catch the outputs of the norms of
queries and keys, and rotate them as diffusers does. So the results of the transformer are the same to the bit, with and
without a tap.
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

#: Key of the `AttentionTap` in ``joint_attention_kwargs``, which the transformer passes to its processors.
TAP = "tap"


class AttentionTap:
    """Receiver of the queries of target tokens and the keys of reference tokens, layer by layer.

    It is not a dataclass: FSDP copies dataclasses that pass through a network, and data written into a copy is lost.

    Args:
        layout: positions of the tokens in the sequence.
        paths: module paths of the requested layers; None: all layers.
        keys: slice of the sequence whose keys are requested; None: the tokens of all references.
    """

    def __init__(self, layout: TokenLayout, paths: Collection[str] | None = None, keys: slice | None = None) -> None:
        self.layout, self.paths = layout, paths
        self.keys = layout.references if keys is None else keys
        #: path -> rotated queries (B, N, heads, d) and keys (B, M, heads, d), stored by `add`.
        self.queries_and_keys: dict[str, KeysValues] = {}

    def add(self, path: str, query: torch.Tensor, key: torch.Tensor) -> None:
        """Store the queries and keys of one layer; recorders can override this to process them instead.

        It is called again for a layer whose activations are computed again in the backward pass.

        Args:
            path: path of the layer's module, such as ``transformer_blocks.0.attn``.
            query: (B, N, heads, d), of the target tokens; the score of a pair of tokens is q k / sqrt(d).
            key: (B, M, heads, d), of the tokens `keys`.
        """
        self.queries_and_keys.setdefault(path, (query, key))

    def wants(self, path: str) -> bool:
        """Return whether a layer is requested."""
        return self.paths is None or path in self.paths

    def take(self, path: str, query: torch.Tensor, key: torch.Tensor, rotation: tuple[torch.Tensor, ...]) -> None:
        """Choose the rows of a layer, rotate them by their positions, and add them.

        Args:
            path: path of the layer's module.
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
        path: path of its attention module.
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
        """Compute the attention with diffusers' processor, and fill the tap, if there is one."""
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
        path: path of its attention module.
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
        """Compute the attention with diffusers' processor, and fill the tap, if there is one."""
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
    """Yield a list that contains the output of each module, in this order, after all of them have run."""
    outputs: list[torch.Tensor] = [torch.empty(0)] * len(modules)

    def catch(number: int) -> Any:
        return lambda _module, _inputs, output: outputs.__setitem__(number, output)

    handles = [module.register_forward_hook(catch(number)) for number, module in enumerate(modules)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
