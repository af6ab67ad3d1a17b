"""Compiles the Triton kernels of GroupNorm for an H100 or H200; writes the bytes of machine code of each, in JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton warns where it is not set
sys.path.insert(0, str(Path(__file__).parents[2]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mimicbrush.models.norms import group_norm_kernels as kernels

HOPPER = GPUTarget("cuda", 90, 32)
HALF, SIZES = ("x", "dy", "out", "dx"), ("hw", "channels", "groups", "tiles")
TILE = {"rows": kernels.TILE_ROWS, "columns": kernels.TILE_CHANNELS}
#: Kernels, and their constants.
CASES: list[tuple[Any, dict[str, Any]]] = [
    (kernels._moments_kernel, TILE),
    (kernels._finish_moments_kernel, {"rows": kernels.TILE_ROWS, "lanes": 16}),
    (kernels._apply_kernel, {**TILE, "silu": True}),
    (kernels._sums_kernel, {**TILE, "silu": True}),
    (kernels._finish_sums_kernel, {"lanes": 128}),
    (kernels._gradient_kernel, {**TILE, "silu": False}),
]


def compile_kernel(kernel: Any, constants: dict[str, Any]) -> int:
    names = kernel.arg_names
    types = dict.fromkeys(names, "*fp32") | dict.fromkeys(SIZES, "i32") | dict.fromkeys(HALF, "*bf16")
    types |= {"eps": "fp32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        {name: types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        # As for tensors of PyTorch, which begin at multiples of 16 bytes, and widths of SD-1.5.
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if "*" in types[name] or name == "channels"},
    )
    return len(triton.compile(source, target=HOPPER).asm["cubin"])


if __name__ == "__main__":
    found = {}
    for kernel, constants in CASES:
        found[kernel.__name__] = compile_kernel(kernel, constants)
        # A size of 1 becomes a constant, too.
        ones = {name: 1 for name in ("hw", "tiles") if name in kernel.arg_names}
        found[f"{kernel.__name__} of one pixel"] = compile_kernel(kernel, {**constants, **ones})
    print(json.dumps(found))
