"""Images between a file, a square canvas and a tensor: letterbox, blanking, paste-back.

The conventions are those of the released benchmark script (ali-vilab/MimicBrush): long side to the model's
size by bilinear interpolation, centred padding, white for images and black for masks.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch

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
