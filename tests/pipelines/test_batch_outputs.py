"""What cannot be written in a batch costs that edit alone; a full disk ends it, and loses nothing."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mimicbrush.errors import InputError, OutputError
from mimicbrush.io import atomic
from mimicbrush.pipelines.editing.batch import BatchCounts, EditGroups, prepare_outputs
from mimicbrush.pipelines.editing.inputs import EditInputs
from mimicbrush.pipelines.editing.requests import Edit

SIZE = (20, 10)


class Painter:
    """Paints every source red."""

    pastes_back = True

    def __init__(self, size: tuple[int, int] = SIZE) -> None:
        self.size, self.loaded = size, 0
        self.groups: list[list[tuple[str, list[int]]]] = []

    def read(self, edit: Edit) -> EditInputs:
        return EditInputs(Image.new("RGB", self.size), Image.new("L", self.size, 255), Image.new("RGB", self.size))

    def load(self) -> object:
        self.loaded += 1
        return None

    def edit(self, edit: Edit, inputs: EditInputs, seeds: Sequence[int]) -> Sequence[Image.Image]:
        return [Image.new("RGB", self.size, "red") for _ in seeds]

    def edit_together(
        self, edits: Sequence[Edit], inputs: Sequence[EditInputs], seeds: Sequence[Sequence[int]]
    ) -> Sequence[Sequence[Image.Image]]:
        self.groups.append([(edit.output.stem, list(of_one)) for edit, of_one in zip(edits, seeds, strict=True)])
        return [self.edit(edit, each, of_one) for edit, each, of_one in zip(edits, inputs, seeds, strict=True)]


def edits_to(*outputs: Path) -> list[Edit]:
    return [Edit(Path("s"), Path("m"), Path("r"), output) for output in outputs]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def test_an_edit_that_can_be_written_nowhere_fails_alone(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = edits_to(*(tmp_path / "out" / name for name in ("a.png", "b.png", "c.png")))
    prepare_outputs(edits)
    write = atomic.write_aside

    def refuse_b(path: Path, how: object) -> None:
        if path.name == "b.png":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        write(path, how)  # type: ignore[arg-type]

    monkeypatch.setattr("mimicbrush.io.images.write_aside", refuse_b)
    tally = BatchCounts()
    for edit in edits:
        EditGroups(Painter(), tally).add(edit)
    assert str(tally) == "3 edits = 2 done + 0 skipped + 1 failed"
    assert "The result cannot be saved elsewhere" in tally.failures[0][1] and not list(temporary.rglob("b.png"))


def test_an_edit_that_cannot_be_written_fails_alone_and_is_kept(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = edits_to(*(tmp_path / "out" / name for name in ("a.png", "b.webp", "c.png")))
    prepare_outputs(edits)
    write = atomic.write_aside

    def refuse_one(path: Path, how: object) -> None:
        if path == edits[1].output:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        write(path, how)  # type: ignore[arg-type]

    monkeypatch.setattr("mimicbrush.io.images.write_aside", refuse_one)
    tally = BatchCounts()
    for edit in edits:
        EditGroups(Painter(), tally).add(edit)
    assert str(tally) == "3 edits = 2 done + 0 skipped + 1 failed"
    (kept,) = temporary.rglob("b.png")
    assert "Permission denied" in tally.failures[0][1] and f"The result was saved as {kept}" in tally.failures[0][1]
    with Image.open(kept) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_a_full_disk_ends_the_batch_and_the_last_edit_is_kept(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (edit,) = edits_to(tmp_path / "a.png")
    write = atomic.write_aside

    def fill(path: Path, how: object) -> None:
        if path == edit.output:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, how)  # type: ignore[arg-type]

    monkeypatch.setattr("mimicbrush.io.images.write_aside", fill)
    with pytest.raises(OutputError, match="The result was saved as"):
        EditGroups(Painter(), BatchCounts()).add(edit)
    assert len(list(temporary.rglob("a.png"))) == 1


def test_a_format_that_cannot_hold_the_result_is_known_before_the_model_is_loaded(tmp_path: Path) -> None:
    painter, tally = Painter((16384, 3)), BatchCounts()
    for edit in edits_to(tmp_path / "a.webp", tmp_path / "a.ico", tmp_path / "a.png"):
        EditGroups(painter, tally).add(edit)
    assert painter.loaded == tally.done == 1
    (_, of_webp), (_, of_ico) = tally.failures
    assert "WEBP cannot store an image of 16384 x 3 px" in of_webp and "unknown image format '.ico'" in of_ico


def test_groups_have_one_way_and_one_number_of_results(tmp_path: Path) -> None:
    edits = edits_to(*(tmp_path / f"{name}.png" for name in "abcdef"))
    edits[1] = replace(edits[1], keep_shape=True, seed=5)
    (tmp_path / "c_0.png").touch()  # of c one result is missing
    painter, tally = Painter(), BatchCounts()
    groups = EditGroups(painter, tally, num_images=2, batch_size=2)
    for edit in edits:
        groups.add(edit)
    assert painter.groups == [[("a", [1, 2]), ("d", [1, 2])], [("e", [1, 2]), ("f", [1, 2])]]
    assert tally.done == 4 and not (tmp_path / "b_0.png").exists()
    groups.finish()  # b and c, each alone
    assert len(painter.groups) == 2 and str(tally) == "6 edits = 6 done + 0 skipped + 0 failed"
    assert len(list(tmp_path.iterdir())) == 12
    groups.finish()
    assert tally.total == 6


def test_a_failure_in_a_group_costs_its_edit_alone(tmp_path: Path) -> None:
    class Picky(Painter):
        def edit(self, edit: Edit, inputs: EditInputs, seeds: Sequence[int]) -> Sequence[Image.Image]:
            if edit.output.stem == "b":
                raise InputError("the mask is too thin")
            return super().edit(edit, inputs, seeds)

    tally = BatchCounts()
    groups = EditGroups(Picky(), tally, batch_size=3)
    for edit in edits_to(*(tmp_path / f"{name}.png" for name in "abc")):
        groups.add(edit)
    assert str(tally) == "3 edits = 2 done + 0 skipped + 1 failed" and tally.failures[0][1] == "the mask is too thin"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "c.png"]


def test_a_full_disk_loses_none_of_a_group(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = edits_to(tmp_path / "a.png", tmp_path / "b.png")
    write = atomic.write_aside

    def fill(path: Path, how: object) -> None:
        if path.parent == tmp_path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, how)  # type: ignore[arg-type]

    monkeypatch.setattr("mimicbrush.io.images.write_aside", fill)
    groups = EditGroups(Painter(), BatchCounts(), batch_size=2)
    groups.add(edits[0])
    with pytest.raises(OutputError, match=r"(?s)The result was saved as .*a\.png.*The result was saved as .*b\.png"):
        groups.add(edits[1])
    assert len(list(temporary.rglob("*.png"))) == 2
