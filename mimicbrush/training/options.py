"""Options of a training run. This module imports nothing heavy: the command line reads it first."""

from __future__ import annotations

from dataclasses import dataclass

from mimicbrush.errors import InputError
from mimicbrush.ranges import BATCH_RANGE, GUIDANCE_RANGE, STEPS_RANGE, check_options, number, numbers, word

#: The networks of MimicBrush that can be trained; each is an option of `TrainOptions`.
TRAINED_PARTS = ("unet", "reference_unet", "image_projector", "depth_projector")

#: Options that only MimicBrush has, and those that only FLUX.2 klein has; the others are for both families.
MIMICBRUSH_ONLY = (
    *TRAINED_PARTS, "depth_drop_ratio", "prediction_type", "rescale_betas_zero_snr", "min_snr_gamma", "distill",
    "latent_channel_weights", "selective_checkpointing", "low_precision_norms", "fused_norms", "compile",
    "compile_parts", "default_num_inference_steps", "default_guidance_scale", "default_timestep_spacing",
)  # fmt: skip
KLEIN_ONLY = ("transformer", "hole_weight", "correspondence_layers")

#: Names for diffusers' `get_scheduler` that need no further options.
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@dataclass
class TrainOptions:
    """Options of a training run. Defaults are those of the paper (Sec. 4.1). Defaults marked *ours* are not published.

    Attributes:
        device: device to train on: "cuda", "cpu", or "auto" (a GPU if there is one).
        cpu_threads: threads of PyTorch on a CPU; 0: PyTorch chooses.
        mixed_precision: data type of the forward and backward passes: "no" (float32), "fp16" or "bf16" (*ours*).
        batch_size: largest number of samples of a process in one pass.
        total_batch_size: samples per optimizer step, over all processes and passes.
        max_steps: optimizer steps of the whole run (*ours*).
        max_minutes: stop and save after this time; None: no limit; 0: train no step.
        learning_rate: learning rate of Adam, after the warm-up.
        lr_scheduler: how the learning rate changes after the warm-up, as in diffusers' `get_scheduler` (*ours*).
        lr_warmup_steps: steps in which the learning rate rises from 0 (*ours*). "constant" has no warm-up.
        adam_betas: decay rates of the two moments of Adam (*ours*).
        adam_weight_decay: weight decay of Adam (*ours*).
        max_grad_norm: largest norm of all gradients together; larger gradients are scaled down (*ours*). 0: no
            clipping.
        ema_decay: decay rate of the average of the weights (EMA), which is exported (*ours*). 0: no average; the
            weights of the last step are exported.
        reference_drop: "random" drops references with `reference_drop_ratio` (paper); "first_quarter" drops those of
            the first quarter of every pass (released code), so the result depends on how the batch is split.
        reference_drop_ratio: probability that a sample is trained without its reference.
        depth_drop_ratio: probability that a sample is trained without its depth map.
        prediction_type: what the U-Net predicts: the noise ("epsilon", paper), or "v_prediction".
        rescale_betas_zero_snr: make the last timestep pure noise, which is where sampling starts (arXiv 2305.08891;
            named as in diffusers). Otherwise it still shows a trace of the image, which sampling does not have. It
            needs "v_prediction".
        min_snr_gamma: multiplies the loss of a sample by min(SNR, this) / SNR (arXiv 2303.09556, which uses 5);
            None: all samples have the same weight (paper).
        correspondence_weight: weight of the correspondence loss (*ours*, see `training.correspondence_loss`). It
            teaches the attention where the reference shows the same thing. 0: no such loss (paper).
        correspondence_final: `correspondence_weight` changes linearly to this value over `max_steps`; None: it does
            not change.
        correspondence_heads: share of the attention heads of each layer that the correspondence loss teaches.
        correspondence_layers: layers of FLUX.2 klein that the correspondence loss teaches: module paths, which may have
            wildcards, such as ``single_transformer_blocks.1?.attn``. An empty list: all. In the U-Nets, the loss
            teaches every layer that reads the reference.
        unrelated_reference_ratio: probability that a sample gets the references of another file (*ours*), so that the
            model learns to ignore references that do not match; 0 (paper): never.
        latent_channel_weights: relative weights of the latent channels in the loss (*ours*; paper: all the same). Give
            more weight to a channel that changes the pixels more.
        hole_weight: weight of a token in the hole, in the loss of FLUX.2 klein; tokens outside have weight 1.
        timestep_sampling: how timesteps are sampled: "uniform" (paper), or "logit_normal" (arXiv 2403.03206), which
            favours those around `timestep_logit_mean`.
        timestep_logit_mean: mean of "logit_normal". Above 0, it favours images with less noise; below 0, with more.
            Edits start with pure noise: with 0, timesteps near it are hardly trained.
        timestep_logit_std: standard deviation of "logit_normal". With a smaller value, timesteps are closer together.
        noise_on: where noise is sampled: "cpu" uses the generator of PyTorch; "device" samples the noise of a whole
            batch in one call on the device of the model. This gives other numbers, and is faster for small models with
            large batches.
        distill: "lcm" teaches the imitative U-Net of a pipeline to edit in few steps, without guidance (*ours*, see
            `training.methods.consistency_distillation`); "none" trains with the denoising loss.
        distill_guidance: lowest and highest guidance scale of the teacher; each sample gets a random one.
        distill_ddim_steps: sampler steps of the teacher. The student cannot use more steps.
        distill_huber_c: threshold of the Huber loss of the distillation: quadratic below, linear above.
        unet: how the imitative U-Net is trained: all weights ("trained", paper), no weights ("frozen"), or adapters
            on frozen weights ("lora").
        reference_unet: the same for the reference U-Net, if the model has one.
        image_projector: how the image projector is trained: all weights ("trained", paper) or no weights ("frozen").
        depth_projector: the same for the depth projector.
        transformer: how the transformer of FLUX.2 klein is trained: adapters on frozen weights ("lora"), or all
            weights ("trained").
        lora_rank: rank of the adapters. A higher rank can learn more, and needs more memory.
        lora_alpha: the output of the adapters is scaled by alpha / rank; None: alpha is equal to the rank.
        lora_dropout: dropout probability of the inputs of the adapters.
        lora_target_modules: names of the layers that get adapters, as in peft.
        log_every: number of steps between two lines of metrics.jsonl.
        checkpoint_every: number of steps between two checkpoints.
        keep_checkpoints: number of newest checkpoints to keep, at least 2.
        save_in_background: write checkpoints while training continues; this needs memory for a copy.
        resume: checkpoint to continue from: "never", "latest" (the newest intact checkpoint; if there is none, the run
            starts from the beginning), or a checkpoint folder.
        tracker: tracker to use in addition to metrics.jsonl: "none", "wandb", "tensorboard" or "trackio" (local,
            without an account).
        activation_checkpointing: compute activations again in the backward pass instead of keeping them, for batches
            that do not fit otherwise. Most of the forward pass is computed twice.
        selective_checkpointing: compute only norms and activation functions again. A sample then needs about half
            of the memory. Cannot be combined with `activation_checkpointing` or `compile`.
        low_precision_norms: keep the activations of norms in half precision. This saves a quarter of the memory of
            activations.
        fused_norms: compute GroupNorm and SiLU in one pass with our own kernels, on a CUDA GPU in half precision. The
            result is the same up to rounding. It needs Triton; if it has no effect, there is a warning.
        compile: compile both U-Nets with `torch.compile`. This takes minutes at the start.
        compile_parts: parts to compile: "unets" makes one graph of each U-Net, "blocks" one of each kind of block.
        attention_backend: attention backend of diffusers (`set_attention_backend`); None: PyTorch chooses (flash
            attention on GPUs that support it). FLUX.2 klein hides dropped references with an attention mask, which
            "flash" and "sage" do not support: use another backend, or set `reference_drop_ratio` to 0.
        default_num_inference_steps: default number of sampler steps of the exported pipeline.
        default_guidance_scale: default guidance scale of the exported pipeline (classifier-free guidance).
        default_timestep_spacing: spacing of the sampler's timesteps in the exported pipeline: "leading" (released), or
            "trailing", which is better with few steps.
    """

    device: str = word("auto", ("auto", "cuda", "cpu"))
    cpu_threads: int = number(0, at_least=0, at_most=4096)
    mixed_precision: str = word("no", ("no", "fp16", "bf16"))
    batch_size: int = number(8, BATCH_RANGE)
    total_batch_size: int = number(64, BATCH_RANGE)
    max_steps: int = number(100_000, at_least=1, at_most=10**9)
    max_minutes: float | None = number(None, at_least=0, at_most=10**7, whole=False, null="no limit")
    learning_rate: float = number(1e-5, at_least=0, at_most=1)
    lr_scheduler: str = word("constant_with_warmup", LR_SCHEDULERS)
    lr_warmup_steps: int = number(500, at_least=0, at_most=10**9)
    adam_betas: tuple[float, float] = numbers((0.9, 0.999), ascending=False, at_least=0, below=1)
    adam_weight_decay: float = number(0.0, at_least=0, at_most=1000)
    max_grad_norm: float = number(1.0, at_least=0, note="0: no clipping")
    ema_decay: float = number(0.9999, at_least=0, below=1, note="0: no average")
    reference_drop: str = word("random", ("random", "first_quarter"))
    reference_drop_ratio: float = number(0.10, at_least=0, at_most=1)
    depth_drop_ratio: float = number(0.50, at_least=0, at_most=1)
    prediction_type: str = word("epsilon", ("epsilon", "v_prediction"))
    rescale_betas_zero_snr: bool = False
    min_snr_gamma: float | None = number(None, above=0, whole=False, null="all samples have the same weight")
    correspondence_weight: float = number(0.0, at_least=0)
    correspondence_final: float | None = number(None, at_least=0, whole=False, null="the weight does not change")
    correspondence_heads: float = number(0.5, above=0, at_most=1)
    correspondence_layers: tuple[str, ...] = ()
    unrelated_reference_ratio: float = number(0.0, at_least=0, at_most=1)
    latent_channel_weights: tuple[float, float, float, float] = numbers(
        (1.0, 1.0, 1.0, 1.0), lengths=(4, 4), ascending=False, at_least=0.001, at_most=1000
    )
    hole_weight: float = number(1.0, above=0, at_most=1000)
    timestep_sampling: str = word("uniform", ("uniform", "logit_normal"))
    timestep_logit_mean: float = number(0.0, at_least=-10, at_most=10, whole=False)
    timestep_logit_std: float = number(1.0, above=0, at_most=10)
    noise_on: str = word("cpu", ("cpu", "device"))
    distill: str = word("none", ("none", "lcm"))
    distill_guidance: tuple[float, float] = numbers((5.0, 5.0), at_least=1, at_most=100)
    distill_ddim_steps: int = number(50, at_least=2, at_most=1000)
    distill_huber_c: float = number(0.001, above=0, at_most=1)
    unet: str = word("trained", ("trained", "frozen", "lora"))
    reference_unet: str = word("trained", ("trained", "frozen", "lora"))
    image_projector: str = word("trained", ("trained", "frozen"))
    depth_projector: str = word("trained", ("trained", "frozen"))
    transformer: str = word("lora", ("lora", "trained"))
    lora_rank: int = number(16, at_least=1, at_most=2**16)
    lora_alpha: int | None = number(None, at_least=1, at_most=2**16, whole=True, null="equal to lora_rank")
    lora_dropout: float = number(0.0, at_least=0, below=1)
    lora_target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    log_every: int = number(50, at_least=1)
    checkpoint_every: int = number(1000, at_least=1)
    keep_checkpoints: int = number(2, at_least=2)
    save_in_background: bool = True
    resume: str = "never"
    tracker: str = word("wandb", ("none", "wandb", "tensorboard", "trackio"))
    activation_checkpointing: bool = False
    selective_checkpointing: bool = False
    low_precision_norms: bool = False
    fused_norms: bool = False
    compile: bool = False
    compile_parts: str = word("unets", ("unets", "blocks"))
    attention_backend: str | None = None
    default_num_inference_steps: int = number(50, STEPS_RANGE)
    default_guidance_scale: float = number(5.0, GUIDANCE_RANGE)
    default_timestep_spacing: str = word("leading", ("leading", "trailing"))

    def __post_init__(self) -> None:
        check_options(self, "train.")
        if self.correspondence_final is not None and not self.correspondence_weight:
            raise InputError("train.correspondence_final needs a train.correspondence_weight above 0")
        for name, default in (("timestep_logit_mean", 0.0), ("timestep_logit_std", 1.0)):
            if self.timestep_sampling == "uniform" and getattr(self, name) != default:
                raise InputError(f"train.{name} needs train.timestep_sampling=logit_normal")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise InputError(
                "train.rescale_betas_zero_snr=true needs train.prediction_type=v_prediction: in pure noise, the noise "
                "says nothing about the image"
            )
        if self.rescale_betas_zero_snr and self.min_snr_gamma is not None:
            raise InputError(
                "train.rescale_betas_zero_snr=true needs train.min_snr_gamma=null: it would give pure noise no weight"
            )
        if self.distill != "none":
            self._check_distillation()
        for other in ("activation_checkpointing", "compile"):
            if self.selective_checkpointing and getattr(self, other):
                raise InputError(
                    f"train.selective_checkpointing=true and train.{other}=true cannot be combined: both choose "
                    "what is kept for the backward pass. Set one of them to false"
                )
        if self.never_warms_up() and not self.lr_scheduler.startswith("constant"):
            raise InputError(
                f"train.lr_warmup_steps={self.lr_warmup_steps} leaves no steps of train.max_steps={self.max_steps} for "
                f"train.lr_scheduler={self.lr_scheduler}; it must be below train.max_steps"
            )

    def _check_distillation(self) -> None:
        """Check the options that distillation needs: its own loss, and only the imitative U-Net is trained."""
        needed = {
            "reference_unet": "frozen",
            "image_projector": "frozen",
            "depth_projector": "frozen",
            "correspondence_weight": 0,
            "min_snr_gamma": None,
            "compile": False,
            "timestep_sampling": "uniform",
        }
        changes = [
            f"train.{name}={'null' if value is None else str(value).lower()}"
            for name, value in needed.items()
            if getattr(self, name) != value
        ]
        if len(set(self.latent_channel_weights)) > 1:
            changes.append("train.latent_channel_weights=[1,1,1,1]")
        if self.default_guidance_scale > 1:
            changes.append("train.default_guidance_scale=1")  # it is learnt
        if self.default_num_inference_steps > self.distill_ddim_steps:
            changes.append(f"train.default_num_inference_steps={self.distill_ddim_steps} or less")
        if changes:
            raise InputError(f"train.distill={self.distill} needs {', '.join(changes)} (see +experiment=distill)")

    def never_warms_up(self) -> bool:
        """Return whether the run ends before the learning rate has reached `learning_rate`."""
        return self.lr_scheduler != "constant" and self.lr_warmup_steps >= self.max_steps

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
                f"train.total_batch_size={self.total_batch_size} cannot be divided evenly among {world_size} "
                f"processes; use for example train.total_batch_size={world_size * max(1, share)}"
            )
        per_pass = max(size for size in range(1, min(self.batch_size, share) + 1) if share % size == 0)
        return per_pass, share // per_pass
