"""The training loop: the one long function, because it is the story."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DDIMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm

from mimicbrush.data.batch import DecodedBatch
from mimicbrush.io.jsonl import StepLog
from mimicbrush.training.checkpoints import CheckpointSaver
from mimicbrush.training.export import ExportWeights
from mimicbrush.training.guards import AsyncScalars, BadSamples, StopRequests
from mimicbrush.training.metrics import TrainingMetrics, finite_only, finite_or_none, gradient_norms, tracker_ids
from mimicbrush.training.noise import NoiseSample
from mimicbrush.training.objective import FrozenEncoders, MimicBrushModel, denoising_loss
from mimicbrush.training.options import TrainOptions
from mimicbrush.training.state import TrainingState, gather_full_tensor
from mimicbrush.types import TrainBatch

#: (first step, last step) -> the micro-batches of these steps, for this rank.
Loader = Callable[[int, int], Iterable[TrainBatch | DecodedBatch]]


@dataclass(frozen=True)
class TrainingHooks:
    """What the loop asks for but does not know, handed in by assembly. Every process calls all of it.

    Weights are all of the trainee's, the trained ones averaged; every process must take all of them.

    Attributes:
        export_pipeline: writes a pipeline with these weights into a folder, on the main process.
        evaluate: figures of these weights on held-out pairs at a step; None: nothing is evaluated.
        evaluate_every: steps between two evaluations; 0 where there are none.
        measure: whose largest value marks the best weights, one of the figures: what the true reference is worth
            over none. The reference gain would also grow where a wrong reference only does more harm.
        best: the largest value before.
    """

    export_pipeline: Callable[[ExportWeights, Path], None]
    evaluate: Callable[[ExportWeights, int], dict[str, float]] | None = None
    evaluate_every: int = 0
    measure: str = "heldout/gain_over_no_reference_db"
    best: float = -math.inf

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether there is an evaluation after this step."""
        every = self.evaluate_every
        return every > 0 and step > 0 and (step == last_step or step % every == 0)


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        step: steps that the run has now.
        figures: the last that were logged, of losses and of an evaluation.
        seconds: spent in this call.
        signal: the signal that ended it, or 0.
    """

    step: int
    figures: dict[str, float | None]
    seconds: float
    signal: int = 0


def train(
    trainee: MimicBrushModel,
    encoders: FrozenEncoders,
    noise_scheduler: DDIMScheduler,
    loader: Loader,
    outside: TrainingHooks,
    options: TrainOptions,
    meters: TrainingMetrics,
    bad_samples: BadSamples,
    accelerator: Accelerator,
    run_dir: Path,
    identity: dict[str, Any],
    resume_from: Path | None = None,
) -> TrainingResult:
    """Train until `max_steps`, `max_minutes` or a signal, resume if asked to, and leave a pipeline folder.

    Args:
        trainee: the trained networks.
        encoders: the frozen networks, on the device.
        noise_scheduler: adds the noise; its `prediction_type` says what is predicted.
        loader: the data.
        outside: export and evaluation.
        options: see `TrainOptions`.
        meters: what is logged.
        bad_samples: what to do about pairs that cannot be read.
        accelerator: made with the passes of ``options.split_batch`` as its gradient accumulation.
        run_dir: gets ``checkpoints/``, ``metrics.jsonl``, ``pipeline/``, ``best/`` where there is an evaluation, and
            ``bad_samples.txt`` where there are any.
        identity: what a checkpoint must agree on to be resumed (seed, batch size, ...).
        resume_from: a checkpoint to go on from, verified.

    Raises:
        MimicBrushError: too many steps in a row had no finite gradients, too many pairs could not be read, or the
            last checkpoint could not be written.
    """
    started = time.monotonic()
    device, passes = accelerator.device, accelerator.gradient_accumulation_steps

    # 1. What learns, and its average.
    adam = torch.optim.Adam(
        trainee.trained_parameters().values(),
        lr=options.learning_rate,
        betas=(options.adam_betas[0], options.adam_betas[1]),
        weight_decay=options.adam_weight_decay,
        fused=True,  # one kernel for all tensors, which can also be told on the device to do nothing
    )
    schedule = get_scheduler(
        options.lr_scheduler, adam, num_warmup_steps=options.lr_warmup_steps, num_training_steps=options.max_steps
    )
    model, optimizer = accelerator.prepare(trainee, adam)
    trained = trainee.trained_parameters()  # after sharding these are others
    average = None
    if options.ema_decay > 0:
        average = EMAModel(trained.values(), decay=options.ema_decay, foreach=True)
    state = TrainingState(trained, adam, schedule, average)

    # 2. Where it stands.
    if resume_from is not None:
        state.restore(resume_from, accelerator)
        accelerator.step = state.step * passes  # micro-batches, of which accelerate counts
        accelerator.print(f"resumed from {resume_from}, which verifies (step {state.step} of {options.max_steps})")
    if accelerator.is_main_process:
        state.tracker = tracker_ids(accelerator)
    log = StepLog(run_dir / "metrics.jsonl", state.step) if accelerator.is_main_process else None
    saver = CheckpointSaver(run_dir / "checkpoints", options.keep_checkpoints, tqdm.write)
    stop = StopRequests(options.max_minutes)

    best = outside.best

    def evaluate() -> dict[str, float]:
        nonlocal best
        found = _evaluate(outside, state, trainee, accelerator, meters)
        if found[outside.measure] > best:
            best = found[outside.measure]
            say_if_refused(lambda: _export_best(outside, state, trainee, accelerator, run_dir, found))
        return found

    def say_if_refused(work: Callable[[], object]) -> None:
        """What is only to be looked at must not end a run on a full disk."""
        try:
            work()
        except (OSError, SafetensorError) as error:
            tqdm.write(f"after step {state.step} something could not be written ({error}); the run goes on")

    def save() -> None:
        if accelerator.is_main_process:
            saver.wait()  # or there would be two copies of everything
        tensors, rest = state.snapshot(accelerator)
        if accelerator.is_main_process:
            saver.save(state.step, tensors, {"identity": identity, **rest})
            if not options.save_in_background:
                saver.wait()

    # 3. Step by step.
    latent_side = trainee.unet.config.sample_size
    latent_shape = (encoders.vae.config.latent_channels, latent_side, latent_side)
    num_timesteps = noise_scheduler.config.num_train_timesteps
    verdict: AsyncScalars | None = None  # on the step before: was it skipped, did a signal come, is the time over
    ended_by, is_late = 0, bool(stop.ask(device)[1] > 0)

    def settle() -> None:
        """Do what a step leaves to be done once it is known whether it changed the weights."""
        nonlocal verdict, ended_by, is_late
        if verdict is not None:
            was_skipped, signal_number, late = verdict.read()
            verdict, ended_by, is_late = None, int(signal_number), bool(late)
            state.skipped.count(bool(was_skipped), state.step, saver.folder)
            if not was_skipped:
                schedule.step()
                if average is not None:
                    average.step(trained.values())

    saved_step = state.step if resume_from is not None else -1
    logged_step, figures, heldout = state.step, dict[str, float | None](), dict[str, float]()
    faults: list[str] = []
    batches = iter(loader(state.step, options.max_steps))
    progress = tqdm(
        total=options.max_steps, initial=state.step, unit="step", disable=not accelerator.is_local_main_process
    )
    with stop.listening(), progress:
        if resume_from is not None and outside.is_due(state.step, options.max_steps):
            heldout = evaluate()  # the checkpoint was written before it
        while state.step < options.max_steps and not ended_by and not is_late:
            # 3a. Loss and gradients.
            model.train()
            for _ in range(passes):
                with meters.waiting():
                    batch = next(batches)
                faults += batch.faults
                with accelerator.accumulate(model):
                    draws = NoiseSample.for_keys(
                        batch.key,
                        latent_shape,
                        num_timesteps=num_timesteps,
                        reference_drop=options.reference_drop,
                        reference_drop_ratio=options.reference_drop_ratio,
                        depth_drop_ratio=options.depth_drop_ratio,
                        noise_device=device if options.noise_on == "device" else None,
                    ).to(device)
                    on_device = batch.to(device)
                    conditions = encoders.encode(on_device, draws)
                    with accelerator.autocast():
                        loss = denoising_loss(
                            model,
                            noise_scheduler,
                            conditions,
                            draws,
                            options.min_snr_gamma,
                            on_device.matches,
                            options.correspondence_weight_at(state.step),
                        )
                    accelerator.backward(loss.total)
                    meters.add(loss)

            # 3b. The verdict on a step is read while a GPU computes the next, so that it never waits for us.
            settle()
            if ended_by or is_late:
                break  # what was computed since belongs to a step that is not made

            # 3c. The step, which a fused optimizer leaves out, on the device, where its gradients are no numbers.
            accelerator.unscale_gradients()
            norms = gradient_norms(trainee, trained)
            nn.utils.clip_grads_with_norm_(trained.values(), options.max_grad_norm, norms["gradient_norm"])
            is_bad = ~norms["gradient_norm"].isfinite()
            adam.__dict__.update(grad_scale=None, found_inf=is_bad.float())  # as torch.amp.GradScaler does it
            optimizer.step()
            optimizer.zero_grad()
            meters.end_step(~gather_full_tensor(is_bad))
            verdict = AsyncScalars(torch.cat([gather_full_tensor(is_bad).float().view(1), stop.ask(device)]))
            state.step += 1
            progress.update()
            if device.type != "cuda":
                settle()

            # 3d. What happens now and then.
            is_last = state.step == options.max_steps
            if state.step % options.log_every == 0 or is_last:
                settle()
                figures = meters.read(options.total_batch_size, accelerator.num_processes, _summing(accelerator))
                all_faults = gather_object(faults)
                figures |= {name: float(gather_full_tensor(norm)) for name, norm in norms.items()}
                figures |= {
                    "learning_rate": schedule.get_last_lr()[0],
                    "bad_samples": len(all_faults),
                    "skipped_steps": state.skipped.total,
                    "failed_checkpoints": saver.num_failed,
                }
                if log is not None:
                    say_if_refused(partial(log.append, {"step": state.step, **finite_or_none(figures)}))
                    say_if_refused(partial(bad_samples.write, all_faults))
                accelerator.log(finite_only(figures), step=state.step)
                progress.set_postfix(_in_short(figures))
                bad_samples.count(all_faults, (state.step - logged_step) * options.total_batch_size)
                faults.clear()
                logged_step = state.step
            is_due = outside.is_due(state.step, options.max_steps)
            if is_due or state.step % options.checkpoint_every == 0:
                settle()
                save()  # first: an evaluation takes long, and may fail
                saved_step = state.step
            if is_due:
                heldout = evaluate()

        # 4. Leave a checkpoint to go on from, and, where nobody waits for the machine, a pipeline to edit with.
        if saved_step != state.step:
            settle()
            save()
        saver.wait(must_succeed=True)
        accelerator.wait_for_everyone()
        if (unwritten := gather_object(faults)) and accelerator.is_main_process:
            bad_samples.write(unwritten)
        if not ended_by:
            outside.export_pipeline(state.weights(trainee), run_dir / "pipeline")
        accelerator.wait_for_everyone()
    return TrainingResult(state.step, {**figures, **heldout}, time.monotonic() - started, ended_by)


def _evaluate(
    outside: TrainingHooks,
    state: TrainingState,
    trainee: MimicBrushModel,
    accelerator: Accelerator,
    meters: TrainingMetrics,
) -> dict[str, float]:
    """Measure the averaged weights on held-out pairs."""
    assert outside.evaluate is not None
    start = time.monotonic()
    with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
        found = outside.evaluate(state.weights(trainee), state.step)
    accelerator.log(found, step=state.step)
    meters.leave_out(time.monotonic() - start)
    return found


def _export_best(
    outside: TrainingHooks,
    state: TrainingState,
    trainee: MimicBrushModel,
    accelerator: Accelerator,
    run_dir: Path,
    found: dict[str, float],
) -> None:
    outside.export_pipeline(state.weights(trainee), run_dir / "best")
    if accelerator.is_main_process:
        (run_dir / "best" / "heldout.json").write_text(json.dumps({"step": state.step, **found}, indent=1))


def _summing(accelerator: Accelerator) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda sums: accelerator.reduce(sums, "sum")


def _in_short(figures: dict[str, float | None]) -> dict[str, str]:
    """The figures that fit beside a progress bar."""
    short = {"loss": "loss", "loss_inside": "inside", "samples_per_s": "samples/s", "data_wait_ratio": "wait",
             "share_of_peak": "of peak", "skipped_steps": "skipped"}  # fmt: skip
    return {word: f"{figures[name]:.3g}" for name, word in short.items() if figures.get(name)}
