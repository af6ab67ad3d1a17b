"""The noise schedule of SD-1.5, for training, for DDIM sampling, and for few steps of a distilled model."""

from __future__ import annotations

from diffusers import DDIMScheduler, LCMScheduler


def noise_scheduler(
    prediction_type: str = "epsilon", timestep_spacing: str = "leading", rescale_betas_zero_snr: bool = False
) -> DDIMScheduler:
    """Make the schedule of the released inference code (ali-vilab/MimicBrush, run_inference_benchmark.py).

    Args:
        prediction_type: "epsilon" or "v_prediction".
        timestep_spacing: spacing of the timesteps in sampling: "leading" (released), which with few steps begins at
            a timestep with less noise, although its input is pure noise; or "trailing", which begins at the last
            timestep (arXiv 2305.08891, Sec. 3.3).
        rescale_betas_zero_snr: make the last timestep pure noise (arXiv 2305.08891, Sec. 3.1).
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
        rescale_betas_zero_snr=rescale_betas_zero_snr,
    )


def few_step_scheduler(
    prediction_type: str = "epsilon", original_steps: int = 50, rescale_betas_zero_snr: bool = False
) -> LCMScheduler:
    """Make the scheduler of a model from consistency distillation, over the same noise schedule.

    Args:
        prediction_type: "epsilon" or "v_prediction".
        original_steps: number of steps of the teacher's sampler; the few steps are chosen among these.
        rescale_betas_zero_snr: see `noise_scheduler`.
    """
    return LCMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        original_inference_steps=original_steps,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=rescale_betas_zero_snr,
    )
