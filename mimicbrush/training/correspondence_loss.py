"""The correspondence loss (*ours*). It teaches the reference attention where the reference shows the same thing.

The denoising loss alone hardly teaches this to a small model: colours reach it sooner through the image tokens
(docs/results.md). It needs no labels: the miner stores SIFT matches of every video pair (`ops.keypoints`), and those
of a photograph follow from the matrices of its two views (`data.transforms`: `_sample_image_matches`). In the same
file, `_sample_matches` chooses those of a sample. The loss supervises some heads of every reading layer.

Related work that uses matches as soft targets of attention, for virtual try-on: SIFT-VTON (arXiv 2605.01296), CORAL
(2602.17636), MOSAIC (2509.01977); without labels: Leffa (2412.08486).
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

#: Layers with fewer tokens along a side are not used, because their tokens are too large to mark a place.
MIN_SIDE = 8
#: A match counts as found if the attention peaks nearer to it than this share of the side of the canvas.
FOUND_RATIO = 0.1


class CorrespondenceLoss(NamedTuple):
    """Correspondence loss of a batch, and how many matches the attention finds.

    Attributes:
        per_sample: (B,) mean over a sample's matches and over layers; 0 without matches or reference. Attention that
            is spread evenly over the reference has a loss of 1.
        num_samples: () number of samples with a match whose reference is not dropped.
        match_counts: (2,) number of matches that the attention finds, and of all matches. A match that is found in a
            share of the layers counts as this share. Without gradients.
    """

    per_sample: torch.Tensor
    num_samples: torch.Tensor
    match_counts: torch.Tensor


def check_reading_layers(unet: UNet2DConditionModel | None) -> None:
    """Check that a layer reads the reference on a grid of `MIN_SIDE` or more tokens along a side.

    Args:
        unet: the imitative U-Net; None if the model has no reference U-Net.

    Raises:
        InputError: there is no such layer.
    """
    if unet is None:
        raise InputError(
            "train.correspondence_weight needs a reference U-Net, and this model has none "
            "(model.reference_encoder); set train.correspondence_weight=0"
        )
    side, paths = unet.config.sample_size, reference_paths(unet)
    levels = len(unet.config.block_out_channels)
    finest = max(int(path.split(".")[1]) if path.startswith("up_blocks.") else 0 for path in paths)
    finest_side = side // 2 ** (levels - 1 - finest)
    if finest_side < MIN_SIDE:
        raise InputError(
            f"train.correspondence_weight needs a reading layer of at least {MIN_SIDE} x {MIN_SIDE} tokens, and the "
            f"finest has {finest_side} x {finest_side}; increase model.size_px, or set train.correspondence_weight=0"
        )


def correspondence_loss(
    queries_and_keys: Mapping[str, KeysValues],
    matches: Matches,
    keep_reference: torch.Tensor,
    size_px: int,
    heads_ratio: float,
) -> CorrespondenceLoss:
    """Compute the cross-entropy between the attention over the reference's tokens and the matching place.

    For a match (x, y) -> (x', y'), with q of the token that contains (x, y) and k of the M reference tokens::

        loss = -sum_i w_i log softmax(q k_i / sqrt(d)) / log M,    i: the four tokens around (x', y'), w bilinear

    The softmax is only over the *reference's* tokens, so the loss does not influence how much attention the reference
    gets as a whole. With several references, it is over the tokens of the first, to which the matches belong. The
    others may show the same place, but there are no matches for them: with a softmax over all tokens, the loss would
    teach not to attend to them.

    Args:
        queries_and_keys: query (B, N, heads, d) and reference key (B, R M, heads, d) of each layer that reads the
            reference, by its path; a reference has as many tokens as the source, M = N.
        matches: matches of the batch, in pixels of the canvas.
        keep_reference: (B,) bool, False = dropped.
        size_px: side of the canvas.
        heads_ratio: share of the heads of each layer to teach, the first ones, above 0 and at most 1.

    Raises:
        InputError: no layer has `MIN_SIDE` tokens along a side.
    """
    layers = [layer for layer in queries_and_keys.values() if math.isqrt(layer[0].shape[1]) >= MIN_SIDE]
    if not layers:
        raise InputError(
            f"train.correspondence_weight needs a reading layer of at least {MIN_SIDE} x {MIN_SIDE} tokens; increase "
            "model.size_px, or leave the weight at 0"
        )
    is_used = matches.is_match & keep_reference[:, None]  # (B, K)
    count = is_used.sum(dim=1)  # (B,)
    per_layer = [_layer_loss(q, k[:, : q.shape[1]], matches, size_px, heads_ratio) for q, k in layers]
    losses, found_ratio = (torch.stack(each).mean(0) for each in zip(*per_layer, strict=True))  # (B, K) each
    per_sample = torch.where(is_used, losses, 0).sum(dim=1) / count.clamp(min=1)
    match_counts = torch.stack([torch.where(is_used, found_ratio, 0).sum(), count.sum()])
    return CorrespondenceLoss(per_sample, (count > 0).sum(), match_counts)


def _layer_loss(
    query: torch.Tensor, key: torch.Tensor, matches: Matches, size_px: int, heads_ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute for one layer, (B, K) float32 each: the loss of each match, and 1 if the attention finds it, else 0."""
    side, heads = math.isqrt(key.shape[1]), math.ceil(round(heads_ratio * query.shape[2], 6))
    rows = torch.arange(len(query), device=query.device)[:, None]
    # For the taught heads: q of the source token that contains each match, and k of all reference tokens.
    token = _token_index(matches.source_xy, math.isqrt(query.shape[1]), size_px)  # (B, K)
    q, k = query[rows, token, :heads], key[:, :, :heads]  # (B, K, heads, d) and (B, M, heads, d)
    # Scores in float32 also under autocast: a softmax over thousands of tokens needs it.
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.einsum("bkhd,bmhd->bhkm", q.float(), k.float()) * query.shape[-1] ** -0.5
        tokens, weights = _bilinear(matches.reference_xy, side, size_px)  # (B, K, 4) each
        around = scores.gather(-1, tokens[:, None].expand(-1, heads, -1, -1))  # (B, heads, K, 4)
        # -sum_i w_i log softmax(s)_i = logsumexp(s) - sum_i w_i s_i, as the four weights add up to 1.
        loss = (scores.logsumexp(-1) - (around * weights[:, None]).sum(-1)).mean(dim=1) / math.log(key.shape[1])
        peak = scores.detach().mean(dim=1).argmax(-1)  # (B, K)
        centre = (torch.stack([peak % side, peak // side], dim=-1) + 0.5) * (size_px / side) - 0.5
        is_found = (centre - matches.reference_xy).norm(dim=-1) <= FOUND_RATIO * size_px
    return loss, is_found.float()


def _token_index(xy: torch.Tensor, side: int, size_px: int) -> torch.Tensor:
    """Find the token that contains a place: (B, K, 2) px of the canvas -> (B, K) index in a grid of side x side."""
    column, row = ((xy + 0.5) * (side / size_px)).long().clamp(0, side - 1).unbind(-1)
    return row * side + column


def _bilinear(xy: torch.Tensor, side: int, size_px: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the four tokens around a place, and their bilinear weights: (B, K, 2) px -> (B, K, 4) each.

    At the edge of the canvas, the nearest token has all the weight.
    """
    place = ((xy + 0.5) * (side / size_px) - 0.5).clamp(0, side - 1)  # in tokens, centres at whole numbers
    low = place.floor().clamp(max=side - 2)
    part = place - low
    number = torch.arange(4, device=xy.device)
    corners = torch.stack([number % 2, number // 2], dim=-1)  # (4, 2): (0, 0), (1, 0), (0, 1), (1, 1)
    column, row = (low[..., None, :].long() + corners).unbind(-1)  # (B, K, 4)
    weights = torch.where(corners.bool(), part[..., None, :], 1 - part[..., None, :]).prod(-1)
    return row * side + column, weights
