"""Convert the output of the pipeline to the requested images and correspondences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from mimicbrush.io.color_profiles import convert_from_srgb
from mimicbrush.models.attention_recorder import CorrespondenceRecorder
from mimicbrush.ops.canvas import SOFT_EDGE_PX, crop_back, paste_back, to_uint8
from mimicbrush.ops.correspondence import Correspondence
from mimicbrush.ops.crops import Placement, grow_box
from mimicbrush.ops.masks import mask_box
from mimicbrush.pipelines.image_inputs import StoredColors


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """Convert pixels of any shape from about [-1, 1] to float32 in 0..1."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1)


def to_square_images(pixels: torch.Tensor, output_type: str) -> list[Image.Image] | np.ndarray:
    """Convert pixels to the model's square canvases.

    Args:
        pixels: (B, 3, S, S), about [-1, 1].
        output_type: "np" for (B, S, S, 3) float32 in 0..1, "pil" for PIL images.
    """
    if output_type == "np":
        return to_unit_range(pixels).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(square) for square in to_uint8(pixels)]


def paste_into_sources(
    pixels: torch.Tensor,
    sources: list[np.ndarray],
    masks: list[np.ndarray],
    placements: list[Placement],
    output_type: str,
    stored: Sequence[StoredColors | None],
) -> list[Image.Image] | list[np.ndarray]:
    """Paste the repainted regions into their sources at full size, with a soft edge.

    Args:
        pixels: (B n, 3, S, S), about [-1, 1]; the n results of a source follow each other.
        sources: B of (H, W, 3) uint8.
        masks: B of (H, W) uint8.
        placements: how each source lies on the canvas.
        output_type: "np" for (H, W, 3) float32 in 0..1, "pil" for PIL images.
        stored: of each source its colours in its own profile, or None. A PIL image keeps them: only what is repainted
            is converted from sRGB, before it is blended at the edge, so that no colour outside of sRGB is lost.
    """
    squares = to_uint8(pixels)  # (B n, S, S, 3)
    results_per_source = len(squares) // len(sources)
    composites: list[Any] = []
    for row, square in enumerate(squares):
        number = row // results_per_source
        source, mask, (x0, y0, x1, y1) = sources[number], masks[number], placements[number].box
        own = stored[number] if output_type == "pil" else None
        if own is not None:
            source = own.pixels
        result = crop_back(square, y1 - y0, x1 - x0)  # (y1 - y0, x1 - x0, 3)
        mask = mask[y0:y1, x0:x1]
        # Only where the paste-back changes anything: a large image in floats takes much memory.
        x2, y2, x3, y3 = grow_box(mask_box(mask), SOFT_EDGE_PX + 1, x1 - x0, y1 - y0)
        region = slice(y0 + y2, y0 + y3), slice(x0 + x2, x0 + x3)
        painted = result[y2:y3, x2:x3]
        if own is not None:
            painted = convert_from_srgb(np.ascontiguousarray(painted), own.icc)
        pasted = paste_back(painted, source[region], mask[y2:y3, x2:x3])
        composite = source / np.float32(255) if output_type == "np" else source.copy()
        composite[region] = pasted / 255 if output_type == "np" else pasted.round()
        composites.append(composite if output_type == "np" else _to_image(composite, own))
    return composites


def _to_image(pixels: np.ndarray, colors: StoredColors | None) -> Image.Image:
    image = Image.fromarray(pixels)
    if colors is not None:
        image.info["icc_profile"] = colors.icc
    return image


def list_correspondences(
    record: CorrespondenceRecorder, sources: list[Placement], references: list[Placement], num_references: int = 1
) -> list[Correspondence]:
    """Make one correspondence per result from the recorded attention.

    Args:
        record: of R = B n rows, the n results of a source following each other.
        sources: B placements.
        references: the placements of one group of references, or of B groups.
        num_references: in a group.
    """
    rows = record.attention()
    groups = [references[start : start + num_references] for start in range(0, len(references), num_references)]
    return [
        Correspondence.from_attention(
            tokens.cpu().numpy(),
            attention.cpu().numpy(),
            sources[row * len(sources) // len(rows)],
            groups[row * len(groups) // len(rows)],
            head_peaks.cpu().numpy(),
        )
        for row, (tokens, attention, head_peaks) in enumerate(rows)
    ]
