"""Norms and activations that are computed again: the same training, with less kept."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from measurements.activations import Alive
from test_speedups import Setting
from torch import nn
from torch.distributed import FileStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from toy_run import differing, metrics, train

from mimicbrush.errors import InputError
from mimicbrush.models.options import ToyModel
from mimicbrush.training.lora import freeze_and_adapt
from mimicbrush.training.objective import denoising_loss
from mimicbrush.training.options import TrainOptions
from mimicbrush.training.performance import apply_speedups

SELECTIVE = TrainOptions(selective_checkpointing=True)


@pytest.fixture
def setting(smallest: ToyModel) -> Setting:
    return Setting(smallest)


def loss_of(setting: Setting, model: nn.Module) -> torch.Tensor:
    """With the correspondence loss, and a dropped reference."""
    noise_sample = setting.noise_sample
    return denoising_loss(model, setting.scheduler, setting.conditions, noise_sample, None, setting.matches, 0.3).total


def apply(model: nn.Module, options: TrainOptions = SELECTIVE) -> None:
    apply_speedups(model, options, channels_last=False)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({}, {}),
        ({"reference_sharing": "keys_values"}, {"low_precision_norms": True}),
        ({}, {"unet": "lora", "reference_unet": "lora", "image_projector": "frozen", "depth_projector": "frozen"}),
        ({}, {"unet": "frozen"}),
        ({}, {"fused_norms": True}),
    ],
    ids=["hidden_states", "keys_values", "lora", "frozen", "fused_norms"],
)
def test_in_float32_loss_and_gradients_are_the_same_to_the_bit(
    smallest: ToyModel, model: dict[str, Any], options: dict[str, Any]
) -> None:
    """With the correspondence loss, and a dropped reference."""
    setting, chosen = Setting(replace(smallest, **model)), replace(SELECTIVE, **options)
    freeze_and_adapt(dict(setting.model.named_children()), chosen)
    for name, parameter in setting.model.named_parameters():
        if "lora_B" in name:  # zero, and would give no gradient to its partner
            nn.init.normal_(parameter, std=0.1)
    assert not setting.noise_sample.keep_reference.all()
    expected, keys = setting.loss_and_gradients(setting.model), setting.model.state_dict().keys()
    apply(setting.model, chosen)
    assert setting.model.state_dict().keys() == keys
    for found, before in zip(setting.loss_and_gradients(setting.model), expected, strict=True):
        assert torch.equal(found, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_gradients_are_the_same_to_the_bit(setting: Setting, dtype: torch.dtype) -> None:
    apply(setting.model, TrainOptions(low_precision_norms=True))
    expected = setting.loss_and_gradients(setting.model, dtype)
    apply(setting.model)
    for found, before in zip(setting.loss_and_gradients(setting.model, dtype), expected, strict=True):
        assert torch.equal(found, before)


def test_norms_in_float32_under_autocast_are_near(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU computes: the loss is the same, and gradients differ by less than half precision costs."""
    exact = setting.loss_and_gradients(setting.model)[1]
    for name in ("group_norm", "layer_norm"):
        norm = getattr(F, name)
        monkeypatch.setattr(F, name, lambda input, *more, norm=norm: norm(input.float(), *more))
    loss, gradients = setting.loss_and_gradients(setting.model, torch.bfloat16)
    apply(setting.model)
    found, gradients_found = setting.loss_and_gradients(setting.model, torch.bfloat16)
    assert torch.equal(found, loss)
    difference, noise = (gradients_found - gradients).norm(), (gradients - exact).norm()
    assert 0 < difference < 0.5 * noise


class Launched(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.times[name] = self.times.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def test_each_cheap_layer_runs_once_more_and_nothing_else_does(setting: Setting) -> None:
    def counted() -> tuple[int, dict[str, int]]:
        with FlopCounterMode(display=False) as flop, Launched() as launched:
            setting.loss_and_gradients(setting.model)
        return flop.get_total_flops(), launched.times

    flop, before = counted()
    apply(setting.model)
    flop_again, after = counted()
    assert flop_again == flop
    for name in ("native_group_norm", "native_layer_norm", "gelu"):
        assert after[name] == 2 * before[name], name
    assert before["silu"] < after["silu"] < 2 * before["silu"]  # not those of the timestep
    for name in ("convolution", "addmm", "mm", "bmm", "_scaled_dot_product_flash_attention_for_cpu", "cat", "where"):
        assert after.get(name) == before.get(name), name


def test_less_is_kept_and_all_of_it_is_freed(setting: Setting) -> None:
    def forward() -> tuple[int, Any]:
        noise_sample = setting.noise_sample
        with Alive() as alive:
            loss = denoising_loss(setting.model, setting.scheduler, setting.conditions, noise_sample).total
        return sum(alive.bytes_by_part().values()), loss

    before = forward()[0]
    apply(setting.model)
    after, loss = forward()
    assert after < 0.65 * before
    nodes = [weakref.ref(node) for node in graph_of(loss) if "_Recomputed" in type(node).__name__]
    assert len(nodes) > 20
    gc.disable()  # what is in a cycle would wait for it
    try:
        loss.backward()
        del loss
        assert all(node() is None for node in nodes)
    finally:
        gc.enable()


def graph_of(loss: torch.Tensor) -> set[Any]:
    found: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return found


def test_without_gradients_nothing_is_marked(setting: Setting) -> None:
    apply(setting.model)
    norm = setting.model.unet.conv_norm_out
    image = torch.randn(1, norm.num_channels, 4, 4)
    with torch.no_grad():
        unmarked = norm(image)
    marked = norm(image)
    assert torch.equal(marked, unmarked)
    assert hasattr(marked.untyped_storage(), "recomputed_by")
    assert not hasattr(unmarked.untyped_storage(), "recomputed_by")


def test_a_copied_network_computes_with_its_own_weights(setting: Setting) -> None:
    apply(setting.model)
    copied = copy.deepcopy(setting.model.unet.conv_norm_out)
    copied.weight.data.fill_(2.0)
    image = torch.randn(1, copied.num_channels, 4, 4, requires_grad=True)
    (own,) = torch.autograd.grad(setting.model.unet.conv_norm_out(image).square().sum(), image)
    (found,) = torch.autograd.grad(copied(image).square().sum(), image)
    torch.testing.assert_close(found, 4 * own)


@pytest.mark.slow
def test_a_run_is_the_same_and_goes_on_with_or_without(mined: Path, tmp_path: Path) -> None:
    options = ["train.log_every=1", "train.checkpoint_every=2", "train.correspondence_weight=0.3"]
    train(mined, tmp_path / "plain", *options, "train.max_steps=4")
    train(mined, tmp_path / "changed", *options, "train.max_steps=2", "train.selective_checkpointing=true")
    train(mined, tmp_path / "changed", *options, "train.max_steps=4", "train.resume=latest")
    assert [each["loss"] for each in metrics(tmp_path / "changed")] == [
        each["loss"] for each in metrics(tmp_path / "plain")
    ]
    assert not differing(tmp_path / "plain", tmp_path / "changed")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_the_gradients_of_one(smallest: ToyModel, tmp_path: Path, kind: str) -> None:
    setting = Setting(smallest)
    loss_of(setting, setting.model).backward()
    expected = {name: parameter.grad for name, parameter in setting.model.named_parameters()}
    apply(setting.model)
    setting.model.zero_grad()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=take_part, args=(setting, kind, rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def take_part(setting: Setting, kind: str, rank: int, folder: Path) -> None:
    """Be one of two processes, which both see the whole batch, and write down the gradients."""
    init_process_group("gloo", store=FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    model = setting.model
    if kind == "ddp":
        wrapped: nn.Module = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for module in model.modules():
            if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
                fully_shard(module, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    loss_of(setting, wrapped).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {name: each.full_tensor() if kind == "fsdp" else each for name, each in gradients.items()}
    torch.save(whole, folder / f"{rank}.pt")
    destroy_process_group()


def test_the_options_that_exclude_each_other() -> None:
    for other in ("activation_checkpointing", "compile"):
        with pytest.raises(InputError, match=f"selective_checkpointing=true and train.{other}=true cannot be combined"):
            replace(SELECTIVE, **{other: True})
