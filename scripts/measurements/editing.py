"""An edit, and the layer of it that reads the reference: against the released algorithm, on the same weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from measurements.harness import Case, Side, count_flops

from mimicbrush.errors import MimicBrushError

if TYPE_CHECKING:
    import torch

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
        if self.compiled:
            for unet in (pipe.unet, pipe.reference_unet, released.unet):
                unet.to(memory_format=torch.channels_last).compile()

        size_px, numbers = self.size_px, torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (2, size_px, size_px, 3), generator=numbers, dtype=torch.uint8).numpy()
        mask = torch.zeros(size_px, size_px, dtype=torch.uint8)
        mask[size_px // 4 : size_px * 3 // 4, size_px // 4 : size_px * 3 // 4] = 255
        latents = torch.randn(1, 4, size_px // 8, size_px // 8, generator=numbers).to(self.device, dtype)
        source, hole, reference = (
            tensor.to(self.device, dtype)
            for tensor in (to_tensor(images[:1]), (mask > 128)[None, None].float(), to_tensor(images[1:]))
        )
        options = {"num_inference_steps": self.steps, "guidance_scale": 5.0, "output_type": output}

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
        (found["features"],) = pipe.read_references(found["prepared"], timestep[None], 1)

    def step() -> None:
        states = ReferenceStates(projected={**found["cached_kv"], **found["features"]})
        pipe.denoise(latents, found["cond_latents"], timestep, found["context"], states, guidance)

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


def _released_conventions(parts: dict[str, object], reference_timestep: str) -> MimicBrushPipeline:
    from mimicbrush.models.options import RELEASED_CONVENTIONS
    from mimicbrush.models.schedule import noise_scheduler
    from mimicbrush.pipelines import MimicBrushPipeline

    options = {**RELEASED_CONVENTIONS, "reference_timestep": reference_timestep, "posterior": "mean"}
    pipe = MimicBrushPipeline(**parts, scheduler=noise_scheduler(), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe
