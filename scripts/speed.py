"""Named measurements: ours and a peer, interleaved in one process, equal results asserted.

python scripts/speed.py NAME [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mimicbrush.errors import MimicBrushError, run_plainly

if TYPE_CHECKING:
    import torch

Side = Callable[[], "torch.Tensor"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "name", choices=sorted(MEASUREMENTS), help="; ".join(f"{n}: {m.__doc__}" for n, m in MEASUREMENTS.items())
    )
    parser.add_argument("--rounds", type=int, default=15, help="times that each side runs (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args()
    ours, peer, tolerance = MEASUREMENTS[arguments.name]()
    figures = {"name": arguments.name, **compare(ours, peer, arguments.rounds, tolerance)}
    for name, value in figures.items():
        print(f"{name:>20}  {value:.4g}" if isinstance(value, float) else f"{name:>20}  {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def compare(ours: Side, peer: Side, rounds: int, tolerance: float) -> dict[str, object]:
    """Run both sides in turn and compare medians; ratios are peer over ours, so more is better.

    Raises:
        MimicBrushError: the results differ by more than the tolerance: then no speed is worth reporting.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    difference = float((ours() - peer()).abs().max())  # also the warm-up
    if not difference <= tolerance:
        raise MimicBrushError(f"ours and the peer differ by {difference:.3g}, allowed are {tolerance:.3g}")
    flops, seconds = [], ([], [])
    for side in (ours, peer):
        with FlopCounterMode(display=False) as counter:
            side()
        flops.append(counter.get_total_flops())
    for _ in range(rounds):
        for side, times in zip((ours, peer), seconds, strict=True):
            start = time.perf_counter()
            side()
            times.append(time.perf_counter() - start)
    own, others = (statistics.median(times) for times in seconds)
    return {
        "time_ratio": others / own,
        "flop_ratio": flops[1] / flops[0],
        "max_abs_diff": difference,
        "ours_ms": own * 1e3,
        "peer_ms": others * 1e3,
        "ours_gflop": flops[0] / 1e9,
        "peer_gflop": flops[1] / 1e9,
        "rounds": rounds,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def dropped_references() -> tuple[Side, Side, float]:
    """one training pass of a reading layer, some references dropped: own keys instead against two attentions"""
    import torch
    import torch.nn.functional as F
    from diffusers.models.attention_processor import Attention

    from mimicbrush.models.reference_attention import ReadReference
    from mimicbrush.types import ReferenceStates

    torch.manual_seed(0)
    batch, tokens, width, heads = 4, 1024, 128, 8
    layer = Attention(width, heads=heads, dim_head=width // heads, processor=ReadReference("layer", blend=1.0))
    own, feature = torch.randn(2, batch, tokens, width).unbind(0)
    keep = torch.tensor([True, False, True, True])
    states = ReferenceStates({"layer": feature}, keep)

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

    return pass_through(lambda: layer(own, reference_states=states)), pass_through(two_attentions), 1e-5


MEASUREMENTS = {"dropped_references": dropped_references}

if __name__ == "__main__":
    run_plainly(main)
