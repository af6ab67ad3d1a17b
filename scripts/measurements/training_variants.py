"""A training step on a CUDA GPU, in each way that the project can train: against the peer at its best micro-batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from measurements.harness import Counted, Made, check_equal, exact_float32, time_alone
from measurements.training_step import SMALL, StepSetting

from mimicbrush.errors import MimicBrushError

if TYPE_CHECKING:
    from measurements.training_step import OurTraining
    from peers.common_training import CommonTraining


@dataclass(frozen=True)
class TrainVariant:
    """A way to train that is timed on a GPU.

    Attributes:
        options: those of `TrainOptions` that are about speed.
        setting: further fields of `StepSetting`.
        batch_sizes: what is timed, ascending; too many for the memory are a failure of their own.
        on_request: not measured unless it is named: compiling takes minutes, and all others together may take two.
        checked: equality with the peer is asserted, in float32 at a small size, before anything is timed. Tests assert
            it where that would compile a second time, or where float32 takes another way.
        profiled: a breakdown of it is made without being asked for.
        is_peer: it is the peer that is timed.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    setting: Mapping[str, Any] = field(default_factory=dict)
    batch_sizes: tuple[int, ...] = (16, 32)
    on_request: bool = False
    checked: bool = True
    profiled: bool = False
    is_peer: bool = False

    def applied_to(self, setting: StepSetting) -> StepSetting:
        """The same setting, of this variant."""
        return replace(setting, options=self.options, **self.setting)


_HALF_NORMS = {"low_precision_norms": True}
#: By name. A variant more is a line more.
TRAIN_VARIANTS: Mapping[str, TrainVariant] = {
    "peer": TrainVariant(batch_sizes=(8, 16, 32, 64), profiled=True, is_peer=True),
    "plain": TrainVariant(batch_sizes=(8,)),
    "half_norms": TrainVariant(_HALF_NORMS, batch_sizes=(8, 16, 32, 48), profiled=True),
    "fused_norms": TrainVariant({**_HALF_NORMS, "fused_norms": True}, batch_sizes=(32,), checked=False, profiled=True),
    "selective": TrainVariant({**_HALF_NORMS, "selective_checkpointing": True}, batch_sizes=(32, 64), on_request=True),
    "noise_on_device": TrainVariant({**_HALF_NORMS, "noise_on": "device"}, batch_sizes=(32,), on_request=True),
    "checkpointing": TrainVariant(
        {**_HALF_NORMS, "activation_checkpointing": True}, batch_sizes=(64,), on_request=True
    ),
    # One micro-batch: for a second one PyTorch would compile graphs of variable sizes, which no run has.
    "compile": TrainVariant({**_HALF_NORMS, "compile": True}, batch_sizes=(32,), on_request=True, checked=False),
    "compile_blocks": TrainVariant(
        {**_HALF_NORMS, "compile": True, "compile_parts": "blocks"}, batch_sizes=(32,), on_request=True, checked=False
    ),
}


#: Times that each row of a GPU runs after its warm-up. Nothing else runs there.
ROUNDS = 2


def train_step_gpu() -> Iterator[Counted]:
    """the same on a CUDA GPU at full size, bf16: peer and variants of ours by micro-batch, memory, share of the peak"""
    import torch

    if not torch.cuda.is_available():
        raise MimicBrushError("train_step_gpu needs a CUDA GPU, and PyTorch sees none; use `train_step` on a CPU")
    yield from train_step_rows("cuda", StepSetting(half=True), SMALL)


def check_variants(variants: Mapping[str, Any], names: Collection[str]) -> None:
    """Check that all names are names of variants.

    Raises:
        MimicBrushError: one is not.
    """
    if unknown := sorted(set(names) - set(variants)):
        known = f"expected some of {', '.join(variants)}" if variants else "this measurement has none"
        raise MimicBrushError(f"there is no variant {', '.join(unknown)}; {known}")


def choose_variants(variants: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """List what is timed: the named variants and the peer, or, without names, all but those on request.

    Raises:
        MimicBrushError: a name is none of them.
    """
    check_variants(variants, names)
    return {
        name: variant
        for name, variant in variants.items()
        if name in names or (not variant.on_request and (variant.is_peer or not names))
    }


def train_step_rows(
    device: str, timed: StepSetting, exact: StepSetting, names: Collection[str] = (), toy: bool = False
) -> Iterator[Counted]:
    """Rows of `train_step_gpu`: each variant of `TRAIN_VARIANTS` at each of its micro-batches, the peer first.

    Args:
        device: "cuda"; "cpu" to try it.
        timed: what is timed.
        exact: where equality is asserted; in float32.
        names: see `choose_variants`.
        toy: every micro-batch is that of `timed`, and a side runs once: to try it.
    """
    # Of a small size neither FLOP nor the share of the peak says anything.
    work = None if toy else Made(lambda: work_of_a_sample(timed, device))
    peer_ms: dict[int, float] = {}
    for name, variant in choose_variants(TRAIN_VARIANTS, names).items():
        setting = variant.applied_to(replace(timed, device=device))
        training = Made(partial(_make_checked, name, variant, setting, replace(exact, device=device)))
        for batch_size in (timed.batch_size,) if toy else variant.batch_sizes:
            sized, rounds = replace(setting, batch_size=batch_size), 1 if toy else ROUNDS
            timing = partial(_time_variant, variant.is_peer, training, sized, rounds, work, peer_ms)
            yield Counted(f"{name}, {batch_size} samples", timing)
        training.drop()
        if variant.is_peer:
            from peers.common_training import BANK

            BANK.clear()  # its last features are no part of anybody's peak


def _time_variant(
    is_peer: bool,
    training: Made[tuple[OurTraining | CommonTraining, float | None]],
    setting: StepSetting,
    rounds: int,
    work: Made[tuple[float, float | None]] | None,
    peer_ms: dict[int, float],
) -> dict[str, object]:
    """The figures of a row, per sample; those of the peer are noted for the rows that follow."""
    made, difference = training()
    found: dict[str, object] = {**time_alone(setting.steps(made), setting.batch_size, setting.device == "cuda", rounds)}
    if is_peer:
        peer_ms[setting.batch_size] = found["ms"]
        return found
    if setting.batch_size in peer_ms:
        found["time_ratio"] = peer_ms[setting.batch_size] / found["ms"]
    if work is not None:
        flop, peak = work()
        found["tflop_per_s"] = flop / found["ms"] / 1e9
        if peak:
            found["share_of_peak"] = found["tflop_per_s"] * 1e12 / peak
    if difference is not None:
        found["max_abs_diff"] = difference
    return found


def _make_checked(
    name: str, variant: TrainVariant, setting: StepSetting, exact: StepSetting
) -> tuple[OurTraining | CommonTraining, float | None]:
    """Make what is timed, and say how far it is from the peer where equality is asserted.

    Raises:
        MimicBrushError: it is not the same.
    """
    if variant.is_peer:
        return setting.peer(), None
    difference = None
    if variant.checked:
        ours, peer = variant.applied_to(exact).makers()
        with exact_float32():
            difference = check_equal(name, ours()(), peer()(), 1e-3)
    return setting.ours(), difference


def work_of_a_sample(setting: StepSetting, device: str) -> tuple[float, float | None]:
    """FLOP of a sample of which nothing is dropped, and what the device could do in a second, where that is known."""
    import torch

    from mimicbrush.training.performance import count_training_flop, find_peak_flop_per_s

    counted = replace(setting, device="meta").ours()
    peak = find_peak_flop_per_s(torch.device(device), "bf16" if setting.half else "no")
    return count_training_flop(counted.model, counted.encoders), peak
