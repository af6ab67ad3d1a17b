"""Metrics of a run, its trackers, and its evaluations.

Sums are on the device and times on the clock; each logged step has one dictionary.
"""

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
        device: where the losses are.
        passes: micro-batches per step and process.
        num_timesteps: of the noise schedule, for the names of the bins.
        flop_per_sample: FLOP of a training step over its samples; None where they were not counted.
        peak_flop_per_s: of one device at this precision; None if that is not known.
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
        # Of the step that is under way, and of the finished ones since the last log, with their number last.
        self._step = torch.zeros(1 + 4 + 2 * NUM_BINS + 4, device=device)
        self._sums = torch.zeros(len(self._step) + 1, device=device)
        self._waited_s = 0.0
        self._since, self._num_steps = time.monotonic(), 0

    def add(self, loss: TrainingLoss) -> None:
        """Add a micro-batch to the current step."""
        total = loss.total.detach()[None] / self.passes
        self._step += torch.cat([total, loss.parts, loss.bins.flatten(), loss.correspondence])

    def end_step(self, is_good: torch.Tensor) -> None:
        """Close a step after its micro-batches; losses of a skipped step are not counted.

        Args:
            is_good: () bool on the device.
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
        """Return name -> figure since the last call, and start again. Only the times differ between processes.

        A figure without samples is None: an empty bin of timesteps, or all losses where every step was skipped.

        Args:
            samples_per_step: over all processes.
            num_processes: that share these.
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
    """Compute the norms of all gradients, and of those of each trained network; () each, on the device."""
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

    Without a key wandb writes into `run_dir` only; ``wandb sync`` uploads that later. trackio writes into a folder of
    its own on this machine, where ``trackio show`` finds all runs. Where a tracker cannot be started, the run goes on
    without it, and says so.

    Args:
        accelerator: made with this tracker.
        name: "none", "wandb", "tensorboard" or "trackio".
        run_name: what the run is called there.
        run_dir: gets the files of the tracker.
        config: option -> value.
        resume_from: the checkpoint that the run goes on from.
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
    # trackio knows a run by its name. The newest run of this name goes on, if the checkpoint was logged there.
    trackio = {"name": run_name, "resume": "allow" if "trackio" in state["tracker"] else "never", "embed": False}
    # Steps beyond the checkpoint will be logged again.
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
    """Call all trackers. One that fails is not used again: it must not end a run.

    Args:
        accelerator: with its trackers.
        use: gets each of them; it may raise anything.
    """
    for tracker in list(accelerator.trackers):
        try:
            use(tracker)
        except Exception as error:  # noqa: BLE001 - a server, a network, a disk: none of it is the run's
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
    """Log a table of images: to wandb and trackio as one, to tensorboard column by column.

    Args:
        accelerator: with its trackers.
        name: of the table.
        rows: a caption, and images (H, W) or (H, W, 3) uint8 by column, the same columns in all; none shows nothing.
        step: of the run.
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
    """Return what a checkpoint must store so that the tracker continues the same run; on the main process."""
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
    """Functions that the loop calls at intervals: the evaluation. Every process calls them.

    Attributes:
        evaluate: (weights, step, must_stop) -> figures of these weights on held-out pairs, or None if it was
            stopped; None if nothing is evaluated. The weights are all of the model, the trained ones averaged;
            every process must take all of them. `must_stop(has_failed)` tells all processes whether one failed, and
            says whether all must stop, for that or for a signal.
        evaluate_every: steps between two evaluations; 0 if there are none.
        best_figure: the figure whose largest value marks the best weights: what the true reference is worth over
            none. The reference gain would also grow where a wrong reference only does more harm.
        best_value: its largest value so far.
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
        hooks: what evaluates, and when.
        method: exports the best weights.
        state: has the weights.
        accelerator: of the run.
        metrics: must not count the time of an evaluation.
        run_dir: gets ``best/``.

    Attributes:
        figures: of the latest evaluation.
        num_failed: how many ended in an error.
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
        except Exception as error:  # noqa: BLE001 - all processes have the same one
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
