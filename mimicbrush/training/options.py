"""Options of a training run. No heavy import here: the command line reads this before anything else."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mimicbrush.errors import InputError

#: The networks that can be trained, options of `TrainOptions`.
TRAINED_PARTS = ("unet", "reference_unet", "image_projector", "depth_projector")

#: Of diffusers' `get_scheduler`, those that need no further options.
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@dataclass
class TrainOptions:
    """Options of a training run. Defaults are the paper's (Sec. 4.1); those marked *ours* are published nowhere.

    Attributes:
        device: "cuda", "cpu", or "auto" for whatever is there.
        cpu_threads: threads of PyTorch on a CPU; 0 leaves it to PyTorch.
        mixed_precision: "no", "fp16" or "bf16" (*ours*).
        batch_size: the most samples that a process takes in one pass.
        total_batch_size: samples per step, over all processes and micro-batches.
        max_steps: optimizer steps of the whole run (*ours*).
        max_minutes: stop (and save) after this time; None for no limit.
        learning_rate: of Adam.
        lr_scheduler, lr_warmup_steps: as in diffusers' `get_scheduler` (*ours*).
        adam_betas, adam_weight_decay, max_grad_norm: of the optimizer (*ours*).
        ema_decay: of the weights that are exported (*ours*); 0 exports the raw weights.
        reference_drop: "random" drops references with `reference_drop_ratio` (paper); "first_quarter" drops those of
            the first quarter of every pass (released code), so it depends on how the batch is split.
        reference_drop_ratio: probability that a sample is trained without its reference.
        depth_drop_ratio: probability that a sample is trained without its depth map.
        prediction_type: "epsilon" or "v_prediction".
        min_snr_gamma: weighs the loss of a sample by min(SNR, this) / SNR, over the noise (arXiv 2303.09556; 5 there);
            None weighs all alike (paper).
        correspondence_weight: of the correspondence loss (*ours*, see `training.correspondence_loss`): the reference
            attention of every reading layer learns to look where the reference shows the same; 0 (paper) leaves that
            to the denoising loss.
        correspondence_final: the value that this weight reaches in a straight line over `max_steps`; None keeps it.
        correspondence_heads: part of the attention heads of each layer that learn from it; the others stay free.
        unrelated_reference_ratio: probability that a sample gets the reference of another source file (*ours*), to
            learn to leave out what does not match; 0 (paper) never.
        noise_on: "cpu" samples noise with PyTorch's generator; "device" samples that of a whole batch in one call where
            the model is: other numbers, and faster for small models with large batches.
        unet, reference_unet: "trained" (paper), "frozen", or "lora" for low-rank adapters beside frozen weights.
        image_projector, depth_projector: "trained" (paper) or "frozen".
        lora_rank, lora_alpha, lora_dropout, lora_target_modules: of the adapters, as in peft; no alpha is the rank.
        log_every, checkpoint_every: in steps.
        keep_checkpoints: how many to keep, at least 2.
        save_in_background: write checkpoints while the training goes on; it takes a copy of them in memory.
        resume: "never", "latest" (the newest that verifies; starts afresh where there is none), or a checkpoint
            folder.
        tracker: "none", "wandb" or "tensorboard", beside metrics.jsonl.
        activation_checkpointing: compute activations again in the backward pass instead of keeping them: where a batch
            would not fit otherwise. A step takes about a third longer.
        low_precision_norms: keep the norms' activations in half precision; saves a quarter of the memory of
            activations.
        compile: compile both U-Nets with `torch.compile`, one graph each; minutes at the start.
        attention_backend: of diffusers' (`set_attention_backend`); None is PyTorch's choice, flash attention on GPUs
            that have it.
        default_num_inference_steps, default_guidance_scale: what the exported pipeline edits with by default.
        default_timestep_spacing: of its sampler: "leading" (released), or "trailing", better where steps are few.
    """

    device: str = "auto"
    cpu_threads: int = 0
    mixed_precision: str = "no"
    batch_size: int = 8
    total_batch_size: int = 64
    max_steps: int = 100_000
    max_minutes: float | None = None
    learning_rate: float = 1e-5
    lr_scheduler: str = "constant_with_warmup"
    lr_warmup_steps: int = 500
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    reference_drop: str = "random"
    reference_drop_ratio: float = 0.10
    depth_drop_ratio: float = 0.50
    prediction_type: str = "epsilon"
    min_snr_gamma: float | None = None
    correspondence_weight: float = 0.0
    correspondence_final: float | None = None
    correspondence_heads: float = 0.5
    unrelated_reference_ratio: float = 0.0
    noise_on: str = "cpu"
    unet: str = "trained"
    reference_unet: str = "trained"
    image_projector: str = "trained"
    depth_projector: str = "trained"
    lora_rank: int = 16
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    lora_target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    save_in_background: bool = True
    resume: str = "never"
    tracker: str = "wandb"
    activation_checkpointing: bool = False
    low_precision_norms: bool = False
    compile: bool = False
    attention_backend: str | None = None
    default_num_inference_steps: int = 50
    default_guidance_scale: float = 5.0
    default_timestep_spacing: str = "leading"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("device", ("auto", "cuda", "cpu")),
            ("mixed_precision", ("no", "fp16", "bf16")),
            ("reference_drop", ("random", "first_quarter")),
            ("default_timestep_spacing", ("leading", "trailing")),
            ("noise_on", ("cpu", "device")),
            ("prediction_type", ("epsilon", "v_prediction")),
            ("lr_scheduler", LR_SCHEDULERS),
            ("unet", ("trained", "frozen", "lora")),
            ("reference_unet", ("trained", "frozen", "lora")),
            ("image_projector", ("trained", "frozen")),
            ("depth_projector", ("trained", "frozen")),
            ("tracker", ("none", "wandb", "tensorboard")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"train.{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("batch_size", "total_batch_size", "max_steps", "log_every", "checkpoint_every", "lora_rank"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("reference_drop_ratio", "depth_drop_ratio", "ema_decay", "unrelated_reference_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"train.{name} must be in 0..1, got {getattr(self, name)}")
        for name in ("correspondence_weight", "correspondence_final"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"train.{name} must be 0 or more, and finite; got {value}")
        if self.correspondence_final is not None and not self.correspondence_weight:
            raise InputError("train.correspondence_final needs train.correspondence_weight above 0")
        if not 0 < self.correspondence_heads <= 1:
            raise InputError(
                f"train.correspondence_heads must be above 0 and at most 1, got {self.correspondence_heads}"
            )
        if self.max_minutes is not None and not self.max_minutes >= 0:
            raise InputError(f"train.max_minutes must be 0 or more, or null; got {self.max_minutes}")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"train.lora_dropout must be in 0..1, got {self.lora_dropout}")
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0:
            raise InputError(f"train.min_snr_gamma must be above 0, or null; got {self.min_snr_gamma}")
        if self.keep_checkpoints < 2:
            raise InputError(f"train.keep_checkpoints must be 2 or more, got {self.keep_checkpoints}")

    def correspondence_weight_at(self, step: int) -> float:
        """Compute the weight of the correspondence loss in the step that begins after `step` steps."""
        if self.correspondence_final is None:
            return self.correspondence_weight
        done = min(step / self.max_steps, 1.0)
        return (1 - done) * self.correspondence_weight + done * self.correspondence_final

    def split_batch(self, world_size: int) -> tuple[int, int]:
        """Split `total_batch_size` over processes: (samples per process and pass, passes per step).

        Raises:
            InputError: the processes cannot share the batch evenly.
        """
        share, rest = divmod(self.total_batch_size, world_size)
        if rest or not share:
            raise InputError(
                f"train.total_batch_size={self.total_batch_size} cannot be shared evenly by {world_size} processes; "
                f"use for instance train.total_batch_size={world_size * max(1, share)}"
            )
        per_pass = max(size for size in range(1, min(self.batch_size, share) + 1) if share % size == 0)
        return per_pass, share // per_pass
