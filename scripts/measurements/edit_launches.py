"""What the host has to start for a denoising step, counted on the meta device, where nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimicbrush.pipelines.cuda_graphs import GraphedPasses

if TYPE_CHECKING:
    from mimicbrush.pipelines import MimicBrushPipeline

_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten._foreach_copy_.default}


class StartedOps(TorchDispatchMode):
    """Counter of operations that compute or copy on the meta device: a GPU would run one kernel or a few for each.

    A value that the host reads from the device, and so waits for, is an error there. Copies to the device wait, too.

    Attributes:
        started: operations that are no views.
        sent: those of them that copy from the host.
        shapes: of the tensors that were allocated.
        is_paused: nothing is counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.started = self.sent = 0
        self.shapes: set[tuple[int, ...]] = set()
        self.is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        returned = [each.alias_info for each in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        changed = [each for each in tree_leaves(outputs if returned else args) if isinstance(each, torch.Tensor)]
        if not self.is_paused and not is_view and any(each.is_meta for each in changed):
            self.started += 1
            if func in _COPIES:
                given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
                self.sent += not all(each.is_meta for each in given)
            if returned and not any(returned):
                self.shapes |= {tuple(each.shape) for each in changed}
        return outputs

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Stand in for the recording of a CUDA graph: each replay is one operation, whatever the graph holds."""
        self.is_paused = True
        outputs = work()
        self.is_paused = False

        def replay() -> Any:
            self.started += 1
            return outputs

        return replay


class _OneKernelAttention(TorchFunctionMode):
    """On the meta device PyTorch takes attention to pieces; on a GPU it is one kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
        return func(*args, **(kwargs or {}))


def count_steps(pipe: MimicBrushPipeline, steps: int, graphed: bool) -> StartedOps:
    """Count what so many steps of a guided edit start: the difference of two edits, after graphs were recorded.

    Args:
        pipe: on the meta device.
        steps: a multiple of 4, the timesteps that the reference U-Net reads in one pass.
        graphed: with CUDA graphs.

    Returns:
        The counts; their shapes are those that the longer edit allocates and the shorter one does not.
    """
    image = np.zeros((pipe.size_px, pipe.size_px, 3), np.uint8)
    mask = np.full(image.shape[:2], 255, np.uint8)
    latents = torch.randn(1, 4, *[pipe.unet.config.sample_size] * 2)

    def edit(more: int) -> StartedOps:
        counter.started = counter.sent = 0
        counter.shapes = set()
        with counter, _OneKernelAttention():
            pipe(image, mask, image, latents=latents, num_inference_steps=4 + more, output_type="latent")
        found = StartedOps()
        found.started, found.sent, found.shapes = counter.started, counter.sent, counter.shapes
        return found

    counter = StartedOps()
    pipe._graphs = GraphedPasses(8, lambda device: counter.capture, "meta") if graphed else None
    if graphed:
        edit(0)  # records
    short, long = edit(0), edit(steps)
    pipe._graphs = None
    long.started, long.sent = long.started - short.started, long.sent - short.sent
    long.shapes -= short.shapes
    return long


def step_launches(pipe: MimicBrushPipeline) -> dict[str, float]:
    """Count what one denoising step starts, eagerly and beside its CUDA graphs; reading references included."""
    eager, graphed = (count_steps(pipe, 4, graphed) for graphed in (False, True))
    return {
        "eager_ops_per_step": eager.started / 4,
        "graphed_ops_per_step": graphed.started / 4,
        "host_copies_per_step": graphed.sent / 4,
    }
