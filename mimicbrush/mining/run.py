"""Mine a folder or a list of videos and photographs into shards of pairs, a manifest, a summary and a report."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mimicbrush.data.manifest import (
    INDEX_NAME,
    PLAN_NAME,
    check_outside_mined_folder,
    is_index_current,
    write_index,
)
from mimicbrush.errors import DataError, InputError
from mimicbrush.io.atomic import ASIDE_PATTERN, write_aside
from mimicbrush.io.locks import hold_folder
from mimicbrush.io.outputs import check_output_folder
from mimicbrush.mining import plan as planning
from mimicbrush.mining.executors import Resources, run_shards
from mimicbrush.mining.input_list import LIST_SUFFIXES, read_input_list
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.plan import Item, Plan
from mimicbrush.mining.report.page import write_mining_report
from mimicbrush.mining.shards import ShardJob, shard_fingerprint
from mimicbrush.mining.summary import SUMMARY_NAME, Summary, summarise_manifest
from mimicbrush.mining.video.other_readers import open_reader
from mimicbrush.mining.video.strict_reader import FrameReader
from mimicbrush.ranges import check_options, number


@dataclass(frozen=True)
class ArrayTask:
    """The share of one of several tasks that mine the same output: every `count`-th shard from `index`.

    Attributes:
        index: number of this task, from 0 to count - 1.
        count: number of tasks.
    """

    index: int = number(0, at_least=0)
    count: int = number(1, at_least=1)

    def __post_init__(self) -> None:
        check_options(self, "task.")
        if self.index >= self.count:
            raise InputError(
                f"task.index={self.index} task.count={self.count}: expected an index from 0 to {self.count - 1}"
            )


@dataclass(frozen=True)
class MiningResult:
    """Result of a mining run.

    Attributes:
        summary: summary of the whole folder; None if other tasks are not finished yet.
        shards_done, shards: number of finished shards, and of all shards.
        shards_mined: number of shards that this run mined.
        notes: notes for the user.
        warning: a warning that most pairs have little motion, see
            `report.statistics.warn_of_still_pairs`; None if they have enough.
    """

    summary: Summary | None
    shards_done: int
    shards: int
    shards_mined: int
    notes: list[str]
    warning: str | None = None


def mine_folder(
    inputs: Path,
    output: Path,
    options: MiningOptions | None = None,
    *,
    resources: Resources | None = None,
    task: ArrayTask | None = None,
    input_root: Path | None = None,
    reader: FrameReader | None = None,
    progress: bool = True,
) -> MiningResult:
    """Mine all videos, photographs with segments, and tars of these in a folder or a list.

    Finished shards are not changed. So to continue a run that was stopped, start it again. Several processes may mine
    one output folder if each has its own `task`.

    Args:
        inputs: a folder, searched with all its subfolders, or a list (`mimicbrush.mining.input_list`).
        output: output folder, created if needed; data_manifests/README.md describes its files.
        options: options of mining; None for the defaults.
        resources: resources that may be used; None for the defaults.
        task: which part of the shards to mine; None: all.
        input_root: the folder that the paths of a list are relative to; None: the folder of the list.
        reader: decodes videos and is pickled; None for the reader that the options name.
        progress: show a progress bar on stderr.

    Raises:
        InputError: there is nothing to mine; or the output belongs to other inputs, cannot be written, or is being
            written by another process (`LockedError`).
        DataError: files of the output cannot be read or written, or the input folder no longer exists; finished shards
            are kept. All other errors of an input file become a row with a reason.
    """
    options, resources, task = options or MiningOptions(), resources or Resources(), task or ArrayTask()
    if not isinstance(progress, bool):
        raise InputError(f"progress={progress}: expected true or false")
    root, output = _check_folders(inputs, output, input_root)
    check_output_folder(output, "output=")
    items, ignored, notes = _read_inputs(inputs, root, output)
    # Each task of an array has its own lock in the shared folder. Workers (local or Ray) need no lock.
    with hold_folder(output, "" if task.count == 1 else f"{task.index}-of-{task.count}"):
        options, kept = planning.add_earlier_options(output, options)
        plan = planning.make_plan(output, root, items, options)
        reader = reader or open_reader(
            options.reader,
            max_pixels=options.max_pixels,
            max_duration_s=options.max_duration_s,
            tone_map=options.hdr == "tone_map",
            deinterlace=options.interlaced == "deinterlace",
        )
        if task.count == 1:  # otherwise another task may be writing one of these files
            for leftover in output.glob(ASIDE_PATTERN):
                leftover.unlink(missing_ok=True)
        _write_if_new(output / PLAN_NAME, plan.to_json())
        jobs = [
            ShardJob(number, tuple(shard), root, output, options, reader, shard_fingerprint(plan, shard))
            for number, shard in enumerate(plan.shards)
        ]
        shards_mined = _run(jobs[task.index :: task.count], resources, progress)
        done = [job for job in jobs if job.paths.marker.is_file()]
        summary, warning = _finish(output, done, ignored, plan) if len(done) == len(jobs) else (None, None)
        return MiningResult(summary, len(done), len(jobs), shards_mined, notes + kept, warning)


def _check_folders(inputs: Path, output: Path, input_root: Path | None) -> tuple[Path, Path]:
    if not inputs.exists():
        raise InputError(f"the input {inputs} does not exist; give a folder of videos, or a list (.csv, .parquet)")
    if not inputs.is_dir() and inputs.suffix.lower() not in LIST_SUFFIXES:
        raise InputError(f"the input {inputs} is a file; expected a folder, or a list ({' '.join(LIST_SUFFIXES)})")
    if input_root is not None and (inputs.is_dir() or not input_root.is_dir()):
        raise InputError(
            f"input_root={input_root} is not a folder; expected the folder that the paths in a list are relative to"
        )
    root, output = (input_root or (inputs if inputs.is_dir() else inputs.parent)).resolve(), output.resolve()
    if root == output:
        raise InputError(f"input and output are the same folder {root}; use another output")
    check_outside_mined_folder(output.parent, f"output={output}")  # the output itself may be a mined folder to extend
    return root, output


def _read_inputs(inputs: Path, root: Path, output: Path) -> tuple[list[Item], Counter[str], list[str]]:
    if not inputs.is_dir():
        items, unused = read_input_list(inputs, root)
        return items, Counter(), [f"unused columns of {inputs.name}: {', '.join(unused)}"] if unused else []
    items, ignored = planning.find_items(root, output)
    if not items:
        others = ", ".join(f"{count} x {suffix}" for suffix, count in ignored.most_common(8)) or "no files"
        raise InputError(
            f"{root} has nothing to mine ({others}); expected videos ({' '.join(planning.VIDEO_SUFFIXES)}), "
            "photographs with segments (NAME.jpg and NAME.json, as in SA-1B), or .tar files of these"
        )
    return items, ignored, []


def _run(jobs: list[ShardJob], resources: Resources, progress: bool) -> int:
    """Mine shards, and return how many were not already done."""
    num_files = sum(len(job.items) for job in jobs)
    mined = 0
    with tqdm(total=num_files, unit="file", desc="mining", disable=not progress) as bar:
        for job, was_mined in run_shards(jobs, resources):
            mined += was_mined
            bar.update(len(job.items))
    return mined


def _finish(output: Path, done: list[ShardJob], ignored: Counter[str], plan: Plan) -> tuple[Summary, str | None]:
    """When all shards are done: write the index for training, the summary and the report.

    Returns:
        The summary, and the warning of the report.
    """
    for job in done:
        ignored = ignored + _read_ignored(job)
    if not is_index_current(output, needs_checksum=True):
        write_aside(output / INDEX_NAME, lambda aside: write_index(output, aside))
    summary = summarise_manifest(output, ignored, plan.options)
    _write_if_new(output / SUMMARY_NAME, summary.to_json())
    return summary, write_mining_report(output)


def _read_ignored(job: ShardJob) -> Counter[str]:
    """Read from the marker of a shard how many other files its archives have, by suffix."""
    try:
        counts = json.loads(job.paths.marker.read_text(encoding="utf-8"))["ignored"]
        return Counter({str(suffix): int(count) for suffix, count in counts.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{job.paths.marker} cannot be read ({error!r}); delete it and mine again") from error


def _write_if_new(path: Path, text: str) -> None:
    """Write a file unless it already has this content, so that a run without new inputs changes no file."""
    data = text.encode()
    if path.is_file() and path.read_bytes() == data:
        return
    write_aside(path, lambda aside: aside.write_bytes(data))
