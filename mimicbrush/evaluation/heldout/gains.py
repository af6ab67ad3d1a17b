"""The three figures of every headline: what a reference is worth, and what a wrong one costs. Imports nothing heavy."""

from __future__ import annotations

from typing import NamedTuple


class Gain(NamedTuple):
    """A difference of PSNR in the hole, in dB, between two rows of `measure.ROWS`.

    Attributes:
        name: in tables and sentences.
        between: what is subtracted from what, in words.
        row, minus: the rows.
        above, below, neither: what is said where its interval lies above zero, below zero, and on both sides of it.
    """

    name: str
    between: str
    row: str
    minus: str
    above: str
    below: str
    neither: str


#: In the order of every report. The first comes first, because the third is also large where a wrong reference
#: only does harm: it is the first minus the second.
GAINS = {
    "gain_over_no_reference_db": Gain(
        "over none",
        "true minus no reference",
        "model",
        "no_reference",
        "so the true reference helps.",
        "the true reference does harm.",
        "so this does not show that the reference helps.",
    ),
    "wrong_against_none_db": Gain(
        "wrong against none",
        "wrong minus no reference",
        "wrong_reference",
        "no_reference",
        "so even a reference from another video helps, which is no imitation.",
        "a reference from another video does harm.",
        "so this shows no harm by a reference from another video.",
    ),
    "reference_gain_db": Gain(
        "reference gain",
        "true minus wrong reference",
        "model",
        "wrong_reference",
        "so the true reference serves better than one from another video.",
        "the true reference serves worse than one from another video.",
        "so this does not show that the model tells the true reference from another.",
    ),
}


def describe_gain(name: str, low: float, high: float) -> str:
    """What the interval of one of `GAINS` says, in a sentence."""
    gain = GAINS[name]
    if low > 0:
        return f"clear of zero, {gain.above}"
    if high < 0:
        return f"clear of zero, on the wrong side: {gain.below}"
    return f"the interval holds zero, {gain.neither}"
