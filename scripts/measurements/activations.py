"""What a sample keeps in memory from the forward pass to the backward pass, at full size, counted without a GPU.

Counted are the storages that the forward pass makes and that are alive after it, each once, however many tensors
share it, and of these what a *second* sample adds: so weights, and their copies in half precision that autocast keeps,
are left out. Without activation checkpointing these are exactly what saved-tensor hooks see; with it there are also the
features of the reference, which live on in a closure and pass no hook (in the peer: in its bank).

The tensors are PyTorch's fake ones. They have no content but say that they are on a GPU, so that autocast chooses the
types that it chooses there. `scaled_dot_product_attention` is replaced by PyTorch's flash attention, which a GPU would
run and which keeps queries, keys, values, its result and the log-sum-exp; without a GPU PyTorch would take the
mathematical form, which keeps all scores.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class MemorySetting:
    """Whose trained networks, and how.

    Attributes:
        peer: those of `peers.common_training` instead of ours.
        options: of ours, those of `TrainOptions` that are about speed; of the peer, `activation_checkpointing`.
        channels_last: ours in the order of memory that a GPU takes.
        size_px, block_out_channels, reference_encoder: see `random_components`; of the peer always "unet".
    """

    peer: bool = False
    options: Mapping[str, bool] = field(default_factory=dict)
    channels_last: bool = False
    size_px: int = 512
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    reference_encoder: str = "unet"

    def model(self) -> nn.Module:
        """The networks, without memory."""
        from peers.common_training import CommonModel

        from mimicbrush.models.components import random_components
        from mimicbrush.training.objective import MimicBrushModel
        from mimicbrush.training.options import TrainOptions
        from mimicbrush.training.performance import apply_speedups

        with torch.device("meta"):
            parts = random_components(
                size_px=self.size_px,
                block_out_channels=self.block_out_channels,
                reference_encoder=self.reference_encoder,
            )
        if self.peer:
            return CommonModel(parts, self.size_px, self.options.get("activation_checkpointing", False)).train()
        model = MimicBrushModel(
            parts.unet, parts.reference_unet, parts.image_projector, parts.depth_projector, size_px=self.size_px
        )
        apply_speedups(model, TrainOptions(**self.options), channels_last=self.channels_last)
        return model.train()


def plain_unet_gib(setting: MemorySetting, by_hooks: bool = False) -> float:
    """GiB that a sample keeps in the imitative U-Net where it reads no reference.

    Args:
        setting: the network.
        by_hooks: count what PyTorch's saved-tensor hooks see, instead of what is alive.
    """
    unet = setting.model().unet
    kept = []
    with FakeTensorMode(), torch.device("cuda"):
        _place(unet)
        side = setting.size_px // 8
        for batch in (1, 2):
            stem = torch.empty(batch, unet.config.in_channels, side, side, requires_grad=True)
            context = torch.empty(batch, 257, unet.config.cross_attention_dim, requires_grad=True)
            timestep = torch.ones(batch, dtype=torch.int64)
            counted = _SeenByHooks(unet) if by_hooks else Alive()
            with as_on_a_gpu(), counted:
                result = unet(stem, timestep, context).sample
            kept.append(sum(counted.bytes_by_part().values()))
            del result
    return (kept[1] - kept[0]) / 2**30


def step_gib(setting: MemorySetting) -> dict[str, float]:
    """GiB that a sample keeps in a training step: in each U-Net, in a pass on average, and in all trained networks."""
    model = setting.model()
    names = [name for name in ("reference_unet", "unet") if getattr(model, name) is not None]
    kept = []
    with FakeTensorMode(), torch.device("cuda"):
        _place(model)
        for batch in (1, 2):
            inputs = make_inputs(setting, model, batch)
            alive = Alive()
            watches = [w for name in names for w in alive.watch(name, getattr(model, name))]
            with as_on_a_gpu(), alive:
                loss = F.mse_loss(model(*inputs).sample.float(), inputs[0])
            kept.append(alive.bytes_by_part())
            del loss
            for watch in watches:
                watch.remove()
    gib = {name: (kept[1][name] - kept[0][name]) / 2**30 for name in kept[0]}
    return {
        **{f"{name}_gib": gib[name] for name in names},
        "per_unet_gib": sum(gib[name] for name in names) / 2,  # one U-Net for both makes two passes
        "sample_gib": sum(gib.values()),
    }


def state_gb(setting: MemorySetting) -> dict[str, float]:
    """GB of the trained weights in float32, and of these with their gradients, two moments of Adam and average."""
    count = sum(each.numel() for each in setting.model().parameters())
    return {"trained_millions": count / 1e6, "weights_gb": 4 * count / 1e9, "states_gb": 20 * count / 1e9}


def make_inputs(setting: MemorySetting, model: nn.Module, batch: int) -> tuple[Any, ...]:
    """Arguments of a model's forward."""
    from mimicbrush.training.objective import Conditions

    latents = torch.empty(batch, 4, setting.size_px // 8, setting.size_px // 8)
    tokens = torch.empty(batch, 257, model.image_projector.config.image_width)
    conditions = Conditions(latents, latents, latents, latents[:, :1], tokens, torch.empty(batch, 1, 518, 518))
    return latents, torch.ones(batch, dtype=torch.int64), conditions, torch.ones(batch, dtype=torch.bool)


def _place(module: nn.Module) -> None:
    """Move a module from the meta device to a GPU that there need not be."""
    module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda"))


class Alive(TorchDispatchMode):
    """Storages that are made inside, by the part of a model that made them."""

    def __init__(self) -> None:
        super().__init__()
        self._part = "others"
        # A weak reference keeps the address from being used again.
        self._made: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes(), self._part))
        return result

    def watch(self, part: str, module: nn.Module) -> list[RemovableHandle]:
        """What the module makes is this part's."""

        def switch_to(name: str) -> Callable[..., None]:
            return lambda *_inputs: setattr(self, "_part", name)

        return [module.register_forward_pre_hook(switch_to(part)), module.register_forward_hook(switch_to("others"))]

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes that are alive now."""
        gc.collect()
        totals: dict[str, int] = dict.fromkeys((part for _, _, part in self._made.values()), 0)
        for reference, size, part in self._made.values():
            if not reference.expired():
                totals[part] += size
        return totals


class _SeenByHooks(torch.autograd.graph.saved_tensors_hooks):
    """Storages of tensors that are saved for the backward pass, but for those of a module's parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._left_out = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
        self._seen: dict[int, int] = {}

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._left_out:
            self._seen[storage._cdata] = storage.nbytes()
        return tensor

    def bytes_by_part(self) -> dict[str, int]:
        """All of them, in one part."""
        return {"others": sum(self._seen.values())}


class _FlashAttention(TorchFunctionMode):
    """Attention as a GPU runs it in half precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
        assert kwargs.get("attn_mask") is None and query.dtype in (torch.float16, torch.bfloat16)
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Autocast to bfloat16 for a GPU (`torch.autocast` refuses where there is none), and flash attention."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        with _FlashAttention():
            yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
