"""Inter-ID cases: the reference shows another subject of the source's class (paper Sec. 3.4).

There is no ground truth: what is compared is the masked part of the result with the marked part of the reference,
and the whole result with a prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mimicbrush.evaluation.benchmark_builder.materials import Material, RegionName
from mimicbrush.ops import counter_rng

#: The paper's four groups of part composition, inter-ID (App. A), as far as classes of the DreamBooth dataset belong to
#: one (*ours*). Scenarios are no objects.
PAPER_GROUPS = {
    "fashion": ("backpack", "boot", "glasses", "sneaker"),
    "animal": ("cat", "dog"),
    "product": ("bowl", "can", "candle", "clock", "stuffed animal", "teapot", "toy", "vase"),
    "scenario": (),
}
#: Words for one and the same part; two regions whose labels share none of these must have the same label.
_SAME_PART = (frozenset({"head", "face"}),)


@dataclass(frozen=True)
class InterPair:
    """A source to be masked, and a reference that shows another subject; both have the region."""

    source: Material
    reference: Material

    @property
    def prompt(self) -> str:
        """The text that the result is compared with, for CLIP-T."""
        article = "an" if self.source.kind[:1] in "aeiou" else "a"
        return "a photo of " + (self.source.kind if self.source.kind == "glasses" else f"{article} {self.source.kind}")


def find_paper_group(kind: str) -> str:
    """Find the paper's group of a class; "other" where it has none."""
    return next((group for group, kinds in PAPER_GROUPS.items() if kind in kinds), "other")


def choose_inter_pairs(materials: Sequence[Material], region: RegionName, seed: int, max_pairs: int) -> list[InterPair]:
    """Choose ordered pairs of images of different subjects of one class.

    At most one for each ordered pair of subjects. Chosen one by one, so that classes, then subjects, then images
    are used as evenly as there are any; the rest is up to the seed.

    Args:
        materials: all images; those without a class or without the region are passed over.
        region: what is masked. Parts must be the same part, as far as their labels tell.
        seed: of the choice.
        max_pairs: at most so many.
    """
    usable = [material for material in materials if material.kind and region in material.regions]
    candidates = [
        InterPair(source, reference)
        for source in usable
        for reference in usable
        if source.kind == reference.kind
        and source.subject != reference.subject
        and (region != "part" or is_same_part(source.regions[region].label, reference.regions[region].label))
    ]
    order = counter_rng.generator(seed, len(candidates)).permutation(len(candidates))
    left = [candidates[number] for number in order]
    uses: Counter[tuple[str, str]] = Counter()

    def count_uses(pair: InterPair) -> tuple[int, ...]:
        source, reference = pair.source, pair.reference
        return (
            uses["class", source.kind],
            uses["source subject", source.subject] + uses["reference subject", reference.subject],
            uses["source", source.key] + uses["reference", reference.key],
        )

    chosen: list[InterPair] = []
    while left and len(chosen) < max_pairs:
        pair = min(left, key=count_uses)
        chosen.append(pair)
        source, reference = pair.source, pair.reference
        uses.update(
            [
                ("class", source.kind),
                ("source subject", source.subject),
                ("reference subject", reference.subject),
                ("source", source.key),
                ("reference", reference.key),
            ]
        )
        subjects = source.subject, reference.subject
        left = [each for each in left if (each.source.subject, each.reference.subject) != subjects]
    return chosen


def is_same_part(one: str, other: str) -> bool:
    """Tell whether two labels name the same part, such as "head with both ears" and "face"."""
    words = [frozenset(re.findall(r"[a-z]+", label.lower())) for label in (one, other)]
    return one == other or any(words[0] & part and words[1] & part for part in _SAME_PART)
