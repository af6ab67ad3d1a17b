"""FLUX.2 klein at full size: what a training step takes, counted without a GPU, and timed on one.

A step is that of `+experiment=klein`, with random weights and images: frozen weights in bfloat16, adapters in float32.
What is counted is for tensors of PyTorch's fake kind, see `step_costs`. The memory is counted apart from the FLOP: the
counter of FLOP keeps tensors alive.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from measurements.harness import Counted, Made, Side, time_alone

if TYPE_CHECKING:
    import torch

    from mimicbrush.training.methods.flux2_klein import Flux2KleinMethod, KleinInputs
    from mimicbrush.training.options import TrainOptions
    from mimicbrush.types import TrainBatch

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RANKS = (16, 32, 64)
#: Of a sample at most, `data.num_matches`.
MATCHES = 64
#: Memory of cards, GiB, and what of it is left for the program: its context and gaps of the allocator take the rest.
CARDS_GIB = {"24 GB": 24, "80 GB": 80}
RESERVED_GIB = 1.5
#: Bytes of a trained parameter: weight, gradient, two moments and the average, all float32.
TRAINED_BYTES = 5 * 4


@dataclass(frozen=True)
class KleinSetting:
    """A training step of FLUX.2 klein.

    Attributes:
        size_px: side of the canvas.
        references: of a sample.
        rank: of the adapters.
        checkpointing: blocks are computed again in the backward pass.
        correspondence: the correspondence loss is on, with as many matches as a sample has at most.
        batch_size: samples.
        device: "meta" to count only.
        toy: a toy of the same classes instead of the full size.
        half: frozen weights and autocast in bfloat16.
    """

    size_px: int = 512
    references: int = 1
    rank: int = 32
    checkpointing: bool = True
    correspondence: bool = False
    batch_size: int = 1
    device: str = "meta"
    toy: bool = False
    half: bool = True

    @cached_property
    def options(self) -> TrainOptions:
        """Those of the experiment, with what this setting chooses."""
        from omegaconf import OmegaConf

        from mimicbrush.assembly.prerequisites import compose_training

        experiment = "+experiment=klein_smoke" if self.toy else "+experiment=klein"
        options: TrainOptions = OmegaConf.to_object(compose_training([experiment], CONFIGS).train)  # type: ignore[assignment]
        chosen = {"lora_rank": self.rank, "activation_checkpointing": self.checkpointing}
        return replace(options, **chosen, correspondence_weight=0.1 if self.correspondence else 0.0)

    def method(self) -> Flux2KleinMethod:
        """The method, with networks on the device: random weights, adapters, and a random prompt."""
        import torch
        from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

        from mimicbrush.models.flux2_klein.attention import klein_attention_paths
        from mimicbrush.models.flux2_klein.components import toy_klein
        from mimicbrush.models.flux2_klein.full_size import SCHEDULER, TRANSFORMER, VAE
        from mimicbrush.models.flux2_klein.prompt import MAX_TOKENS
        from mimicbrush.models.options import ToyFlux2KleinModel
        from mimicbrush.training.lora import freeze_and_adapt
        from mimicbrush.training.methods.flux2_klein import Flux2KleinMethod, KleinModel

        with torch.random.fork_rng(), torch.device(self.device), _default_dtype(self.half):
            torch.manual_seed(0)
            if self.toy:
                parts = toy_klein(ToyFlux2KleinModel(size_px=self.size_px))
                transformer, vae, scheduler = parts.transformer, parts.vae, parts.scheduler
            else:
                transformer, vae = Flux2Transformer2DModel(**TRANSFORMER), AutoencoderKLFlux2(**VAE)
                scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
            prompt = torch.randn(1, MAX_TOKENS, transformer.config.joint_attention_dim)
            if self.checkpointing:
                transformer.enable_gradient_checkpointing()
            paths = tuple(klein_attention_paths(transformer)) if self.correspondence else ()
            model = KleinModel(transformer, prompt, size_px=self.size_px, correspondence_paths=paths)
            freeze_and_adapt({"transformer": transformer}, self.options)
        return Flux2KleinMethod(model.train(), vae, scheduler, cast(Any, None), self.options)

    def batch(self) -> TrainBatch:
        """Samples on the CPU, as the loader gives them."""
        import torch

        from mimicbrush.types import TrainBatch

        numbers = torch.Generator().manual_seed(0)
        shape = (self.batch_size, 1 + self.references, 3, self.size_px, self.size_px)
        source, reference, *others = (torch.rand(shape, generator=numbers) * 2 - 1).unbind(1)
        mask = torch.zeros(self.batch_size, 1, self.size_px, self.size_px)
        mask[..., self.size_px // 4 : self.size_px // 2, self.size_px // 4 : self.size_px // 2] = 1
        keys = torch.arange(self.batch_size)
        more = {"other_references": torch.stack(others, dim=1)} if others else {}
        return TrainBatch(source, reference, mask, keys, keys, **more)

    def inputs(self, method: Flux2KleinMethod) -> KleinInputs:
        """What a step gets of the frozen networks; without content, of which nothing is dropped."""
        import torch

        from mimicbrush.training.methods.flux2_klein import KleinInputs
        from mimicbrush.training.noise import NoiseSample
        from mimicbrush.types import Matches

        side = self.size_px // 2 ** len(method.vae.config.block_out_channels)
        latents = torch.empty(self.batch_size, method.model.transformer.config.in_channels, side, side)
        ones = torch.ones(self.batch_size)
        keep, rows = ones.bool(), torch.arange(self.batch_size)
        noise = NoiseSample(rows, latents, latents[None, :0], keep, keep, rows, rows, ones / 2)
        places = torch.ones(self.batch_size, MATCHES, 2)
        matches = Matches(places, places, places[..., 0].bool()) if self.correspondence else None
        return KleinInputs(latents, (latents,) * (1 + self.references), latents[:, :1], noise, matches)


@contextmanager
def _default_dtype(half: bool) -> Iterator[None]:
    """Make weights in half precision from the start: in float32 they would take twice the memory for a while."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if half else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def klein() -> Iterator[Counted]:
    """FLUX.2 klein at full size: bytes of weights and adapters, then memory, FLOP and the batch that fits, by size"""
    setting = KleinSetting()
    for rank in RANKS:
        yield Counted(f"weights, adapters of rank {rank}", partial(count_weights, replace(setting, rank=rank)))
    for size_px in (512, 1024):
        for references in (1, 2, 4):
            for checkpointing in (False, True):
                how = "blocks computed again" if checkpointing else "everything kept"
                case = f"{size_px} px, {references} reference{'s' * (references > 1)}, {how}"
                changed = replace(setting, size_px=size_px, references=references, checkpointing=checkpointing)
                yield Counted(case, partial(count_sample, changed))
    with_loss = replace(setting, correspondence=True)
    yield Counted("512 px, 1 reference, blocks computed again, correspondence loss", partial(count_sample, with_loss))


def count_weights(setting: KleinSetting, method: Flux2KleinMethod | None = None) -> dict[str, float]:
    """Count bytes that a step holds, whatever the batch.

    Args:
        setting: says which step.
        method: of the setting, where there is one already.

    Returns:
        ``frozen_gib`` of transformer and VAE; ``adapter_millions``, trained parameters; ``trained_gib``, their weights,
        gradients, moments and average.
    """
    method = method or setting.method()
    frozen = [*method.vae.parameters(), *(each for each in method.model.parameters() if not each.requires_grad)]
    trained = sum(parameter.numel() for parameter in method.trained_parameters().values())
    return {
        "frozen_gib": sum(each.nbytes for each in (*frozen, method.model.prompt_embeds)) / 2**30,
        "adapter_millions": trained / 1e6,
        "trained_gib": trained * TRAINED_BYTES / 2**30,
    }


def count_sample(setting: KleinSetting) -> dict[str, float]:
    """Count what a sample adds to `count_weights`, and how many of them fit on a card.

    Returns:
        ``kept_gib`` from the forward to the backward pass; ``peak_gib`` of both passes; ``encode_gib``, the peak of the
        VAE, which runs before; ``tflop`` of all; ``encode_tflop``, the part of the VAE; ``fits_...``, samples.
    """
    import torch
    from measurements.step_costs import Launches, as_a_gpu_computes
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from mimicbrush.models.flux2_klein.sequence import encode_images

    method = setting.method()
    # The noise levels of the scheduler are real numbers.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in (method.model, method.vae):
            network._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        for parameter in method.trained_parameters().values():
            parameter.grad = torch.empty_like(parameter)
        inputs = setting.inputs(method)
        pixels = torch.empty(setting.batch_size * (2 + setting.references), 3, setting.size_px, setting.size_px)

        def learn() -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return method.loss(method.model, inputs, 0, {}).total

        def encode() -> None:
            with torch.no_grad():
                encode_images(method.vae, pixels)

        with as_a_gpu_computes():
            step, encoding, step_flop, encode_flop = Launches(), Launches(), FlopCounterMode(display=False), FlopCounterMode(display=False)
            with step:
                loss = learn()
                kept_bytes = step.alive_bytes
                loss.backward()
            del loss
            with encoding:
                encode()
            with step_flop:
                learn().backward()
            with encode_flop:
                encode()
    size = setting.batch_size
    found = {
        "kept_gib": kept_bytes / size / 2**30,
        "peak_gib": step.peak_bytes / size / 2**30,
        "encode_gib": encoding.peak_bytes / size / 2**30,
        "tflop": (step_flop.get_total_flops() + encode_flop.get_total_flops()) / size / 1e12,
        "encode_tflop": encode_flop.get_total_flops() / size / 1e12,
    }
    weights = count_weights(setting, method)
    fixed_gib = RESERVED_GIB + weights["frozen_gib"] + weights["trained_gib"]
    sample_gib = max(found["peak_gib"], found["encode_gib"])
    fits = {f"fits_{name.replace(' ', '_')}": int((card - fixed_gib) / sample_gib) for name, card in CARDS_GIB.items()}
    return found | fits
