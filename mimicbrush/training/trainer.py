"""The training loop: `Trainer.train` tells it from a batch to a checkpoint, the methods below it are its steps."""

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
from mimicbrush.training.method import TrainingMethod
from mimicbrush.training.metrics import (
    TrainingMetrics,
    compute_gradient_norms,
    finite_only,
    finite_or_none,
    read_tracker_ids,
)
from mimicbrush.training.options import TrainOptions
from mimicbrush.training.state import TrainingState, gather_full_tensor
from mimicbrush.types import TrainBatch

#: (first step, last step) -> the micro-batches of these steps, for this rank.
Loader = Callable[[int, int], Iterable[TrainBatch | DecodedBatch]]


@dataclass(frozen=True)
class TrainingHooks:
    """Functions that the loop calls now and then: the evaluation. Every process calls them.

    Attributes:
        evaluate: (weights, step) -> figures of these weights on held-out pairs; None where nothing is evaluated. The
            weights are all of the model, the trained ones averaged; every process must take all of them.
        evaluate_every: steps between two evaluations; 0 where there are none.
        best_figure: the figure whose largest value marks the best weights: what the true reference is worth over
            none. The reference gain would also grow where a wrong reference only does more harm.
        best_value: its largest value so far.
    """

    evaluate: Callable[[ExportWeights, int], dict[str, float]] | None = None
    evaluate_every: int = 0
    best_figure: str = "heldout/gain_over_no_reference_db"
    best_value: float = -math.inf

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether there is an evaluation after this step."""
        every = self.evaluate_every
        return every > 0 and step > 0 and (step == last_step or step % every == 0)


@dataclass(frozen=True)
class TrainingResult:
    """Result of a run, or of a part of it.

    Attributes:
        step: steps that the run has now.
        figures: the last logged ones, of losses and of an evaluation.
        seconds: spent in this call.
        signal: the signal that ended it, or 0.
    """

    step: int
    figures: dict[str, float | None]
    seconds: float
    signal: int = 0


class PendingStep:
    """The latest step, until the CPU knows whether it changed the weights.

    The device itself leaves out a step whose gradients are not finite. Whether it did so, and whether a process wants
    to stop, are numbers on the device. A CPU that waited for them would leave a GPU idle; so they are read while the
    GPU computes the next gradients, and whatever depends on them happens in `finish`.

    Args:
        state: what a step changes besides the weights.
        stop: learns what all processes agree on.
        checkpoint_folder: named where too many steps in a row are skipped.
    """

    def __init__(self, state: TrainingState, stop: StopRequests, checkpoint_folder: Path) -> None:
        self.state, self.stop, self.checkpoint_folder = state, stop, checkpoint_folder
        self._scalars: AsyncScalars | None = None

    def begin(self, is_skipped: torch.Tensor) -> None:
        """Start to copy the numbers of a step from the device.

        Args:
            is_skipped: () bool on the device, the same on all processes.
        """
        self._scalars = AsyncScalars(torch.cat([is_skipped.float().view(1), self.stop.ask(is_skipped.device)]))

    def finish(self) -> None:
        """Advance learning rate and average unless the step was skipped; do nothing where no step is pending.

        Raises:
            MimicBrushError: too many steps in a row were skipped.
        """
        if self._scalars is None:
            return
        was_skipped, signal_number, is_late = self._scalars.read()
        self._scalars = None
        self.stop.agree(int(signal_number), bool(is_late))
        self.state.skipped.count(bool(was_skipped), self.state.step, self.checkpoint_folder)
        if not was_skipped:
            self.state.schedule.step()
            if self.state.average is not None:
                self.state.average.step(self.state.parameters.values())


class Trainer:
    """Trains a model by a `TrainingMethod`, on one or many devices.

    Args:
        method: the model, its loss and its export.
        loader: the data.
        options: of the run.
        accelerator: made with the passes of ``options.split_batch`` as its gradient accumulation.
        metrics: what is logged.
        bad_samples: what to do about pairs that cannot be read.
        hooks: the evaluation.
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
        schedule = get_scheduler(
            options.lr_scheduler,
            self.adam,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.max_steps,
        )
        #: The wrapped model and optimizer; `method.model` is the model itself.
        self.model, self.optimizer = accelerator.prepare(method.model, self.adam)
        parameters = method.trained_parameters()  # sharding has replaced them
        average = None
        if options.ema_decay > 0:
            average = EMAModel(parameters.values(), decay=options.ema_decay, foreach=True)
        self.state = TrainingState(parameters, self.adam, schedule, average)
        self.saver = CheckpointSaver(run_dir / "checkpoints", options.keep_checkpoints, tqdm.write)
        self.step_log: StepLog | None = None  # on the main process, made once the step is clear

        #: Messages about pairs that could not be read since the last log, of this process.
        self.faults: list[str] = []
        self.figures: dict[str, float | None] = {}
        self.heldout_figures: dict[str, float] = {}
        self.best_value = hooks.best_value
        self.logged_step, self.saved_step = 0, -1

    def train(self) -> TrainingResult:
        """Train until `max_steps`, `max_minutes` or a signal; leave a checkpoint and, unless a signal came, a pipeline.

        Raises:
            MimicBrushError: too many steps in a row had no finite gradients, too many pairs could not be read, or the
                last checkpoint could not be written.
        """
        started = time.monotonic()
        options, accelerator, device = self.options, self.accelerator, self.accelerator.device
        method, model, state, metrics = self.method, self.model, self.state, self.metrics
        self._resume()
        stop = StopRequests(options.max_minutes)
        stop.agree(*stop.ask(device).int().tolist())
        pending = PendingStep(state, stop, self.saver.folder)
        batches = iter(self.loader(state.step, options.max_steps))
        progress = tqdm(
            total=options.max_steps, initial=state.step, unit="step", disable=not accelerator.is_local_main_process
        )
        with stop.catch_signals(), progress:
            if self.resume_from is not None and self.hooks.is_due(state.step, options.max_steps):
                self._evaluate()  # the checkpoint was written before the evaluation

            while state.step < options.max_steps and not stop.is_agreed:
                # Forward and backward, in as many passes as the batch needs.
                model.train()
                for _ in range(accelerator.gradient_accumulation_steps):
                    with metrics.measure_waiting():
                        batch = next(batches)
                    self.faults += batch.faults
                    with accelerator.accumulate(model):
                        inputs = method.encode(batch, device)
                        with accelerator.autocast():
                            loss = method.loss(model, inputs, state.step)
                        accelerator.backward(loss.total)
                        metrics.add(loss)

                # The step before this one: its numbers have arrived while a GPU computed.
                pending.finish()
                if stop.is_agreed:
                    break  # what was computed since belongs to a step that is not made

                # Clip, and step. The learning rate and the average (EMA) follow when the step is finished.
                norms = self._clip_gradients()
                is_skipped = self._step(norms["gradient_norm"])
                pending.begin(is_skipped)
                state.step += 1
                progress.update()

                # Log, save, evaluate: all of it reads the state, so the step must be finished. On a CPU nothing runs
                # beside the loop, and waiting gains nothing.
                is_log_due = state.step % options.log_every == 0 or state.step == options.max_steps
                is_evaluation_due = self.hooks.is_due(state.step, options.max_steps)
                is_checkpoint_due = is_evaluation_due or state.step % options.checkpoint_every == 0
                if is_log_due or is_checkpoint_due or device.type != "cuda":
                    pending.finish()
                if is_log_due:
                    self._log(norms, progress)
                if is_checkpoint_due:
                    self._save()  # before the evaluation, which takes long and may fail
                if is_evaluation_due:
                    self._evaluate()

            pending.finish()
            self._end(has_signal=stop.signal != 0)
        return TrainingResult(
            state.step, {**self.figures, **self.heldout_figures}, time.monotonic() - started, stop.signal
        )

    def _resume(self) -> None:
        """Go back to the checkpoint, if there is one, and cut the log to its step."""
        state, accelerator = self.state, self.accelerator
        if self.resume_from is not None:
            state.restore(self.resume_from, accelerator)
            accelerator.step = state.step * accelerator.gradient_accumulation_steps  # accelerate counts micro-batches
            accelerator.print(
                f"resumed from {self.resume_from}, which verifies (step {state.step} of {self.options.max_steps})"
            )
            self.saved_step = state.step
        self.logged_step = state.step
        if accelerator.is_main_process:
            state.tracker = read_tracker_ids(accelerator)
            self.step_log = StepLog(self.run_dir / "metrics.jsonl", state.step)

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

    def _log(self, norms: dict[str, torch.Tensor], progress: tqdm[Any]) -> None:
        """Log the figures since the last call, and count the pairs that could not be read.

        Raises:
            DataError: there were too many of these.
        """
        accelerator, options, step = self.accelerator, self.options, self.state.step
        figures = self.metrics.read(
            options.total_batch_size, accelerator.num_processes, lambda sums: accelerator.reduce(sums, "sum")
        )
        faults = gather_object(self.faults)
        figures |= {name: float(gather_full_tensor(norm)) for name, norm in norms.items()}
        figures |= {
            "learning_rate": float(self.state.schedule.get_last_lr()[0]),
            "bad_samples": len(faults),
            "skipped_steps": self.state.skipped.total,
            "failed_checkpoints": self.saver.num_failed,
        }
        if self.step_log is not None:
            self._write_or_warn(partial(self.step_log.append, {"step": step, **finite_or_none(figures)}))
            self._write_or_warn(partial(self.bad_samples.write, faults))
        accelerator.log(finite_only(figures), step=step)
        progress.set_postfix(_shorten_figures(figures))
        self.bad_samples.count(faults, (step - self.logged_step) * options.total_batch_size)
        self.faults.clear()
        self.figures, self.logged_step = figures, step

    def _save(self) -> None:
        """Copy the state and begin to write it, in the background if that is wanted."""
        is_main = self.accelerator.is_main_process
        if is_main:
            self.saver.wait()  # or there would be two copies of everything
        tensors, rest = self.state.snapshot(self.accelerator)
        if is_main:
            self.saver.save(self.state.step, tensors, {"identity": self.identity, **rest})
            if not self.options.save_in_background:
                self.saver.wait()
        self.saved_step = self.state.step

    def _evaluate(self) -> None:
        """Measure the averaged weights on held-out pairs, and export them where they are the best so far."""
        evaluate, accelerator, state = self.hooks.evaluate, self.accelerator, self.state
        assert evaluate is not None
        start = time.monotonic()
        with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
            figures = evaluate(state.weights(self.method.model), state.step)
        accelerator.log(figures, step=state.step)
        self.metrics.leave_out(time.monotonic() - start)
        self.heldout_figures = figures
        if figures[self.hooks.best_figure] > self.best_value:
            self.best_value = figures[self.hooks.best_figure]
            self._write_or_warn(self._export_best)

    def _export_best(self) -> None:
        folder = self.run_dir / "best"
        self.method.export(self.state.weights(self.method.model), folder)
        if self.accelerator.is_main_process:
            values = {"step": self.state.step, **self.heldout_figures}
            (folder / "heldout.json").write_text(json.dumps(values, indent=1))

    def _write_or_warn(self, write: Callable[[], object]) -> None:
        """Write what is only to be looked at: a full disk must not end the run for that."""
        try:
            write()
        except (OSError, SafetensorError) as error:
            tqdm.write(f"after step {self.state.step} something could not be written ({error}); the run goes on")

    def _end(self, has_signal: bool) -> None:
        """Leave a checkpoint to go on from and, unless somebody waits for the machine, a pipeline to edit with."""
        accelerator = self.accelerator
        if self.saved_step != self.state.step:
            self._save()
        self.saver.wait(must_succeed=True)
        accelerator.wait_for_everyone()
        if (faults := gather_object(self.faults)) and accelerator.is_main_process:
            self._write_or_warn(lambda: self.bad_samples.write(faults))
        if not has_signal:
            self.method.export(self.state.weights(self.method.model), self.run_dir / "pipeline")
        accelerator.wait_for_everyone()


def _shorten_figures(figures: dict[str, float | None]) -> dict[str, str]:
    """Choose the figures that fit beside a progress bar."""
    short = {"loss": "loss", "loss_inside": "inside", "samples_per_s": "samples/s", "data_wait_ratio": "wait",
             "share_of_peak": "of peak", "skipped_steps": "skipped"}  # fmt: skip
    return {word: f"{figures[name]:.3g}" for name, word in short.items() if figures.get(name)}
