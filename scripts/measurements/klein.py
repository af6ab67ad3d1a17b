"""FLUX.2 klein at full size: what a training step takes, counted without a GPU, and timed on one.

A step is that of `+experiment=klein`, with random weights and images: frozen weights in bfloat16, adapters in float32.
What is counted is for tensors of PyTorch's fake kind, see `step_costs`. The memory is counted apart from the FLOP: the
counter of FLOP keeps tensors alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from measurements.harness import Counted, time_alone

if TYPE_CHECKING:
    import torch

    from mimicbrush.training.methods.flux2_klein import Flux2KleinMethod, KleinInputs
    from mimicbrush.training.options import TrainOptions
    from mimicbrush.types import TrainBatch

#: Layers with adapters, as in configs/experiment/klein.yaml: of a GPU machine no package is asked that reads it.
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "to_out")
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

    @property
    def options(self) -> TrainOptions:
        """Those of the experiment that a step depends on."""
        from mimicbrush.training.options import TrainOptions

        return TrainOptions(
            lora_rank=self.rank,
            lora_target_modules=ADAPTED,
            activation_checkpointing=self.checkpointing,
            reference_drop_ratio=0.0,
            correspondence_weight=0.1 if self.correspondence else 0.0,
        )

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
    for rank in RANKS:
        yield Counted(f"weights, adapters of rank {rank}", partial(count_weights, KleinSetting(rank=rank)))
    for size_px in (512, 1024):
        for references in (1, 2, 4):
            for how, checkpointing, correspondence in (
                ("everything kept", False, False),
                ("blocks computed again", True, False),
                ("blocks computed again, correspondence loss", True, True),
            ):
                changed = KleinSetting(size_px, references, checkpointing=checkpointing, correspondence=correspondence)
                yield Counted(f"{size_px} px, references: {references}, {how}", partial(count_sample, changed))


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
    from measurements.step_costs import Launches

    method = setting.method()
    with _without_content(setting, method) as (learn, encode):
        step, encoding = Launches(), Launches()
        with step:
            loss = learn()
            kept_bytes = step.alive_bytes
            loss.backward()
        del loss
        with encoding:
            encode()
    size = setting.batch_size
    found = {
        "kept_gib": kept_bytes / size / 2**30,
        "peak_gib": step.peak_bytes / size / 2**30,
        "encode_gib": encoding.peak_bytes / size / 2**30,
        **count_flop(setting),
    }
    weights = count_weights(setting, method)
    fixed_gib = RESERVED_GIB + weights["frozen_gib"] + weights["trained_gib"]
    sample_gib = max(found["peak_gib"], found["encode_gib"])
    fits = {f"fits_{name.replace(' ', '_')}": int((card - fixed_gib) / sample_gib) for name, card in CARDS_GIB.items()}
    return found | fits


def count_flop(setting: KleinSetting) -> dict[str, float]:
    """Count the FLOP of a sample: ``tflop`` of all, ``encode_tflop`` of the VAE."""
    from torch.utils.flop_counter import FlopCounterMode

    step, encoding = (FlopCounterMode(display=False) for _ in range(2))
    with _without_content(setting, setting.method()) as (learn, encode):
        with step:
            learn().backward()
        with encoding:
            encode()
    flop, encode_flop = (each.get_total_flops() / setting.batch_size for each in (step, encoding))
    return {"tflop": (flop + encode_flop) / 1e12, "encode_tflop": encode_flop / 1e12}


@contextmanager
def _without_content(
    setting: KleinSetting, method: Flux2KleinMethod
) -> Iterator[tuple[Callable[[], torch.Tensor], Callable[[], None]]]:
    """Let tensors have no content, and give what computes the loss of a batch and what encodes its images."""
    import torch
    from measurements.step_costs import as_a_gpu_computes
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mimicbrush.models.flux2_klein.sequence import encode_images

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
            yield learn, encode


class KleinTraining:
    """A step as `training.trainer.Trainer.train` makes it, without loader, logs and checkpoints.

    Args:
        setting: says which; not on the meta device.
    """

    def __init__(self, setting: KleinSetting) -> None:
        from measurements.training_step import make_optimizer

        self.method = setting.method()
        self.trained = self.method.trained_parameters()
        self.autocast = setting.half
        self.adam, self.average = make_optimizer(self.trained)

    def step(self, batch: TrainBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """A step: loss, and the norm of the gradients."""
        import torch
        from measurements.training_step import move_weights

        inputs = self.method.encode(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.method.loss(self.method.model, inputs, 0, {}).total
        loss.backward()
        return loss.detach(), move_weights(self.method.model, self.trained, self.adam, self.average)


def klein_rows(device: str, toy: bool) -> Iterator[Counted]:
    """Rows of the piece `klein` of scripts/gpu_check.sh: training steps at full size in bf16, or of a toy in float32.

    Args:
        device: where they run.
        toy: see `KleinSetting`.
    """
    sizes = (64,) if toy else (512, 1024)
    for size_px in sizes:
        for references in (1, 2):
            setting = KleinSetting(size_px, references, device=device, toy=toy, half=not toy)
            # Without blocks that are computed again 1024 px take 60 GiB.
            for checkpointing in (False, True) if size_px < 1024 else (True,):
                how = "blocks computed again" if checkpointing else "everything kept"
                case = f"{size_px} px, references: {references}, {how}"
                yield Counted(case, partial(time_step, replace(setting, checkpointing=checkpointing)))


def time_step(setting: KleinSetting) -> dict[str, float]:
    """Time a step, and at full size compare it with what was counted.

    Returns:
        As `time_alone`; ``loss`` of the first step; at full size also ``tflop_per_s`` and, where it is known what the
        device could do, ``share_of_peak``, both without what is computed again.

    Raises:
        MimicBrushError: a loss is not finite, or the weights did not move.
    """
    import torch

    from mimicbrush.errors import MimicBrushError
    from mimicbrush.training.performance import find_peak_flop_per_s

    training, batch, device = KleinTraining(setting), setting.batch(), torch.device(setting.device)
    before = {name: parameter.detach().clone() for name, parameter in training.trained.items()}
    losses = []

    def step() -> None:
        losses.append(training.step(batch.pin_memory() if device.type == "cuda" else batch, device)[0])

    found = time_alone(step, setting.batch_size, device.type == "cuda", rounds=1 if setting.toy else 2)
    moved = sum(not torch.equal(parameter, before[name]) for name, parameter in training.trained.items())
    if not torch.stack(losses).isfinite().all() or not moved:
        raise MimicBrushError(f"losses are {losses}, and {moved} of {len(before)} adapters moved; expected all of them")
    found["loss"] = losses[0].item()
    if not setting.toy:
        flop = count_flop(replace(setting, device="meta", checkpointing=False))["tflop"] * 1e12
        found["tflop_per_s"] = flop / found["ms"] / 1e9
        if peak := find_peak_flop_per_s(device, "bf16"):
            found["share_of_peak"] = found["tflop_per_s"] * 1e12 / peak
    return found
