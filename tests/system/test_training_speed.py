"""scripts/speed.py on training: both sides do the same, and the counts, which hang on no machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from measurements import activations, harness, memory, training_step, training_variants

from mimicbrush.errors import MimicBrushError

#: One of two samples has no reference, the same one has no depth map.
SETTING = training_step.StepSetting(size_px=64, block_out_channels=(32, 32, 32, 32), batch_size=2)


@pytest.mark.slow
def test_the_peer_trains_as_we_do() -> None:
    ours, peer = SETTING.ours(), SETTING.peer()
    batch, draws = SETTING.inputs()
    assert not draws.keep_reference.all() and not draws.keep_depth.all()
    # What the encoders make of a batch, and what that takes: the peer also encodes what is dropped.
    conditions = (vars(each.encode(batch, draws)).values() for each in (ours, peer))
    for own, other in zip(*conditions, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
    own, other = (harness.count_flops(lambda each=each: each.encode(batch, draws)) for each in (ours, peer))
    assert other > 1.2 * own
    # From the second step on, loss and norm hang on what the first has made of the weights.
    for _ in range(2):
        found, expected = ours.step(batch, draws), peer.step(batch, draws)
        assert float(found[0]) == pytest.approx(expected[0], rel=1e-5)
        assert float(found[1]) == pytest.approx(float(expected[1]), rel=1e-4)
    averages = [torch.cat([s.flatten() for s in each.average.shadow_params]) for each in (ours, peer)]
    # Adam moves a weight by its rate, whichever way a gradient of nearly zero points: not all are equal.
    assert (averages[0] - averages[1]).abs().mean() < 0.05 * training_step.LEARNING_RATE
    # The references that are dropped matter.
    everything = replace(draws, keep_reference=torch.ones_like(draws.keep_reference))
    assert abs(float(ours.loss_and_gradients(batch, everything)) - expected[0]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("norms", ["float32", "half precision"])
def test_a_full_size_u_net_keeps_what_reference_md_says(norms: str) -> None:
    setting = activations.MemorySetting(options={"low_precision_norms": norms == "half precision"})
    assert activations.plain_unet_gib(setting) == pytest.approx(memory.EXPECTED_GIB[f"norms in {norms}"], rel=0.02)


@pytest.mark.slow
def test_what_is_alive_is_what_hooks_see() -> None:
    setting = activations.MemorySetting()
    assert activations.plain_unet_gib(setting) == pytest.approx(activations.plain_unet_gib(setting, True), rel=1e-3)


@pytest.mark.slow
def test_what_a_sample_keeps_by_option() -> None:
    def kept(peer: bool, **options: bool) -> dict[str, float]:
        return activations.step_gib(activations.MemorySetting(peer, options))

    full_norms, half_norms = kept(False), kept(False, low_precision_norms=True)
    assert full_norms["per_unet_gib"] < 1.02 * memory.EXPECTED_GIB["norms in float32"]
    assert half_norms["per_unet_gib"] < 1.02 * memory.EXPECTED_GIB["norms in half precision"]
    for norms in (False, True):
        selective = kept(False, low_precision_norms=norms, selective_checkpointing=True)
        assert selective["sample_gib"] < 0.6 * half_norms["sample_gib"]
    checkpointed = kept(False, activation_checkpointing=True)
    assert checkpointed["sample_gib"] < 0.2 * full_norms["sample_gib"]
    # The second attention of the peer keeps more, where it is not computed again.
    assert kept(True)["unet_gib"] > full_norms["unet_gib"]
    assert kept(True, activation_checkpointing=True) == pytest.approx(checkpointed, rel=0.02)


@pytest.mark.slow
def test_a_full_size_step_by_count() -> None:
    own, peer = training_step.full_size_tflop("loss_and_gradients")
    assert own < 9.13  # ../shared/REFERENCE.md, section 7, where nothing is dropped
    assert peer / own > 1.2


@pytest.mark.slow
def test_the_share_of_the_peak_counts_a_sample_of_which_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H200")
    work = harness.Made(lambda: training_variants.work_of_a_sample(training_step.StepSetting(half=True), "cuda"))
    assert work()[0] / 1e12 == pytest.approx(9.13, abs=0.01)
    made = harness.Made(lambda: (None, None))
    monkeypatch.setattr(training_variants, "time_alone", lambda *_: {"ms": 46.3})
    row = training_variants._time_variant(False, made, SETTING, 1, work, {2: 92.6})
    # As measured at micro-batch 32: docs/results.md.
    assert row["share_of_peak"] == pytest.approx(0.20, abs=0.005) and row["time_ratio"] == 2


def test_fused_and_foreach_give_the_weights_of_one_tensor_at_a_time() -> None:
    case = harness.Case(
        "optimizer", *training_step.optimizer_sides((32, 32, 32, 32)), 1e-6, 1, counts={}, cpu_time=True
    )
    figures = harness.compare(case, 2)
    assert figures["max_abs_diff"] <= 1e-6 and figures["cpu_time_ratio"] > 0


def test_something_large_is_made_when_it_is_asked_for_and_freed() -> None:
    events: list[str] = []

    class Held:
        def __init__(self) -> None:
            events.append("made")

        def __del__(self) -> None:
            events.append("dropped")

    made = harness.Made(Held)
    assert events == []
    assert made() is made() and events == ["made"]
    made.drop()
    assert events == ["made", "dropped"]
    assert isinstance(made(), Held) and events == ["made", "dropped", "made"]


def test_kept_memory_changes_no_result() -> None:
    with harness.memory_kept():
        kept = torch.arange(20_000_000).sum()
    assert kept == torch.arange(20_000_000).sum()


def test_the_gpu_measurement_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MimicBrushError, match="needs a CUDA GPU"):
        next(iter(training_variants.train_step_gpu()))
