"""The training loop: the one long function, because it is the story."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from diffusers import DDIMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from mimicbrush.data.batch import UndrawnBatch
from mimicbrush.errors import MimicBrushError
from mimicbrush.ops.files import replace_folder
from mimicbrush.training import checkpoints
from mimicbrush.training.bad_samples import BadSamples
from mimicbrush.training.draws import Draws
from mimicbrush.training.method import FrozenEncoders, Trainee, denoising_loss
from mimicbrush.training.metrics_log import MetricsLog
from mimicbrush.training.options import TrainOptions
from mimicbrush.types import TrainBatch

#: (first step, last step) -> the micro-batches of these steps, for this rank.
Loader = Callable[[int, int], Iterable[TrainBatch | UndrawnBatch]]
#: Called at the end, on the main process, with a folder to write the pipeline into.
ExportPipeline = Callable[[Path], None]


def train(
    trainee: Trainee,
    encoders: FrozenEncoders,
    noise_scheduler: DDIMScheduler,
    loader: Loader,
    export_pipeline: ExportPipeline,
    options: TrainOptions,
    max_bad_ratio: float,
    accelerator: Accelerator,
    run_dir: Path,
    identity: dict[str, Any],
    resume_from: Path | None = None,
) -> int:
    """Train until `max_steps` (or `max_minutes`), resume if asked to, and leave a pipeline folder.

    Args:
        trainee: the trained networks; after the call they hold the averaged (EMA) weights.
        encoders: the frozen networks.
        noise_scheduler: adds the noise; its `prediction_type` says what is predicted.
        loader: the data.
        export_pipeline: writes `run_dir`/pipeline.
        options: see `TrainOptions`.
        max_bad_ratio: see `BadSamples`.
        accelerator: made with the passes of ``options.split_batch`` as its gradient accumulation.
        run_dir: gets ``checkpoints/``, ``metrics.jsonl``, ``pipeline/``, and ``bad_samples.txt`` where there are any.
        identity: what a checkpoint must agree on to be resumed (seed, batch size, ...).
        resume_from: a checkpoint to go on from.

    Returns:
        The number of steps that the run has now.
    """
    # 1. What learns, and its average.
    optimizer = torch.optim.Adam(
        trainee.parameters(),
        lr=options.learning_rate,
        betas=(options.adam_betas[0], options.adam_betas[1]),
        weight_decay=options.adam_weight_decay,
        fused=accelerator.device.type == "cuda",
    )
    schedule = get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=options.max_steps,
    )
    ema = EMAModel(trainee.parameters(), decay=options.ema_decay)
    model, optimizer = accelerator.prepare(trainee, optimizer)
    encoders = encoders.to(accelerator.device, _half_precision(options.mixed_precision))
    accelerator.register_for_checkpointing(ema, schedule)
    ema.to(accelerator.device)
    micro_batches = accelerator.gradient_accumulation_steps

    # 2. Where it stands.
    folder = run_dir / "checkpoints"
    step = 0
    if resume_from is not None:
        step = checkpoints.read_state(resume_from, identity)
        accelerator.load_state(str(resume_from))
        # accelerate restores what it saved: custom objects on the CPU, and a count of micro-batches that is
        # wrong where the number of processes has changed.
        ema.to(accelerator.device)
        accelerator.step = step * micro_batches
        accelerator.print(f"resumed from {resume_from} (step {step} of {options.max_steps})")
    log = MetricsLog(run_dir / "metrics.jsonl", step) if accelerator.is_main_process else None
    bad_samples = BadSamples(max_bad_ratio, run_dir / "bad_samples.txt")

    # 3. Step by step.
    latent_side = trainee.unet.config.sample_size
    latent_shape = (encoders.vae.config.latent_channels, latent_side, latent_side)
    started = logged_at = time.monotonic()
    logged_step, saved_step = step, step if resume_from is not None else -1
    faults: list[str] = []  # of this process, since the last log
    sums = torch.zeros(5, device=accelerator.device)  # since the last log: loss, and `Loss.parts`
    batches = iter(loader(step, options.max_steps))
    progress = tqdm(total=options.max_steps, initial=step, unit="step", disable=not accelerator.is_local_main_process)
    while step < options.max_steps and not _out_of_time(options, started, accelerator):
        model.train()
        for _ in range(micro_batches):
            batch = next(batches)
            faults += batch.faults
            with accelerator.accumulate(model):
                draws = Draws.for_keys(
                    batch.key,
                    latent_shape,
                    num_timesteps=noise_scheduler.config.num_train_timesteps,
                    reference_drop=options.reference_drop,
                    reference_drop_ratio=options.reference_drop_ratio,
                    depth_drop_ratio=options.depth_drop_ratio,
                ).to(accelerator.device)
                conditions = encoders.encode(batch.to(accelerator.device), draws)
                with accelerator.autocast():
                    loss = denoising_loss(model, noise_scheduler, conditions, draws)
                accelerator.backward(loss.total)
                if accelerator.sync_gradients:
                    gradient_norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            sums += torch.cat([loss.total.detach()[None] / micro_batches, loss.parts])
        if not accelerator.optimizer_step_was_skipped:  # fp16 skips the steps whose gradients overflow
            schedule.step()
            ema.step(trainee.parameters())
        step += 1
        progress.update()

        is_last = step == options.max_steps
        if step % options.log_every == 0 or step % options.checkpoint_every == 0 or is_last:
            _stop_unless_finite(sums, step, folder)
        if step % options.log_every == 0 or is_last:
            means = accelerator.reduce(sums, "mean")
            total = float(means[0]) / (step - logged_step)
            inside, outside = (means[1::2] / means[2::2]).tolist()
            all_faults = gather_object(faults)
            now = time.monotonic()
            values = {
                "step": step,
                "loss": total,
                "loss_inside": inside,
                "loss_outside": outside,
                "gradient_norm": float(gradient_norm),
                "learning_rate": schedule.get_last_lr()[0],
                "samples_per_s": (step - logged_step) * options.total_batch_size / (now - logged_at),
                "bad_samples": len(all_faults),
            }
            values = {name: value if math.isfinite(value) else None for name, value in values.items()}
            if log is not None:
                log.append(values)
                bad_samples.write(all_faults)
            accelerator.log({k: v for k, v in values.items() if k != "step" and v is not None}, step=step)
            progress.set_postfix(loss=f"{total:.4f}", inside=f"{inside:.4f}")
            bad_samples.count(all_faults, (step - logged_step) * options.total_batch_size)
            faults.clear()
            sums.zero_()
            logged_at, logged_step = now, step
        if step % options.checkpoint_every == 0:
            _save(accelerator, folder, step, identity, options.keep_checkpoints)
            saved_step = step
    progress.close()

    # 4. Leave a checkpoint to go on from, and a pipeline to edit with.
    if saved_step != step:
        _stop_unless_finite(sums, step, folder)
        _save(accelerator, folder, step, identity, options.keep_checkpoints)
    if options.ema_decay > 0:
        ema.copy_to(trainee.parameters())
    if accelerator.is_main_process:
        replace_folder(run_dir / "pipeline", export_pipeline)
    accelerator.wait_for_everyone()
    return step


def _half_precision(mixed_precision: str) -> torch.dtype:
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]


def _out_of_time(options: TrainOptions, started: float, accelerator: Accelerator) -> bool:
    """Whether `max_minutes` are over, by the main process's clock: all processes must agree."""
    if options.max_minutes is None:
        return False
    elapsed = torch.tensor(time.monotonic() - started, device=accelerator.device)
    return float(broadcast(elapsed)) > 60 * options.max_minutes


def _stop_unless_finite(sums: torch.Tensor, step: int, folder: Path) -> None:
    """Never let weights that are no numbers push good checkpoints out."""
    if not bool(torch.isfinite(sums).all()):
        raise MimicBrushError(
            f"the loss is no number any more at step {step}. The checkpoints in {folder} are from before. Start anew "
            "in another run_dir with a lower train.learning_rate, or with train.mixed_precision=bf16 instead of fp16."
        )


def _save(accelerator: Accelerator, folder: Path, step: int, identity: dict[str, Any], keep: int) -> None:
    aside = checkpoints.checkpoint_path(folder, step).with_suffix(".tmp")
    if accelerator.is_main_process:
        checkpoints.begin(folder, step)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        checkpoints.finish(aside, {"step": step, **identity}, keep)
    accelerator.wait_for_everyone()
