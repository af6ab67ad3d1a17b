"""What the forward pass of a training step starts on a GPU, and what its norms move, counted without a GPU.

The tensors have no content and say that they are on a GPU, see `measurements.activations`. Counted are PyTorch's
operators, but for those that only look at a tensor in another way. An operator is one kernel, or a few: GroupNorm is
three.

Convolutions run in channels-last order there (`cudnn_conv_use_channels_last` of PyTorch): if an input or the weight is
in it, both are changed to it, and the result is. Before PyTorch 2.15, GroupNorm on a GPU changed its input to the other
order, and left its result there (`at::native::group_norm`; the kernels for channels-last came with pull request
191945). Both rules are applied here, because PyTorch without a GPU does not.

The backward pass is not counted: PyTorch does not run it on such tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from measurements.activations import MemorySetting, as_on_a_gpu, make_inputs
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

BATCH = 2
#: Change no memory.
_LOOKS = ("empty", "new_empty", "detach", "expand", "as_strided", "_unsafe_view", "device", "_local_scalar_dense")
_COPIES = ("clone", "_to_copy", "copy_")


def count_forward(setting: MemorySetting, norms_change_order: bool) -> Mapping[str, float]:
    """Count the forward pass of both U-Nets.

    Args:
        setting: the networks.
        norms_change_order: as before PyTorch 2.15.

    Returns:
        Operators; of these the casts of weights; changes of the order of an image's memory; GiB of a sample that these
        read and write; GiB of a sample that norms of images read and write, with their SiLU, their casts, and the
        changes of order that they cause.
    """
    counted = []
    for order in dict.fromkeys((norms_change_order, False)):
        model = setting.model()
        with FakeTensorMode(), torch.device("cuda"):
            model._apply(_to_gpu)
            inputs = make_inputs(setting, model, BATCH)
            counter = _Counter(model, order)
            with as_on_a_gpu(), counter:
                model(*inputs)
        counted.append(counter)
    first, plain = counted[0], counted[-1]
    changed_bytes = first.changed_bytes - plain.changed_bytes  # those that norms cause
    return {
        "operators": sum(first.operators.values()),
        "weight_casts": first.weight_casts,
        "changes_of_order": sum(first.changes.values()),
        "changes_gib": first.changed_bytes / BATCH / 2**30,
        "norms_gib": (first.norm_bytes + changed_bytes) / BATCH / 2**30,
    }


def _to_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether an image, or the weight of a convolution, is in channels-last order; by strides, as PyTorch asks."""
    return tensor.ndim == 4 and tensor.stride(1) == 1 and tensor.stride(3) == tensor.shape[1] > 1


class _Counter(TorchDispatchMode):
    """Counts operators, and gives their results the order of memory that they have on a GPU."""

    def __init__(self, model: nn.Module, norms_change_order: bool) -> None:
        super().__init__()
        self._weights = {id(each) for each in model.parameters()}
        self._norms_change_order = norms_change_order
        self.operators, self.changes = Counter[str](), Counter[str]()
        self.weight_casts = self.changed_bytes = self.norm_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if func.is_view or name in _LOOKS or name.startswith("view"):
            return result
        self.operators[name] += 1
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name == "convolution":
            return self._convolve(args, result)
        if name in ("native_group_norm", "group_norm"):
            self.norm_bytes += 2 * first.nbytes + result[0].nbytes  # it is read for the moments, and again
            return self._normalise(name, first, result)
        if name in _COPIES and first is not None and id(first) in self._weights:
            self.weight_casts += 1
        elif name in (*_COPIES, "silu") and first is not None and first.ndim == 4:
            if is_channels_last(first) != is_channels_last(result):
                self._change(name, first, result.nbytes)
            elif first.dtype != result.dtype or name == "silu":
                self.norm_bytes += first.nbytes + result.nbytes
        return result

    def _change(self, name: str, tensor: torch.Tensor, written_bytes: int) -> None:
        self.changes[name] += 1
        self.changed_bytes += tensor.nbytes + written_bytes

    def _convolve(self, args: tuple[Any, ...], result: torch.Tensor) -> torch.Tensor:
        if not any(is_channels_last(each) for each in args[:2]):
            return result
        for each in args[:2]:
            if not is_channels_last(each):
                self._change("convolution", each, each.nbytes)
        return torch.empty_like(result, memory_format=torch.channels_last)

    def _normalise(self, name: str, image: torch.Tensor, result: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if name == "group_norm" or not is_channels_last(image):
            return result
        order = torch.channels_last
        if self._norms_change_order:
            self._change(name, image, image.nbytes)
            order = torch.contiguous_format
        return torch.empty_like(result[0], memory_format=order), *result[1:]
