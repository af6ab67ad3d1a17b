"""What is faster or smaller computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimicbrush.models.components import Components, random_components, toy_components
from mimicbrush.models.norms.low_precision import use_half_norms
from mimicbrush.models.options import ModelOptions, ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.ops import pillow_resize
from mimicbrush.training.lora import freeze_and_adapt
from mimicbrush.training.noise import NoiseSample
from mimicbrush.training.objective import Conditions, FrozenEncoders, MimicBrushModel, denoising_loss
from mimicbrush.training.options import TrainOptions
from mimicbrush.training.performance import apply_speedups, compile_unet, count_training_flop, find_peak_flop_per_s
from mimicbrush.types import Matches, TrainBatch

CPU = torch.device("cpu")
#: Of the latent channels.
WEIGHTS = (2.0, 1.0, 1.0, 1.0)


def build_model_of(parts: Components, size_px: int) -> MimicBrushModel:
    assert parts.reference_unet is not None
    return MimicBrushModel(
        parts.unet, parts.reference_unet, parts.image_projector, parts.depth_projector, size_px=size_px
    )


def a_batch(size_px: int, rows: int = 4) -> TrainBatch:
    generator = torch.Generator().manual_seed(0)
    source, reference = torch.rand(2, rows, 3, size_px, size_px, generator=generator) * 2 - 1
    mask = (torch.rand(rows, 1, size_px, size_px, generator=generator) > 0.5).float()
    return TrainBatch(source, reference, mask, torch.arange(rows), torch.arange(rows))


def some_matches(size_px: int, rows: int = 4) -> Matches:
    source, reference = torch.rand(2, rows, 6, 2, generator=torch.Generator().manual_seed(1)) * (size_px - 1)
    return Matches(source, reference, torch.tensor([[True] * 4 + [False] * 2]).expand(rows, -1))


def sample_noise(batch: TrainBatch, side: int, reference: float = 0.5, depth: float = 0.5) -> NoiseSample:
    return NoiseSample.for_keys(
        batch.key, (4, side, side), num_timesteps=1000, reference_drop_ratio=reference, depth_drop_ratio=depth
    )


class Setting:
    """A toy, a batch, and the loss of both."""

    def __init__(self, options: ToyModel) -> None:
        parts = toy_components(options)
        nn.init.normal_(parts.unet.conv_in.weight, std=0.1)
        self.model, self.scheduler = build_model_of(parts, options.size_px), noise_scheduler()
        batch = a_batch(options.size_px)
        self.noise_sample = sample_noise(batch, options.size_px // 2)
        self.conditions = FrozenEncoders(parts, options).encode(batch, self.noise_sample)
        self.matches = some_matches(options.size_px)

    def loss_and_gradients(
        self, model: MimicBrushModel, autocast: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = denoising_loss(
                model, self.scheduler, self.conditions, self.noise_sample, None, self.matches, 0.3
            ).total
        gradients = torch.autograd.grad(loss, [each for each in model.parameters() if each.requires_grad])
        return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.fixture
def setting(smallest: ToyModel) -> Setting:
    return Setting(smallest)


def test_activation_checkpointing_gives_the_same_loss_and_gradients(setting: Setting) -> None:
    expected = setting.loss_and_gradients(setting.model)
    kept = saved_bytes(lambda: setting.loss_and_gradients(setting.model))
    apply_speedups(setting.model, TrainOptions(activation_checkpointing=True), channels_last=False)
    found = setting.loss_and_gradients(setting.model)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert saved_bytes(lambda: setting.loss_and_gradients(setting.model)) < 0.7 * kept


def saved_bytes(work: Callable[[], object]) -> int:
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return total


def test_low_precision_norms_are_near_full_ones_and_save_the_same(setting: Setting) -> None:
    half = copy.deepcopy(setting.model)
    use_half_norms(half)
    assert half.state_dict().keys() == setting.model.state_dict().keys()
    # In float32 they are the same.
    torch.testing.assert_close(setting.loss_and_gradients(half), setting.loss_and_gradients(setting.model))
    exact, gradients = setting.loss_and_gradients(setting.model)
    for dtype in (torch.bfloat16, torch.float16):
        loss, found = setting.loss_and_gradients(half, dtype)
        other, of_full_norms = setting.loss_and_gradients(setting.model, dtype)
        assert abs(loss - exact) < 0.01 * exact and abs(other - exact) < 0.01 * exact
        assert torch.corrcoef(torch.stack([found, gradients]))[0, 1] > 0.99
        assert torch.corrcoef(torch.stack([of_full_norms, gradients]))[0, 1] > 0.99


def test_low_precision_norms_keep_half_precision(setting: Setting) -> None:
    use_half_norms(setting.model)
    seen: set[torch.dtype] = set()
    for module in setting.model.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    setting.loss_and_gradients(setting.model, torch.bfloat16)
    assert seen == {torch.bfloat16}


def build_full_structure() -> MimicBrushModel:
    """The layers of Stable Diffusion 1.5, narrow: 16 transformer blocks in each U-Net, of four widths."""
    return build_model_of(random_components(size_px=64, block_out_channels=(32, 64, 128, 128)), 64)


# Dynamo looks at gradients, and at a function of diffusers that remembers its results.
COMPILES = pytest.mark.filterwarnings("ignore:(The .grad|Dynamo detected):UserWarning")


@pytest.mark.slow
@COMPILES
def test_each_u_net_of_the_full_structure_is_one_graph_at_every_step() -> None:
    model, graphs = build_full_structure(), CompileCounter()
    assert model.reference_unet is not None
    for unet in (model.unet, model.reference_unet):
        compile_unet(unet, graphs)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        noisy, *latents = torch.randn(4, 2, 4, 8, 8, generator=generator)
        conditions = Conditions(
            *latents,
            latent_mask=torch.ones(2, 1, 8, 8),
            image_tokens=torch.randn(2, 257, model.image_projector.config.image_width, generator=generator),
            depth_map=torch.rand(2, 1, 56, 56, generator=generator),
        )
        timestep = torch.randint(0, 1000, (2,), generator=generator)
        model(noisy, timestep, conditions, torch.tensor([True, seed % 2 == 0])).sample.sum().backward()
        assert graphs.frame_count == 2


@pytest.mark.slow
@COMPILES
@pytest.mark.parametrize("ways", [(), ("activation_checkpointing", "low_precision_norms"), ("keys_values", "lora")])
def test_compiled_u_nets_give_the_same_loss_and_gradients(smallest: ToyModel, ways: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    setting = Setting(replace(smallest, reference_sharing="keys_values") if "keys_values" in ways else smallest)
    model, options = setting.model, TrainOptions()
    assert model.reference_unet is not None
    if "activation_checkpointing" in ways:
        speedups = dict.fromkeys(ways, True)
        apply_speedups(model, replace(options, **speedups), channels_last=False)
    if "lora" in ways:
        parts = {name: part for name, part in model.named_children() if "unet" in name}
        freeze_and_adapt(parts, replace(options, unet="lora", reference_unet="lora"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero, and would give no gradient to its partner
                nn.init.normal_(parameter, std=0.1)
    expected = setting.loss_and_gradients(model)
    keys, graphs = model.state_dict().keys(), CompileCounterWithBackend("aot_eager")
    for unet in (model.unet, model.reference_unet):
        # As `apply_speedups` does it, which takes inductor: minutes on a CPU.
        compile_unet(unet, graphs)
    for _ in range(2):
        torch.testing.assert_close(setting.loss_and_gradients(model), expected, atol=1e-5, rtol=1e-4)
    assert graphs.frame_count == 2 and model.state_dict().keys() == keys


def test_the_option_compiles_both_u_nets(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[nn.Module, dict[str, Any]]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: compiled.append((module, how)))
    apply_speedups(setting.model, TrainOptions(compile=True), channels_last=False)
    assert [module for module, _ in compiled] == [setting.model.unet, setting.model.reference_unet]
    assert all(how == {"fullgraph": True, "backend": "inductor"} for _, how in compiled)


def test_dropped_rows_are_not_computed_and_kept_ones_are_as_before(smallest: ToyModel) -> None:
    parts = toy_components(smallest)
    encoders, batch = FrozenEncoders(parts, smallest), a_batch(smallest.size_px)
    whole = encoders.encode(batch, sample_noise(batch, 8, reference=0, depth=0))
    nothing = encoders.encode(batch, sample_noise(batch, 8, reference=1, depth=1))
    some_draws = sample_noise(batch, 8)
    some = encoders.encode(batch, some_draws)
    for name, keep in (("image_tokens", some_draws.keep_reference), ("depth_map", some_draws.keep_depth)):
        assert keep.any() and not keep.all()
        for row, kept in enumerate(keep):
            expected = getattr(whole if kept else nothing, name)[row]
            torch.testing.assert_close(getattr(some, name)[row], expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(getattr(nothing, name)[0], getattr(nothing, name)[1])
    assert torch.equal(some.source_latents, whole.source_latents)


class NoQuestions(TorchDispatchMode):
    """Fails where the host would have to wait for a GPU: numbers read, and shapes that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
            torch.ops.aten.equal,
            torch.ops.aten.is_nonzero,
        ):
            raise AssertionError(f"{func} makes the host wait")
        indices = [index for index in args[1] if index is not None] if "index.Tensor" in str(func) else []
        assert all(index.dtype not in (torch.bool, torch.uint8) for index in indices), "a mask as an index waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        TrainOptions(),
        TrainOptions(low_precision_norms=True, min_snr_gamma=5.0),
        TrainOptions(selective_checkpointing=True),
    ],
)
def test_no_step_asks_the_device(smallest: ToyModel, options: TrainOptions) -> None:
    parts = toy_components(smallest)
    encoders, scheduler = FrozenEncoders(parts, smallest), noise_scheduler()
    model = build_model_of(parts, smallest.size_px)
    apply_speedups(model, options, channels_last=True)
    batch = a_batch(smallest.size_px)
    noise_sample = sample_noise(batch, 8)
    with NoQuestions():
        conditions = encoders.encode(batch, noise_sample)
        matches = some_matches(smallest.size_px)
        loss = denoising_loss(
            model, scheduler, conditions, noise_sample, options.min_snr_gamma, matches, 0.3, (2, 1, 1, 1)
        )
        loss.total.backward()
    with pytest.raises(AssertionError, match="makes the host wait"), NoQuestions():
        float(loss.total.detach())


class NoCopies(TorchDispatchMode):
    """Fails where something is copied between the CPU and a GPU in a way that waits for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
        if len(devices) > 1 and not (kwargs or {}).get("non_blocking"):
            raise AssertionError(f"{func} copies between {' and '.join(sorted(devices))}")
        return result


def test_no_step_copies_to_the_device(smallest: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that there need not be: tensors without content that say they are there."""
    parts, batch = toy_components(smallest), a_batch(smallest.size_px)
    noise_sample = sample_noise(batch, 8)

    def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    # What is kept from one step to the next is not kept for tensors without content; see the test below.
    monkeypatch.setattr(pillow_resize, "_weights_beside", lambda pixels, old, new: pixels.new_empty(new, old))
    with FakeTensorMode():
        model, encoders = build_model_of(parts, smallest.size_px), FrozenEncoders(parts, smallest)
        for part in vars(parts).values():
            part._apply(on_gpu)
        batch = TrainBatch(*(on_gpu(getattr(batch, name)) for name in ("source", "reference", "mask", "key", "index")))
        noise_sample = NoiseSample(**{name: on_gpu(tensor) for name, tensor in vars(noise_sample).items()})
        matches = Matches(*map(on_gpu, vars(some_matches(smallest.size_px)).values()))
        scheduler = noise_scheduler()
        scheduler.alphas_cumprod = on_gpu(scheduler.alphas_cumprod)  # which it does by itself at the first step
        with NoCopies():
            conditions = encoders.encode(batch, noise_sample)
            loss = denoising_loss(model, scheduler, conditions, noise_sample, 5.0, matches, 0.3, WEIGHTS)
        with pytest.raises(AssertionError, match="copies between cpu and cuda"), NoCopies():
            loss.total.detach().new_tensor([1.0, 2.0])


def test_what_pixels_are_resized_with_is_brought_to_the_device_once() -> None:
    pixels = torch.zeros(1, 3, 16, 16)
    assert pillow_resize._weights_beside(pixels, 16, 8) is pillow_resize._weights_beside(pixels + 1, 16, 8)


def test_the_foreach_average_is_that_of_one_tensor_at_a_time() -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(n, n)) for n in (3, 50, 7)]
    averages = [EMAModel(parameters, decay=0.99, foreach=foreach) for foreach in (True, False)]
    for _ in range(20):
        for parameter in parameters:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        for average in averages:
            average.step(parameters)
    for one, other in zip(averages[0].shadow_params, averages[1].shadow_params, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_a_sample_of_the_papers_model_takes_913_tflop() -> None:
    with torch.device("meta"):
        parts = random_components()
    # ../shared/REFERENCE.md, section 7: 3 x (0.908 + 0.779) + 3 x 1.117 + 0.72; CLIP's last layer is not computed here.
    found = count_training_flop(build_model_of(parts, 512), FrozenEncoders(parts, ModelOptions()))
    assert found == pytest.approx(9.13e12, rel=2e-3)


def test_counting_leaves_nothing_behind(smallest: ToyModel) -> None:
    parts = toy_components(smallest)
    encoders, batch = FrozenEncoders(parts, smallest), a_batch(smallest.size_px)
    before = encoders.encode(batch, sample_noise(batch, 8))
    fresh = FrozenEncoders(parts, smallest)
    assert count_training_flop(build_model_of(parts, smallest.size_px), fresh) > 1e6
    after = fresh.encode(batch, sample_noise(batch, 8))
    assert all(torch.equal(one, other) for one, other in zip(vars(before).values(), vars(after).values(), strict=True))
    assert all(parameter.grad is None for parameter in parts.unet.parameters())


def test_fsdp_and_a_gpu_are_told_apart_by_whoever_calls(smallest: ToyModel) -> None:
    model = build_model_of(toy_components(smallest), smallest.size_px)
    weight = model.unet.conv_in.weight
    apply_speedups(model, TrainOptions(), channels_last=False)
    assert weight.is_contiguous()
    apply_speedups(model, TrainOptions(), channels_last=True)
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_no_peak_is_made_up() -> None:
    assert find_peak_flop_per_s(CPU, "bf16") is None
