"""GroupNorm and SiLU as one operation: its kernels under Triton's interpreter, and its place in the U-Nets."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mimicbrush.models.components import toy_components
from mimicbrush.models.norms import fused_norms
from mimicbrush.models.norms.fused_norms import FusedGroupNorm, find_obstacle, use_fused_norms
from mimicbrush.models.norms.low_precision import use_half_norms
from mimicbrush.models.options import ToyModel

HELPERS = Path(__file__).parents[1] / "helpers"
#: Largest errors as parts of the largest number: the result and the gradients of input, weight and bias.
BOUNDS = {
    "float32": (1e-6, 1e-6, 1e-6, 1e-6),
    "float16": (1e-3, 1e-3, 1e-6, 1e-6),
    "bfloat16": (8e-3, 8e-3, 1e-6, 1e-6),
}


def measure(cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """What the kernels give for shapes, groups, types, SiLU and means; see `helpers/norm_kernels.py`."""
    pytest.importorskip("triton")
    command = [sys.executable, str(HELPERS / "norm_kernels.py"), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def check(cases: list[tuple[Any, ...]]) -> None:
    for case, found in zip(cases, measure(cases), strict=True):
        # With a mean of 10,000 and a deviation of 1, float32 keeps a thousandth of the input. Sums of squares, which
        # PyTorch takes on a CPU, would keep nothing.
        bounds, of_moments = (BOUNDS[case[2]], 1e-5) if abs(case[4]) < 100 else ((2e-3,) * 4, 1e-4)
        assert all(error < bound for error, bound in zip(found["errors"], bounds, strict=True)), (case, found)
        assert max(found["moment_errors"]) < of_moments, (case, found)
        assert found["is_channels_last"] and found["is_repeatable"], case
        assert found["types"] == [f"torch.{case[2]}"] * 2 + ["torch.float32"] * 2


def test_the_kernels_give_what_pytorch_gives() -> None:
    check(
        [
            ((2, 30, 9, 8), 3, "float32", True, 0.0),  # 10 channels a group, as 320 / 32, and 72 rows: a tile and a bit
            ((1, 72, 3, 5), 3, "bfloat16", True, 0.0),  # more channels than a tile
            ((1, 12, 1, 1), 2, "float16", False, 0.0),  # one pixel
            ((1, 8, 12, 12), 2, "float32", True, 1e4),
        ]
    )


@pytest.mark.slow
def test_the_kernels_at_the_widths_of_sd15() -> None:
    check(
        [
            ((1, 320, 5, 13), 32, "bfloat16", True, 0.5),
            ((1, 960, 9, 8), 32, "float32", True, -3.0),
            ((1, 1920, 3, 3), 32, "float16", False, 0.0),
            ((1, 2560, 1, 1), 32, "float32", True, 0.0),
        ]
    )


@pytest.mark.slow
def test_the_kernels_compile_for_hopper() -> None:
    """To machine code, by the assembler that Triton brings; it needs no GPU."""
    pytest.importorskip("triton")
    command = [sys.executable, str(HELPERS / "compile_norm_kernels.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    sizes = json.loads(done.stdout)
    assert len(sizes) == 12 and min(sizes.values()) > 1000


def u_net_inputs(options: ToyModel) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    parts = toy_components(options)
    side = options.size_px // 2
    sample = torch.randn(2, parts.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    context = torch.randn(2, 4, options.context_width, generator=torch.Generator().manual_seed(1))
    return parts.unet.to(memory_format=torch.channels_last), (sample, torch.tensor([3, 700]), context)


@pytest.mark.parametrize("half", [False, True])
def test_a_u_net_with_fused_norms_is_the_same(smallest: ToyModel, half: bool, caplog: pytest.LogCaptureFixture) -> None:
    plain, inputs = u_net_inputs(smallest)
    if half:
        use_half_norms(plain)
    fused = copy.deepcopy(plain)
    use_fused_norms(fused)
    assert [*fused.state_dict()] == [*plain.state_dict()]
    assert all(isinstance(each, FusedGroupNorm) for each in fused.modules() if isinstance(each, nn.GroupNorm))
    fused_norms._tell_once.cache_clear()
    results = []
    for unet in (plain, fused):
        with torch.autocast("cpu", torch.bfloat16):
            loss = unet(*inputs).sample.float().square().mean()
        results.append((loss, torch.autograd.grad(loss, list(unet.parameters()))))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    # It says once why nothing is faster, for all norms.
    assert [r.levelno for r in caplog.records if "train.fused_norms has no effect here" in r.message] == [
        logging.WARNING
    ]


class Operators(TorchDispatchMode):
    """Notes each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def test_on_a_gpu_a_norm_and_its_silu_are_one_operator() -> None:
    """On a GPU that there need not be: tensors without content that say they are there."""
    pytest.importorskip("triton")
    with FakeTensorMode(), torch.device("cuda"):
        norm = FusedGroupNorm(nn.GroupNorm(4, 32), silu=True)
        x = torch.empty(2, 32, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        assert find_obstacle(x) is None
        with Operators() as found:
            result = norm(x)
    assert result.is_contiguous(memory_format=torch.channels_last) and result.dtype == torch.bfloat16
    assert [name for name in found.names if "norm" in name or "silu" in name] == ["mimicbrush.group_norm"]


def test_why_the_kernels_cannot_take_an_input() -> None:
    with FakeTensorMode(), torch.device("cuda"):
        assert "half precision" in str(find_obstacle(torch.empty(1, 4, 2, 2)))
        assert "channels-last" in str(find_obstacle(torch.empty(1, 4, 2, 2, dtype=torch.float16)))
    assert "CUDA" in str(find_obstacle(torch.empty(1, 4, 2, 2)))


def test_scale_and_shift_by_the_time_keep_their_silu_behind_them() -> None:
    """There, something stands between the norm and its SiLU."""
    plain = ResnetBlock2D(in_channels=32, temb_channels=8, time_embedding_norm="scale_shift")
    holder = nn.Module()
    holder.resnet, holder.conv_norm_out = copy.deepcopy(plain), None
    use_fused_norms(holder)  # type: ignore[arg-type]
    x, time = torch.randn(2, 32, 4, 4), torch.randn(2, 8)
    assert torch.equal(holder.resnet(x, time), plain(x, time))
