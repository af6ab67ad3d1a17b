"""Named measurements: ours and a peer, interleaved in one process, equal results asserted.

python scripts/speed.py NAME [--json FILE]

Ratios are peer over ours: more is better. FLOP counts do not depend on the machine (a multiply-add counts as two);
"full size" is SD-1.5 at 512 px, counted without being run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mimicbrush.errors import MimicBrushError, run_plainly

if TYPE_CHECKING:
    import torch

    from mimicbrush.pipelines import MimicBrushPipeline

Side = Callable[[], "torch.Tensor"]


@dataclass
class Case:
    """One comparison.

    Attributes:
        case: its name.
        ours, peer: do the work once, and return what must be equal.
        tolerance: the most that the results may differ.
        rounds: times that each side runs, unless told otherwise.
        flop_ratio_full_size: where the timed size is not the real one.
    """

    case: str
    ours: Side
    peer: Side
    tolerance: float
    rounds: int
    flop_ratio_full_size: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "name", choices=sorted(MEASUREMENTS), help="; ".join(f"{n}: {m.__doc__}" for n, m in MEASUREMENTS.items())
    )
    parser.add_argument("--rounds", type=int, help="times that each side runs (default: the measurement's own)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args()

    import torch

    cases = []
    for case in MEASUREMENTS[arguments.name]():
        cases.append(compare(case, arguments.rounds or case.rounds))
        print(f"{arguments.name}, {case.case}")
        for name, value in list(cases[-1].items())[1:]:
            print(f"{name:>22}  {value:.4g}" if isinstance(value, float) else f"{name:>22}  {value}")
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"name": arguments.name, "cases": cases, **machine}, indent=1))


def compare(case: Case, rounds: int) -> dict[str, object]:
    """Run both sides in turn and compare medians.

    Raises:
        MimicBrushError: the results differ by more than the tolerance: then no speed is worth reporting.
    """
    difference = float((case.ours() - case.peer()).abs().max())  # also the warm-up
    if not difference <= case.tolerance:
        raise MimicBrushError(
            f"{case.case}: ours and the peer differ by {difference:.3g}, allowed are {case.tolerance:.3g}"
        )
    flops = [count_flops(side) for side in (case.ours, case.peer)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, times in zip((case.ours, case.peer), seconds, strict=True):
            start = time.perf_counter()
            side()
            times.append(time.perf_counter() - start)
    own, others = (statistics.median(times) for times in seconds)
    ratio = flops[1] / flops[0]
    return {
        "case": case.case,
        "time_ratio": others / own,
        "flop_ratio": ratio,
        "flop_ratio_full_size": ratio if case.flop_ratio_full_size is None else case.flop_ratio_full_size,
        "max_abs_diff": difference,
        "ours_ms": own * 1e3,
        "peer_ms": others * 1e3,
        "ours_gflop": flops[0] / 1e9,
        "peer_gflop": flops[1] / 1e9,
        "rounds": rounds,
    }


def count_flops(work: Callable[[], object]) -> int:
    """FLOP of matrix products, convolutions and attention; on the meta device nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def read_block() -> list[Case]:
    """one guided pass of a layer that reads the reference, at the real sizes: against three attentions over 2 rows"""
    import torch
    from diffusers.models.attention_processor import Attention
    from released_algorithm import ThreeAttentions

    from mimicbrush.models.reference_attention import ReadReference
    from mimicbrush.types import ReferenceStates

    def case(side: int, width: int) -> Case:
        torch.manual_seed(0)
        layer = Attention(width, heads=8, dim_head=width // 8).eval()
        ours, peer = ReadReference("layer", blend=0.5), ThreeAttentions("layer")
        own = torch.randn(2, side * side, width)
        feature = torch.randn(1, side * side, width)
        one, two = ReferenceStates({"layer": feature}), ReferenceStates({"layer": feature.repeat(2, 1, 1)})

        @torch.no_grad()
        def lean() -> torch.Tensor:
            return ours(layer, own, reference_states=one)

        @torch.no_grad()
        def released() -> torch.Tensor:
            return peer(layer, own, reference_states=two)

        return Case(f"{side}x{side}", lean, released, 1e-4, rounds=5)

    return [case(64, 320), case(32, 640)]


def edit() -> list[Case]:
    """a whole guided edit, 64 to 256 channels at 256 px: against the released algorithm, same weights and noise"""
    import torch
    from released_algorithm import ReleasedAlgorithm

    from mimicbrush.models.parts import random_parts
    from mimicbrush.ops.images import to_tensor

    steps, guidance_scale, size_px = 6, 5.0, 256
    torch.manual_seed(0)
    parts = vars(random_parts(size_px=size_px, block_out_channels=(64, 128, 256, 256)))
    numbers = torch.Generator().manual_seed(0)
    source, reference = torch.randint(0, 256, (2, size_px, size_px, 3), generator=numbers, dtype=torch.uint8).numpy()
    mask = torch.zeros(size_px, size_px, dtype=torch.uint8)
    mask[64:192, 64:192] = 255
    latents = torch.randn(1, 4, size_px // 8, size_px // 8, generator=numbers)

    def case(reference_timestep: str) -> Case:
        pipe = _released_conventions(parts, reference_timestep)
        released = ReleasedAlgorithm(pipe, reference_timestep)
        pixels = to_tensor(source[None]), (mask > 128)[None, None].float(), to_tensor(reference[None])

        def ours() -> torch.Tensor:
            return pipe(
                source,
                mask.numpy(),
                reference,
                latents=latents,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                output_type="pt",
            ).images

        def peer() -> torch.Tensor:
            return released.decode(released(*pixels, latents, steps=steps, guidance_scale=guidance_scale))

        own_tera, peer_tera = full_size_edit(reference_timestep)
        print(f"{reference_timestep}: 50 steps at full size: {own_tera:.1f} TFLOP, released {peer_tera:.1f}")
        return Case(reference_timestep, ours, peer, 1e-4, 5, peer_tera / own_tera)

    return [case("current"), case("zero")]


def full_size_edit(reference_timestep: str, steps: int = 50) -> tuple[float, float]:
    """TFLOP of a guided edit at 512 px, ours and the released algorithm, counted on the meta device."""
    import torch
    from released_algorithm import ReleasedAlgorithm

    from mimicbrush.models.parts import random_parts
    from mimicbrush.models.reference_attention import project_context
    from mimicbrush.types import ReferenceStates

    with torch.device("meta"):
        pipe = _released_conventions(vars(random_parts()), reference_timestep)
        pixels, mask = torch.empty(1, 3, pipe.size_px, pipe.size_px), torch.empty(1, 1, pipe.size_px, pipe.size_px)
        latents = torch.empty(1, 4, pipe.size_px // 8, pipe.size_px // 8)
    timestep = torch.tensor(1)
    found: dict[str, object] = {}

    # The parts of `MimicBrushPipeline.__call__`, in its order.
    def prepare() -> None:
        found["prepared"] = prepared = pipe.encode_references(pixels, [], None)
        stem = pipe.prepare_stem(pixels, mask, False, None, None)
        context = torch.cat([pipe.no_reference_context(), prepared.context])
        found["stem"], found["context"] = torch.cat([stem] * 2), context
        found["at_hand"] = project_context(pipe.unet, context)
        pipe.decode(latents, [], [], [], False, "pt")

    def read() -> None:
        (found["features"],) = pipe.read_references(found["prepared"], timestep[None], 1)

    def step() -> None:
        states = ReferenceStates(projected={**found["at_hand"], **found["features"]})
        pipe.denoise(latents, found["stem"], timestep, found["context"], states, 5.0)

    released = ReleasedAlgorithm(pipe, reference_timestep)

    def prepare_released() -> None:
        found["conditions"] = released.encode(pixels, mask, pixels, keep_shape=False)
        released.decode(latents)

    reads = steps if reference_timestep == "current" else 1
    with torch.no_grad():
        own = count_flops(prepare) + reads * count_flops(read) + steps * count_flops(step)
        peer = count_flops(prepare_released)
        peer += steps * count_flops(lambda: released.step(latents, timestep, found["conditions"], 5.0))
    return own / 1e12, peer / 1e12


def _released_conventions(parts: dict[str, object], reference_timestep: str) -> MimicBrushPipeline:
    from mimicbrush.models.options import RELEASED_CONVENTIONS
    from mimicbrush.models.schedule import noise_scheduler
    from mimicbrush.pipelines import MimicBrushPipeline

    options = {**RELEASED_CONVENTIONS, "reference_timestep": reference_timestep, "posterior": "mean"}
    pipe = MimicBrushPipeline(**parts, scheduler=noise_scheduler(), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dropped_references() -> list[Case]:
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


MEASUREMENTS = {"dropped_references": dropped_references, "edit": edit, "read_block": read_block}

if __name__ == "__main__":
    run_plainly(main)
