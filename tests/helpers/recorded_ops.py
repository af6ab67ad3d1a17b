"""A CUDA graph on a CPU: the operations of a function are recorded once, and repeated on the same memory.

As in a CUDA graph, no Python of the function runs again, numbers are those of the recording, and every tensor stays
where it is. What a graph could not record is an error: to look at a value on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
#: Operations by which a host learns a value, for which it waits for the device.
HOST_READS = {each.default for each in (aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.equal, aten.item)}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in HOST_READS, f"{func} cannot be recorded"
        outputs = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_leaves(outputs)))
        return outputs


def record_ops(device: torch.device) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """What `GraphedPasses` takes in place of `make_cuda_capture`."""

    def capture(work: Callable[[], Any]) -> Callable[[], Any]:
        with _Recorder() as recorder:
            outputs = work()

        def replay() -> Any:
            for func, args, kwargs, recorded in recorder.calls:
                aliases = [each.alias_info for each in func._schema.returns]
                if any(alias is not None and not alias.is_write for alias in aliases):
                    continue  # a view of memory that is written to again anyway
                again = tree_leaves(func(*args, **kwargs))
                for old, new in zip(recorded, again, strict=True):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.copy_(new)
            return outputs

        return replay

    return capture
