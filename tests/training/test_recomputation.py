"""Norms and activations that are computed again: the same training, with less kept."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measurements.activations import Alive
from test_speedups import Setting
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from toy_run import metrics, train

from mimicbrush.errors import InputError
from mimicbrush.models.options import ToyModel
from mimicbrush.training.lora import freeze_and_adapt
from mimicbrush.training.options import TrainOptions
from mimicbrush.training.performance import apply_speedups
from mimicbrush.training.recomputation import _compute

SELECTIVE = TrainOptions(selective_checkpointing=True)


@pytest.fixture
def setting(smallest: ToyModel) -> Setting:
    return Setting(smallest)


def apply(model: nn.Module, options: TrainOptions = SELECTIVE) -> None:
    apply_speedups(model, options, channels_last=False)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({}, {}),
        ({"reference_sharing": "keys_values"}, {"low_precision_norms": True}),
        ({}, {"unet": "lora", "reference_unet": "lora", "image_projector": "frozen", "depth_projector": "frozen"}),
        ({}, {"unet": "frozen"}),
    ],
    ids=["hidden_states", "keys_values", "lora", "frozen"],
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


@pytest.mark.parametrize("half_norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_gradients_are_as_near(setting: Setting, dtype: torch.dtype, half_norms: bool) -> None:
    exact = setting.loss_and_gradients(setting.model)[1]
    options = TrainOptions(low_precision_norms=half_norms)
    apply(setting.model, options)
    loss, gradients = setting.loss_and_gradients(setting.model, dtype)
    apply(setting.model, replace(SELECTIVE, low_precision_norms=half_norms))
    loss_again, gradients_again = setting.loss_and_gradients(setting.model, dtype)
    assert torch.equal(loss_again, loss)
    noise, difference = (gradients - exact).norm(), (gradients_again - gradients).norm()
    print("difference", dtype, half_norms, float(difference / noise), float(noise/exact.norm()))
    assert difference < 0.1 * noise


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
    def kept() -> int:
        with Alive() as alive:
            result = setting.model(
                setting.conditions.source_latents,
                setting.noise_sample.timestep,
                setting.conditions,
                setting.noise_sample.keep_reference,
            )
        total = sum(alive.bytes_by_part().values())
        nonlocal node
        node = weakref.ref(result.sample.untyped_storage())
        return total

    node: Callable[[], object]
    before = kept()
    apply(setting.model)
    after = kept()
    print("kept", before, after)
    assert after < 0.7 * before
    assert node() is None


def test_the_options_that_exclude_each_other() -> None:
    for other in ("activation_checkpointing", "compile"):
        with pytest.raises(InputError, match=f"selective_checkpointing=true and train.{other}=true exclude each other"):
            replace(SELECTIVE, **{other: True})
