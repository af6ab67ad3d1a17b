"""Counts of what a training step starts on a GPU, at a small size."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from measurements.activations import MemorySetting
from measurements.training_launches import count_forward

#: Norms of both U-Nets: 2 in each of 22 resnets, 1 in each of 16 transformers, and 1 at the end of the imitative one.
NORMS = 2 * (2 * 22 + 16) + 1
#: Those with SiLU behind them, and the copies that diffusers makes: of the shortcut of 14 resnets and 16 transformers.
SILUS, COPIES = 2 * 2 * 22 + 1, 2 * (14 + 16)


def count(norms_change_order: bool = False, **options: bool) -> Mapping[str, float]:
    setting = MemorySetting(options=options, channels_last=True, size_px=128, block_out_channels=(32, 64, 128, 128))
    return count_forward(setting, norms_change_order)


@pytest.mark.slow
def test_fused_norms_start_and_move_less() -> None:
    pytest.importorskip("triton")
    before, plain, fused = count(norms_change_order=True), count(), count(fused_norms=True)
    # Each copy, and each norm of old, takes a convolution that changes the order back; and so do both first ones.
    assert before["changes_of_order"] == 2 * COPIES + 2 * NORMS + 2
    assert plain["changes_of_order"] == fused["changes_of_order"] == 2 * COPIES + 2
    # SiLU, and the casts of a norm's input and of its result.
    assert plain["operators"] - fused["operators"] > SILUS + NORMS
    assert before["norms_gib"] > plain["norms_gib"] > 2 * fused["norms_gib"] > 0
