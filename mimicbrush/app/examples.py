"""Examples on the editing page, rendered from photographs that the scikit-image wheel contains."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import cv2
import numpy as np
from PIL import Image

from mimicbrush.app.editing_service import Example
from mimicbrush.synthetic.clips import HELDOUT_PHOTOGRAPHS, demo_clips, render_frames

#: The reference is this many frames after the source.
_FRAMES_APART = 24


@dataclass(frozen=True)
class _Scene:
    """Two views of a rendered scene, and a place in the first.

    Attributes:
        number, seed: of the clip, see `demo_clips`.
        centre: (x, y), over width and height.
        radius: over the height.
    """

    number: int
    seed: int
    centre: tuple[float, float]
    radius: float

    def render(self) -> tuple[np.ndarray, np.ndarray]:
        """Render source and reference, (H, W, 3) uint8 RGB."""
        spec = list(demo_clips(HELDOUT_PHOTOGRAPHS, self.number + 1, self.seed).values())[self.number]
        source, reference = islice(render_frames(spec), 0, _FRAMES_APART + 1, _FRAMES_APART)
        return source, reference

    def draw_mask(self, image: np.ndarray, radius: float | None = None) -> np.ndarray:
        """Draw a disc at the place, (H, W) uint8, 255 inside."""
        height, width = image.shape[:2]
        x, y = round(self.centre[0] * width), round(self.centre[1] * height)
        mask = np.zeros((height, width), np.uint8)
        return cv2.circle(mask, (x, y), round((radius or self.radius) * height), 255, -1)


_PART = _Scene(number=1, seed=79, centre=(0.45, 0.19), radius=0.14)
_TEXTURE = _Scene(number=0, seed=79, centre=(0.55, 0.42), radius=0.15)
_DETAIL = _Scene(number=2, seed=77, centre=(0.26, 0.44), radius=0.13)


def examples() -> list[Example]:
    """Render three examples: a part from another view, a texture, and the repair of a detail (paper Fig. 1).

    The shipped model was not trained on these photographs.
    """
    part, part_view = _PART.render()
    texture, texture_view = _TEXTURE.render()
    detail, detail_view = _DETAIL.render()
    garbled = _garble(detail, _DETAIL.draw_mask(detail, 0.7 * _DETAIL.radius))
    return [
        Example(
            "Replace a part with the same part from another view", *_images(part, _PART.draw_mask(part), part_view)
        ),
        Example(
            "Apply a texture and keep the shape", *_images(texture, _TEXTURE.draw_mask(texture), texture_view), True
        ),
        Example("Repair a detail that came out wrong", *_images(garbled, _DETAIL.draw_mask(detail), detail_view)),
    ]


def _images(
    source: np.ndarray, mask: np.ndarray, reference: np.ndarray
) -> tuple[Image.Image, Image.Image, Image.Image]:
    return Image.fromarray(source), Image.fromarray(mask), Image.fromarray(reference)


def _garble(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Move the masked pixels about by a few waves, as a generator might have garbled them."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    inside = cv2.GaussianBlur(mask.astype(np.float32) / 255, (0, 0), 4)
    moved_x = x + 14 * inside * np.sin(y / 5) + 9 * inside * np.sin(x / 3)
    moved_y = y + 14 * inside * np.sin(x / 6) + 9 * inside * np.cos(y / 4)
    return cv2.remap(image, moved_x, moved_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
