"""Numbers on the device that $DEVICE names, a CPU by default: as the released code's, as the peer's, and in bfloat16.

scripts/gpu_check.sh runs this file on a GPU. Float32 is without TF32 here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from measurements.harness import exact_float32
from measurements.training_step import StepSetting
from released_golden import GoldenPipeline, golden_path
from torch import nn

from mimicbrush.models.norms.fused_norms import FusedGroupNorm, find_obstacle
from mimicbrush.models.norms.low_precision import HalfGroupNorm

DEVICE = torch.device(os.environ.get("DEVICE") or "cpu")
#: Of the released code's numbers in float32.
TOLERANCE = 1e-4
#: What bfloat16 may change, as a part of the norm: of the latents after four steps (on a CPU: 0.013), of all gradients
#: of a step on random weights, encoders included (0.26; two gradients without relation: 1.4), and of the loss.
BF16_LATENTS, BF16_GRADIENTS, BF16_LOSS = 0.05, 0.5, 0.02
#: And of what a norm gives, and of its gradients (on a CPU: 0.003).
BF16_NORM = 0.01
SETTING = StepSetting(size_px=64, block_out_channels=(32, 32, 32, 32), batch_size=2, device=DEVICE.type, made_on="cpu")

Record = Callable[[str, object], None]


@pytest.fixture(autouse=True)
def without_tf32() -> Iterator[None]:
    with exact_float32():
        yield


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Note a figure; it is in the test's report (`record_property` objects to one kind of report)."""
    return lambda name, value: request.node.user_properties.append((name, value))


@pytest.fixture(scope="module")
def golden() -> GoldenPipeline:
    return GoldenPipeline(golden_path("MIMICBRUSH_GOLDEN_PIPELINE", "released_pipeline.safetensors"))


def edited(golden: GoldenPipeline, dtype: torch.dtype, channels_last: bool = False) -> list[torch.Tensor]:
    """Latents after each step, and the image; (4, h, w) and (3, S, S) float32 on the CPU."""
    pipe = golden.pipeline().to(DEVICE, dtype)
    if channels_last:
        for network in (pipe.unet, pipe.reference_unet, pipe.vae):
            network.to(memory_format=torch.channels_last)
    found: list[torch.Tensor] = []

    def keep(_pipe: object, _step: int, _timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found.append(tensors["latents"][0].float().cpu())
        return {}

    (image,) = pipe(**golden.edit(), output_type="pt", callback_on_step_end=keep).images
    return [*found, image.float().cpu()]


def released(golden: GoldenPipeline) -> list[torch.Tensor]:
    latents = [golden.tensors[f"out/latents_after_step_{step}"][0] for step in range(golden.steps)]
    return [*latents, golden.tensors["out/image"].permute(2, 0, 1)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_edit_has_the_released_numbers(golden: GoldenPipeline, channels_last: bool, record: Record) -> None:
    pairs = zip(edited(golden, torch.float32, channels_last), released(golden), strict=True)
    off = max(float((found - expected).abs().max()) for found, expected in pairs)
    record("max_abs_diff", off)
    assert off < TOLERANCE


def test_an_edit_in_bfloat16_is_near(golden: GoldenPipeline, record: Record) -> None:
    off = relative(edited(golden, torch.bfloat16)[-2], released(golden)[-2])
    record("relative_difference", off)
    assert 0 < off < BF16_LATENTS


def gradients(setting: StepSetting, channels_last: bool = False, peer: bool = False) -> tuple[float, torch.Tensor]:
    """Loss and all gradients of a step."""
    training = setting.peer() if peer else setting.ours()
    if channels_last:
        training.model.to(memory_format=torch.channels_last)
    batch, noise = (each.to(torch.device(setting.device)) for each in setting.inputs())
    loss = training.loss_and_gradients(batch, noise)
    found = {name: weight.grad for name, weight in training.model.named_parameters() if weight.grad is not None}
    return float(loss), torch.cat([found[name].float().cpu().flatten() for name in sorted(found)])


@pytest.fixture(scope="module")
def in_float32() -> tuple[float, torch.Tensor]:
    with exact_float32():
        return gradients(SETTING)


@pytest.mark.slow
def test_a_training_step_has_the_numbers_of_the_peer_and_of_another_layout(
    in_float32: tuple[float, torch.Tensor], record: Record
) -> None:
    expected_loss, expected = gradients(replace(SETTING, device="cpu"), peer=True)
    for loss, found in (in_float32, gradients(SETTING, channels_last=True)):
        off = relative(found, expected)
        record("relative_difference", off)
        assert loss == pytest.approx(expected_loss, rel=1e-4)
        assert off < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("others", [(), ("fused_norms", "selective_checkpointing")])
def test_a_training_step_in_bfloat16_is_near(
    in_float32: tuple[float, torch.Tensor], others: tuple[str, ...], record: Record
) -> None:
    expected_loss, expected = in_float32
    options = dict.fromkeys(("low_precision_norms", *others), True)
    loss, found = gradients(replace(SETTING, half=True, options=options), channels_last=True)
    off = relative(found, expected)
    record("relative_difference", off)
    assert loss == pytest.approx(expected_loss, rel=BF16_LOSS)
    assert 0 < off < BF16_GRADIENTS


@pytest.mark.parametrize("silu", [False, True])
def test_a_fused_norm_in_bfloat16_is_near(silu: bool, record: Record) -> None:
    """Forward and backward; on a GPU these are the Triton kernels, which no float32 reaches."""
    generator = torch.Generator().manual_seed(0)
    image, gradient = torch.randn(2, 2, 320, 24, 20, generator=generator).bfloat16()
    norm = HalfGroupNorm(32, 320)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, generator=generator)
    norm, results = norm.to(DEVICE), []
    for dtype in (torch.float32, torch.bfloat16):
        x = image.to(DEVICE, dtype).to(memory_format=torch.channels_last).requires_grad_()
        if dtype == torch.float32:
            result = F.silu(norm(x)) if silu else norm(x)
        else:
            assert DEVICE.type != "cuda" or find_obstacle(x) is None
            result = FusedGroupNorm(norm, silu)(x)
        found = torch.autograd.grad(result, (x, *norm.parameters()), gradient.to(DEVICE, dtype))
        results.append([each.detach().float() for each in (result, *found)])
    off = max(relative(found, expected) for expected, found in zip(*results, strict=True))
    record("relative_difference", off)
    assert 0 < off < BF16_NORM
