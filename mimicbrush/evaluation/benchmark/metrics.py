"""The paper's metrics (Sec. 3.4, App. A) for one case: which pixels are compared, and by what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from mimicbrush.evaluation.benchmark.subjects import cut_subject
from mimicbrush.evaluation.heldout.reference_gain import PSNR_CAP_DB
from mimicbrush.ops.masks import mask_box
from mimicbrush.ops.similarity import SSIM_WINDOW_PX, psnr_inside, ssim_luma

if TYPE_CHECKING:
    from mimicbrush.evaluation.benchmark.backbones import Backbones

#: Key -> heading of tables, and digits. The first four need a ground truth, the others a reference mask or a prompt.
METRICS = {
    "ssim": ("SSIM", 3),
    "psnr": ("PSNR", 2),
    "lpips": ("LPIPS", 3),
    "efficientnet_lite0": ("EffNet-Lite0 distance", 3),
    "dino_i": ("DINO-I", 2),
    "dinov2_i": ("DINOv2-I", 2),
    "clip_i": ("CLIP-I", 2),
    "clip_t": ("CLIP-T", 2),
}
WITH_TRUTH = ("ssim", "psnr", "lpips", "efficientnet_lite0")

METRIC_DEFINITIONS = {
    "crop": "SSIM, PSNR, LPIPS and EffNet-Lite0 compare result and ground truth, cropped to the box of the source mask "
    "with the background; only for tracks with a ground truth (inner-ID)",
    "ssim": "scikit-image structural_similarity of 8-bit luma of the crop, Gaussian weights sigma 1.5, population "
    "covariance, data range 255; n/a if a side is below 11 px",
    "psnr": f"dB over all pixels of the crop, 8-bit RGB, capped at {PSNR_CAP_DB:g} dB (equal images)",
    "lpips": "torchmetrics LPIPS (AlexNet) of the crop; n/a if a side is below 32 px",
    "efficientnet_lite0": "a distance similar to LPIPS: the crop, reduced to a longer side of at most 224 px, goes "
    "through EfficientNet-Lite0 (ImageNet); the activations at strides 2, 4, 8, 16 and 32 are normalised to unit "
    "length over channels; the distance is the mean of their squared differences over places and depths; nothing is "
    "fitted to human ratings; 0 (equal) to 2, lower is better; n/a if a side is below 32 px",
    "dino_i": "cosine similarity x 100 of DINO ViT-S/16 class tokens of the two subjects",
    "dinov2_i": "the same with DINOv2 class tokens: the paper says DINO but cites DINOv2, so both are measured",
    "clip_i": "cosine similarity x 100 of CLIP image embeddings of the two subjects",
    "clip_t": "cosine similarity x 100 of CLIP embeddings of the whole result and the prompt",
    "subjects": "a subject is the image inside its mask (the reference by its own mask, the result by the source "
    "mask), white outside, cropped to the box of the mask and padded with white to a square; only for inter-ID "
    "tracks",
    "pasted": "the result blended into the source with the mask, which is blurred ten times with a 3 x 3 Gaussian "
    "(released code)",
    "painted": "the raw output of the editor, not pasted back into the source",
}


@dataclass(frozen=True)
class CasePixels:
    """The pixels of one case: (H, W, 3) and (H, W) uint8; masks are 1 inside.

    Attributes:
        truth: None where there is none.
        reference_mask: None where there is none.
    """

    result: np.ndarray
    mask: np.ndarray
    truth: np.ndarray | None
    reference: np.ndarray
    reference_mask: np.ndarray | None
    prompt: str | None


def score_case(pixels: CasePixels, backbones: Backbones) -> dict[str, float | str]:
    """Score one case: metric -> value, or why there is none.

    Those that the track does not have are left out: of inner-ID cases there are SSIM, PSNR, LPIPS and the
    EffNet-Lite0 distance, of inter-ID cases the others.
    """
    if pixels.truth is not None:
        return _score_closeness(pixels.result, pixels.truth, pixels.mask, backbones)
    scores: dict[str, float | str] = {}
    subjects: tuple[np.ndarray, np.ndarray] | None = None
    if pixels.reference_mask is not None:
        subjects = cut_subject(pixels.result, pixels.mask), cut_subject(pixels.reference, pixels.reference_mask)
    for key, encoder in (("dino_i", backbones.dino), ("dinov2_i", backbones.dinov2), ("clip_i", backbones.clip)):
        if encoder is None:
            scores[key] = backbones.absent[key]
        elif subjects is None:
            scores[key] = "the reference has no mask"
        else:
            scores[key] = 100 * encoder.compare(*subjects)
    if backbones.clip is None:
        scores["clip_t"] = backbones.absent["clip_t"]
    elif pixels.prompt is None:
        scores["clip_t"] = "the case has no prompt"
    else:
        scores["clip_t"] = 100 * backbones.clip.compare_with_text(pixels.result, pixels.prompt)
    return scores


def _score_closeness(
    result: np.ndarray, truth: np.ndarray, mask: np.ndarray, backbones: Backbones
) -> dict[str, float | str]:
    left, top, right, bottom = mask_box(mask)
    a, b = (image[top:bottom, left:right] for image in (result, truth))
    everywhere = np.ones(a.shape[:2], np.uint8)
    scores: dict[str, float | str] = {"psnr": min(psnr_inside(a, b, everywhere), PSNR_CAP_DB)}
    small = f"the box of the mask is {right - left} x {bottom - top} px"
    if min(a.shape[:2]) < SSIM_WINDOW_PX:
        scores["ssim"] = small
    else:
        scores["ssim"] = ssim_luma(*(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (a, b)))
    for key, network in (("lpips", backbones.lpips), ("efficientnet_lite0", backbones.efficientnet_lite0)):
        if network is None:
            scores[key] = backbones.absent[key]
        elif not network.is_large_enough(a):
            scores[key] = small
        else:
            scores[key] = network.measure(a, b)
    return scores


def select_numbers(scores: Mapping[str, float | str]) -> dict[str, float]:
    """Select the metrics that have a value."""
    return {key: value for key, value in scores.items() if not isinstance(value, str)}
