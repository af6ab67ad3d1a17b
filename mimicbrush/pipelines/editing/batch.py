"""Many edits, one by one or in groups: finished ones are skipped, failures are recorded. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from PIL import Image

from mimicbrush.errors import InputError, OutputError, choose_words, is_full_disk, is_out_of_memory
from mimicbrush.io.images import check_writable, write_image
from mimicbrush.io.outputs import check_output_file, check_output_folder, keep_elsewhere
from mimicbrush.pipelines.editing.inputs import EditInputs
from mimicbrush.pipelines.editing.requests import Edit, number_outputs


class BatchEditor(Protocol):
    """Editor of a batch: reads images and edits them."""

    @property
    def pastes_back(self) -> bool:
        """Whether a result has the size of its source."""
        ...

    def read(self, edit: Edit) -> EditInputs:
        """Read the images of an edit; an InputError, or too little memory, is the edit's failure."""
        ...

    def load(self) -> object:
        """Load the model unless it is loaded; an error ends the batch, for every edit would meet it."""
        ...

    def edit(self, edit: Edit, inputs: EditInputs, seeds: Sequence[int]) -> Sequence[Image.Image]:
        """Edit once per seed; an InputError, or too little memory, is the edit's failure; others end the batch."""
        ...

    def edit_together(
        self, edits: Sequence[Edit], inputs: Sequence[EditInputs], seeds: Sequence[Sequence[int]]
    ) -> Sequence[Sequence[Image.Image]]:
        """Edit several in one pass, each with as many seeds; errors as of `edit`, but nobody knows whose they are."""
        ...


@dataclass
class BatchCounts:
    """Counts of edits of a batch: done, skipped, failed.

    Attributes:
        done, skipped: edits that were done now, and before.
        failures: edits that failed, with the reason.
    """

    done: int = 0
    skipped: int = 0
    failures: list[tuple[Edit, str]] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Number of edits that were processed."""
        return self.done + self.skipped + len(self.failures)

    def __str__(self) -> str:
        failed = len(self.failures)
        return f"{self.total} edits = {self.done} done + {self.skipped} skipped + {failed} failed"


def explain_no_memory() -> str:
    """Say what to do if an edit needs too much memory."""
    way = choose_words(
        python='crop="auto", a smaller image, or dtype="float16" on a GPU',
        command="--crop auto, a smaller image, or --dtype float16 on a GPU",
        page='the setting "Use only the area around the mask", or a smaller image',
    )
    return f"not enough memory for this edit: try {way}"


@contextmanager
def convert_memory_errors() -> Iterator[None]:
    """Convert out-of-memory errors of the CPU or GPU to an InputError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise InputError(explain_no_memory()) from error
        raise


def prepare_outputs(edits: Sequence[Edit]) -> None:
    """Make the folders of all outputs.

    Raises:
        InputError: one cannot be made, or an output is no image that can be written.
    """
    for folder in dict.fromkeys(edit.output.parent for edit in edits):
        check_output_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
    for edit in edits:
        check_writable(edit.output, is_tried=False)


@dataclass
class _Ready:
    """An edit whose images are read, and the results that it lacks, by seed."""

    edit: Edit
    inputs: EditInputs
    todo: dict[int, Path]


class EditGroups:
    """Edits that are collected into groups, made and counted. Finished edits are skipped.

    Args:
        editor: reads and edits.
        tally: counts.
        num_images: results wanted of each; image i has the edit's seed + i, so missing ones can be made alone.
        force: edit again what is finished.
        batch_size: the most edits of a group, which must all keep the shape or not, lack as many results, and have as
            many references.
    """

    def __init__(
        self, editor: BatchEditor, tally: BatchCounts, num_images: int = 1, force: bool = False, batch_size: int = 1
    ) -> None:
        self.editor, self.tally = editor, tally
        self.num_images, self.force, self.batch_size = num_images, force, batch_size
        self._waiting: dict[tuple[bool, int, int], list[_Ready]] = {}

    def add(self, edit: Edit) -> None:
        """Add the next edit. Its results are made and written as soon as its group is full.

        Raises:
            InputError: the model cannot be loaded.
            OutputError: the disk is full, which ends the batch: what was edited last is kept elsewhere.
        """
        outputs = {edit.seed + number: path for number, path in enumerate(number_outputs(edit.output, self.num_images))}
        todo = {seed: path for seed, path in outputs.items() if self.force or not path.exists()}
        if not todo:
            self.tally.skipped += 1
            return
        try:
            with convert_memory_errors():
                inputs = self.editor.read(edit)
                for path in todo.values():
                    check_writable(path, inputs.source.size if self.editor.pastes_back else None, is_tried=False)
        except InputError as error:
            self.tally.failures.append((edit, str(error)))
            return
        kind = (edit.keep_shape, len(todo), len(edit.references))
        group = self._waiting.setdefault(kind, [])
        group.append(_Ready(edit, inputs, todo))
        if len(group) >= self.batch_size:
            self._make(self._waiting.pop(kind))

    def finish(self) -> None:
        """Make the edits of groups that are not full; raises as `add` does."""
        while self._waiting:
            self._make(self._waiting.pop(next(iter(self._waiting))))

    def _make(self, group: list[_Ready]) -> None:
        self.editor.load()
        if len(group) > 1:
            parts = [each.edit for each in group], [each.inputs for each in group], [list(each.todo) for each in group]
            try:
                with convert_memory_errors():
                    together = self.editor.edit_together(*parts)
            except InputError:  # of one of them, or too little memory for all: the others go on by themselves
                pass
            else:
                lost = []
                for each, results in zip(group, together, strict=True):
                    try:
                        self._write(each, results)
                    except OutputError as error:  # the disk is full: the others can be kept elsewhere, too
                        lost.append(str(error))
                if lost:
                    raise OutputError("\n".join(lost))
                return
        for each in group:
            try:
                with convert_memory_errors():
                    results = self.editor.edit(each.edit, each.inputs, list(each.todo))
            except InputError as error:
                self.tally.failures.append((each.edit, str(error)))
            else:
                self._write(each, results)

    def _write(self, made: _Ready, results: Sequence[Image.Image]) -> None:
        problems = []
        for path, result in zip(made.todo.values(), results, strict=True):
            try:
                write_image(result, path, made.inputs.encoding)
            except MemoryError:
                problems.append(explain_no_memory())
            except InputError as error:
                keep = partial(write_image, result, like=made.inputs.encoding)
                try:
                    _, problem = keep_elsewhere(f"{path.stem}.png", keep, error)
                except OutputError as second:  # nor there: this result is lost, and the others need not be
                    problem = str(second)
                if is_full_disk(error):
                    raise OutputError(problem) from error
                problems.append(problem)
        if problems:
            self.tally.failures.append((made.edit, "; ".join(problems)))
        else:
            self.tally.done += 1


def check_sheet_apart(sheet: Path, edits: Sequence[Edit], num_images: int) -> None:
    """Check that a contact sheet, which a batch makes anew each time, has a name of its own.

    Raises:
        InputError: it is an image that the batch reads or writes.
    """
    for edit in edits:
        for path in (*edit.inputs, *number_outputs(edit.output, num_images)):
            if path.resolve() == sheet.resolve():
                raise InputError(f"--contact-sheet {sheet} is also an image of the batch; choose another name")


def check_new(paths: Sequence[Path], force: bool) -> None:
    """Check that files may be written: none is there yet (or may be replaced), and none is named twice.

    Args:
        paths: images, or ``.npz``.
        force: replace files that are there.

    Raises:
        InputError: names all that are there, or the first that cannot be written.
    """
    for path in paths:
        (check_output_file if path.suffix == ".npz" else check_writable)(path)
    there = [str(path) for path in paths if path.exists()]
    if there and not force:
        verb = "exists" if len(there) == 1 else "exist"
        raise InputError(f"{', '.join(there)} {verb}; choose another name, or overwrite with --force")
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError(f"two outputs have the same name: {', '.join(map(str, paths))}")
