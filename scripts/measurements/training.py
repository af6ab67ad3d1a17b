"""Parts of a training step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from measurements.harness import Case, Counted, Side

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


def noise(batch: int = 256) -> Iterator[Case]:
    """timesteps, drops and noise of 256 samples, on the CPU or the GPU: one call against a loop over the samples"""
    import torch

    from mimicbrush.ops.counter_rng import generator, mix
    from mimicbrush.training.noise import NoiseSample, sample_counter_normals

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keys = torch.tensor([mix(number) for number in range(batch)])

    def make_case(name: str, shape: tuple[int, int, int], noise_device: torch.device | None, rounds: int) -> Case:
        count = math.prod(shape)

        def make_at_once() -> list[torch.Tensor]:
            made = NoiseSample.for_keys(
                keys, shape, num_timesteps=1000, reference_drop_ratio=0.1, depth_drop_ratio=0.5,
                noise_device=noise_device,
            )  # fmt: skip
            return [made.timestep, made.keep_reference, made.keep_depth, made.noise, made.posteriors]

        def make_one_by_one() -> list[torch.Tensor]:
            timesteps, keeps, seeds = [], [], []
            for key in keys.tolist():
                decisions = generator(key, 1)
                timesteps.append(int(decisions.integers(1000)))
                keeps.append([bool(decisions.random() >= ratio) for ratio in (0.1, 0.5)])
                seeds.append([mix(key, 2), mix(key, 3)])
            if noise_device is None:
                normals = [
                    torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in stream])
                    for size, stream in zip((count, 3 * count), zip(*seeds, strict=True), strict=True)
                ]
            else:
                normals = [
                    sample_counter_normals(torch.tensor([stream], device=noise_device), (size,))[0]
                    for size, stream in zip((count, 3 * count), zip(*seeds, strict=True), strict=True)
                ]
            keep_reference, keep_depth = torch.tensor(keeps).unbind(1)
            posteriors = normals[1].unflatten(1, (3, *shape)).transpose(0, 1)
            return [torch.tensor(timesteps), keep_reference, keep_depth, normals[0].unflatten(1, shape), posteriors]

        return Case(name, make_at_once, make_one_by_one, tolerance=0.0, rounds=rounds, counts={})

    yield make_case("decisions alone", (1, 1, 1), device, rounds=15)
    for size_px, side in ((64, 16), (512, 64)):
        rounds = 15 if side == 16 else 3
        yield make_case(f"{size_px} px, noise by PyTorch on the CPU", (4, side, side), None, rounds)
        yield make_case(f"{size_px} px, noise by the counter on this {device.type}", (4, side, side), device, rounds)


def launches() -> Iterator[Counted]:
    """operators of a training step's forward pass at full size, changes of memory order, and what its norms move"""
    from measurements.activations import MemorySetting
    from measurements.training_launches import count_forward

    for title, options, changes_order in (
        ("no option, PyTorch before 2.15", {}, True),
        ("no option", {}, False),
        ("low_precision_norms, PyTorch before 2.15", {"low_precision_norms": True}, True),
        ("low_precision_norms", {"low_precision_norms": True}, False),
        ("fused_norms, any PyTorch", {"fused_norms": True}, False),
        ("low_precision_norms, fused_norms", {"low_precision_norms": True, "fused_norms": True}, False),
    ):
        setting = MemorySetting(options=options, channels_last=True)
        yield Counted(title, lambda setting=setting, changed=changes_order: count_forward(setting, changed))
