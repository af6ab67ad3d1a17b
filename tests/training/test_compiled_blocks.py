"""U-Nets that are compiled by blocks: equal blocks share a graph, no step makes another, and the numbers stay."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters

from mimicbrush.models.components import random_components, toy_components
from mimicbrush.models.options import ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.training.lora import freeze_and_adapt
from mimicbrush.training.noise import NoiseSample
from mimicbrush.training.objective import Conditions, FrozenEncoders, MimicBrushModel, denoising_loss
from mimicbrush.training.options import TrainOptions
from mimicbrush.training.performance import apply_speedups, compile_blocks
from mimicbrush.types import Matches, TrainBatch

# Dynamo looks at gradients, and at a function of diffusers that remembers its results.
pytestmark = pytest.mark.filterwarnings("ignore:(The .grad|Dynamo detected):UserWarning")


def unets_of(model: MimicBrushModel) -> list[Any]:
    return [unet for unet in (model.unet, model.reference_unet) if unet is not None]


class Steps:
    """A toy and its training steps, each with other drops."""

    def __init__(self, options: ToyModel) -> None:
        torch._dynamo.reset()
        parts = toy_components(options)
        nn.init.normal_(parts.unet.conv_in.weight, std=0.1)
        self.model = MimicBrushModel(
            parts.unet, parts.reference_unet, parts.image_projector, parts.depth_projector, size_px=options.size_px
        )
        self.encoders, self.size_px = FrozenEncoders(parts, options), options.size_px

    def loss_and_gradients(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows, side = 4, self.size_px
        generator = torch.Generator().manual_seed(step)
        source, reference = torch.rand(2, rows, 3, side, side, generator=generator) * 2 - 1
        key = torch.arange(rows) + rows * step
        batch = TrainBatch(source, reference, (source[:, :1] > 0).float(), key, key)
        # The last steps keep all and nothing.
        ratio = {2: 0.0, 3: 1.0}.get(step, 0.5)
        noise = NoiseSample.for_keys(
            key, (4, side // 2, side // 2), num_timesteps=1000, reference_drop_ratio=ratio, depth_drop_ratio=ratio
        )
        places = torch.rand(2, rows, 5, 2, generator=generator) * (side - 1)
        matches = Matches(places[0], places[1], torch.rand(rows, 5, generator=generator) > 0.3)
        conditions = self.encoders.encode(batch, noise)
        loss = denoising_loss(self.model, noise_scheduler(), conditions, noise, None, matches, 0.3).total
        trained = list(self.model.trained_parameters().values())
        return loss.detach(), torch.cat([each.flatten() for each in torch.autograd.grad(loss, trained)])


@pytest.mark.slow
def test_no_step_makes_a_graph_after_the_first(smallest: ToyModel) -> None:
    steps = Steps(smallest)
    expected = [steps.loss_and_gradients(step) for step in range(4)]
    keys, graphs = steps.model.state_dict().keys(), CompileCounter()
    counters.clear()
    num_kinds = compile_blocks(unets_of(steps.model), graphs)
    for step in range(4):
        torch.testing.assert_close(steps.loss_and_gradients(step), expected[step], atol=1e-5, rtol=1e-4)
        assert graphs.frame_count == num_kinds
    assert not counters["graph_break"] and steps.model.state_dict().keys() == keys


@pytest.mark.slow
@pytest.mark.parametrize(
    "ways",
    [
        ("activation_checkpointing", "low_precision_norms", "fused_norms"),
        ("keys_values",),
        ("lora",),
        ("shared", "activation_checkpointing"),
    ],
)
def test_compiled_blocks_give_the_same_loss_and_gradients(smallest: ToyModel, ways: tuple[str, ...]) -> None:
    sharing = "keys_values" if "keys_values" in ways else "hidden_states"
    encoder = "shared" if "shared" in ways else "unet"
    steps = Steps(replace(smallest, reference_sharing=sharing, reference_encoder=encoder))
    options = TrainOptions(**{way: True for way in ways if hasattr(TrainOptions, way)})
    apply_speedups(steps.model, options, channels_last=False)
    if "lora" in ways:
        adapted = {name: part for name, part in steps.model.named_children() if "unet" in name}
        freeze_and_adapt(adapted, replace(options, unet="lora", reference_unet="lora"))
        for name, parameter in steps.model.named_parameters():
            if "lora_B" in name:  # zero, and would give no gradient to its partner
                nn.init.normal_(parameter, std=0.1)
    expected = [steps.loss_and_gradients(step) for step in range(4)]
    graphs = CompileCounterWithBackend("aot_eager")
    num_kinds = compile_blocks(unets_of(steps.model), graphs)
    counts = []
    for step in range(4):
        torch.testing.assert_close(steps.loss_and_gradients(step), expected[step], atol=1e-5, rtol=1e-4)
        counts.append(graphs.frame_count)
    assert len(set(counts)) == 1
    # Before the first adapter nothing has a gradient, which makes another graph of a resnet in each U-Net.
    assert num_kinds <= counts[0] <= num_kinds + (2 if "lora" in ways else 0)


@pytest.mark.slow
def test_the_full_size_has_few_graphs() -> None:
    """SD-1.5 at its full widths: 88 blocks, without the memory of their weights."""
    torch._dynamo.reset()
    graphs = CompileCounter()
    with torch.device("meta"):
        parts = random_components(size_px=64)
        assert parts.reference_unet is not None
        model = MimicBrushModel(
            parts.unet, parts.reference_unet, parts.image_projector, parts.depth_projector, size_px=64
        ).train()
        assert compile_blocks(unets_of(model), graphs) == 33
        latents = torch.empty(2, 4, 8, 8)
        conditions = Conditions(
            latents,
            latents,
            latents,
            latent_mask=latents[:, :1],
            image_tokens=torch.empty(2, 257, model.image_projector.config.image_width),
            depth_map=torch.empty(2, 1, 56, 56),
        )
        for _ in range(2):
            prediction = model(latents, torch.ones(2).long(), conditions, torch.ones(2).bool())
            prediction.sample.sum().backward()
            assert graphs.frame_count == 33


def test_a_copy_of_a_compiled_network_is_not_compiled(smallest: ToyModel) -> None:
    model = Steps(smallest).model
    graphs = CompileCounter()
    compile_blocks(unets_of(model), graphs)
    for module in copy.deepcopy(model.unet).modules():
        assert module._compiled_call_impl is None
    assert any(module._compiled_call_impl is not None for module in model.unet.modules()) and not graphs.frame_count


def test_the_option_compiles_blocks(smallest: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, compiled = Steps(smallest).model, list[tuple[str, dict[str, Any]]]()

    def note(module: nn.Module, **how: Any) -> None:
        compiled.append((type(module).__name__, how))

    monkeypatch.setattr(nn.Module, "compile", note)
    before = torch._dynamo.config.recompile_limit
    apply_speedups(model, TrainOptions(compile=True, compile_parts="blocks"), channels_last=False)
    assert {name for name, _ in compiled} == {"ResnetBlock2D", "Transformer2DModel", "Downsample2D", "Upsample2D"}
    assert all(how == {"fullgraph": True, "dynamic": False, "backend": "inductor"} for _, how in compiled)
    assert torch._dynamo.config.recompile_limit > before
