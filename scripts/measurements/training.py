"""Parts of a training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from measurements.harness import Case, Side

if TYPE_CHECKING:
    import torch


def dropped_references() -> list[Case]:
    """one training pass of a reading layer, some references dropped: own keys instead against two attentions"""
    import torch
    import torch.nn.functional as F
    from diffusers.models.attention_processor import Attention

    from mimicbrush.models.reference_attention import ReferenceReadProcessor
    from mimicbrush.types import ReferenceStates

    torch.manual_seed(0)
    batch, tokens, width, heads = 4, 1024, 128, 8
    layer = Attention(width, heads=heads, dim_head=width // heads, processor=ReferenceReadProcessor("layer", blend=1.0))
    own, feature = torch.randn(2, batch, tokens, width).unbind(0)
    keep = torch.tensor([True, False, True, True])
    states = ReferenceStates({"layer": feature}, keep=keep)

    def two_attentions() -> torch.Tensor:
        # The loop that people write: attend with and without the reference, and choose per sample.
        def attend(context: torch.Tensor) -> torch.Tensor:
            query, key, value = (
                t.unflatten(-1, (heads, -1)).transpose(1, 2)
                for t in (layer.to_q(own), layer.to_k(context), layer.to_v(context))
            )
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

        chosen = torch.where(keep.view(-1, 1, 1), attend(torch.cat([own, feature], dim=1)), attend(own))
        return layer.to_out[0](chosen)

    def pass_through(forward: Side) -> Side:
        def run() -> torch.Tensor:
            result = forward()
            gradients = torch.autograd.grad(result.square().mean(), [layer.to_q.weight, layer.to_k.weight])
            # Compared in units of the largest: gradients of a mean are tiny.
            parts = [part.detach().flatten() for part in (result, *gradients)]
            return torch.cat([part / part.abs().max() for part in parts])

        return run

    ours, peer = pass_through(lambda: layer(own, reference_states=states)), pass_through(two_attentions)
    return [Case(f"{batch} x {tokens} tokens", ours, peer, 1e-5, rounds=15)]
