"""Evaluation during training: edits and scores a few held-out pairs at regular intervals."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mimicbrush.data.pair import Pair, refuse_pair
from mimicbrush.errors import DataError, InputError, MimicBrushError
from mimicbrush.evaluation.editors.protocol import Editor
from mimicbrush.evaluation.heldout import report
from mimicbrush.evaluation.heldout.options import EvaluationOptions, SetName
from mimicbrush.evaluation.heldout.reference_gain import GAINS, PairScores, summarise_pairs
from mimicbrush.evaluation.heldout.samples import EvalSample, choose_shown_samples, plan_samples
from mimicbrush.evaluation.heldout.scoring import SHEET_COLUMNS, EditedPair, edit_batch, load_sets
from mimicbrush.io.images import write_image
from mimicbrush.io.jsonl import StepLog
from mimicbrush.io.text import describe_error
from mimicbrush.ops.contact_sheet import SheetRow, contact_sheet

LOG_FILE = "heldout.jsonl"
#: Prefixes of the names of figures, for the natural and the warped set.
PREFIXES: dict[SetName, str] = {"natural": "heldout/", "warped": "heldout_warped/"}
#: Columns of the image table; the last two only if the editor returns correspondences.
TABLE_COLUMNS = (
    "source", "mask", "reference", "model", "target", "wrong", "wrong_reference", "reference_places", "correspondence"
)  # fmt: skip


@dataclass(frozen=True)
class ImageRow:
    """A row of a tracker's table: one pair's images by column (see `TABLE_COLUMNS`), (H, W[, 3]) uint8."""

    caption: str
    images: dict[str, np.ndarray]


@dataclass(frozen=True)
class HeldOutResult:
    """The result of the evaluation at one step.

    Attributes:
        step: steps done.
        figures: name -> value: ``heldout/psnr`` (dB), ``heldout/ssim``, ``heldout/gain_over_no_reference_db``,
            ``heldout/wrong_against_none_db``, ``heldout/reference_gain_db``, all three with ``_ci95_low`` and
            ``_ci95_high``,
            ``heldout/psnr_wrong_reference``, ``heldout/psnr_no_reference``, ``heldout/n``, ``heldout/n_sources``,
            ``heldout/unreadable`` (pairs left out) and ``heldout/seconds``; for the warped set, the same names with
            ``heldout_warped/``. Definitions: `reference_gain.GAIN_DEFINITIONS`. All processes have the same figures.
        table: the images of a few pairs of the natural set; empty except on the first process.
        notes: problems that do not end the run: pairs that cannot be read, files that cannot be written.
    """

    step: int
    figures: dict[str, float]
    table: list[ImageRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _PairRecord(NamedTuple):
    """The result of a process for one pair in one set."""

    number: int
    set_name: SetName
    scores: PairScores
    row: ImageRow | None


def gather_alone(items: list[Any]) -> list[Any]:
    """Gather items when there is a single process: return its own items."""
    return items


def fails_alone(has_failed: bool) -> bool:
    """Decide whether to stop when there is a single process: only if it failed."""
    return has_failed


class HeldOutEvaluation:
    """An evaluation on held-out pairs, with the same pairs, masks and noise at every step.

    Several processes share the pairs. All get the figures that a single process would get, except for rounding, because
    the pairs are split into other batches.

    Args:
        pairs: pairs of two or more sources that are not trained on.
        size_px: side of the editor's square canvas.
        options: options of the evaluation; `split` is not used, because the caller has chosen the pairs.
        output: folder for ``heldout.jsonl`` and a contact sheet ``step-00002000.png`` of each evaluation.
        rank, world_size: number of this process, and number of processes.
        gather: joins the lists of all processes; all processes call it at the same time.
        first_step: the step that the run continues from; results of later steps are removed.

    Raises:
        DataError: the pairs come from a single source, or too few of them have enough references.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        size_px: int,
        options: EvaluationOptions,
        output: Path,
        rank: int = 0,
        world_size: int = 1,
        gather: Callable[[list[Any]], list[Any]] = gather_alone,
        first_step: int = 0,
    ) -> None:
        self._plans = plan_samples(pairs, options.max_pairs, options.seed, options.num_references)
        self._size_px, self._options, self._output, self._gather = size_px, options, output, gather
        shown = choose_shown_samples(len(self._plans), options.sheet_pairs)
        rest = sorted(set(range(len(self._plans))) - set(shown))
        # Pairs that are shown come first, in separate batches, because their correspondences take long to plot.
        of_ranks = [
            [
                (chunk, numbers is shown)
                for numbers in (shown, rest)
                for share in [numbers[each::world_size]]
                for chunk in (share[i : i + options.batch_size] for i in range(0, len(share), options.batch_size))
            ]
            for each in range(world_size)
        ]
        self._batches, self._num_rounds = of_ranks[rank], max(map(len, of_ranks))
        self._log: StepLog | None = None
        if rank == 0:
            output.mkdir(parents=True, exist_ok=True)
            self._log = StepLog(output / LOG_FILE, first_step)
            for sheet in output.glob("step-*.png"):
                if int(sheet.stem.removeprefix("step-")) > first_step:
                    sheet.unlink()

    def __call__(
        self, editor: Editor, step: int, must_stop: Callable[[bool], bool] = fails_alone
    ) -> HeldOutResult | None:
        """Evaluate an editor. All processes must call this with equal editors.

        Args:
            editor: has the weights of this step.
            step: steps done.
            must_stop: function: whether this process failed -> whether all must stop, because of a failure or for
                another reason. All processes call it after each batch.

        Returns:
            The result; None if all processes stopped for another reason.

        Raises:
            DataError: no pair could be read.
            MimicBrushError: the editor failed in one of the processes.
        """
        start = time.monotonic()
        gathered = self._edit_and_gather(editor, must_stop)
        if gathered is None:
            return None
        records, unreadable = gathered
        scores = {name: [each.scores for each in records if each.set_name == name] for name in self._options.sets}
        summaries = {name: summarise_pairs(scores[name], self._options.seed) for name in self._options.sets}
        figures: dict[str, float] = {}
        for name, summary in summaries.items():
            figures |= {f"{PREFIXES[name]}{key}": value for key, value in _flatten_summary(summary).items()}
        figures |= {"heldout/unreadable": len(unreadable), "heldout/seconds": time.monotonic() - start}
        notes = [f"a held-out pair is left out at step {step}: {fault}" for fault in unreadable]
        if self._log is None:
            return HeldOutResult(step, figures)
        table = [each.row for each in records if each.row is not None]
        try:
            self._log.append({"step": step, **figures})
            if table:
                write_image(
                    Image.fromarray(_make_sheet(step, table, summaries["natural"])),
                    self._output / f"step-{step:08d}.png",
                )
        except (OSError, InputError) as error:  # a full disk must not end the training
            notes.append(f"the held-out figures or images of step {step} could not be written: {error}")
        return HeldOutResult(step, figures, table, notes)

    def _edit_and_gather(
        self, editor: Editor, must_stop: Callable[[bool], bool]
    ) -> tuple[list[_PairRecord], list[str]] | None:
        """Gather the results of all processes in the order of the pairs, and the faults of unreadable pairs."""
        own: list[_PairRecord | str | MimicBrushError] = []
        failure: Exception | None = None
        is_stopped = False
        for number in range(self._num_rounds):
            try:
                if number < len(self._batches):
                    own += self._edit(editor, *self._batches[number])
            except Exception as error:  # noqa: BLE001 - raised below on all processes, so that none waits for this one
                failure = error
            is_stopped = must_stop(failure is not None)
            if is_stopped:
                break
        if failure is not None:
            own = [failure if isinstance(failure, MimicBrushError) else MimicBrushError(describe_error(failure))]
        gathered = self._gather(own)
        for item in gathered:
            if isinstance(item, MimicBrushError):
                raise item from failure
        if is_stopped:
            return None
        records = sorted((item for item in gathered if isinstance(item, _PairRecord)), key=lambda each: each.number)
        unreadable = sorted(item for item in gathered if isinstance(item, str))
        if not records:
            raise DataError(f"none of {len(self._plans)} held-out pairs could be read: {unreadable[0]}")
        return records, unreadable

    def _edit(
        self, editor: Editor, numbers: Sequence[int], is_shown: bool
    ) -> list[_PairRecord | str | MimicBrushError]:
        readable: list[int] = []
        batch: list[dict[SetName, EvalSample]] = []
        records: list[_PairRecord | str | MimicBrushError] = []
        for number in numbers:
            try:
                with refuse_pair(self._plans[number].pair.pair_id):
                    batch.append(load_sets(self._plans[number], self._options.sets, self._size_px, self._options.seed))
                readable.append(number)
            except DataError as error:
                records.append(str(error))
        if batch:
            edits = edit_batch(editor, batch, with_baselines=False, with_correspondences=is_shown)
            for count, edited in enumerate(edits):
                row = _make_image_row(edited) if is_shown and edited.set_name == "natural" else None
                records.append(_PairRecord(readable[count % len(batch)], edited.set_name, edited.scores, row))
        return records


def summarise_in_one_line(step: int, figures: Mapping[str, float]) -> str:
    """Summarise the natural set of one evaluation on one line."""
    parts = []
    for key, gain in GAINS.items():
        value, low, high = (figures[f"{PREFIXES['natural']}{key}{end}"] for end in ("", "_ci95_low", "_ci95_high"))
        parts.append(f"{gain.name} {value:+.2f} dB ({low:+.2f} to {high:+.2f})")
    return f"step {step}: {', '.join(parts)} on {figures['heldout/n']} held-out pairs"


def _flatten_summary(summary: dict[str, Any]) -> dict[str, float]:
    """Flatten the figures of one set; figures that could not be computed are left out."""
    rows = summary["rows"]
    values = {
        "psnr": rows["model"]["psnr"],
        "ssim": rows["model"]["ssim"],
        "psnr_wrong_reference": rows["wrong_reference"]["psnr"],
        "psnr_no_reference": rows["no_reference"]["psnr"],
        "n": summary["n"],
        "n_sources": summary["n_sources"],
    }
    for gain in GAINS:
        low, high = summary[f"{gain}_ci95"]
        values |= {gain: summary[gain], f"{gain}_ci95_low": low, f"{gain}_ci95_high": high}
    return {name: value for name, value in values.items() if value is not None}


def _make_image_row(edited: EditedPair) -> ImageRow:
    cells = edited.make_cells()
    return ImageRow(edited.make_caption(), {name: cells[name] for name in TABLE_COLUMNS if name in cells})


def _make_sheet(step: int, table: Sequence[ImageRow], summary: dict[str, Any]) -> np.ndarray:
    columns = [name for name in TABLE_COLUMNS if name in table[0].images]
    title = f"Step {step}: {len(table)} of {summary['n']} held-out pairs. Raw outputs, not pasted back.\n"
    title += report.describe_gains(summary)
    rows = [SheetRow(row.caption, [row.images[name] for name in columns]) for row in table]
    return contact_sheet(title, [SHEET_COLUMNS[name] for name in columns], rows)
