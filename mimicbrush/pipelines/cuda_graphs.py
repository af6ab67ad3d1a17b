"""CUDA graphs: passes of networks are recorded once and then replayed with a single launch.

A pass of a U-Net starts about a thousand kernels, and for one image a large GPU computes them faster than Python
starts them. A CUDA graph is started by one call. It always reads and writes the same memory: so inputs are copied into
*static buffers* before each replay (`StaticCall`), and results are copied out of it.

A graph repeats what happened when it was recorded, numbers of Python included. So three things are taken care of:

* A number that may change, such as the guidance scale, is a static buffer, too.
* Whatever else a pass depends on is the key of its graph: names, shapes and types of the inputs, and the networks with
  their weights' addresses, adapters and attention backends (`describe_network`).
* What no graph can repeat runs as it does without graphs, and the reason is logged once (`find_graph_obstacle`).
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

#: A tensor, a number or None.
Leaf = Any
#: Leaves in dictionaries and tuples.
Tree = Any
#: Records work, which takes nothing and returns a tree; returns the function that repeats it.
Capture = Callable[[Callable[[], Tree]], Callable[[], Tree]]

#: Passes before the recording: libraries choose kernels and take their memory in the first ones.
_WARM_UP_PASSES = 3
#: Attributes of every module, of which none but its mode and its tensors matter here.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

_log = logging.getLogger(__name__)


class GraphedPasses:
    """The CUDA graphs of one pipeline; the least recently used graph is dropped first.

    Args:
        max_graphs: the most graphs that are kept.
        make_capture: makes what records on a device.
        device_type: where it can record.
    """

    def __init__(
        self,
        max_graphs: int,
        make_capture: Callable[[torch.device], Capture] | None = None,
        device_type: str = "cuda",
    ) -> None:
        self.max_graphs, self.device_type = max_graphs, device_type
        self._make_capture = make_capture or make_cuda_capture
        self._captures: dict[torch.device, Capture] = {}
        self._calls: OrderedDict[Hashable, StaticCall] = OrderedDict()
        self._failed: set[Hashable] = set()
        self._logged: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedPasses:
        return GraphedPasses(self.max_graphs, self._make_capture, self.device_type)  # the copy has weights of its own

    def __len__(self) -> int:
        return len(self._calls)

    def replay(
        self,
        function: Callable[..., Tree],
        networks: Sequence[nn.Module],
        settings: Hashable = None,
        obstacle: str | None = None,
    ) -> Callable[..., Tree]:
        """Return a function with the same results as this one that replays graphs.

        Args:
            function: takes trees by name, returns a tree of tensors, and depends on nothing but these, the networks and
                the settings. Numbers (float) come to it as tensors, (), float64.
            networks: all that it runs.
            settings: all else that it depends on.
            obstacle: why it cannot be recorded this time.

        Returns:
            The function itself where graphs cannot repeat it. What networks are is looked at here, so take a new one
            whenever they may have changed.
        """
        # A private name of diffusers: where it is missing, pipelines without graphs still work.
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        device = next(networks[0].parameters()).device
        obstacle = obstacle or next(filter(None, map(find_graph_obstacle, networks)), None)
        if obstacle is None and device.type != self.device_type:
            obstacle = f"the pipeline is on the device {device.type!r}, but CUDA graphs need {self.device_type!r}"
        if obstacle is not None:
            self._log_once(obstacle)
            return function
        described = (
            *(function.__name__, settings, device, torch.is_inference_mode_enabled()),
            *(_AttentionBackendRegistry.get_active_backend()[0], *map(describe_network, networks)),
        )
        found: dict[Hashable, StaticCall | None] = {}  # a short key for every step, and evicted graphs live on here

        def replayed(**inputs: Tree) -> Tree:
            leaves = list(_list_leaves(inputs))
            key = tuple((name, *_describe_leaf(leaf)) for name, leaf in leaves)
            if key not in found:
                found[key] = self._find_or_record((described, key), function, inputs, device)
            call = found[key]
            return function(**inputs) if call is None else call(inputs)

        return replayed

    def free(self) -> None:
        """Drop all graphs and their memory."""
        self._drop(0)
        self._captures.clear()
        self._failed.clear()

    def _find_or_record(
        self, key: Hashable, function: Callable[..., Tree], inputs: dict[str, Tree], device: torch.device
    ) -> StaticCall | None:
        if key in self._failed:
            return None
        if key not in self._calls:
            try:
                if device not in self._captures:
                    self._captures[device] = self._make_capture(device)
                self._calls[key] = StaticCall(function, inputs, self._captures[device])
            except RuntimeError as error:  # of CUDA, or too little memory: without a graph it may still work
                self._failed.add(key)
                self._log_once(f"a pass could not be recorded ({type(error).__name__}: {error})")
                return None
            # After the recording, not before it: the graphs share their memory as long as one of them lives.
            self._drop(self.max_graphs)
        self._calls.move_to_end(key)
        return self._calls[key]

    def _drop(self, kept: int) -> None:
        if len(self._calls) > kept and self.device_type == "cuda":
            torch.cuda.synchronize()  # they may still run
        while len(self._calls) > kept:
            self._calls.popitem(last=False)

    def _log_once(self, obstacle: str) -> None:
        if obstacle not in self._logged:
            self._logged.add(obstacle)
            _log.warning("this edit runs without CUDA graphs: %s", obstacle)


class StaticCall:
    """Function whose inputs and results stay at the same addresses.

    Args:
        function: see `GraphedPasses.replay`.
        inputs: the first ones. Later ones have the same names, shapes and types.
        capture: records the function.
    """

    def __init__(self, function: Callable[..., Tree], inputs: dict[str, Tree], capture: Capture) -> None:
        leaves = [leaf for _, leaf in _list_leaves(inputs)]
        device = next(leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor))
        self._buffers = [_make_buffer(leaf, device) for leaf in leaves]
        self._held = [_Held(leaf) for leaf in leaves]
        static_inputs = _rebuild(inputs, iter(self._buffers))
        self._replay = capture(lambda: function(**static_inputs))

    def __call__(self, inputs: dict[str, Tree]) -> Tree:
        """Copy what has changed into the buffers, replay, and return new tensors."""
        changed: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
        for number, ((_, leaf), buffer) in enumerate(zip(_list_leaves(inputs), self._buffers, strict=True)):
            if self._held[number].is_same(leaf):
                continue
            self._held[number] = _Held(leaf)
            if isinstance(leaf, torch.Tensor):
                buffers, values = changed[leaf.dtype]
                buffers.append(buffer)
                values.append(leaf)
            else:
                buffer.fill_(leaf)
        for buffers, values in changed.values():
            torch._foreach_copy_(buffers, values)  # one kernel for all tensors of a type
        outputs = self._replay()
        return _rebuild(outputs, (leaf.clone() for _, leaf in _list_leaves(outputs)))


class _Held:
    """What a buffer holds a copy of."""

    def __init__(self, leaf: Leaf) -> None:
        self._number = None if isinstance(leaf, torch.Tensor) else leaf
        self._tensor = weakref.ref(leaf) if isinstance(leaf, torch.Tensor) else None
        self._version = leaf._version if isinstance(leaf, torch.Tensor) and not leaf.is_inference() else None

    def is_same(self, leaf: Leaf) -> bool:
        if not isinstance(leaf, torch.Tensor):
            return self._tensor is None and leaf == self._number
        # Tensors made under torch.inference_mode() do not count writes.
        is_counted = not leaf.is_inference()
        return is_counted and self._tensor is not None and self._tensor() is leaf and self._version == leaf._version


def make_cuda_capture(device: torch.device) -> Capture:
    """Make the function that records graphs on a GPU. All graphs share memory, because only one runs at a time."""
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def capture(work: Callable[[], Tree]) -> Callable[[], Tree]:
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_PASSES):
                    work()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as the page's, may go on using the GPU.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                outputs = work()

        def replay() -> Tree:
            graph.replay()
            return outputs

        return replay

    return capture


def find_graph_obstacle(network: nn.Module) -> str | None:
    """Find a reason why graphs cannot repeat passes of a network; None if there is none."""
    device_type = next(network.parameters()).device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return "autocast converts weights at every pass"
    for name, module in network.named_modules():
        own = vars(module).get("forward")
        is_replaced = own is not None and getattr(own, "__func__", None) is not type(module).forward
        is_compiled = "_orig_mod" in module._modules  # by torch.compile(network)
        if module._forward_hooks or module._forward_pre_hooks or (is_replaced and not is_compiled):
            return (
                f"a hook (offloading, layerwise casting, ...) runs at every pass of {name or 'the network'} "
                f"({type(network).__name__})"
            )
    return None


def describe_network(network: nn.Module) -> Hashable:
    """Describe everything that a pass of a network depends on, except its inputs and the values of its weights.

    Weights are described by their addresses: a graph reads what is there, also after a write in place.
    """
    described: list[Any] = []
    for name, module in network.named_modules():
        described += name, type(module), module.training
        for key, value in vars(module).items():
            if key not in _OF_EVERY_MODULE:
                described += key, _describe(value)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            described.append(_describe(tensor))
        if processor := vars(module).get("processor"):  # of an attention layer
            described += type(processor), _describe(vars(processor))
    return tuple(described)


def _describe(value: object) -> Hashable:
    """Numbers, words and collections by what they are, tensors by their address, other objects by which one it is."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        return id(value), value.data_ptr(), value.dtype
    if isinstance(value, dict):
        return tuple((str(key), _describe(each)) for key, each in value.items())
    if isinstance(value, list | tuple | set):
        return tuple(map(_describe, value))
    return id(value)


def _list_leaves(tree: Tree, name: str = "") -> Iterator[tuple[str, Leaf]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _list_leaves(value, f"{name}/{key}")
    elif isinstance(tree, tuple):
        for number, value in enumerate(tree):
            yield from _list_leaves(value, f"{name}/{number}")
    else:
        yield name, tree


def _rebuild(tree: Tree, leaves: Iterator[Leaf]) -> Tree:
    """The same tree with other leaves."""
    if isinstance(tree, dict):
        return {key: _rebuild(value, leaves) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_rebuild(value, leaves) for value in tree)
    return next(leaves)


def _describe_leaf(leaf: Leaf) -> tuple[Hashable, ...]:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else (leaf is None,)


def _make_buffer(leaf: Leaf, device: torch.device) -> Leaf:
    if leaf is None:
        return None
    # float64, as a number of Python: each operation rounds it as it would round the number.
    return leaf.clone() if isinstance(leaf, torch.Tensor) else torch.full((), leaf, dtype=torch.float64, device=device)
