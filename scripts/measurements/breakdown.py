"""Where the time of a training step and of an edit goes on a GPU: by kind of kernel, and what the host does meanwhile.

The kinds are found by the names of kernels alone (`KINDS`). On a CPU the operators of PyTorch take their place, so that
all of this can be tried there.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from measurements.editing import EDIT_VARIANTS, EditSetting
from measurements.harness import Counted, Side, free_memory
from measurements.training_step import StepSetting
from measurements.training_variants import TRAIN_VARIANTS, check_variants

from mimicbrush.errors import MimicBrushError

#: Kind, and what the names of its kernels (CUDA) and operators (CPU) hold, in small letters. The first that fits
#: counts.
KINDS = (
    ("attention", r"flash|fmha|sdpa|_mha|flex_attention|dot_product_attention|efficient_attention|softmax"),
    # A kernel that torch.compile made says all that it fuses: templates are matrix products, the others are not.
    ("convolution", r"triton_tem_.*conv"),
    ("matmul", r"triton_tem_|triton_mm"),
    ("norm and activation", r"triton_.*(group_norm|layer_norm|var_mean|welford|silu|gelu|sigmoid|erf)"),
    ("optimizer", r"multi_tensor_apply|fused_adam|fusedadam|_foreach_|normtwoops|vector_norm|triton_for_"),
    (
        "copies",
        r"nchwtonhwc|nhwctonchw|triton_poi_fused(_(_to_copy|clone|cat|_unsafe_view|view|transpose|permute))+_\d+$",
    ),
    ("other", r"triton_(poi|red|per)_"),
    ("convolution", r"fprop|dgrad|wgrad|convol|cudnn|winograd|conv2d|conv_depthwise|im2col|col2im"),
    ("matmul", r"gemm|gemv|nvjet|cublas|splitk|cutlass|xmma|addmm|\bmm\b|bmm|matmul|(?<![a-z])linear|dot_kernel"),
    (
        "norm and activation",
        r"(group|layer|batch)_?norm|rowwisemoments|fusedparams|internalgradients|gammabeta|silu|gelu|sigmoid|relu|"
        r"clamp_(min|scalar)",
    ),
    ("copies", r"copy|memcpy|memset|catarray|::cat\b|clone|transpose|permute"),
)
_PATTERNS = [(kind, re.compile(pattern)) for kind, pattern in KINDS]
#: All kinds, in the order of the table that is printed.
ALL_KINDS = ("convolution", "matmul", "attention", "norm and activation", "optimizer", "copies", "other")
_WINDOW = "measured"
#: Operators on a CPU that compute nothing themselves.
_NO_WORK = re.compile(
    r"(aten::)?(empty\w*|as_strided\w*|view\w*|_?reshape\w*|_unsafe_view|alias|detach\w*|resolve_\w+|lift_fresh|set_|"
    r"resize_|result_type|item|is_nonzero|_local_scalar_dense|to|_has_\w+|unbind|split\w*|t|transpose|permute|expand\w*|"
    r"slice|select|unsqueeze|squeeze|narrow|chunk|contiguous|dropout|_nnpack_available)$"
)
_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST_CALLS = ("cuda_runtime", "cuda_driver")
_LAUNCH = re.compile(r"^cu(da)?\w*Launch(?!HostFunc)")
_SYNC = re.compile(r"^cu(da)?(\w+Synchronize|Memcpy|MemcpyDtoH_v2)$|^aten::_local_scalar_dense$")


def find_kind(name: str) -> str:
    """Tell what kind of work a kernel or an operator does, by its name."""
    small = name.lower()
    return next((kind for kind, pattern in _PATTERNS if pattern.search(small)), "other")


@dataclass(frozen=True)
class Event:
    """Something that a profiler saw: times in microseconds."""

    name: str
    category: str
    thread: object
    start: float
    end: float


def profile(side: Side, on_gpu: bool) -> list[Event]:
    """Run a side to warm it up, on a GPU twice, then once under PyTorch's profiler.

    Returns:
        Everything in the order of its start; the run itself is the event named "measured".
    """
    import torch
    from torch.profiler import ProfilerActivity, record_function

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    for _ in range(2 if on_gpu else 1):
        side()
    wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        with record_function(_WINDOW):
            side()
        wait()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_text()))


def read_trace(trace: Mapping[str, Any]) -> list[Event]:
    """List the complete events of a trace in Chrome's format, in the order of their start."""
    events = [
        Event(found["name"], found.get("cat", ""), found.get("tid"), found["ts"], found["ts"] + found["dur"])
        for found in trace["traceEvents"]
        if found.get("ph") == "X"
    ]
    return sorted(events, key=lambda event: (event.start, -event.end))


def break_down(events: Sequence[Event]) -> dict[str, object]:
    """Tell where the time of a profiled run went.

    Returns:
        Milliseconds of the run, of each kind, and in which nothing ran; number of kernels, of launches by the host, and
        of calls in which the host waits for the GPU; the kernels that took longest, by name. Of a run on a CPU, the
        innermost operators count as kernels and as launches, and reading a number counts as waiting.
    """
    window = next(event for event in events if event.name == _WINDOW and event.category == "user_annotation")
    inside = [event for event in events if window.start <= event.start and event is not window]
    kernels = [event for event in inside if event.category in _GPU_WORK]
    hosts = [event for event in inside if event.start <= window.end]
    calls = [event for event in hosts if event.category in _HOST_CALLS]
    launches = sum(1 for event in calls if _LAUNCH.match(event.name))
    if not calls:
        calls = [event for event in hosts if event.category == "cpu_op"]
        kernels = list_innermost(event for event in calls if not _NO_WORK.match(event.name))
        launches = len(kernels)
    end = max([window.end, *(event.end for event in kernels)])
    milliseconds: dict[str, float] = dict.fromkeys(ALL_KINDS, 0.0)
    for event in kernels:
        milliseconds[find_kind(event.name)] += (event.end - event.start) / 1e3
    total = (end - window.start) / 1e3
    return {
        "total_ms": total,
        **{f"{kind.replace(' ', '_')}_ms": spent for kind, spent in milliseconds.items()},
        "idle_ms": total - covered(kernels) / 1e3,
        "kernels": len(kernels),
        "launches": launches,
        "host_syncs": sum(1 for event in calls if _SYNC.match(event.name)),
        "longest": list_longest(kernels),
    }


def covered(events: Iterable[Event]) -> float:
    """Measure the time in which at least one of the events ran, in microseconds."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        total += max(0.0, event.end - max(event.start, until))
        until = max(until, event.end)
    return total


def list_innermost(events: Iterable[Event]) -> list[Event]:
    """List the events that hold no other of the same thread; they come in the order of their start, outer ones first.

    One whose name tells no kind takes the name of the nearest around it that does: an addition may belong to Adam.
    """
    innermost: list[Event] = []
    around: dict[object, list[Event]] = defaultdict(list)

    def close(stack: list[Event]) -> None:
        telling = (event.name for event in reversed(stack) if find_kind(event.name) != "other")
        innermost.append(replace(stack[-1], name=next(telling, stack[-1].name)))

    for event in events:
        stack = around[event.thread]
        if stack and event.start >= stack[-1].end:
            close(stack)
            while stack and event.start >= stack[-1].end:
                stack.pop()
        stack.append(event)
    for stack in around.values():
        close(stack)
    return innermost


def list_longest(kernels: Iterable[Event], most: int = 15) -> list[str]:
    """List the names that took the most time together, longest first: milliseconds, number, kind and name."""
    spent: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        spent[event.name].append((event.end - event.start) / 1e3)
    order = sorted(spent, key=lambda name: -sum(spent[name]))[:most]
    return [f"{sum(spent[n]):.3g} ms, {len(spent[n])} times, {find_kind(n)}: {n[:160]}" for n in order]


def breakdown_gpu() -> Iterator[Counted]:
    """where the time of a training step and an edit goes on a CUDA GPU: kinds of kernels; launches, syncs, idle time"""
    import torch

    if not torch.cuda.is_available():
        raise MimicBrushError("breakdown_gpu needs a CUDA GPU, and PyTorch sees none; try scripts/gpu_check.sh --toy")
    edited = EditSetting(device="cuda", dtype="bfloat16", steps=BREAKDOWN_STEPS)
    yield from breakdown_rows(StepSetting(half=True, device="cuda", batch_size=32), edited)


#: Denoising steps of a profiled edit.
BREAKDOWN_STEPS = 10


def breakdown_rows(trained: StepSetting, edited: EditSetting, names: Collection[str] = ()) -> Iterator[Counted]:
    """Rows of `breakdown_gpu`: a step of training in each variant, then an edit in each.

    Args:
        trained, edited: what is profiled, on their device.
        names: of variants, of training, of editing, or of both; nothing: those that are `profiled`.

    Raises:
        MimicBrushError: a name is none of them.
    """
    check_variants({**TRAIN_VARIANTS, **EDIT_VARIANTS}, names)
    for name, variant in TRAIN_VARIANTS.items():
        if name in names if names else variant.profiled:
            setting = variant.applied_to(trained)
            case = f"train step, {name}, {setting.batch_size} samples"
            yield Counted(case, partial(_step_breakdown, setting, variant.is_peer))
    for name, variant in EDIT_VARIANTS.items():
        if name in names if names else variant.profiled:
            setting = replace(edited, variant=variant)
            yield Counted(f"edit, {name}, {setting.steps} steps", partial(_edit_breakdown, setting))


def _step_breakdown(setting: StepSetting, is_peer: bool) -> dict[str, object]:
    free_memory()
    step = setting.makers()[is_peer]()
    return break_down(profile(step, setting.device == "cuda"))


def _edit_breakdown(setting: EditSetting) -> dict[str, object]:
    free_memory()
    edit = setting.sides("current")[setting.variant.is_peer]
    return break_down(profile(edit, setting.device == "cuda"))
