"""Examples on the editing page, rendered from photographs that the scikit-image wheel contains."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from mimicbrush.app.editing_service import Example
from mimicbrush.synthetic.clips import HELDOUT_PHOTOGRAPHS, demo_clips, render_frames

Images = tuple[Image.Image, Image.Image, Image.Image]
_SEED = 77
#: Frames of a clip that show the same from elsewhere.
_SOURCE_FRAME, _REFERENCE_FRAME = 0, 24


def examples() -> list[Example]:
    """Render three examples: a part from another view, a texture, and the repair of a detail (paper Fig. 1).

    The shipped model was not trained on these photographs.
    """
    views = []
    for spec in demo_clips(HELDOUT_PHOTOGRAPHS, 3, seed=_SEED).values():
        frames = list(render_frames(spec))
        views.append((frames[_SOURCE_FRAME], frames[_REFERENCE_FRAME]))
    (first, first_view), (second, second_view), (third, third_view) = views
    return [
        Example("Replace a part with the same part from another view", *_images(first, _oval(first, 0.22), first_view)),
        Example("Apply a texture and keep the shape", *_images(second, _oval(second, 0.3), second_view), True),
        Example("Repair a detail that came out wrong", *_images(_garbled(third), _oval(third, 0.2), third_view)),
    ]


def _images(source: np.ndarray, mask: np.ndarray, reference: np.ndarray) -> Images:
    return Image.fromarray(source), Image.fromarray(mask), Image.fromarray(reference)


def _oval(image: np.ndarray, radius: float) -> np.ndarray:
    """Draw an oval mask in the middle; its radius is a ratio of the height."""
    height, width = image.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    cv2.ellipse(
        mask, (width // 2, height // 2), (round(radius * height * 1.2), round(radius * height)), 0, 0, 360, 255, -1
    )
    return mask


def _garbled(image: np.ndarray) -> np.ndarray:
    """Distort the middle, as a bad generator might: a few waves move its pixels."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    inside = cv2.GaussianBlur(_oval(image, 0.16).astype(np.float32) / 255, (0, 0), 4)
    moved_x = x + 14 * inside * np.sin(y / 5) + 9 * inside * np.sin(x / 3)
    moved_y = y + 14 * inside * np.sin(x / 6) + 9 * inside * np.cos(y / 4)
    return cv2.remap(image, moved_x, moved_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
