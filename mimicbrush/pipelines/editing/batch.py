"""Makes many edits, one by one or in groups. Finished edits are skipped, failures are recorded. No heavy imports."""

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
        """Read the images of an edit. After an InputError or a lack of memory, only this edit fails."""
        ...

    def load(self) -> object:
        """Load the model if it is not loaded yet. An error ends the batch, because all edits need the model."""
        ...

    def edit(self, edit: Edit, inputs: EditInputs, seeds: Sequence[int]) -> Sequence[Image.Image]:
        """Edit once per seed. After an InputError or a lack of memory, only this edit fails; others end the batch."""
        ...

    def edit_together(
        self, edits: Sequence[Edit], inputs: Sequence[EditInputs], seeds: Sequence[Sequence[int]]
    ) -> Sequence[Sequence[Image.Image]]:
        """Make several edits in one call, with the same number of seeds. Errors as in `edit`, for the whole group."""
        ...


@dataclass
class BatchCounts:
    """Counts of the edits of a batch: done, skipped, failed.

    Attributes:
        done: number of edits that were made now.
        skipped: number of edits that were already finished.
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
    """Return a message about what to do if an edit needs too much memory."""
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
    """Create the folders of all outputs.

    Raises:
        InputError: a folder cannot be created, or an output cannot be written as an image.
    """
    for folder in dict.fromkeys(edit.output.parent for edit in edits):
        check_output_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
    for edit in edits:
        check_writable(edit.output, is_tried=False)


@dataclass
class _Ready:
    """An edit with its images, and its missing results: seed -> file to write."""

    edit: Edit
    inputs: EditInputs
    todo: dict[int, Path]


class EditGroups:
    """Collects edits into groups, makes and counts them. Finished edits are skipped.

    Args:
        editor: reads the images and edits them.
        tally: the counts to update.
        num_images: number of results of each edit; result i has the edit's seed + i, so missing ones can be made alone.
        force: make finished edits again.
        batch_size: largest number of edits in a group. The edits of a group have the same `keep_shape`, number of
            missing results and number of references.
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
            OutputError: the disk is full, which ends the batch; the last results are saved elsewhere.
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
            except InputError:  # one edit is wrong, or the memory does not suffice for all: they are made one by one
                pass
            else:
                lost = []
                for each, results in zip(group, together, strict=True):
                    try:
                        self._write(each, results)
                    except OutputError as error:  # the disk is full: the other results are also saved elsewhere
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
                except OutputError as second:  # this result is lost, but the others may still be saved
                    problem = str(second)
                if is_full_disk(error):
                    raise OutputError(problem) from error
                problems.append(problem)
        if problems:
            self.tally.failures.append((made.edit, "; ".join(problems)))
        else:
            self.tally.done += 1


def check_sheet_apart(sheet: Path, edits: Sequence[Edit], num_images: int) -> None:
    """Check that a contact sheet, which each run of a batch overwrites, is not also another image of the batch.

    Raises:
        InputError: the batch also reads or writes this file.
    """
    for edit in edits:
        for path in (*edit.inputs, *number_outputs(edit.output, num_images)):
            if path.resolve() == sheet.resolve():
                raise InputError(f"--contact-sheet {sheet} is also an image of the batch; choose another name")


def check_new(paths: Sequence[Path], force: bool) -> None:
    """Check that files can be written, do not exist yet (unless `force` is set), and are not named twice.

    Args:
        paths: images, or ``.npz`` files.
        force: replace existing files.

    Raises:
        InputError: the message names all files that exist, or the first that cannot be written.
    """
    for path in paths:
        (check_output_file if path.suffix == ".npz" else check_writable)(path)
    there = [str(path) for path in paths if path.exists()]
    if there and not force:
        verb = "exists" if len(there) == 1 else "exist"
        raise InputError(f"{', '.join(there)} {verb}; choose another name, or overwrite with --force")
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError(f"two outputs have the same name: {', '.join(map(str, paths))}")
