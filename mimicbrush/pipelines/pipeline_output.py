"""The output of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image

from mimicbrush.ops.correspondence import Correspondence


@dataclass
class MimicBrushPipelineOutput(BaseOutput):
    """Edited images, with their correspondences where asked for.

    Attributes:
        images: for each source in turn the images asked for. "pil": at the source's own size and, where it came with
            a colour profile, in that profile, which ``info["icc_profile"]`` holds; the others are sRGB. "np":
            (B, S, S, 3) float32 in 0..1, or with paste-back a list of (H, W, 3); "pt": (B, 3, S, S) in 0..1;
            "latent": (B, 4, h, w).
        correspondences: one per image: which place of the reference filled which place of the masked region.
    """

    images: list[Image.Image] | list[np.ndarray] | np.ndarray | torch.Tensor
    correspondences: list[Correspondence] | None = None
