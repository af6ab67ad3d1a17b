"""The noise schedule of SD-1.5, for training and for DDIM sampling."""

from __future__ import annotations

from diffusers import DDIMScheduler


def noise_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """The schedule of the released inference code (ali-vilab/MimicBrush, run_inference_benchmark.py)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
