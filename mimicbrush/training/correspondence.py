"""The correspondence loss: reference attention is taught to look where the reference shows the same (*ours*).

The denoising loss alone hardly teaches a small model to look: colours reach it sooner by the image tokens
(docs/results.md). Which places match is known anyway: the miner stores SIFT matches of every video pair, and both views
of a photograph come with their matrices. So the attention itself is supervised, in some heads of every reading layer.

Matches as soft targets of attention: SIFT-VTON (arXiv 2605.01296), CORAL (2602.17636), MOSAIC (2509.01977) for try-on;
Leffa (2412.08486) without labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from mimicbrush.errors import InputError
from mimicbrush.models.reference_attention import reference_paths
from mimicbrush.types import Matches

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from mimicbrush.types import KeysValues

#: Layers with fewer tokens along a side say too little about a place.
MIN_SIDE = 8
#: A match counts as found where the attention peaks within this part of the side of the canvas.
FOUND_RATIO = 0.1


class CorrespondenceLoss(NamedTuple):
    """What the reference attention does at the matches.

    Attributes:
        per_sample: (B,) mean over a sample's matches and over layers; 0 without matches or reference. 1 is what
            attention that is spread evenly over the reference has.
        num_samples: () how many samples have a match and their reference.
        found: (2,) summed share of layers in which the attention peaks within `FOUND_RATIO` of the match, and the
            number of matches. Without gradients.
    """

    per_sample: torch.Tensor
    num_samples: torch.Tensor
    found: torch.Tensor


def check_reading_layers(unet: UNet2DConditionModel | None) -> None:
    """Whether some layer reads a reference on a grid of `MIN_SIDE` or more tokens along a side.

    Args:
        unet: the imitative U-Net; None: nothing reads a reference U-Net.

    Raises:
        InputError: none does.
    """
    if unet is None:
        raise InputError(
            "train.correspondence_weight teaches the attention to a reference U-Net, and this model has none "
            "(model.reference_encoder); set train.correspondence_weight=0"
        )
    side, paths = unet.config.sample_size, reference_paths(unet)
    levels = len(unet.config.block_out_channels)
    finest = max(int(path.split(".")[1]) if path.startswith("up_blocks.") else 0 for path in paths)
    found = side // 2 ** (levels - 1 - finest)
    if found < MIN_SIDE:
        raise InputError(
            f"train.correspondence_weight needs a reading layer of {MIN_SIDE} x {MIN_SIDE} tokens or more, the finest "
            f"here has {found} x {found}; enlarge model.size_px, or set train.correspondence_weight=0"
        )


def correspondence_loss(
    attended: Mapping[str, KeysValues],
    matches: Matches,
    keep_reference: torch.Tensor,
    size_px: int,
    heads_ratio: float,
) -> CorrespondenceLoss:
    """Cross-entropy between the attention over the reference's tokens and the place that matches.

    For a match (x, y) -> (x', y'), with q of the token that holds (x, y) and k of the M reference tokens::

        loss = -sum_i w_i log softmax(q k_i / sqrt(d)) / log M,    i: the four tokens around (x', y'), w bilinear

    The softmax is over the *reference's* tokens alone: how much is read of the reference at all stays free.

    Args:
        attended: query (B, N, heads, d) and reference key (B, M, heads, d) of each reading layer, by its path.
        matches: of the batch, on the canvas.
        keep_reference: (B,) bool, False = dropped.
        size_px: side of the canvas.
        heads_ratio: part of the heads of each layer, the first ones, above 0 and at most 1.

    Raises:
        InputError: no layer has `MIN_SIDE` tokens along a side.
    """
    layers = [layer for layer in attended.values() if math.isqrt(layer[0].shape[1]) >= MIN_SIDE]
    if not layers:
        raise InputError(
            f"train.correspondence_weight needs a reading layer of {MIN_SIDE} x {MIN_SIDE} tokens or more; enlarge "
            "model.size_px, or leave the weight at 0"
        )
    is_used = matches.is_match & keep_reference[:, None]  # (B, K)
    count = is_used.sum(dim=1)  # (B,)
    per_match, is_found = zip(*(_at_matches(*layer, matches, size_px, heads_ratio) for layer in layers), strict=True)
    losses, found = torch.stack(per_match).mean(0), torch.stack(is_found).mean(0)  # (B, K) each
    per_sample = torch.where(is_used, losses, 0).sum(dim=1) / count.clamp(min=1)
    sums = torch.stack([torch.where(is_used, found, 0).sum(), count.sum()])
    return CorrespondenceLoss(per_sample, (count > 0).sum(), sums)


def _at_matches(
    query: torch.Tensor, key: torch.Tensor, matches: Matches, size_px: int, heads_ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer, (B, K) float32 twice: the loss at each match, mean over heads; 1 where their mean score peaks near."""
    side, heads = math.isqrt(key.shape[1]), math.ceil(round(heads_ratio * query.shape[2], 6))
    rows = torch.arange(len(query), device=query.device)[:, None]
    at = query[rows, _token(matches.source_xy, math.isqrt(query.shape[1]), size_px), :heads]  # (B, K, heads, d)
    # Scores in float32 also under autocast: a softmax over thousands of tokens needs it.
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.einsum("bkhd,bmhd->bhkm", at.float(), key[:, :, :heads].float()) * query.shape[-1] ** -0.5
        tokens, weights = _bilinear(matches.reference_xy, side, size_px)  # (B, K, 4) each
        around = scores.gather(-1, tokens[:, None].expand(-1, heads, -1, -1))  # (B, heads, K, 4)
        loss = (scores.logsumexp(-1) - (around * weights[:, None]).sum(-1)).mean(dim=1) / math.log(key.shape[1])
        peak = scores.detach().mean(dim=1).argmax(-1)  # (B, K)
        centre = (torch.stack([peak % side, peak // side], dim=-1) + 0.5) * (size_px / side) - 0.5
        is_found = (centre - matches.reference_xy).norm(dim=-1) <= FOUND_RATIO * size_px
    return loss, is_found.float()


def _token(xy: torch.Tensor, side: int, size_px: int) -> torch.Tensor:
    """(B, K, 2) px of the canvas -> (B, K) number of the token of side x side that holds it."""
    column, row = ((xy + 0.5) * (side / size_px)).long().clamp(0, side - 1).unbind(-1)
    return row * side + column


def _bilinear(xy: torch.Tensor, side: int, size_px: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, K, 2) px of the canvas -> the four tokens whose centres are around it and their weights, (B, K, 4) each.

    At the edge of the canvas, where there is no token beyond, the nearest one has all of the weight.
    """
    place = ((xy + 0.5) * (side / size_px) - 0.5).clamp(0, side - 1)  # in tokens, centres at whole numbers
    low = place.floor().clamp(max=side - 2)
    part = place - low
    number = torch.arange(4, device=xy.device)
    corners = torch.stack([number % 2, number // 2], dim=-1)  # (4, 2): (0, 0), (1, 0), (0, 1), (1, 1)
    column, row = (low[..., None, :].long() + corners).unbind(-1)  # (B, K, 4)
    weights = torch.where(corners.bool(), part[..., None, :], 1 - part[..., None, :]).prod(-1)
    return row * side + column, weights
