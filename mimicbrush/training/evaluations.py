"""Evaluations while training: on held-out pairs, with the averaged weights; the best so far are exported."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from tqdm.auto import tqdm

from mimicbrush.errors import MimicBrushError
from mimicbrush.io.atomic import write_json
from mimicbrush.io.text import describe_error
from mimicbrush.training.export import ExportWeights
from mimicbrush.training.guards import StopRequests, run_together
from mimicbrush.training.method import TrainingMethod
from mimicbrush.training.metrics import TrainingMetrics, use_trackers
from mimicbrush.training.state import TrainingState


@dataclass(frozen=True)
class TrainingHooks:
    """Functions that the loop calls now and then: the evaluation. Every process calls them.

    Attributes:
        evaluate: (weights, step, must_stop) -> figures of these weights on held-out pairs, or None where it was
            stopped; None where nothing is evaluated. The weights are all of the model, the trained ones averaged;
            every process must take all of them. `must_stop(has_failed)` tells all processes whether one failed, and
            says whether all must stop, for that or for a signal.
        evaluate_every: steps between two evaluations; 0 where there are none.
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
    """The evaluations of a run, and what they found.

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
        """Measure the averaged weights on held-out pairs, and export them where they are the best so far.

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
                f"warning: the evaluation after step {state.step} failed ({describe_error(error)}); the training goes "
                "on without its figures"
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
    """Write what is only to be looked at: a full disk must not end the run for that."""
    try:
        write()
    except (OSError, SafetensorError) as error:
        tqdm.write(f"after step {step} something could not be written ({error}); the run goes on")
