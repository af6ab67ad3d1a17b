"""Numbers that the paper prints (arXiv 2406.07547), for tables beside ours. Imports nothing heavy.

They are of the paper's benchmark, full training and real weights; what we measure otherwise compares only in order.
"""

from __future__ import annotations

from typing import NamedTuple


class PaperValues(NamedTuple):
    """A row of one task: the first three values are of its inner-ID pairs, the others of its inter-ID pairs.

    Attributes:
        ssim: 0..1, higher is better.
        psnr: dB, higher is better.
        lpips: lower is better.
        dino_i, clip_i, clip_t: cosine similarity times 100, higher is better.
    """

    ssim: float
    psnr: float
    lpips: float
    dino_i: float
    clip_i: float
    clip_t: float


#: How tables head these columns.
PAPER_COLUMNS = ("SSIM", "PSNR", "LPIPS", "DINO-I", "CLIP-I", "CLIP-T")


class Ablation(NamedTuple):
    """A row of Table 3 (part composition) and Table 4 (texture transfer)."""

    name: str
    part_composition: PaperValues
    texture_transfer: PaperValues


#: Table 1, part composition: method -> values. Of those it compares with, the row that is told where to paint.
TABLE_1 = {
    "Paint-by-Example, with box": PaperValues(0.51, 16.09, 0.48, 42.70, 81.10, 29.30),
    "AnyDoor, with mask": PaperValues(0.44, 14.09, 0.50, 61.30, 86.08, 29.39),
    "Paint-by-Example": PaperValues(0.51, 15.17, 0.49, 41.44, 81.00, 29.45),
    "AnyDoor": PaperValues(0.42, 12.73, 0.56, 43.41, 78.56, 28.45),
    "MimicBrush": PaperValues(0.70, 17.54, 0.28, 56.48, 84.30, 30.08),
}

#: Tables 3 and 4: file in ``configs/ablation/`` -> row. The CLIP-T of "full" in Table 4, 30.75 here, is what its own
#: table prints as 31.75.
ABLATIONS = {
    "reference_clip": Ablation(
        "reference encoder: CLIP",
        PaperValues(0.66, 16.78, 0.31, 45.03, 82.30, 30.05),
        PaperValues(0.75, 16.78, 0.31, 37.86, 78.30, 31.39),
    ),
    "reference_dinov2": Ablation(
        "reference encoder: DINOv2",
        PaperValues(0.67, 16.50, 0.32, 48.34, 82.40, 29.84),
        PaperValues(0.74, 17.27, 0.27, 46.34, 78.00, 30.61),
    ),
    "image_data_only": Ablation(
        "image data only",
        PaperValues(0.67, 14.95, 0.33, 39.68, 79.90, 29.12),
        PaperValues(0.70, 15.10, 0.31, 41.30, 77.80, 30.72),
    ),
    "weak_augmentation": Ablation(
        "weak augmentation",
        PaperValues(0.68, 16.98, 0.30, 50.55, 83.20, 29.81),
        PaperValues(0.74, 18.13, 0.26, 50.92, 80.00, 31.23),
    ),
    "single_box": Ablation(
        "mask: single box 0.5",
        PaperValues(0.66, 15.97, 0.32, 47.41, 82.10, 28.97),
        PaperValues(0.72, 16.24, 0.31, 48.52, 78.10, 29.30),
    ),
    "grid_025": Ablation(
        "mask: grid 0.25",
        PaperValues(0.68, 17.10, 0.30, 49.17, 82.94, 29.80),
        PaperValues(0.74, 17.35, 0.27, 50.09, 79.50, 31.05),
    ),
    "grid_050": Ablation(
        "mask: grid 0.50",
        PaperValues(0.68, 16.97, 0.30, 50.09, 82.56, 29.84),
        PaperValues(0.73, 17.25, 0.27, 48.58, 81.00, 30.35),
    ),
    "grid_075": Ablation(
        "mask: grid 0.75",
        PaperValues(0.67, 16.61, 0.30, 49.94, 83.00, 29.75),
        PaperValues(0.73, 16.69, 0.28, 52.46, 81.75, 30.02),
    ),
    "full": Ablation(
        "full (U-Net reference, SIFT grid)",
        PaperValues(0.70, 17.54, 0.28, 56.48, 84.30, 30.08),
        PaperValues(0.75, 17.73, 0.26, 49.83, 79.44, 30.75),
    ),
}
