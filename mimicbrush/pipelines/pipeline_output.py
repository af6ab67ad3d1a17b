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
    """Edited images, and their correspondences if they were requested.

    Attributes:
        images: the results of each source, one source after the other. "pil": at the size of the source; if the source
            has a colour profile, the result is in that profile (``info["icc_profile"]``), otherwise in sRGB. "np":
            (B, S, S, 3) float32 in 0..1, or a list of (H, W, 3) with `paste_back`; "pt": (B, 3, S, S) in 0..1;
            "latent": (B, 4, h, w).
        correspondences: one per image; it says which place of the reference filled which place of the masked region.
    """

    images: list[Image.Image] | list[np.ndarray] | np.ndarray | torch.Tensor
    correspondences: list[Correspondence] | None = None
