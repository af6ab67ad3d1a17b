"""The training loop. Read `Trainer.train` first: the methods below it are its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm

from mimicbrush.data.batch import LoadedBatch
from mimicbrush.errors import CheckpointError, DataError, MimicBrushError, UnsavedError
from mimicbrush.io.jsonl import StepLog
from mimicbrush.io.text import describe_error
from mimicbrush.training.checkpoints import CheckpointSaver
from mimicbrush.training.guards import (
    BadSamples,
    StopRequests,
    await_next,
    explain_error,
    run_together,
)
from mimicbrush.training.method import TrainingMethod
from mimicbrush.training.metrics import (
    Evaluations,
    TrainingHooks,
    TrainingMetrics,
    compute_gradient_norms,
    finite_only,
    finite_or_none,
    read_tracker_ids,
    use_trackers,
    write_or_warn,
)
from mimicbrush.training.options import TrainOptions
from mimicbrush.training.state import PendingStep, TrainingState, gather_full_tensor

#: (first step, last step) -> the micro-batches of these steps, for this rank; None while the next one is not ready.
Loader = Callable[[int, int], Iterable[LoadedBatch | None]]


@dataclass(frozen=True)
class TrainingResult:
    """Result of a run, or of a part of it.

    Attributes:
        step: optimizer steps done so far.
        figures: the last logged ones, of losses and of an evaluation.
        seconds: spent in this call.
        signal: the signal that ended it, or 0.
        failed_evaluations: how many evaluations ended in an error.
    """

    step: int
    figures: dict[str, float | None]
    seconds: float
    signal: int = 0
    failed_evaluations: int = 0


class Trainer:
    """Trains a model by a `TrainingMethod`, on one or many devices.

    Args:
        method: the model, its loss and its export.
        loader: the data.
        options: of the run.
        accelerator: created with the gradient accumulation steps of ``options.split_batch``.
        metrics: what is logged.
        bad_samples: what to do about pairs that cannot be read.
        hooks: when and how to evaluate.
        run_dir: gets ``checkpoints/``, ``metrics.jsonl``, ``pipeline/``, ``best/`` where there is an evaluation, and
            ``bad_samples.txt`` where there are any.
        identity: what a checkpoint must agree on to be resumed (seed, batch size, ...).
        resume_from: a checkpoint to go on from, verified.
    """

    def __init__(
        self,
        method: TrainingMethod[Any],
        loader: Loader,
        options: TrainOptions,
        accelerator: Accelerator,
        metrics: TrainingMetrics,
        bad_samples: BadSamples,
        hooks: TrainingHooks,
        run_dir: Path,
        identity: dict[str, Any],
        resume_from: Path | None = None,
    ) -> None:
        self.method, self.loader, self.options, self.accelerator = method, loader, options, accelerator
        self.metrics, self.bad_samples, self.hooks = metrics, bad_samples, hooks
        self.run_dir, self.identity, self.resume_from = run_dir, identity, resume_from

        self.adam = torch.optim.Adam(
            method.trained_parameters().values(),
            lr=options.learning_rate,
            betas=(options.adam_betas[0], options.adam_betas[1]),
            weight_decay=options.adam_weight_decay,
            fused=True,  # one kernel for all tensors, which can leave out a step on the device itself
        )
        lr_scheduler = get_scheduler(
            options.lr_scheduler,
            self.adam,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.max_steps,
        )
        #: The wrapped model and optimizer; `method.model` is the model itself.
        self.model, self.optimizer = accelerator.prepare(method.model, self.adam)
        parameters = method.trained_parameters()  # sharding has replaced them
        ema = None
        if options.ema_decay > 0:
            ema = EMAModel(parameters.values(), decay=options.ema_decay, foreach=True)
        self.state = TrainingState(parameters, self.adam, lr_scheduler, ema)
        self.saver = CheckpointSaver(run_dir / "checkpoints", options.keep_checkpoints, tqdm.write)
        self.pending = PendingStep(self.state, self.saver.folder)
        #: False while a step is being applied: the state must not be saved then.
        self.is_state_consistent = True
        self.norms: dict[str, torch.Tensor] = {}  # of the latest gradients
        self.step_log: StepLog | None = None  # on the main process, created in `_resume`: the first step is known there

        #: Messages about pairs that could not be read since the last log, of this process.
        self.faults: list[str] = []
        self.figures: dict[str, float | None] = {}
        self.evaluations = Evaluations(hooks, method, self.state, accelerator, metrics, run_dir)
        self.logged_step, self.saved_step = 0, -1
        self.num_trackers = len(accelerator.trackers)
        #: The error that ends the run early. All processes have it, and save first.
        self.failure: Exception | None = None

    def train(self) -> TrainingResult:
        """Train until `max_steps`, `max_minutes` or a signal; write a checkpoint and, unless a signal came, a pipeline.

        An error that leaves the state whole, such as a worker that was killed, is raised after a checkpoint.

        Raises:
            LoaderError: a process that reads the data was killed, or does not answer.
            UnsavedError: the last checkpoint or the pipeline could not be written.
            MimicBrushError: too many steps in a row had no finite gradients, too many pairs could not be read, or the
                memory of the device is full.
        """
        started = time.monotonic()
        options, device, state = self.options, self.accelerator.device, self.state
        self._resume()
        self.stop = StopRequests(options.max_minutes)
        batches = iter(self.loader(state.step, options.max_steps))
        progress = tqdm(
            total=options.max_steps,
            initial=state.step,
            unit="step",
            disable=not self.accelerator.is_local_main_process,
        )
        with self.stop.catch_signals(), progress:
            try:
                if self.resume_from is not None and self.hooks.is_due(state.step, options.max_steps):
                    self.evaluations.run(self.stop)  # the checkpoint was written before the evaluation

                while state.step < options.max_steps and self.failure is None:
                    # Forward and backward. The step before this one is finished meanwhile: its numbers have arrived
                    # while a GPU computed.
                    if not self._compute_gradients(batches):
                        break
                    self._finish_step()

                    # Clip, and step. The learning rate and the average (EMA) follow when the step is finished.
                    self.norms = self._clip_gradients()
                    self._begin_step()
                    progress.update()

                    # Log, save, evaluate: all of it reads the state, so the step must be finished. The next loss may
                    # read the averaged weights. On a CPU nothing runs beside the loop, and deferring gains nothing.
                    is_log_due = state.step % options.log_every == 0 or state.step == options.max_steps
                    is_evaluation_due = self.hooks.is_due(state.step, options.max_steps)
                    is_checkpoint_due = is_evaluation_due or state.step % options.checkpoint_every == 0
                    if is_log_due or is_checkpoint_due or self.method.reads_ema or device.type != "cuda":
                        self._finish_step()
                    if is_log_due:
                        self._log(progress)
                    if is_checkpoint_due:
                        self._save()  # before the evaluation, which takes long and may fail
                    if is_evaluation_due:
                        self.evaluations.run(self.stop)
            except Exception as error:  # noqa: BLE001 - raised at once, or after a checkpoint
                self._keep_failure(error)
            finally:
                if isinstance(batches, Generator):
                    batches.close()  # ends the loader's processes
            self._end(progress)
        return TrainingResult(
            state.step,
            {**self.figures, **self.evaluations.figures},
            time.monotonic() - started,
            self.stop.signal,
            self.evaluations.num_failed,
        )

    def _resume(self) -> None:
        """Go back to the checkpoint, if there is one, and cut the log to its step."""
        state, accelerator = self.state, self.accelerator
        if self.resume_from is not None:
            state.restore(self.resume_from, accelerator)
            accelerator.step = state.step * accelerator.gradient_accumulation_steps  # accelerate counts micro-batches
            accelerator.print(
                f"resumed from {self.resume_from}, which was verified (step {state.step} of {self.options.max_steps})"
            )
            self.saved_step = state.step
        self.logged_step = state.step
        if accelerator.is_main_process:
            state.tracker = read_tracker_ids(accelerator)
            self.step_log = StepLog(self.run_dir / "metrics.jsonl", state.step)

    def _compute_gradients(self, batches: Iterator[LoadedBatch | None]) -> bool:
        """Forward and backward, in as many passes as the batch needs; False if the run is to stop instead."""
        accelerator, model = self.accelerator, self.model
        model.train()
        for _ in range(accelerator.gradient_accumulation_steps):
            batch = self._next_batch(batches)
            if batch is None:
                return False  # the gradients since the last step belong to a step that is not made
            self.faults += batch.faults
            with accelerator.accumulate(model):
                inputs = self.method.encode(batch, accelerator.device)
                with accelerator.autocast():
                    loss = self.method.loss(model, inputs, self.state.step, self.state.ema_weights())
                accelerator.backward(loss.total)
                self.metrics.add(loss)
        return True

    def _next_batch(self, batches: Iterator[LoadedBatch | None]) -> LoadedBatch | None:
        """Wait for the next batch; None if all processes agree to stop: by a signal, the time or an error."""
        with self.metrics.measure_waiting():
            batch, self.failure = await_next(batches, self.stop)
        return None if self.failure is not None or self.stop.is_agreed else batch

    def _begin_step(self) -> None:
        self.is_state_consistent = False
        self.pending.begin(self._step(self.norms["gradient_norm"]))
        self.state.step += 1
        self.is_state_consistent = True

    def _finish_step(self) -> None:
        self.is_state_consistent = False
        self.pending.finish()
        self.is_state_consistent = True

    def _keep_failure(self, error: Exception) -> None:
        """Keep an error until the state is saved.

        Raise it at once if the state is half changed, or with several processes: one cannot save alone, while the
        others are in the middle of a step.
        """
        failure = explain_error(error, self.accelerator.device)
        if self.accelerator.num_processes > 1 or not self.is_state_consistent:
            self.saver.wait()  # the previous checkpoint may still be being written
            if failure is error:
                raise error
            raise failure from error
        self.failure = failure

    def _clip_gradients(self) -> dict[str, torch.Tensor]:
        """Clip the gradients to `max_grad_norm`, if any; return their norms before, see `compute_gradient_norms`."""
        self.accelerator.unscale_gradients()
        parameters = self.state.parameters
        norms = compute_gradient_norms(self.method.model, parameters)
        if self.options.max_grad_norm:
            nn.utils.clip_grads_with_norm_(parameters.values(), self.options.max_grad_norm, norms["gradient_norm"])
        return norms

    def _step(self, gradient_norm: torch.Tensor) -> torch.Tensor:
        """Change the weights unless the norm is not finite; return () bool on the device, whether this was skipped."""
        is_bad = ~gradient_norm.isfinite()
        # As torch.amp.GradScaler does it: a fused optimizer reads this on the device, and does nothing where it is 1.
        self.adam.found_inf = is_bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        is_skipped = gather_full_tensor(is_bad)
        self.metrics.end_step(~is_skipped)
        return is_skipped

    def _log(self, progress: tqdm[Any]) -> None:
        """Log the figures since the last call, and count the pairs that could not be read: too many end the run."""
        accelerator, options, step = self.accelerator, self.options, self.state.step
        figures = self.metrics.read(
            options.total_batch_size, accelerator.num_processes, lambda sums: accelerator.reduce(sums, "sum")
        )
        faults = gather_object(self.faults)
        figures |= {name: float(gather_full_tensor(norm)) for name, norm in self.norms.items()}
        figures |= {
            "learning_rate": float(self.state.lr_scheduler.get_last_lr()[0]),
            "bad_samples": len(faults),
            "skipped_steps": self.state.skipped.total,
            "failed_checkpoints": self.saver.num_failed,
            "failed_evaluations": self.evaluations.num_failed,
            "failed_trackers": self.num_trackers - len(accelerator.trackers),
        }
        if self.step_log is not None:
            write_or_warn(step, partial(self.step_log.append, {"step": step, **finite_or_none(figures)}))
            write_or_warn(step, partial(self.bad_samples.write, faults))
        use_trackers(accelerator, lambda tracker: tracker.log(finite_only(figures), step=step))
        progress.set_postfix(_shorten_figures(figures))
        try:
            self.bad_samples.count(faults, (step - self.logged_step) * options.total_batch_size)
        except DataError as error:
            self.failure = self.failure or error
        self.faults.clear()
        self.figures, self.logged_step = figures, step

    def _save(self, must_succeed: bool = False) -> None:
        """Copy the state and begin to write it, in the background if wanted.

        Args:
            must_succeed: the run ends here: wait until it is written, and raise if writing fails.

        Raises:
            UnsavedError: it could not be written; on all processes.
        """
        is_main = self.accelerator.is_main_process
        if self.saved_step != self.state.step:
            if is_main:
                self.saver.wait()  # or there would be two copies of everything
            try:
                tensors, rest = self.state.snapshot(self.accelerator)
            except CheckpointError as error:
                self.saver.note_failure(error, must_succeed)
                return
            if is_main:
                self.saver.save(self.state.step, tensors, {"identity": self.identity, **rest})
            self.saved_step = self.state.step
        if must_succeed:
            run_together(lambda: self.saver.wait(must_succeed=True))
        elif is_main and not self.options.save_in_background:
            self.saver.wait()

    def _end(self, progress: tqdm[Any]) -> None:
        """Write a checkpoint to continue from and, unless the run must stop soon, a pipeline to edit with.

        Raises:
            MimicBrushError: see `train`; whatever ended the run before its time.
        """
        accelerator = self.accelerator
        try:
            self._finish_step()
            if self.logged_step != self.state.step:
                self._log(progress)
            self._save(must_succeed=True)
        except Exception as error:
            if self.failure is None:
                raise
            raise UnsavedError(f"{describe_error(self.failure)}\nThe state could not be saved: {error}") from error
        if (faults := gather_object(self.faults)) and accelerator.is_main_process:
            write_or_warn(self.state.step, lambda: self.bad_samples.write(faults))
        if self.failure is not None:
            saved = f"The state after step {self.state.step} is saved; to continue, run with train.resume=latest."
            if isinstance(self.failure, MimicBrushError):
                raise type(self.failure)(f"{self.failure}\n{saved}") from self.failure
            self.failure.add_note(saved)
            raise self.failure
        self.stop.agree()  # after a signal, there is no time for a pipeline
        if not self.stop.signal:
            run_together(self._export)
        accelerator.wait_for_everyone()

    def _export(self) -> None:
        try:
            self.method.export(self.state.weights(self.method.model), self.run_dir / "pipeline")
        except (OSError, SafetensorError) as error:
            raise UnsavedError(
                f"the pipeline could not be written ({error}). The last checkpoint is good: free some space, then "
                f"write {self.run_dir / 'pipeline'} with train.resume=latest or mimicbrush export"
            ) from error


def _shorten_figures(figures: dict[str, float | None]) -> dict[str, str]:
    """Choose the figures that fit beside a progress bar."""
    short = {"loss": "loss", "loss_inside": "inside", "samples_per_s": "samples/s", "data_wait_ratio": "wait",
             "share_of_peak": "of peak", "skipped_steps": "skipped"}  # fmt: skip
    return {word: f"{figures[name]:.3g}" for name, word in short.items() if figures.get(name)}
