"""Jitter and warp of a batch on any device: the numbers of `color_jitter` and `geometry`, up to rounding."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def warp_images(
    images: torch.Tensor,
    sizes: torch.Tensor,
    to_image: torch.Tensor,
    colours: torch.Tensor,
    size_px: int,
    fill: int,
) -> torch.Tensor:
    """Change the colours of images, and warp each onto a square canvas through its matrix.

    Args:
        images: (B, H, W, C) uint8, each in the upper left corner of the common size.
        sizes: (B, 2), height and width of each; what lies outside is not shown.
        to_image: (B, 3, 3) float32, from (x, y, 1) of the canvas to the image, pixel centres at whole numbers:
            the inverse of what `geometry.warp_to_canvas` is given.
        colours: (B, C, C + 1) float32, applied to [channels, 1] in 0..255 and clipped.
        size_px: side of the canvas, S.
        fill: grey value where the image ends.

    Returns:
        (B, C, S, S) float32, whole numbers in 0..255.
    """
    pixels = images.permute(0, 3, 1, 2).float()
    pixels = (torch.einsum("bij,bjhw->bihw", colours[..., :-1], pixels) + colours[..., -1:, None]).round().clamp(0, 255)
    # Sampling pads with zeros; so the fill is subtracted, and added again.
    pixels = torch.where(_is_inside(pixels, sizes), pixels - fill, 0)
    grid = _sampling_grid(to_image, size_px, *pixels.shape[2:])
    warped = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (warped + fill).round()


def _is_inside(pixels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) bool: where an image is."""
    rows, columns = (torch.arange(side, device=pixels.device) for side in pixels.shape[2:])
    height, width = sizes.T
    in_height, in_width = rows < height[:, None], columns < width[:, None]
    return in_height[:, None, :, None] & in_width[:, None, None, :]


def _sampling_grid(to_image: torch.Tensor, size_px: int, height: int, width: int) -> torch.Tensor:
    """(B, S, S, 2) places in the images for `grid_sample`, whose units count pixel edges from -1 to 1."""
    axis = torch.arange(size_px, device=to_image.device, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    canvas = torch.stack([x, y, torch.ones_like(x)])
    mapped_x, mapped_y, depth = torch.einsum("bij,jhw->ibhw", to_image, canvas)
    places = torch.stack([mapped_x / depth, mapped_y / depth], dim=-1)
    return (2 * places + 1) / torch.tensor([width, height], device=places.device) - 1
