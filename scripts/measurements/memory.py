"""The memory of activations, see `measurements.activations`, and what it costs to save some, see `step_costs`."""

from __future__ import annotations

from collections.abc import Iterator

from measurements.harness import Counted

#: A plain SD-1.5 U-Net with 257 tokens of context, GiB per sample, counted by other code than ours.
EXPECTED_GIB = {"norms in float32": 1.17, "norms in half precision": 0.88}


def memory() -> Iterator[Counted]:
    """what a sample keeps for the backward pass at full size, by network and option: ours, and the loop people write"""
    from measurements.activations import MemorySetting, plain_unet_gib, state_gb, step_gib
    from measurements.step_costs import pass_costs

    for title, expected_gib in EXPECTED_GIB.items():
        setting = MemorySetting(options={"low_precision_norms": title == "norms in half precision"})
        yield Counted(
            f"a U-Net that reads no reference, {title}",
            lambda setting=setting, expected_gib=expected_gib: _beside(plain_unet_gib(setting), expected_gib),
        )
    for peer, *names in (
        (False,),
        (False, "low_precision_norms"),
        (False, "selective_checkpointing"),
        (False, "low_precision_norms", "selective_checkpointing"),
        (False, "activation_checkpointing"),
        (False, "low_precision_norms", "activation_checkpointing"),
        (True,),
        (True, "activation_checkpointing"),
    ):
        setting = MemorySetting(peer, dict.fromkeys(names, True))
        yield Counted(
            f"{'peer' if peer else 'ours'}, {', '.join(names) or 'no option'}",
            # The costs take a minute or two; the peer is compared by `train_step`.
            lambda setting=setting, peer=peer: (
                step_gib(setting) | ({} if peer else state_gb(setting) | pass_costs(setting))
            ),
        )

    for names in ((), ("selective_checkpointing",)):
        setting = MemorySetting(options=dict.fromkeys(names, True), reference_encoder="shared")
        yield Counted(
            f"ours, one U-Net for both, {', '.join(names) or 'no option'}",
            lambda setting=setting: step_gib(setting) | state_gb(setting) | _without_peak(pass_costs(setting)),
        )


def _without_peak(costs: dict[str, float]) -> dict[str, float]:
    # Gradients of the pass that paints wait for those of the pass that reads. So one sample has its peak at the end of
    # the backward pass, two have it at the beginning, and their difference is not what a sample adds.
    return {name: cost for name, cost in costs.items() if name != "peak_gib"}


def _beside(found_gib: float, expected_gib: float) -> dict[str, float]:
    return {"unet_gib": found_gib, "expected_gib": expected_gib, "found_over_expected": found_gib / expected_gib}
