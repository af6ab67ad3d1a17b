"""Runs the Triton kernels of GroupNorm on a CPU, under Triton's interpreter: python norm_kernels.py CASES.

CASES is a list in JSON: of the shape, the groups, the type, whether SiLU follows, and the mean of the input. It writes
the largest errors of each case: of the result and of the gradients of input, weight and bias, against PyTorch in
float64, as parts of the largest number there; and whether memory is still channels-last.

It is a program of its own, because Triton reads the variable when it is imported.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F

from mimicbrush.models.norms.group_norm_kernels import fused_group_norm

EPS = 1e-5


def measure(shape: list[int], groups: int, dtype: str, silu: bool, mean: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) + mean).to(getattr(torch, dtype))
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(shape[1], generator=generator).requires_grad_() for _ in range(2))
    dy = torch.randn(shape, generator=generator).to(x.dtype)  # not channels-last, and need not be
    y, *moments = fused_group_norm(x, weight, bias, groups, EPS, silu)
    found = [y, *torch.autograd.grad(y, (x, weight, bias), dy)]
    again = fused_group_norm(x, weight, bias, groups, EPS, silu)[0]
    inputs = [each.detach().double().requires_grad_() for each in (x, weight, bias)]
    exact = F.group_norm(inputs[0], groups, *inputs[1:], EPS)
    exact = F.silu(exact) if silu else exact
    expected = [exact, *torch.autograd.grad(exact, inputs, dy.double())]
    grouped = inputs[0].detach().unflatten(1, (groups, -1)).flatten(2)
    expected_moments = [grouped.mean(-1), (grouped.var(-1, correction=0) + EPS).rsqrt()]
    return {
        "errors": [error(*pair) for pair in zip(found, expected, strict=True)],
        "moment_errors": [error(*pair) for pair in zip(moments, expected_moments, strict=True)],
        "is_channels_last": all(each.is_contiguous(memory_format=torch.channels_last) for each in found[:2]),
        "types": [str(each.dtype) for each in found],
        "is_repeatable": torch.equal(y, again),
    }


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(
        (found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max().clamp(min=1e-3)
    )


if __name__ == "__main__":
    print(json.dumps([measure(*case) for case in json.loads(sys.argv[1])]))
