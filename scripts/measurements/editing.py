"""An edit, and the layer of it that reads the reference: against the released algorithm, on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from measurements.harness import Case, Counted, Made, Side, check_equal, count_flops, exact_float32, time_alone
from measurements.training_step import FULL_SIZE_PX, FULL_WIDTHS
from measurements.training_variants import ROUNDS, choose_variants

from mimicbrush.errors import MimicBrushError

if TYPE_CHECKING:
    import torch
    from peers.released_algorithm import ReleasedAlgorithm

    from mimicbrush.pipelines import MimicBrushPipeline


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

    from mimicbrush.models.reference_attention import ReferenceReadProcessor
    from mimicbrush.types import ReferenceStates

    torch.manual_seed(0)
    ours, peer = ReferenceReadProcessor("layer", blend=0.5), ThreeAttentions("layer")
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


def _run_as_it_comes(_pipe: MimicBrushPipeline, _released: ReleasedAlgorithm) -> None:
    """Nothing is prepared."""


def _compile(pipe: MimicBrushPipeline, released: ReleasedAlgorithm) -> None:
    """Compile the U-Nets of both sides, in channels_last."""
    import torch

    for unet in (pipe.unet, pipe.reference_unet, released.unet):
        unet.to(memory_format=torch.channels_last).compile()


def _enable_graphs(pipe: MimicBrushPipeline, _released: ReleasedAlgorithm) -> None:
    pipe.enable_cuda_graphs()


@dataclass(frozen=True)
class EditVariant:
    """A way to edit that is timed on a GPU.

    Attributes:
        prepare: what is done to the pipeline, or to the released algorithm, before the first edit.
        call: further options of the pipeline's call.
        on_request, checked, profiled, is_peer: as of `TrainVariant`.
    """

    prepare: Callable[[MimicBrushPipeline, ReleasedAlgorithm], None] = _run_as_it_comes
    call: Mapping[str, Any] = field(default_factory=dict)
    on_request: bool = False
    checked: bool = True
    profiled: bool = False
    is_peer: bool = False


#: By name. A variant more is a line more.
EDIT_VARIANTS: Mapping[str, EditVariant] = {
    "peer": EditVariant(is_peer=True),
    "eager": EditVariant(profiled=True),
    "cuda_graphs": EditVariant(_enable_graphs, profiled=True),
    "peer_compiled": EditVariant(_compile, on_request=True, is_peer=True),
    "compiled": EditVariant(_compile, on_request=True, checked=False),
}


@dataclass
class EditSetting:
    """A guided edit with random weights, ours and the released algorithm's.

    Attributes:
        size_px, block_out_channels: of the model.
        steps: of DDIM.
        device, dtype: where and in what.
        variant: of ours.
    """

    size_px: int = FULL_SIZE_PX
    block_out_channels: tuple[int, ...] = FULL_WIDTHS
    steps: int = 50
    device: str = "cpu"
    dtype: str = "float32"
    variant: EditVariant = field(default_factory=EditVariant)

    def sides(self, reference_timestep: str, output: str = "pt") -> tuple[Side, Side]:
        """Ours and the released algorithm, from equal images, noise and weights."""
        import torch
        from peers.released_algorithm import ReleasedAlgorithm

        from mimicbrush.models.components import random_components
        from mimicbrush.ops.canvas import to_tensor

        torch.manual_seed(0)
        with torch.device(self.device):
            parts = vars(random_components(size_px=self.size_px, block_out_channels=self.block_out_channels))
        dtype = getattr(torch, self.dtype)
        pipe = _released_conventions(
            {name: torch.nn.Module.to(part, dtype) for name, part in parts.items()}, reference_timestep
        )
        released = ReleasedAlgorithm(pipe, reference_timestep)
        self.variant.prepare(pipe, released)

        size_px, numbers = self.size_px, torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (2, size_px, size_px, 3), generator=numbers, dtype=torch.uint8).numpy()
        mask = torch.zeros(size_px, size_px, dtype=torch.uint8)
        mask[size_px // 4 : size_px * 3 // 4, size_px // 4 : size_px * 3 // 4] = 255
        latents = torch.randn(1, 4, size_px // 8, size_px // 8, generator=numbers).to(self.device, dtype)
        source, hole, reference = (
            tensor.to(self.device, dtype)
            for tensor in (to_tensor(images[:1]), (mask > 128)[None, None].float(), to_tensor(images[1:]))
        )
        options = {"num_inference_steps": self.steps, "guidance_scale": 5.0, "output_type": output, **self.variant.call}

        def ours() -> torch.Tensor:
            return pipe(images[0], mask.numpy(), images[1], latents=latents, **options).images

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
    for reference_timestep, (own, _) in full_size_edit(few_steps=4).items():
        print(f"{reference_timestep}: 4 steps of a distilled model: {own:.1f} TFLOP")
        cases.append(Case(reference_timestep, *setting.sides(reference_timestep), 1e-4, 3, peer / own))
    return cases


def edit_gpu() -> Iterator[Counted]:
    """the same on a CUDA GPU at full size, bf16, 50 steps: peer and variants of ours, latency, peak memory"""
    import torch

    if not torch.cuda.is_available():
        raise MimicBrushError("edit_gpu needs a CUDA GPU, and PyTorch sees none; use `edit` on a CPU")
    yield from edit_rows(EditSetting(device="cuda", dtype="bfloat16"))


def edit_rows(timed: EditSetting, names: Collection[str] = ()) -> Iterator[Counted]:
    """Rows of `edit_gpu`: each of `EDIT_VARIANTS`, the peer first, with the reference read at every step and once.

    The peer is timed in one of these two ways alone: its work is the same in both.

    Args:
        timed: what is timed. Equality is asserted in float32, after four steps, on the latents.
        names: see `choose_variants`.
    """
    work = Made(lambda: _work_of_an_edit(timed))
    peer_ms: list[float] = []
    for name, variant in choose_variants(EDIT_VARIANTS, names).items():
        for reference_timestep in ("current",) if variant.is_peer else ("current", "zero"):
            setting = replace(timed, variant=variant)
            case = f"{name}, {reference_timestep}"
            yield Counted(case, partial(_time_variant, case, setting, reference_timestep, work, peer_ms))


def _time_variant(
    case: str,
    setting: EditSetting,
    reference_timestep: str,
    work: Made[tuple[Mapping[str, float], float | None]],
    peer_ms: list[float],
) -> dict[str, object]:
    """The figures of a row, per edit; those of the first peer are noted for the rows that follow."""
    on_gpu, variant = setting.device == "cuda", setting.variant
    found: dict[str, object] = {}
    if variant.checked and not variant.is_peer:
        exactly = replace(setting, steps=4, dtype="float32").sides(reference_timestep, "latent")
        with exact_float32():
            found["max_abs_diff"] = check_equal(case, exactly[0](), exactly[1](), 1e-3)
        del exactly
    ours, peer = setting.sides(reference_timestep)
    found = {**time_alone(peer if variant.is_peer else ours, 1, on_gpu, ROUNDS if on_gpu else 1), **found}
    if variant.is_peer:
        peer_ms.append(found["ms"])
        return found
    if peer_ms:
        found["time_ratio"] = peer_ms[0] / found["ms"]
    tflop, peak = work()
    if reference_timestep in tflop:
        found["tflop_per_s"] = tflop[reference_timestep] / found["ms"] * 1e3
        if peak:
            found["share_of_peak"] = found["tflop_per_s"] * 1e12 / peak
    return found


def _work_of_an_edit(setting: EditSetting) -> tuple[Mapping[str, float], float | None]:
    """TFLOP by the way to read the reference, at full size alone; and what the device could do in a second."""
    import torch

    from mimicbrush.training.performance import find_peak_flop_per_s

    is_full = (setting.size_px, setting.block_out_channels) == (FULL_SIZE_PX, FULL_WIDTHS)
    counted = {way: own for way, (own, _) in full_size_edit(setting.steps).items()} if is_full else {}
    return counted, find_peak_flop_per_s(torch.device(setting.device), "bf16")


def full_size_edit(steps: int = 50, few_steps: int | None = None) -> dict[str, tuple[float, float]]:
    """TFLOP of a guided edit at 512 px, ours and the released algorithm, counted on the meta device.

    Args:
        steps: of both.
        few_steps: of ours instead, and without guidance: what a distilled model takes.

    Returns:
        "current" and "zero" -> (ours, released). The released loop reads the reference at every step in both.
    """
    import torch
    from peers.released_algorithm import ReleasedAlgorithm

    from mimicbrush.models.components import random_components
    from mimicbrush.models.encoders import decode_latents
    from mimicbrush.models.reference_attention import project_context
    from mimicbrush.types import ReferenceStates

    with torch.device("meta"):
        pipe = _released_conventions(vars(random_components()), "current")
        pixels, mask = torch.empty(1, 3, pipe.size_px, pipe.size_px), torch.empty(1, 1, pipe.size_px, pipe.size_px)
        latents = torch.empty(1, 4, pipe.size_px // 8, pipe.size_px // 8)
    timestep, guidance = torch.tensor(1), 5.0 if few_steps is None else None
    found: dict[str, object] = {}

    # The parts of `MimicBrushPipeline.__call__`, in its order.
    def prepare() -> None:
        found["prepared"] = prepared = pipe.encode_references(pixels, [], None)
        cond_latents = pipe.prepare_cond_latents(pixels, mask, False, None, None)
        context = prepared.context
        if few_steps is None:
            context, cond_latents = torch.cat([pipe.no_reference_context(), context]), torch.cat([cond_latents] * 2)
        found["cond_latents"], found["context"] = cond_latents, context
        found["cached_kv"] = project_context(pipe.unet, context)
        decode_latents(pipe.vae, latents)

    def read() -> None:
        (found["features"],) = pipe.compute_reference_kv(found["prepared"], timestep[None], 1)

    def step() -> None:
        states = ReferenceStates(keys_values={**found["cached_kv"], **found["features"]})
        pipe.predict_noise(latents, found["cond_latents"], timestep, found["context"], states, guidance)

    released = ReleasedAlgorithm(pipe)

    def prepare_released() -> None:
        found["conditions"] = released.encode(pixels, mask, pixels, keep_shape=False)
        released.decode(latents)

    def step_released() -> None:
        released.step(latents, timestep, found["conditions"], 5.0)

    with torch.no_grad():
        prepared, reading, step_flops = (count_flops(work) / 1e12 for work in (prepare, read, step))
        peer = (count_flops(prepare_released) + steps * count_flops(step_released)) / 1e12
    own_steps = few_steps or steps
    own = prepared + own_steps * step_flops
    return {"current": (own + own_steps * reading, peer), "zero": (own + reading, peer)}


def edit_launches() -> Iterator[Counted]:
    """operations that a step of a full-size edit starts, eagerly and with CUDA graphs; counted, not run"""
    for reference_timestep in ("current", "zero"):
        yield Counted(reference_timestep, partial(_count_launches, reference_timestep))


def _count_launches(reference_timestep: str) -> dict[str, float]:
    import torch
    from measurements.edit_launches import step_launches

    from mimicbrush.models.components import random_components

    with torch.device("meta"):
        pipe = _released_conventions(vars(random_components()), reference_timestep)
    return step_launches(pipe)


def _released_conventions(parts: dict[str, object], reference_timestep: str) -> MimicBrushPipeline:
    import torch

    from mimicbrush.models.options import RELEASED_CONVENTIONS
    from mimicbrush.models.schedule import noise_scheduler
    from mimicbrush.pipelines import MimicBrushPipeline

    options = {**RELEASED_CONVENTIONS, "reference_timestep": reference_timestep, "posterior": "mean"}
    with torch.device("cpu"):  # where the factors of a scheduler always are
        pipe = MimicBrushPipeline(**parts, scheduler=noise_scheduler(), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe
