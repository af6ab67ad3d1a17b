"""What a pass of the trained networks costs, forward and backward, at full size, counted without a GPU.

The tensors are PyTorch's fake ones. They say that they are on a CPU, because PyTorch's backward pass asks any other
device for its driver. Where a GPU computes otherwise under autocast than a CPU, the GPU's way is taken: norms in
float32, and flash attention.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from measurements.activations import MemorySetting, make_inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry


def pass_costs(setting: MemorySetting) -> dict[str, float]:
    """Count a forward and backward pass: what a sample adds, and the launches, which any number of samples share.

    Args:
        setting: ours.

    Returns:
        ``tflop`` of a sample; ``launches`` of a pass; ``moved_gib``, what a sample adds to the bytes that everything
        but convolutions, matrix products and attention reads and writes; ``peak_gib``, what a sample adds to the most
        memory that a pass takes beside weights and gradients.
    """
    model = setting.model()
    passes = []
    with FakeTensorMode():
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        for batch in (1, 2):
            inputs, counted, flop = make_inputs(setting, model, batch), Launches(), FlopCounterMode(display=False)
            with as_a_gpu_computes(), counted, flop:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = F.mse_loss(model(*inputs).sample.float(), inputs[0])
                loss.backward()
            passes.append((counted, flop.get_total_flops()))
            del loss
    (first, flop_of_one), (second, flop_of_two) = passes
    return {
        "tflop": (flop_of_two - flop_of_one) / 1e12,
        "launches": first.launches,
        "moved_gib": (second.moved_bytes - first.moved_bytes) / 2**30,
        "peak_gib": (second.peak_bytes - first.peak_bytes) / 2**30,
    }


class Launches(TorchDispatchMode):
    """Operations that write something, what they move, and the memory that is made inside and alive.

    Attributes:
        launches: operations that make a storage or change one; views are none.
        moved_bytes: bytes that they read and write, but for those with FLOP to speak of.
        alive_bytes, peak_bytes: in storages that were made inside, now and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.moved_bytes = self.alive_bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = (
            [tensor for tensor in tree_leaves(tree) if isinstance(tensor, torch.Tensor)]
            for tree in ((args, kwargs), result)
        )
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        made = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in outputs}
        made = {address: storage for address, storage in made.items() if address not in known}
        for storage in made.values():
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes())
        if made or func._schema.is_mutable:
            self.launches += 1
            if func.overloadpacket not in flop_registry:
                self.moved_bytes += sum(tensor.nbytes for tensor in (*inputs, *outputs))
        return result

    def _add(self, size: int) -> None:
        self.alive_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)


@contextmanager
def as_a_gpu_computes() -> Iterator[None]:
    """Norms in float32 where autocast is on, and flash attention.

    By replaced functions: a `TorchFunctionMode` is off in the backward pass, where parts of the forward pass may run
    again.
    """

    def in_float32(norm: Any) -> Any:
        def compute(*inputs: Any) -> torch.Tensor:
            if torch.is_autocast_enabled("cpu"):
                inputs = tuple(each.float() if isinstance(each, torch.Tensor) else each for each in inputs)
            return norm(*inputs)

        return compute

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (each.to(torch.bfloat16) for each in (query, key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    with ExitStack() as stack:
        for name in ("group_norm", "layer_norm", "rms_norm"):
            stack.enter_context(mock.patch.object(F, name, in_float32(getattr(F, name))))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attend))
        yield
