"""Keypoints carried by the reference attention, inside and outside the mask, by layer and third of the steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from mimicbrush.evaluation.keypoint_transfer.attention_maps import THIRDS, AttentionAtTokens, AttentionMaps
from mimicbrush.evaluation.keypoint_transfer.tasks import TransferTask
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.klein.pipeline import KleinPipeline

#: Of the sampler that the reference attention is summed over.
ATTENTION_STEPS = 8
_SEED = 0


@dataclass(frozen=True)
class AttentionPlaces:
    """Places to which the reference attention carries K keypoints: px of the reference's canvas, (K, 2) each.

    Attributes:
        inside_mask: asked while the keypoint's token is inside the mask.
        outside_mask: asked while it is outside, so that the model sees the keypoint.
        by_layer: module path (None: all layers) and number in `THIRDS` (None: all steps) -> `inside_mask` of these.
        sides: module path of each reading layer -> its tokens along a side.
    """

    inside_mask: np.ndarray
    outside_mask: np.ndarray
    by_layer: dict[tuple[str | None, int | None], np.ndarray]
    sides: dict[str, int]


class AttentionTransfer:
    """A method that carries keypoints by the reference attention while the pipeline fills a mask.

    The source is edited twice, with the dark and with the light fields of a chessboard as its mask. So every
    keypoint is masked once, with the source around it, and is visible once. Every head and step counts, and every
    layer.

    Args:
        pipeline: has a reference U-Net, or is of FLUX.2 klein.
        fields: of the chessboard, along a side.
        scores: of the attention, the scores before the softmax instead of its probabilities (`AttentionAtTokens`).
        reciprocal: to each map the transposed one is added of the swapped pair, the reference edited with the source
            as its reference (ZeroCo, arXiv 2412.09072): two more edits. A token of it counts as it was,
            masked or visible.
    """

    def __init__(
        self,
        pipeline: MimicBrushPipeline | KleinPipeline,
        fields: int = 4,
        scores: bool = False,
        reciprocal: bool = False,
    ) -> None:
        self.pipeline, self.fields = pipeline, fields
        self.scores, self.reciprocal = scores, reciprocal
        if isinstance(pipeline, MimicBrushPipeline):
            # Some schedulers take more steps than they are asked for.
            pipeline.scheduler.set_timesteps(ATTENTION_STEPS)
            self._side, self._num_steps = pipeline.unet.config.sample_size, len(pipeline.scheduler.timesteps)
        else:
            self._side, self._num_steps = pipeline.token_side, ATTENTION_STEPS

    def __call__(self, task: TransferTask) -> AttentionPlaces:
        """Carry the keypoints of a task."""
        inside_mask, outside_mask = self.record_maps(task)
        size = len(task.reference)
        by_layer: dict[tuple[str | None, int | None], np.ndarray] = {
            (path, third): inside_mask.find_places(size, path, third)
            for path in (*inside_mask.sides, None)
            for third in (*range(len(THIRDS)), None)
        }
        return AttentionPlaces(by_layer[None, None], outside_mask.find_places(size), by_layer, inside_mask.sides)

    def record_maps(self, task: TransferTask) -> tuple[AttentionMaps, AttentionMaps]:
        """Record the attention of the keypoints' tokens, inside and outside the mask, in the keypoints' order."""
        # 1. Two boards, each the inverse mask of the other. For each keypoint the nearest token of the board that
        #    masks it.
        size = len(task.source)
        field = np.arange(size) * self.fields // size
        dark = (field[:, None] + field[None]) % 2
        boards = [dark, 1 - dark]
        pixel = np.clip(np.round(task.source_xy).astype(int), 0, size - 1)
        in_dark = torch.from_numpy(dark[pixel[:, 1], pixel[:, 0]] > 0)
        boards_px = [torch.from_numpy(board)[None, None].float() for board in boards]
        latent_masks = [F.interpolate(board, self._side)[0, 0] for board in boards_px]
        of_dark, of_light = (
            _find_nearest_tokens(task.source_xy, size, latent_mask > 0) for latent_mask in latent_masks
        )
        tokens = torch.where(in_dark, of_dark, of_light)

        # 2. Edited with either, so that each token is masked once, and visible once.
        on_dark, on_light = (self._edit(task.source, task.reference, board, tokens) for board in boards)
        inside_mask, outside_mask = on_dark.merge(in_dark, on_light), on_light.merge(in_dark, on_dark)
        if not self.reciprocal:
            return inside_mask, outside_mask

        # 3. The swapped pair: how much each token of the reference looks at the keypoints' tokens, likewise.
        for board, latent_mask in zip(boards, latent_masks, strict=True):
            swapped = self._edit(task.reference, task.source, board, tokens, transposed=True)
            for key, maps in swapped.sums.items():
                # A coarse token may lie on both boards.
                share = F.adaptive_avg_pool2d(latent_mask[None], maps.shape[-1])  # (1, n, n)
                inside_mask.sums[key] += maps * share
                outside_mask.sums[key] += maps * (1 - share)
        for each in (inside_mask, outside_mask):
            each.counts = {key: 2 * number for key, number in each.counts.items()}
        return inside_mask, outside_mask

    def _edit(
        self,
        source: np.ndarray,
        reference: np.ndarray,
        board: np.ndarray,
        tokens: torch.Tensor,
        transposed: bool = False,
    ) -> AttentionMaps:
        record = AttentionAtTokens(tokens, self._side, self._num_steps, self.scores, transposed)
        self.pipeline(
            Image.fromarray(source),
            Image.fromarray((board * 255).astype(np.uint8)),
            Image.fromarray(reference),
            num_inference_steps=ATTENTION_STEPS,
            generator=torch.Generator().manual_seed(_SEED),
            attention_record=record,
            output_type="latent",
        )
        return record.maps


def _find_nearest_tokens(points: np.ndarray, size_px: int, allowed: torch.Tensor) -> torch.Tensor:
    """For points (K, 2) px of the canvas, the numbers (K,) of the tokens of a grid (n, n) bool that are nearest."""
    side = len(allowed)
    numbers = np.flatnonzero(allowed.numpy())
    row, column = np.divmod(numbers, side)
    centres = (np.stack([column, row], axis=1) + 0.5) * (size_px / side)
    # Centres are stated by edges, keypoints by pixel centres: half a pixel apart.
    distance = np.linalg.norm(points[:, None] + 0.5 - centres[None], axis=-1)
    return torch.from_numpy(numbers[distance.argmin(axis=1)])
