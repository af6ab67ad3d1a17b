"""Metrics of a run, the trackers that log them, and evaluations during a run."""

from __future__ import annotations

import math
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm

from mimicbrush.errors import MimicBrushError
from mimicbrush.io.atomic import write_json
from mimicbrush.io.text import describe_error
from mimicbrush.training.checkpoints import read_state
from mimicbrush.training.export import ExportWeights
from mimicbrush.training.guards import StopRequests, run_together
from mimicbrush.training.objective import NUM_BINS, TrainingLoss
from mimicbrush.training.state import TrainingState

if TYPE_CHECKING:
    from mimicbrush.training.method import TrainingMethod

#: Adds up a tensor over all processes.
Reduce = Callable[[torch.Tensor], torch.Tensor]


class TrainingMetrics:
    """Sums of losses and times since the last log. Only `read` waits for the device.

    Args:
        device: the device of the losses.
        passes: number of micro-batches per step and process.
        num_timesteps: number of timesteps of the noise schedule, for the names of the bins.
        flop_per_sample: FLOP of a training step per sample; None if they were not counted.
        peak_flop_per_s: peak FLOP/s of one device at this precision; None if it is not known.
    """

    def __init__(
        self,
        device: torch.device,
        passes: int,
        num_timesteps: int,
        flop_per_sample: float | None = None,
        peak_flop_per_s: float | None = None,
    ) -> None:
        self.device, self.passes, self.num_timesteps = device, passes, num_timesteps
        self.flop_per_sample, self.peak_flop_per_s = flop_per_sample, peak_flop_per_s
        # Sums of the current step, and of the finished steps since the last log; the last entry counts these steps.
        self._step = torch.zeros(1 + 4 + 2 * NUM_BINS + 4, device=device)
        self._sums = torch.zeros(len(self._step) + 1, device=device)
        self._waited_s = 0.0
        self._since, self._num_steps = time.monotonic(), 0

    def add(self, loss: TrainingLoss) -> None:
        """Add a micro-batch to the current step."""
        total = loss.total.detach()[None] / self.passes
        self._step += torch.cat([total, loss.parts, loss.bins.flatten(), loss.correspondence])

    def end_step(self, is_good: torch.Tensor) -> None:
        """Finish a step after its micro-batches.

        Args:
            is_good: () bool on the device; False if the step is skipped: its losses are not counted.
        """
        ended = torch.cat([self._step, torch.ones_like(self._step[:1])])
        self._sums += torch.where(is_good, ended, 0)
        self._step.zero_()
        self._num_steps += 1

    @contextmanager
    def measure_waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.monotonic()
        yield
        self._waited_s += time.monotonic() - start

    def leave_out(self, seconds: float) -> None:
        """Exclude a time that was not spent on training."""
        self._since += seconds

    def read(self, samples_per_step: int, num_processes: int, reduce: Reduce) -> dict[str, float | None]:
        """Return the figures since the last call, name -> value, and reset the sums.

        Only the times differ between processes. A figure without samples is None: that of an empty bin of timesteps, or
        all losses if all steps were skipped.

        Args:
            samples_per_step: number of samples per step, of all processes together.
            num_processes: number of processes.
            reduce: adds up a tensor over all processes.
        """
        sums = reduce(self._sums).tolist()
        loss, parts, bins, correspondence, good = sums[0], sums[1:5], sums[5:-5], sums[-5:-1], sums[-1]
        now = time.monotonic()
        elapsed_s = max(now - self._since, 1e-9)
        samples_per_s = self._num_steps * samples_per_step / elapsed_s
        width = self.num_timesteps // NUM_BINS
        values: dict[str, float | None] = {
            "loss": _ratio(loss, good),
            "loss_inside": _ratio(parts[0], parts[1]),
            "loss_outside": _ratio(parts[2], parts[3]),
            **{
                f"loss_t{i * width:03d}_{(i + 1) * width - 1:03d}": _ratio(bins[i], bins[NUM_BINS + i])
                for i in range(NUM_BINS)
            },
            "samples_per_s": samples_per_s,
            "data_wait_ratio": self._waited_s / elapsed_s,
        }
        if correspondence[1]:
            values["loss_correspondence"] = _ratio(correspondence[0], correspondence[1])
            values["matches_found_ratio"] = _ratio(correspondence[2], correspondence[3])
        if self.flop_per_sample is not None:
            flop_per_s = samples_per_s / num_processes * self.flop_per_sample
            values["tflop_per_s_and_device"] = flop_per_s / 1e12
            if self.peak_flop_per_s is not None:
                values["share_of_peak"] = flop_per_s / self.peak_flop_per_s
        if self.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self.device)
        self._sums.zero_()
        self._waited_s, self._since, self._num_steps = 0.0, now, 0
        return values


def compute_gradient_norms(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Compute the norm of all gradients together, and of those of each trained network; () each, on the device."""
    norms: dict[str, torch.Tensor] = {}
    for part, _ in model.named_children():
        gradients = [p.grad for name, p in parameters.items() if name.startswith(f"{part}.") and p.grad is not None]
        if gradients:
            norms[f"gradient_norm_{part}"] = nn.utils.get_total_norm(gradients)
    total = torch.stack(list(norms.values())).square().sum().sqrt()
    return {"gradient_norm": total, **norms}


def finite_or_none(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Replace values that JSON cannot store with None."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


def finite_only(values: Mapping[str, float | None]) -> dict[str, float]:
    """Keep the values that a tracker can show."""
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


def start_tracker(
    accelerator: Accelerator,
    name: str,
    run_name: str,
    run_dir: Path,
    config: dict[str, Any],
    resume_from: Path | None,
) -> None:
    """Start the tracker that `Accelerator.log` logs to.

    Without an API key, wandb only writes into `run_dir`; ``wandb sync`` uploads this later. trackio writes into its own
    folder on this machine, where ``trackio show`` finds all runs. If a tracker cannot be started, there is a warning,
    and the run continues without it.

    Args:
        accelerator: was created with this tracker.
        name: "none", "wandb", "tensorboard" or "trackio".
        run_name: name of the run in the tracker.
        run_dir: folder for the files of the tracker.
        config: option -> value.
        resume_from: the checkpoint that the run continues from; None for a new run.
    """
    if name == "none":
        return
    state: dict[str, Any] = {"tracker": {}} if resume_from is None else read_state(resume_from)
    wandb: dict[str, Any] = {"name": run_name, "dir": str(run_dir)}
    if name == "wandb":
        if "WANDB_MODE" not in os.environ and not _has_key():
            wandb["mode"] = "offline"
            accelerator.print(
                "note: wandb has no API key (`wandb login`), so it logs offline; `wandb sync` uploads the logs later"
            )
        if state["tracker"].get("wandb"):
            wandb |= {"id": state["tracker"]["wandb"], "resume": "allow"}
    # trackio identifies a run by its name. The newest run of this name continues, if the checkpoint was logged there.
    trackio = {"name": run_name, "resume": "allow" if "trackio" in state["tracker"] else "never", "embed": False}
    # Steps after the checkpoint will be logged again.
    tensorboard = {"purge_step": state["step"] + 1 if "step" in state else None}
    try:
        accelerator.init_trackers(
            "mimicbrush",
            config=config,
            init_kwargs={"wandb": wandb, "tensorboard": tensorboard, "trackio": trackio},
        )
    except Exception as error:  # noqa: BLE001 - see `use_trackers`
        accelerator.trackers = []
        _warn_of_tracker(name, error)


def use_trackers(accelerator: Accelerator, use: Callable[[Any], object]) -> None:
    """Call all trackers. A tracker that fails is not used again, so that it does not end the run.

    Args:
        accelerator: has the trackers.
        use: function that is called with each tracker; it may raise any error.
    """
    for tracker in list(accelerator.trackers):
        try:
            use(tracker)
        except Exception as error:  # noqa: BLE001 - for example of a server, the network or the disk
            accelerator.trackers.remove(tracker)
            _warn_of_tracker(tracker.name, error)


def _warn_of_tracker(name: str, error: Exception) -> None:
    tqdm.write(
        f"warning: the tracker {name} failed ({describe_error(error)}). The run continues "
        "without it; metrics.jsonl has all figures"
    )


def log_image_table(
    accelerator: Accelerator, name: str, rows: Sequence[tuple[str, Mapping[str, np.ndarray]]], step: int
) -> None:
    """Log a table of images: as a table to wandb and trackio, column by column to tensorboard.

    Args:
        accelerator: has the trackers.
        name: name of the table.
        rows: (caption, images (H, W) or (H, W, 3) uint8 by column), with the same columns in all rows; without rows,
            nothing is logged.
        step: step of the run.
    """
    if not rows:
        return
    columns = list(rows[0][1])

    def show(tracker: Any) -> None:
        if tracker.name == "wandb":
            import wandb

            data = [[caption, *[wandb.Image(images[column]) for column in columns]] for caption, images in rows]
            tracker.log_table(name, columns=["pair", *columns], data=data, step=step)
        elif tracker.name == "trackio":
            import trackio

            data = [[caption, *[trackio.Image(images[column]) for column in columns]] for caption, images in rows]
            tracker.log({name: trackio.Table(columns=["pair", *columns], data=data)}, step=step)
        elif tracker.name == "tensorboard":
            stacked = {
                f"{name}/{column}": np.stack([np.atleast_3d(images[column]) for _, images in rows])
                for column in columns
            }
            tracker.log_images(stacked, step=step, dataformats="NHWC")

    use_trackers(accelerator, show)


def read_tracker_ids(accelerator: Accelerator) -> dict[str, str]:
    """Return the ids that a checkpoint must store so that trackers continue the same run; on the main process."""
    return {
        tracker.name: str(tracker.tracker.id)
        for tracker in accelerator.trackers
        if tracker.name in ("wandb", "trackio")
    }


def _has_key() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)


@dataclass(frozen=True)
class TrainingHooks:
    """The evaluation that the loop calls at intervals, on every process.

    Attributes:
        evaluate: function: (weights, step, must_stop) -> figures of these weights on held-out pairs, or None if it was
            stopped. None: there is no evaluation. The weights are all weights of the model, the trained ones averaged;
            every process must iterate over all of them. `must_stop(has_failed)` returns whether all processes must
            stop, because one has failed or because of a signal.
        evaluate_every: number of steps between two evaluations; 0: no evaluation.
        best_figure: the figure whose largest value marks the best weights: the gain of the true reference over no
            reference. The reference gain would also increase if a wrong reference only did more harm.
        best_value: largest value of this figure so far.
    """

    evaluate: Callable[[ExportWeights, int, Callable[[bool], bool]], dict[str, float] | None] | None = None
    evaluate_every: int = 0
    best_figure: str = "heldout/gain_over_no_reference_db"
    best_value: float = -math.inf

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether there is an evaluation after this step."""
        every = self.evaluate_every
        return every > 0 and step > 0 and (step == last_step or step % every == 0)


class Evaluations:
    """The evaluations of a run, and their results.

    Args:
        hooks: the evaluation function, and how often it is called.
        method: exports the best weights.
        state: has the weights.
        accelerator: the `Accelerator` of the run.
        metrics: the metrics, which do not count the time of evaluations.
        run_dir: folder of the run, for ``best/``.

    Attributes:
        figures: figures of the latest evaluation.
        num_failed: number of evaluations that ended with an error.
    """

    def __init__(
        self,
        hooks: TrainingHooks,
        method: TrainingMethod[Any],
        state: TrainingState,
        accelerator: Accelerator,
        metrics: TrainingMetrics,
        run_dir: Path,
    ) -> None:
        self.hooks, self.method, self.state = hooks, method, state
        self.accelerator, self.metrics, self.run_dir = accelerator, metrics, run_dir
        self.figures: dict[str, float] = {}
        self.num_failed, self._best_value = 0, hooks.best_value

    def run(self, stop: StopRequests) -> None:
        """Evaluate the averaged weights on held-out pairs, and export them if they are the best so far.

        An error does not end the training. It is printed, counted, and printed again at the end of the run.

        Args:
            stop: says whether the evaluation must stop.
        """
        evaluate, accelerator, state = self.hooks.evaluate, self.accelerator, self.state
        assert evaluate is not None

        def must_stop(has_failed: bool) -> bool:
            return stop.agree(int(has_failed)) > 0 or stop.signal != 0

        start = time.monotonic()
        figures: dict[str, float] | None = None
        try:
            with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
                figures = run_together(lambda: evaluate(state.weights(self.method.model), state.step, must_stop))
        except Exception as error:  # noqa: BLE001 - all processes have the same error, see `run_together`
            self.num_failed += 1
            if not isinstance(error, MimicBrushError):
                traceback.print_exc()
            tqdm.write(
                f"warning: the evaluation after step {state.step} failed ({describe_error(error)}); training "
                "continues without its figures"
            )
        self.metrics.leave_out(time.monotonic() - start)
        if figures is None:
            return
        self.figures = figures
        use_trackers(accelerator, lambda tracker: tracker.log(figures, step=state.step))
        if figures.get(self.hooks.best_figure, -math.inf) > self._best_value:
            self._best_value = figures[self.hooks.best_figure]
            write_or_warn(state.step, self._export_best)

    def _export_best(self) -> None:
        folder = self.run_dir / "best"
        self.method.export(self.state.weights(self.method.model), folder)
        if self.accelerator.is_main_process:
            write_json(folder / "heldout.json", {"step": self.state.step, **self.figures})


def write_or_warn(step: int, write: Callable[[], object]) -> None:
    """Write files that the run does not need: a full disk must not end the run because of them."""
    try:
        write()
    except (OSError, SafetensorError) as error:
        tqdm.write(f"warning: after step {step}, a file could not be written ({error}); the run continues")
