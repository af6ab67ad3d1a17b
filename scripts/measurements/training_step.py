"""A whole training step, its encoders and its optimizer: against the loop that people write today."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from measurements.harness import Case, Side, count_flops, memory_kept

if TYPE_CHECKING:
    import torch
    from diffusers.training_utils import EMAModel
    from peers.common_training import CommonTraining

    from mimicbrush.models.components import Components
    from mimicbrush.training.noise import NoiseSample
    from mimicbrush.training.objective import Conditions, FrozenEncoders, MimicBrushModel
    from mimicbrush.types import TrainBatch

LEARNING_RATE, MAX_GRAD_NORM, EMA_DECAY = 1e-5, 1.0, 0.9999
FULL_SIZE_PX, FULL_WIDTHS = 512, (320, 640, 1280, 1280)


class OurTraining:
    """A step as `training.trainer.Trainer.train` makes it, without loader, logs and checkpoints."""

    def __init__(self, model: MimicBrushModel, encoders: FrozenEncoders, autocast: torch.dtype | None) -> None:
        from mimicbrush.models.schedule import noise_scheduler

        self.model, self.encoders, self.autocast = model.train(), encoders, autocast
        self.noise_scheduler = noise_scheduler()
        self.adam: torch.optim.Optimizer | None = None
        if not next(model.parameters()).is_meta:
            self.trained = model.trained_parameters()
            self.adam, self.average = make_optimizer(self.trained)

    def encode(self, batch: TrainBatch, noise_sample: NoiseSample) -> Conditions:
        """Pixels -> conditions."""
        return self.encoders.encode(batch, noise_sample)

    def loss_and_gradients(self, batch: TrainBatch, noise_sample: NoiseSample) -> torch.Tensor:
        """() loss; the gradients are where the optimizer looks for them."""
        import torch

        from mimicbrush.training.objective import denoising_loss

        conditions = self.encode(batch, noise_sample)
        device = batch.source.device.type
        with torch.autocast(device, self.autocast) if self.autocast else nullcontext():
            loss = denoising_loss(self.model, self.noise_scheduler, conditions, noise_sample).total
        loss.backward()
        return loss.detach()

    def step(self, batch: TrainBatch, noise_sample: NoiseSample) -> tuple[torch.Tensor, torch.Tensor]:
        """A step: loss, and the norm of the gradients."""
        assert self.adam is not None
        loss = self.loss_and_gradients(batch, noise_sample)
        return loss, move_weights(self.model, self.trained, self.adam, self.average)


def make_optimizer(trained: Mapping[str, torch.nn.Parameter]) -> tuple[torch.optim.Optimizer, EMAModel]:
    """Make what moves the weights, and their average, as the trainer does."""
    import torch
    from diffusers.training_utils import EMAModel

    adam = torch.optim.Adam(trained.values(), lr=LEARNING_RATE, fused=True)
    return adam, EMAModel(trained.values(), decay=EMA_DECAY, foreach=True)


def move_weights(
    model: torch.nn.Module, trained: Mapping[str, torch.nn.Parameter], adam: torch.optim.Optimizer, average: EMAModel
) -> torch.Tensor:
    """Move the weights by their gradients, and the average after them; returns the norm of the gradients, ()."""
    from torch import nn

    from mimicbrush.training.metrics import compute_gradient_norms

    norm = compute_gradient_norms(model, trained)["gradient_norm"]
    nn.utils.clip_grads_with_norm_(trained.values(), MAX_GRAD_NORM, norm)
    adam.__dict__.update(grad_scale=None, found_inf=(~norm.isfinite()).float())
    adam.step()
    adam.zero_grad()
    average.step(trained.values())
    return norm


@dataclass
class StepSetting:
    """A training step on random weights and images, ours and the peer's. Built twice, it is the same.

    Attributes:
        size_px, block_out_channels: of the model, see `random_components`.
        batch_size: samples. One of eight has no reference, every other one no depth map (paper: 10 % and 50 %).
        device: "meta" to count only.
        made_on: where the random weights are made, if not there: those of a CPU and of a GPU differ.
        half: mixed precision and encoders in bfloat16.
        options: of ours, those of `TrainOptions` that are about speed. With `noise_on`="device" every step makes its
            noise there; else the noise comes with the batch, as loader workers make it.
    """

    size_px: int = FULL_SIZE_PX
    block_out_channels: tuple[int, ...] = FULL_WIDTHS
    batch_size: int = 8
    device: str = "cpu"
    made_on: str | None = None
    half: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def inputs(self) -> tuple[TrainBatch, NoiseSample]:
        """Batch and noise_sample on the CPU, as the loader gives them."""
        import torch

        from mimicbrush.types import TrainBatch

        numbers = torch.Generator().manual_seed(0)
        shape = (2, self.batch_size, 3, self.size_px, self.size_px)
        images = torch.randint(0, 256, shape, generator=numbers).float() / 127.5 - 1
        mask = (torch.rand(self.batch_size, 1, *shape[-2:], generator=numbers) > 0.5).float()
        keys = torch.arange(self.batch_size)
        return TrainBatch(*images, mask, keys, keys), self.noise(None)

    def noise(self, noise_device: torch.device | None) -> NoiseSample:
        """The noise of the batch, made there (None: on the CPU, with other numbers), and always the same drops."""
        import torch

        from mimicbrush.training.noise import NoiseSample

        keys, side = torch.arange(self.batch_size), self.size_px // 8
        ratios = {"reference_drop_ratio": 0.0, "depth_drop_ratio": 0.0}
        noise_sample = NoiseSample.for_keys(
            keys, (4, side, side), num_timesteps=1000, **ratios, noise_device=noise_device
        )
        keep_reference, keep_depth = keys % 8 != 1, keys % 2 == 0
        return replace(
            noise_sample,
            keep_reference=keep_reference,
            keep_depth=keep_depth,
            reference_rows=keep_reference.nonzero()[:, 0],
            depth_rows=keep_depth.nonzero()[:, 0],
        )

    def networks(self) -> Components:
        """All parts, on the device, the frozen ones in the type that they run in."""
        import torch

        from mimicbrush.models.components import random_components

        torch.manual_seed(0)
        with torch.device(self.made_on or self.device):
            parts = random_components(size_px=self.size_px, block_out_channels=self.block_out_channels)
        for part in vars(parts).values():
            torch.nn.Module.to(part, self.device)
        for part in (parts.vae, parts.image_encoder, parts.depth_estimator):
            torch.nn.Module.to(part, self.autocast or torch.float32).requires_grad_(False).eval()
        return parts

    @property
    def autocast(self) -> torch.dtype | None:
        """The half type, where there is one."""
        import torch

        return torch.bfloat16 if self.half else None

    def ours(self) -> OurTraining:
        """Ours, freshly made."""
        import torch

        from mimicbrush.models.options import ModelOptions
        from mimicbrush.training.objective import FrozenEncoders, MimicBrushModel
        from mimicbrush.training.options import TrainOptions
        from mimicbrush.training.performance import apply_speedups

        parts, device = self.networks(), torch.device(self.device)
        model = MimicBrushModel(
            parts.unet, parts.reference_unet, parts.image_projector, parts.depth_projector, size_px=self.size_px
        )
        apply_speedups(model, TrainOptions(**self.options), channels_last=device.type == "cuda")
        encoders = FrozenEncoders(parts, ModelOptions()).to(device, self.autocast or torch.float32)
        return OurTraining(model, encoders, self.autocast)

    def peer(self) -> CommonTraining:
        """The loop that people write, freshly made."""
        from peers.common_training import CommonTraining

        from mimicbrush.models.schedule import noise_scheduler

        return CommonTraining(
            self.networks(),
            self.size_px,
            noise_scheduler(),
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_GRAD_NORM,
            ema_decay=EMA_DECAY,
            autocast=self.autocast,
        )

    def makers(self) -> tuple[Callable[[], Side], Callable[[], Side]]:
        """What makes ours, and the peer, as sides."""
        return lambda: self.steps(self.ours()), lambda: self.steps(self.peer())

    def steps(self, training: OurTraining | CommonTraining) -> Side:
        """One step after another on the same samples, which come from the CPU: loss, and norm of the gradients."""
        import torch

        batch, noise_sample = self.inputs()
        if self.device == "cuda":
            batch = batch.pin_memory()

        device = torch.device(self.device)
        made_there = self.options.get("noise_on") == "device"

        def step() -> torch.Tensor:
            noise = (self.noise(device) if made_there else noise_sample).to(device)
            loss, norm = training.step(batch.to(device), noise)
            return torch.stack([torch.as_tensor(loss, device=device), norm])

        return step


#: What a CPU does in seconds, with about the shares of work of the full size.
SMALL = StepSetting(size_px=256, block_out_channels=(32, 64, 128, 128))


def train_step() -> Iterator[Case]:
    """a whole training step, 32 to 128 channels at 256 px: against the loop that people write today"""
    own, peer = full_size_tflop("loss_and_gradients")
    print(f"a sample at full size, with drops: {own:.2f} TFLOP, peer {peer:.2f}")
    with memory_kept():
        ours, other = (make() for make in SMALL.makers())
        # Both move their weights at every step; the loss, about 1, and the norm after the first are compared.
        yield Case("8 samples", ours, other, 1e-4, 5, peer / own, items=SMALL.batch_size, cpu_time=True)


def full_size_tflop(work: str) -> tuple[float, float]:
    """TFLOP of a sample at 512 px, ours and the peer's, with the drops of `StepSetting`, on the meta device.

    Args:
        work: "encode" or "loss_and_gradients", a method of both.
    """
    import torch

    setting, device = StepSetting(device="meta"), torch.device("meta")
    batch, noise_sample = (each.to(device) for each in setting.inputs())
    counted = []
    for training in (setting.ours(), setting.peer()):
        training.encode(batch, noise_sample)  # ours encodes "no reference" this first time only
        flop = count_flops(lambda training=training: getattr(training, work)(batch, noise_sample))
        counted.append(flop / setting.batch_size / 1e12)
    return counted[0], counted[1]


def encoders() -> Iterator[Case]:
    """what the frozen encoders make of a batch: one call of the VAE, and kept rows only, against three and all rows"""
    own, peer_tflop = full_size_tflop("encode")
    print(f"a sample at full size, with drops: {own:.2f} TFLOP, peer {peer_tflop:.2f}")
    with memory_kept():
        inputs, ours, peer = SMALL.inputs(), SMALL.ours(), SMALL.peer()

        def side(training: OurTraining | CommonTraining) -> Side:
            return lambda: list(vars(training.encode(*inputs)).values())

        ratio = peer_tflop / own
        yield Case("8 samples", side(ours), side(peer), 1e-4, 5, ratio, items=SMALL.batch_size, cpu_time=True)


def optimizer() -> Iterator[Case]:
    """Adam and the average of the weights: fused and all at once, against one tensor at a time"""
    with memory_kept():
        sides = optimizer_sides((64, 128, 256, 256))
        yield Case("two U-Nets of 64 to 256 channels", *sides, 1e-6, rounds=15, counts={}, cpu_time=True)


def optimizer_sides(block_out_channels: tuple[int, ...]) -> tuple[Side, Side]:
    """A step of optimizer and average for U-Nets of these widths: returns the weights and their average."""
    import torch
    from diffusers.training_utils import EMAModel
    from torch import nn

    parts = StepSetting(256, block_out_channels, device="meta").networks()
    shapes = [p.shape for unet in (parts.unet, parts.reference_unet) for p in unet.parameters()]
    numbers = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=numbers) for shape in shapes]
    gradients = [torch.randn(shape, generator=numbers) for shape in shapes]

    def side(is_ours: bool) -> Side:
        weights = [nn.Parameter(tensor.clone()) for tensor in start]
        adam = torch.optim.Adam(weights, lr=LEARNING_RATE, fused=is_ours, foreach=False)
        average = EMAModel(weights, decay=EMA_DECAY, foreach=is_ours)

        def step() -> list[torch.Tensor]:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            adam.step()
            average.step(weights)
            return [weight.detach() for weight in weights] + average.shadow_params

        return step

    return side(True), side(False)
