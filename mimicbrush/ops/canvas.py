"""Images between a file, a square canvas and a tensor: letterbox, warp, blanking, paste-back.

The conventions are those of the released benchmark script (ali-vilab/MimicBrush): long side to the model's
size by bilinear interpolation, centred padding, white for images and black for masks.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from mimicbrush.io.images import MASK_THRESHOLD as MASK_THRESHOLD

IMAGE_FILL = 255
MASK_FILL = 0
#: How far outside of its mask the paste-back changes an image: ten blurs of 3 x 3 (released code).
SOFT_EDGE_PX = 10


def letterbox(image: np.ndarray, size_px: int, fill: int, order: str = "resize_then_pad") -> np.ndarray:
    """Scale and pad to a square: (H, W[, 3]) uint8 -> (S, S[, 3]) uint8.

    Args:
        image: any size.
        size_px: side of the square, S.
        fill: grey value of the padding.
        order: "resize_then_pad" scales the long side to S first (released benchmark script), "pad_then_resize" pads
            to a square first (released demo): the border between image and padding is then interpolated.
    """
    height, width = image.shape[:2]
    if order == "pad_then_resize":
        return cv2.resize(_pad(image, max(height, width), fill), (size_px, size_px), interpolation=cv2.INTER_LINEAR)
    scale = size_px / max(height, width)
    new_height, new_width = (
        (max(1, int(height * scale)), size_px) if width >= height else (size_px, max(1, int(width * scale)))
    )
    return _pad(cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR), size_px, fill)


def _pad(image: np.ndarray, size_px: int, fill: int) -> np.ndarray:
    height, width = image.shape[:2]
    top, left = (size_px - height) // 2, (size_px - width) // 2
    canvas = np.full((size_px, size_px, *image.shape[2:]), fill, np.uint8)
    canvas[top : top + height, left : left + width] = image
    return canvas


def letterbox_mask(mask: np.ndarray, size_px: int, order: str = "resize_then_pad") -> np.ndarray:
    """Letterbox a mask and threshold it: (H, W) uint8 in 0..255 -> (S, S) uint8 in {0, 1}."""
    return (letterbox(mask, size_px, MASK_FILL, order) > MASK_THRESHOLD).astype(np.uint8)


def crop_back(square: np.ndarray, height: int, width: int) -> np.ndarray:
    """Undo `letterbox`: (S, S, 3) uint8 -> (height, width, 3) uint8, by scaling the square to the long side."""
    long_side = max(height, width)
    scaled = cv2.resize(square, (long_side, long_side), interpolation=cv2.INTER_LINEAR)
    top, left = (long_side - height) // 2, (long_side - width) // 2
    return scaled[top : top + height, left : left + width]


def paste_back(result: np.ndarray, source: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Put the repainted pixels back into the source, with a soft edge.

    The mask as it was given is blurred ten times with a 3 x 3 Gaussian (released code), so the source's own pixels
    stay where all of the mask within ten pixels is 0. Values between are a blend; nothing is cut at `MASK_THRESHOLD`.

    Args:
        result, source: (H, W, 3) uint8.
        mask: (H, W) uint8 in 0..255.

    Returns:
        (H, W, 3) float64 in 0..255; round it to store it.
    """
    soft = mask
    for _ in range(SOFT_EDGE_PX):
        soft = cv2.GaussianBlur(soft, (3, 3), 0)
    alpha = soft[..., None] / 255.0
    # out = result * m + source * (1 - m), with the blurred mask m in 0..1 (released code).
    return result * alpha + source * (1 - alpha)


def warp_images(
    images: torch.Tensor,
    sizes: torch.Tensor,
    to_image: torch.Tensor,
    colours: torch.Tensor,
    size_px: int,
    fill: int,
) -> torch.Tensor:
    """Change the colours of images, and warp each onto a square canvas through its matrix.

    Works on any device. The result is that of `color_jitter` and `geometry`, up to rounding.

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


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """Convert (B, H, W, 3) uint8 in 0..255 to (B, 3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return pixels.float() / 127.5 - 1


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """Convert (B, 3, H, W) in [-1, 1], clamped, to (B, H, W, 3) uint8 in 0..255, rounded."""
    scaled = (pixels.detach().float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def blank_mask(source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Blank what is to be repainted: (B, 3, H, W) in [-1, 1], (B, 1, H, W) -> (B, 3, H, W), -1 where mask is 1.

    Differs from SD inpainting, which blanks to grey (0); this is 0 of 0..255 (released code).
    """
    return source * (1 - mask) - mask  # mask 0: the source; mask 1: -1, which is black in [-1, 1]
