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
        equality: what is compared, where the timed results cannot be (half precision).
    """

    case: str
    ours: Side
    peer: Side
    tolerance: float
    rounds: int
    flop_ratio_full_size: float | None = None
    equality: tuple[Side, Side] | None = None


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
    import torch

    left, right = case.ours(), case.peer()  # also the warm-up
    on_gpu = left.is_cuda
    if case.equality:
        left, right = (side() for side in case.equality)
    difference = float((left - right).abs().max())
    if not difference <= case.tolerance:
        raise MimicBrushError(
            f"{case.case}: ours and the peer differ by {difference:.3g}, allowed are {case.tolerance:.3g}"
        )
    flops = [count_flops(side) for side in (case.ours, case.peer)]
    seconds: tuple[list[float], list[float]] = ([], [])
    peaks = [0, 0]
    for _ in range(rounds):
        for number, side in enumerate((case.ours, case.peer)):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            side()
            if on_gpu:
                torch.cuda.synchronize()
                peaks[number] = torch.cuda.max_memory_allocated()
            seconds[number].append(time.perf_counter() - start)
    own, others = (statistics.median(times) for times in seconds)
    memory = {"ours_peak_gib": peaks[0] / 2**30, "peer_peak_gib": peaks[1] / 2**30} if on_gpu else {}
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
        **memory,
    }


def count_flops(work: Callable[[], object]) -> int:
    """FLOP of matrix products, convolutions and attention; on the meta device nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def read_block() -> list[Case]:
    """one guided pass of a layer that reads the reference, at the real sizes: against three attentions over 2 rows"""

    def case(side: int, width: int) -> Case:
        return Case(f"{side}x{side}", *read_block_sides(side, width), 1e-4, rounds=5)

    return [case(64, 320), case(32, 640)]


def read_block_sides(side: int, width: int, device: str = "cpu") -> tuple[Side, Side]:
    """One reading layer on side x side tokens of this width, rows [unconditional, conditional]."""
    import torch
    from diffusers.models.attention_processor import Attention
    from peers.released_algorithm import ThreeAttentions

    from mimicbrush.models.reference_attention import ReadReference
    from mimicbrush.types import ReferenceStates

    torch.manual_seed(0)
    ours, peer = ReadReference("layer", blend=0.5), ThreeAttentions("layer")
    with torch.device(device):
        layer = Attention(width, heads=8, dim_head=width // 8).eval()
        own, feature = torch.randn(2, side * side, width), torch.randn(1, side * side, width)
    one, two = ReferenceStates({"layer": feature}), ReferenceStates({"layer": feature.repeat(2, 1, 1)})

    @torch.no_grad()
    def lean() -> torch.Tensor:
        return ours(layer, own, reference_states=one)

    @torch.no_grad()
    def released() -> torch.Tensor:
        return peer(layer, own, reference_states=two)

    return lean, released


@dataclass
class EditSetting:
    """A guided edit with random weights, ours and the released algorithm's.

    Attributes:
        size_px, block_out_channels: of the model.
        steps: of DDIM.
        device, dtype: where and in what.
        compiled: both U-Nets of both sides by torch.compile, ours in channels_last.
    """

    size_px: int
    block_out_channels: tuple[int, ...]
    steps: int
    device: str = "cpu"
    dtype: str = "float32"
    compiled: bool = False

    def sides(self, reference_timestep: str, output: str = "pt") -> tuple[Side, Side]:
        """Ours and the released algorithm, from equal pictures, noise and weights."""
        import torch
        from peers.released_algorithm import ReleasedAlgorithm

        from mimicbrush.models.parts import random_parts
        from mimicbrush.ops.images import to_tensor

        torch.manual_seed(0)
        with torch.device(self.device):
            parts = vars(random_parts(size_px=self.size_px, block_out_channels=self.block_out_channels))
        dtype = getattr(torch, self.dtype)
        pipe = _released_conventions(
            {name: torch.nn.Module.to(part, dtype) for name, part in parts.items()}, reference_timestep
        )
        released = ReleasedAlgorithm(pipe, reference_timestep)
        if self.compiled:
            for unet in (pipe.unet, pipe.reference_unet, released.unet):
                unet.to(memory_format=torch.channels_last).compile()

        size_px, numbers = self.size_px, torch.Generator().manual_seed(0)
        pictures = torch.randint(0, 256, (2, size_px, size_px, 3), generator=numbers, dtype=torch.uint8).numpy()
        mask = torch.zeros(size_px, size_px, dtype=torch.uint8)
        mask[size_px // 4 : size_px * 3 // 4, size_px // 4 : size_px * 3 // 4] = 255
        latents = torch.randn(1, 4, size_px // 8, size_px // 8, generator=numbers).to(self.device, dtype)
        source, hole, reference = (
            tensor.to(self.device, dtype)
            for tensor in (to_tensor(pictures[:1]), (mask > 128)[None, None].float(), to_tensor(pictures[1:]))
        )
        options = {"num_inference_steps": self.steps, "guidance_scale": 5.0, "output_type": output}

        def ours() -> torch.Tensor:
            return pipe(pictures[0], mask.numpy(), pictures[1], latents=latents, **options).images

        def peer() -> torch.Tensor:
            found = released(source, hole, reference, latents, steps=self.steps, guidance_scale=5.0)
            return found if output == "latent" else released.decode(found)

        return ours, peer


def edit() -> list[Case]:
    """a whole guided edit, 64 to 256 channels at 256 px: against the released algorithm, same weights and noise"""
    setting = EditSetting(size_px=256, block_out_channels=(64, 128, 256, 256), steps=6)
    cases = []
    for reference_timestep, (own, peer) in full_size_edit().items():
        print(f"{reference_timestep}: 50 steps at full size: {own:.1f} TFLOP, released {peer:.1f}")
        cases.append(Case(reference_timestep, *setting.sides(reference_timestep), 1e-4, 3, peer / own))
    return cases


def edit_gpu() -> list[Case]:
    """the same on a CUDA GPU at full size, bf16, 50 steps: eager and compiled, latency and peak memory"""
    import torch

    if not torch.cuda.is_available():
        raise MimicBrushError("edit_gpu needs a CUDA GPU, and PyTorch sees none; `edit` runs on a CPU")
    return edit_cases("cuda", "bfloat16", 512, (320, 640, 1280, 1280), 50)


def edit_cases(device: str, dtype: str, size_px: int, block_out_channels: tuple[int, ...], steps: int) -> list[Case]:
    """Cases of `edit_gpu`; equality is asserted in float32, after four steps, on the latents."""
    exact = EditSetting(size_px, block_out_channels, 4, device)
    cases = []
    for reference_timestep in ("current", "zero"):
        equality = exact.sides(reference_timestep, "latent")
        for compiled in (False, True):
            setting = EditSetting(size_px, block_out_channels, steps, device, dtype, compiled)
            name = f"{reference_timestep}, {'compiled' if compiled else 'eager'}"
            cases.append(Case(name, *setting.sides(reference_timestep), 1e-3, 5, equality=equality))
    return cases


def full_size_edit(steps: int = 50) -> dict[str, tuple[float, float]]:
    """TFLOP of a guided edit at 512 px, ours and the released algorithm, counted on the meta device.

    Returns:
        "current" and "zero" -> (ours, released). The released loop reads the reference at every step in both.
    """
    import torch
    from peers.released_algorithm import ReleasedAlgorithm

    from mimicbrush.models.encoders import decode_latents
    from mimicbrush.models.parts import random_parts
    from mimicbrush.models.reference_attention import project_context
    from mimicbrush.types import ReferenceStates

    with torch.device("meta"):
        pipe = _released_conventions(vars(random_parts()), "current")
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
        decode_latents(pipe.vae, latents)

    def read() -> None:
        (found["features"],) = pipe.read_references(found["prepared"], timestep[None], 1)

    def step() -> None:
        states = ReferenceStates(projected={**found["at_hand"], **found["features"]})
        pipe.denoise(latents, found["stem"], timestep, found["context"], states, 5.0)

    released = ReleasedAlgorithm(pipe)

    def prepare_released() -> None:
        found["conditions"] = released.encode(pixels, mask, pixels, keep_shape=False)
        released.decode(latents)

    def step_released() -> None:
        released.step(latents, timestep, found["conditions"], 5.0)

    with torch.no_grad():
        prepared, reading, step_flops = (count_flops(work) / 1e12 for work in (prepare, read, step))
        peer = (count_flops(prepare_released) + steps * count_flops(step_released)) / 1e12
    own = prepared + steps * step_flops
    return {"current": (own + steps * reading, peer), "zero": (own + reading, peer)}


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


MEASUREMENTS = {"dropped_references": dropped_references, "edit": edit, "edit_gpu": edit_gpu, "read_block": read_block}

if __name__ == "__main__":
    run_plainly(main)
