"""How far weights have moved from those that training started from, part by part and block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from mimicbrush.errors import InputError, WeightsError
from mimicbrush.models.unets import REFERENCE_UNETS
from mimicbrush.pipelines.conversion.depth_anything import hub_weights
from mimicbrush.pipelines.conversion.exporting import pipeline_index
from mimicbrush.pipelines.conversion.key_maps import (
    PARTS,
    check_fit,
    present_vae_names,
    split_parts,
    vision_half,
    without_position_ids,
)
from mimicbrush.pipelines.conversion.reading import Weights, config_of, read_files, read_state_dict, weights_of

EQUAL, EQUAL_IN_HALF, CHANGED, NO_STOCK = "equal", "equal in half precision", "changed", "no stock weights"

#: What people call the parts.
TITLES = {
    "unet": "imitative U-Net",
    "referencenet": "reference U-Net",
    "image_proj": "CLIP projection",
    "depth_guider": "depth projector",
    "image_encoder": "image encoder",
    "vae": "autoencoder",
    "depth": "depth estimator",
}

_STEM = "conv_in.weight"


@dataclass(frozen=True)
class Change:
    """How much some weights differ from their stock.

    Attributes:
        relative: ||new - stock|| / ||stock|| over all of them; NaN where a stock of zeros was changed.
        equal: bit for bit.
        equal_in_half: as float16.
    """

    relative: float
    equal: bool
    equal_in_half: bool

    @property
    def verdict(self) -> str:
        """One of `EQUAL`, `EQUAL_IN_HALF`, `CHANGED`."""
        return EQUAL if self.equal else EQUAL_IN_HALF if self.equal_in_half else CHANGED

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which knows no NaN."""
        return {"verdict": self.verdict, "relative": self.relative if math.isfinite(self.relative) else None}


@dataclass(frozen=True)
class PartChange:
    """A part against its stock.

    Attributes:
        name: as in `TITLES`.
        stock: where the stock weights came from; None where there are none.
        total: over the whole part; None without stock.
        blocks: block -> its change.
        excused: keys of the stock that this part is known not to have.
        new_inputs: of ``conv_in``, what has no stock: {"channels", "norm", "all_zero"}.
    """

    name: str
    stock: Path | None = None
    total: Change | None = None
    blocks: dict[str, Change] = field(default_factory=dict)
    excused: list[str] = field(default_factory=list)
    new_inputs: dict[str, Any] | None = None

    @property
    def verdict(self) -> str:
        """`NO_STOCK`, or that of `Change`."""
        return self.total.verdict if self.total is not None else NO_STOCK

    def sentence(self) -> str:
        """What it means."""
        title = f"The {TITLES[self.name]}"
        if self.total is None:
            return f"{title} has no stock weights: it was trained from random ones."
        if self.verdict == EQUAL:
            return f"{title} was not trained: all its weights are those of {self.stock}."
        if self.verdict == EQUAL_IN_HALF:
            return f"{title} was not trained: its weights are those of {self.stock}, as far as half precision can tell."
        moved = [name for name, block in self.blocks.items() if block.verdict == CHANGED]
        where = f"in {len(moved)} of {len(self.blocks)} blocks" if len(moved) < len(self.blocks) else "in every block"
        return f"{title} was trained, or began from others than {self.stock}: it differs {where}" + (
            f", by {self.total.relative:.3%} in all." if math.isfinite(self.total.relative) else "."
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "part": self.name,
            "stock": None if self.stock is None else str(self.stock),
            "verdict": self.verdict,
            "relative": None if self.total is None else self.total.as_dict()["relative"],
            "sentence": self.sentence(),
            "blocks": {name: block.as_dict() for name, block in self.blocks.items()},
            "excused_keys": self.excused,
            "new_inputs": self.new_inputs,
        }


def compare_with_stock(
    given: Path,
    *,
    inpainting: Path,
    sd15: Path,
    image_encoder: Path,
    vae: Path | None = None,
    depth: Path | None = None,
) -> list[PartChange]:
    """Every part of a released checkpoint, or of a pipeline folder, against the weights that it started from.

    Args:
        given: ``mimicbrush.bin`` or a pipeline folder.
        inpainting, sd15, image_encoder: stock weights: folders, or files (see `reading.weights_of`).
        vae, depth: the same; only a pipeline folder holds these parts.

    Raises:
        InputError: the VAE or the depth estimator of a ``mimicbrush.bin`` is asked for.
        WeightsError: weights are absent, cannot be read, or have other keys or shapes than their stock.
    """
    frozen = {"vae": vae, "depth": depth}
    if given.is_dir():
        index = pipeline_index(given)
        parts = {
            part: read_state_dict(weights_of(given / component))
            for part, component in {**PARTS, "vae": "vae", "depth": "depth_estimator"}.items()
            if frozen.get(part, given) is not None
        }
        shares_keys_values = index["reference_unet"][1] == REFERENCE_UNETS["keys_values"].__name__
    else:
        asked = [name for name, stock in frozen.items() if stock is not None]
        if asked:
            raise InputError(f"{given} holds no {' and no '.join(asked)}; compare a pipeline folder, or leave that out")
        parts = split_parts(read_files([given])[0], given)
        shares_keys_values = False

    changes = []
    for part, weights in parts.items():
        if part == "unet":
            change = _compare_unet(weights, inpainting)
        elif part == "referencenet":
            sharing = "keys_values" if shares_keys_values else "hidden_states"
            excused = dead_keys(config_of(sd15, "unet"), sharing)
            change = compare_part(part, weights, read_state_dict(weights_of(sd15, "unet")), sd15, excused)
        elif part == "image_encoder":
            stock = without_position_ids(vision_half(read_state_dict(weights_of(image_encoder))))
            change = compare_part(part, without_position_ids(weights), stock, image_encoder)
        elif part == "vae" and vae is not None:
            change = compare_part(part, weights, present_vae_names(read_state_dict(weights_of(vae))), vae)
        elif part == "depth" and depth is not None:
            stock, _ = hub_weights(read_state_dict(weights_of(depth)), depth)
            change = compare_part(part, weights, stock, depth)
        else:
            change = PartChange(part)
        changes.append(change)
    return changes


def compare_part(name: str, new: Weights, stock: Weights, origin: Path, excused: Sequence[str] = ()) -> PartChange:
    """A part against its stock, whose keys must be the same.

    Args:
        name: of the part.
        new, stock: the weights.
        origin: of the stock.
        excused: keys that the stock may have, and the part must not.

    Raises:
        WeightsError: keys or shapes differ.
    """
    check_fit(name, new, {key: tensor for key, tensor in stock.items() if key not in excused})
    members: dict[str, list[str]] = {}
    for key in new:
        members.setdefault(block_of(key), []).append(key)
    return PartChange(
        name,
        stock=origin,
        total=change_of(new, stock, list(new)),
        blocks={block: change_of(new, stock, keys) for block, keys in members.items()},
        excused=[key for key in stock if key in excused],
    )


def change_of(new: Weights, stock: Weights, keys: list[str]) -> Change:
    """The change of some weights, taken together."""
    moved = size = 0.0
    equal = equal_in_half = True
    for key in keys:
        now, before = new[key].double(), stock[key].double()
        moved += float((now - before).square().sum())
        size += float(before.square().sum())
        equal &= torch.equal(now, before)
        equal_in_half &= torch.equal(new[key].half(), stock[key].half())
    relative = math.sqrt(moved / size) if size else 0.0 if not moved else math.nan
    return Change(relative, equal, equal_in_half)


def block_of(key: str) -> str:
    """The block that a weight belongs to: its name up to the first number, or up to its own last word."""
    words = key.split(".")
    for number, word in enumerate(words):
        if word.isdecimal():
            return ".".join(words[: number + 1])
    return ".".join(words[:-1]) or key


def dead_keys(config: dict[str, Any], sharing: str = "hidden_states") -> list[str]:
    """The keys of a stock U-Net that the reference U-Net is known not to have: 24 for SD-1.5.

    Args:
        config: of the stock U-Net.
        sharing: see `ModelOptions.reference_sharing`.
    """
    with torch.device("meta"):
        stock = UNet2DConditionModel.from_config(config)
        kept = set(REFERENCE_UNETS[sharing].from_config(config).state_dict())
    return [key for key in stock.state_dict() if key not in kept]


def _compare_unet(weights: Weights, inpainting: Path) -> PartChange:
    """The imitative U-Net, whose wider entrance has stock weights for its first channels only."""
    stock = read_state_dict(weights_of(inpainting, "unet"))
    if _STEM not in weights or _STEM not in stock:
        raise WeightsError(f"unet does not fit:\n  {_STEM} is missing")
    known = stock[_STEM].shape[1]
    old, added = weights[_STEM][:, :known], weights[_STEM][:, known:]
    change = compare_part("unet", {**weights, _STEM: old}, stock, inpainting)
    new_inputs = {
        "channels": added.shape[1],
        "norm": float(added.double().norm()),
        "all_zero": not bool(added.any()),
    }
    return PartChange(change.name, change.stock, change.total, change.blocks, change.excused, new_inputs=new_inputs)


def describe(changes: list[PartChange]) -> str:
    """All changes as text for people: the blocks of what has changed, and one sentence per part at the end."""
    lines = []
    for part in changes:
        lines.append(f"{part.name}: {part.verdict}" + _percent(part.total))
        if part.excused:
            lines.append(f"    {len(part.excused)} keys of the stock lie behind the last feature that is read; excused")
        if part.new_inputs is not None:
            new = part.new_inputs
            lines.append(
                f"    conv_in: {new['channels']} input channels beside the stock's, "
                + ("all zero" if new["all_zero"] else f"norm {new['norm']:.4g}")
            )
        if part.verdict != EQUAL:
            lines += [f"    {name}: {block.verdict}{_percent(block)}" for name, block in part.blocks.items()]
    return "\n".join([*lines, "", *[part.sentence() for part in changes]])


def as_json(changes: list[PartChange]) -> dict[str, Any]:
    """All changes as JSON for programs."""
    return {"parts": [part.as_dict() for part in changes]}


def _percent(change: Change | None) -> str:
    if change is None or change.equal:
        return ""
    return f" ({change.relative:.4%})" if math.isfinite(change.relative) else " (from zero)"
