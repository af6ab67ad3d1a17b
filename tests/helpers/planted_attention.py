"""Attention of which it is known where it goes."""

from __future__ import annotations

import torch

from mimicbrush.pipelines import MimicBrushPipeline


def plant(pipe: MimicBrushPipeline, path: str, shift: tuple[int, int]) -> None:
    """What enters a layer becomes a code of the token's place, and the reference's is moved by `shift`."""
    own, other = pipe.unet.get_submodule(path), pipe.reference_unet.get_submodule(path)
    width, heads = own.query_dim, own.heads

    def place_code(tokens: int, moved: tuple[int, int]) -> torch.Tensor:
        """(N, 4 * heads): as angles, in units of the canvas, so that a level with half the tokens agrees."""
        side = int(tokens**0.5)
        at = (torch.arange(side) + 0.5) / side
        rows, columns = torch.meshgrid(at - moved[0] / 8, at - moved[1] / 8, indexing="ij")
        angles = [grid.flatten() * torch.pi / 2 for grid in (rows, columns)]
        return torch.stack([f(a) for a in angles for f in (torch.cos, torch.sin)], dim=1).repeat(1, heads)

    head = width // heads
    spread = torch.zeros(width, 4 * heads)
    for number in range(heads):
        spread[number * head : number * head + 4, number * 4 : number * 4 + 4] = torch.eye(4)

    def planted(moved: tuple[int, int], scale: float) -> object:
        def hook(_: object, args: tuple, kwargs: dict) -> tuple:
            tokens = args[0]
            code = place_code(tokens.shape[1], moved) @ spread.T * scale
            return (code.expand(len(tokens), -1, -1).to(tokens), *args[1:]), kwargs

        return hook

    own.register_forward_pre_hook(planted((0, 0), 1.0), with_kwargs=True)
    other.register_forward_pre_hook(planted(shift, 40.0), with_kwargs=True)
    with torch.no_grad():
        own.to_q.weight.copy_(torch.eye(width) * 200)
        own.to_k.weight.copy_(torch.eye(width))
