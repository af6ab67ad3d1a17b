"""What the pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image


@dataclass
class MimicBrushPipelineOutput(BaseOutput):
    """Edited pictures.

    Attributes:
        images: one per source. "pil": at the source's own size; "np": (B, S, S, 3) float32 in 0..1, or with
            paste-back a list of (H, W, 3); "pt": (B, 3, S, S) in 0..1; "latent": (B, 4, h, w).
    """

    images: list[Image.Image] | list[np.ndarray] | np.ndarray | torch.Tensor
