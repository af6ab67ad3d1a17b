"""The state of a run: `TrainingState.snapshot` makes a checkpoint from it, `restore` returns to one.

Weights, average and optimizer share the names of the trained parameters. A checkpoint holds full tensors, however they
are sharded in memory: a run may go on with another number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LRScheduler

from mimicbrush.errors import CheckpointError
from mimicbrush.training.checkpoints import read_state
from mimicbrush.training.guards import AsyncScalars, SkippedSteps

WEIGHTS, AVERAGE, OPTIMIZER, RANDOM = "weights", "ema", "optimizer", "random"


@dataclass
class TrainingState:
    """Everything in a run that changes, between two steps.

    Attributes:
        parameters: name -> trained parameter, as the optimizer holds it.
        optimizer: over these.
        lr_scheduler: of its learning rate.
        ema: average of the parameters; None if none is kept.
        step: steps done, skipped ones included: the position in the data.
        skipped: steps that changed nothing.
        tracker: what a tracker needs to go on with the same run.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    lr_scheduler: LRScheduler
    ema: EMAModel | None
    step: int = 0
    skipped: SkippedSteps = field(default_factory=SkippedSteps)
    tracker: dict[str, str] = field(default_factory=dict)

    def weights(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name -> weight of a whole model, one at a time: the trained ones averaged, the others as they are.

        Sharded tensors are gathered, so all processes must take all of them.
        """
        averaged = self.ema_weights()
        for name, parameter in model.named_parameters():
            yield name, gather_full_tensor(averaged.get(name, parameter.detach()))

    def ema_weights(self) -> dict[str, torch.Tensor]:
        """List the averaged weights of what is trained, perhaps sharded: name -> tensor; none if none are kept."""
        if self.ema is None:
            return {}
        return dict(zip(self.parameters, self.ema.shadow_params, strict=True))

    def snapshot(self, accelerator: Accelerator) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """Copy everything, as tensors on the CPU and as JSON; training can continue at once.

        All processes must call it. It returns everything on the main process, and random states alone elsewhere.

        Raises:
            CheckpointError: the main process has no memory for the copy. All processes raise it.
        """
        keeps = accelerator.is_main_process
        groups: dict[str, dict[str, torch.Tensor]] = {WEIGHTS: {}, OPTIMIZER: {}}
        for name, parameter in self.parameters.items():
            keeps = _keep(groups[WEIGHTS], name, parameter.detach(), keeps)
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                keeps = _keep(groups[OPTIMIZER], f"{kind}.{name}", value, keeps)
        if self.ema is not None:
            groups[AVERAGE] = {}
            for name, shadow in self.ema_weights().items():
                keeps = _keep(groups[AVERAGE], name, shadow, keeps)
        gathered = gather_object([(_copy_random_state(accelerator.device), keeps)])
        if not gathered[0][1]:
            raise CheckpointError("cannot copy the training state to host memory, which may be full")
        groups[RANDOM] = {
            f"{kind}.{rank}": value for rank, (states, _) in enumerate(gathered) for kind, value in states.items()
        }
        scaler = accelerator.scaler
        return groups, {
            "schedule": _json_of_schedule(self.lr_scheduler),
            "average_updates": 0 if self.ema is None else self.ema.optimization_step,
            "scaler": {} if scaler is None else scaler.state_dict(),
            "skipped": {"in_a_row": self.skipped.in_a_row, "total": self.skipped.total},
            "tracker": self.tracker,
            "num_processes": accelerator.num_processes,
        }

    def restore(self, checkpoint: Path, accelerator: Accelerator) -> None:
        """Restore the state of a checkpoint.

        Args:
            checkpoint: its folder, verified.
            accelerator: the number of its processes may differ from then.

        Raises:
            CheckpointError: tensors are missing in it, unexpected, or of another shape.
        """
        state = read_state(checkpoint)
        with torch.no_grad():
            for name, value in _read(checkpoint, WEIGHTS, self.parameters):
                self.parameters[name].copy_(_place_like(value, self.parameters[name]))
            if self.ema is not None:
                shadows = self.ema_weights()
                for name, value in _read(checkpoint, AVERAGE, shadows):
                    shadows[name].copy_(_place_like(value, shadows[name]))
                self.ema.optimization_step = state["average_updates"]
            self._restore_optimizer(checkpoint)
        self.lr_scheduler.load_state_dict(state["schedule"])
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if accelerator.scaler is not None and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.skipped = SkippedSteps(**state["skipped"])
        self.tracker = dict(state["tracker"])
        if state["num_processes"] == accelerator.num_processes:
            _restore_random_state(checkpoint, accelerator)

    def _restore_optimizer(self, checkpoint: Path) -> None:
        with safe_open(checkpoint / f"{OPTIMIZER}.safetensors", "pt") as file:
            for key in sorted(file.keys()):
                kind, name = key.split(".", 1)
                if name not in self.parameters:
                    raise CheckpointError(f"{checkpoint}: its optimizer has {name}, which this run does not train")
                parameter, value = self.parameters[name], file.get_tensor(key)
                # Adam's count of steps is a scalar. Moments must lie in memory as the parameter does (channels last):
                # the fused kernel goes through both alike.
                moment = value.to(parameter.device)
                if value.ndim:
                    moment = torch.empty_like(parameter, requires_grad=False).copy_(_place_like(value, parameter))
                self.optimizer.state[parameter][kind] = moment


class PendingStep:
    """The latest step, until the CPU knows whether it changed the weights.

    The device itself leaves out a step whose gradients are not finite. Whether it did so is a number on the device. A
    CPU that waited for it would leave a GPU idle; so it is read while the GPU computes the next gradients, and whatever
    depends on it happens in `finish`.

    Args:
        state: what a step changes besides the weights.
        checkpoint_folder: named where too many steps in a row are skipped.
    """

    def __init__(self, state: TrainingState, checkpoint_folder: Path) -> None:
        self.state, self.checkpoint_folder = state, checkpoint_folder
        self._scalars: AsyncScalars | None = None

    def begin(self, is_skipped: torch.Tensor) -> None:
        """Start to copy the number of a step from the device.

        Args:
            is_skipped: () bool on the device, the same on all processes.
        """
        self._scalars = AsyncScalars(is_skipped.float().view(1))

    def finish(self) -> None:
        """Advance learning rate and average unless the step was skipped; do nothing where no step is pending.

        Raises:
            MimicBrushError: too many steps in a row were skipped.
        """
        if self._scalars is None:
            return
        (was_skipped,) = self._scalars.read()
        self._scalars = None
        self.state.skipped.count(bool(was_skipped), self.state.step, self.checkpoint_folder)
        if not was_skipped:
            self.state.lr_scheduler.step()
            if self.state.ema is not None:
                self.state.ema.step(self.state.parameters.values())


def read_saved_weights(checkpoint: Path, model: nn.Module, *, average: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name -> weight of a whole model from a checkpoint, as `TrainingState.weights` does from memory.

    Args:
        checkpoint: its folder, verified.
        model: gives the weights that were not trained.
        average: the averaged weights, or those of the last step.

    Raises:
        CheckpointError: no average was kept, or other parameters were trained.
    """
    group = AVERAGE if average else WEIGHTS
    if not (checkpoint / f"{group}.safetensors").is_file():
        raise CheckpointError(
            f"{checkpoint} has no averaged weights (train.ema_decay=0); export the weights of the last step with --raw"
        )
    yield from _read(checkpoint, group, {name: p for name, p in model.named_parameters() if p.requires_grad})
    yield from ((name, p.detach()) for name, p in model.named_parameters() if not p.requires_grad)


def _keep(group: dict[str, torch.Tensor], name: str, tensor: torch.Tensor, keeps: bool) -> bool:
    """Copy a tensor if `keeps`; return whether the next one is to be kept: not after one that found no memory."""
    full = gather_full_tensor(tensor)  # on all processes, also where nothing is kept: they gather together
    if keeps:
        try:
            group[name] = full.to("cpu", copy=True)
        except (MemoryError, RuntimeError):  # how PyTorch reports a host without memory
            group.clear()
            return False
    return keeps


def gather_full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor that may be sharded; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _place_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Put a full tensor where another one is, and shard it alike."""
    value = value.to(like.device)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _read(checkpoint: Path, group: str, expected: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Read one tensor at a time from the mapped file: eight processes of a machine share its pages."""
    path = checkpoint / f"{group}.safetensors"
    with safe_open(path, "pt") as file:
        stored = set(file.keys())
        if stored != expected.keys():
            differing = sorted(stored ^ expected.keys())
            raise CheckpointError(
                f"{path} and this run do not train the same parameters; {len(differing)} differ: "
                f"{', '.join(differing[:3])}"
            )
        for name in expected:
            value = file.get_tensor(name)
            if value.shape != expected[name].shape:
                raise CheckpointError(
                    f"{path}: {name} has shape {tuple(value.shape)}, expected {tuple(expected[name].shape)}"
                )
            yield name, value


def _json_of_schedule(schedule: LRScheduler) -> dict[str, Any]:
    """Leave out the functions in diffusers' schedules: they are made again from the options."""
    state = schedule.state_dict()
    return {key: value for key, value in state.items() if key != "lr_lambdas"} | {
        "lr_lambdas": [None for _ in state.get("lr_lambdas", [])]
    }


def _copy_random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Copy the states of PyTorch's generators, which only dropout uses: all else comes from the keys of the samples."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_random_state(checkpoint: Path, accelerator: Accelerator) -> None:
    with safe_open(checkpoint / f"{RANDOM}.safetensors", "pt") as file:
        rank, stored = accelerator.process_index, set(file.keys())
        if f"cpu.{rank}" in stored:
            torch.set_rng_state(file.get_tensor(f"cpu.{rank}"))
        if f"cuda.{rank}" in stored and accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(file.get_tensor(f"cuda.{rank}"), accelerator.device)
