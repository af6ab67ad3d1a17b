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
from mimicbrush.models.pretrained.stored_weights import (
    StateDict,
    check_fit,
    describe_build_errors,
    rename_vae_attention,
    take_vision_half,
)
from mimicbrush.models.unets import REFERENCE_UNETS
from mimicbrush.pipelines.conversion.depth_anything import hub_weights
from mimicbrush.pipelines.conversion.export_released import pipeline_index
from mimicbrush.pipelines.conversion.key_maps import (
    PARTS,
    split_parts,
    without_position_ids,
)
from mimicbrush.pipelines.conversion.untrusted_files import config_of, join_shards, read_groups, weights_of

EQUAL, EQUAL_IN_HALF, CHANGED, NO_STOCK = "equal", "equal in half precision", "changed", "no stock weights"

#: What people call the parts.
CHANGE_TITLES = {
    "unet": "imitative U-Net",
    "referencenet": "reference U-Net",
    "image_proj": "CLIP projection",
    "depth_guider": "depth projector",
    "image_encoder": "image encoder",
    "vae": "autoencoder",
    "depth": "depth estimator",
}

_CONV_IN = "conv_in.weight"
_CHECKPOINT = "checkpoint"
# Parts that only a pipeline folder holds, and how it calls them.
_FROZEN = {"vae": "vae", "depth": "depth_estimator"}


@dataclass(frozen=True)
class WeightChange:
    """Difference between some weights and their stock.

    Attributes:
        relative: ||new - stock|| / ||stock|| over all of them; NaN where a stock of zeros was changed.
        equal: bit for bit.
        equal_in_half: both rounded to float16.
        rounded: the new weights are nothing but the stock rounded to float16 (or the stock itself).
    """

    relative: float
    equal: bool
    equal_in_half: bool
    rounded: bool

    @property
    def verdict(self) -> str:
        """Verdict on these weights, one of `EQUAL`, `EQUAL_IN_HALF`, `CHANGED`."""
        return EQUAL if self.equal else EQUAL_IN_HALF if self.equal_in_half else CHANGED

    def as_dict(self) -> dict[str, Any]:
        """Convert to values for JSON, which has no NaN."""
        return {"verdict": self.verdict, "relative": self.relative if math.isfinite(self.relative) else None}


@dataclass(frozen=True)
class PartChange:
    """Difference between a part and its stock.

    Attributes:
        name: as in `CHANGE_TITLES`.
        stock: where the stock weights came from; None where there are none.
        total: over the whole part; None without stock.
        blocks: block -> its change.
        excused: keys of the stock that this part is known not to have.
        new_inputs: of ``conv_in``, the channels that have no stock, left out above: {"channels", "norm", "all_zero"}.
    """

    name: str
    stock: Path | None = None
    total: WeightChange | None = None
    blocks: dict[str, WeightChange] = field(default_factory=dict)
    excused: list[str] = field(default_factory=list)
    new_inputs: dict[str, Any] | None = None

    @property
    def verdict(self) -> str:
        """`NO_STOCK`, or that of `WeightChange`."""
        return self.total.verdict if self.total is not None else NO_STOCK

    def sentence(self) -> str:
        """Say in a sentence what the difference means."""
        title = f"The {CHANGE_TITLES[self.name]}"
        if self.total is None:
            return f"{title} has no stock weights: all of its weights were learnt."
        if self.verdict == EQUAL:
            return f"{title} was not trained: all of its weights are those of {self.stock}."
        if self.verdict == EQUAL_IN_HALF and self.total.rounded:
            return f"{title} was not trained: its weights are those of {self.stock}, rounded to half precision."
        amount = f"{self.total.relative:.2g} of their size" if math.isfinite(self.total.relative) else "any amount"
        if self.verdict == EQUAL_IN_HALF:
            return (
                f"{title} was hardly trained or not at all: its weights differ from those of {self.stock} by {amount}, "
                "and the difference vanishes in half precision."
            )
        moved = [name for name, block in self.blocks.items() if block.verdict == CHANGED]
        if len(moved) < len(self.blocks):  # so it did begin there
            return (
                f"{title} was trained: its weights differ from those of {self.stock} in {len(moved)} of "
                f"{len(self.blocks)} blocks, by {amount} in total."
            )
        return (
            f"{title} was trained, or started from other weights: its weights differ from those of {self.stock} "
            f"in every block, by {amount} in total."
        )

    def as_dict(self) -> dict[str, Any]:
        """Convert to values for JSON."""
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
    """Compare every part of a released checkpoint, or of a pipeline folder, with the weights that it started from.

    Args:
        given: ``mimicbrush.bin`` or a pipeline folder.
        inpainting, sd15, image_encoder: stock weights: folders, or files (see `untrusted_files.weights_of`).
        vae, depth: the same; only a pipeline folder holds these parts.

    Raises:
        InputError: the VAE or the depth estimator of a ``mimicbrush.bin`` is asked for.
        WeightsError: weights are absent, cannot be read, or have other keys or shapes than their stock.
    """
    stocks = {"unet": inpainting, "referencenet": sd15, "image_encoder": image_encoder}
    stocks |= {name: path for name, path in (("vae", vae), ("depth", depth)) if path is not None}
    sharing = "hidden_states"
    if given.is_dir():
        components = {**PARTS, **{name: _FROZEN[name] for name in _FROZEN if name in stocks}}
        files = {part: weights_of(given / component) for part, component in components.items()}
        if pipeline_index(given)["reference_unet"][1] == REFERENCE_UNETS["keys_values"].__name__:
            sharing = "keys_values"
    else:
        absent = [name for name in _FROZEN if name in stocks]
        if absent:
            raise InputError(
                f"{given} does not contain {' and '.join(absent)}; compare a pipeline folder instead, or do not name "
                f"stock weights for {' and '.join(absent)}"
            )
        files = {_CHECKPOINT: [given]}
    stock_files = {part: weights_of(path, "unet") for part, path in stocks.items()}

    contents = read_groups(files | {f"stock {part}": paths for part, paths in stock_files.items()})
    if given.is_dir():
        parts = {part: join_shards(paths, contents[part]) for part, paths in files.items()}
    else:
        parts = split_parts(contents[_CHECKPOINT][0], given)
    stock = {part: join_shards(paths, contents[f"stock {part}"]) for part, paths in stock_files.items()}
    stock["image_encoder"] = without_position_ids(take_vision_half(stock["image_encoder"]))
    parts["image_encoder"] = without_position_ids(parts["image_encoder"])
    if vae is not None:
        stock["vae"] = rename_vae_attention(stock["vae"])
    if depth is not None:
        stock["depth"], _ = hub_weights(stock["depth"], depth)
    excused = {"referencenet": find_dead_keys(config_of(sd15, "unet"), sharing)}
    return [
        compare_part(part, weights, stock[part], stocks[part], excused.get(part, ()))
        if part in stock
        else PartChange(part)
        for part, weights in parts.items()
    ]


def compare_part(name: str, new: StateDict, stock: StateDict, origin: Path, excused: Sequence[str] = ()) -> PartChange:
    """Compare a part with its stock, whose keys must be the same.

    Args:
        name: of the part.
        new, stock: the weights.
        origin: of the stock.
        excused: keys that the stock may have, and the part must not.

    Raises:
        WeightsError: keys or shapes differ.
    """
    new_inputs = None
    if name == "unet":
        new, new_inputs = _split_conv_in(new, stock)
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
        new_inputs=new_inputs,
    )


def change_of(new: StateDict, stock: StateDict, keys: list[str]) -> WeightChange:
    """Measure the change of some weights, taken together."""
    moved = size = 0.0
    equal = equal_in_half = rounded = True
    for key in keys:
        now, before = new[key].double(), stock[key].double()
        moved += float((now - before).square().sum())
        size += float(before.square().sum())
        equal &= torch.equal(now, before)
        equal_in_half &= torch.equal(now.half(), before.half())
        rounded &= torch.equal(now, before) or torch.equal(now, before.half().double())
    relative = math.sqrt(moved / size) if size else 0.0 if not moved else math.nan
    return WeightChange(relative, equal, equal_in_half, rounded)


def block_of(key: str) -> str:
    """Name the block that a weight belongs to: its name up to the first number, or up to its own last word."""
    words = key.split(".")
    for number, word in enumerate(words):
        if word.isdecimal():
            return ".".join(words[: number + 1])
    return ".".join(words[:-1]) or key


def find_dead_keys(config: dict[str, Any], sharing: str = "hidden_states") -> list[str]:
    """List the keys of a stock U-Net that the reference U-Net does not have: 24 for SD-1.5.

    Args:
        config: of the stock U-Net.
        sharing: see `ModelOptions.reference_sharing`.
    """
    with describe_build_errors("the config.json of sd15"):
        stock = UNet2DConditionModel.from_config(config)
        kept = set(REFERENCE_UNETS[sharing].from_config(config).state_dict())
    return [key for key in stock.state_dict() if key not in kept]


def _split_conv_in(new: StateDict, stock: StateDict) -> tuple[StateDict, dict[str, Any]]:
    """Split the imitative U-Net: weights with a conv_in as narrow as its stock's, and what the added channels hold."""
    for weights in (new, stock):
        if _CONV_IN not in weights:
            raise WeightsError(f"unet does not fit:\n  {_CONV_IN} is missing")
    known = stock[_CONV_IN].shape[1]
    added = new[_CONV_IN][:, known:].double()
    return {**new, _CONV_IN: new[_CONV_IN][:, :known]}, {
        "channels": added.shape[1],
        "norm": float(added.norm()),
        "all_zero": not bool(added.any()),
    }


def describe_changes(changes: list[PartChange]) -> str:
    """Describe all changes for people: the blocks of what has changed, and one sentence per part at the end."""
    lines = []
    for part in changes:
        lines.append(f"{part.name}: {part.verdict}" + _percent(part.total))
        if part.excused:
            lines.append(
                f"    {len(part.excused)} keys of the stock weights are absent: no later layer reads their output"
            )
        if part.new_inputs is not None:
            new = part.new_inputs
            lines.append(
                f"    conv_in: {new['channels']} input channels that the stock weights do not have, ignored below: "
                + ("all zero" if new["all_zero"] else f"norm {new['norm']:.4g}")
            )
        if part.verdict != EQUAL:
            lines += [f"    {name}: {block.verdict}{_percent(block)}" for name, block in part.blocks.items()]
    return "\n".join([*lines, "", *[part.sentence() for part in changes]])


def changes_as_json(changes: list[PartChange]) -> dict[str, Any]:
    """Convert all changes to JSON for programs."""
    return {"parts": [part.as_dict() for part in changes]}


def _percent(change: WeightChange | None) -> str:
    if change is None or change.equal:
        return ""
    return f" ({change.relative:.4%})" if math.isfinite(change.relative) else " (from zero)"
