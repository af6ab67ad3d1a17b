from __future__ import annotations

from pathlib import Path

import pytest

from mimicbrush.assembly.run_folder import (
    FINISHED_FILE,
    FinishedRun,
    find_finished_run,
    read_finished_run,
    write_finished_run,
)
from mimicbrush.errors import CheckpointError

IDENTITY = {"seed": 0, "train.learning_rate": 0.1}
DONE = FinishedRun(20, 1.5, {"loss": 0.5, "loss_inside": None}, IDENTITY)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_finished_run(tmp_path) is None and find_finished_run(tmp_path, IDENTITY, 20, "never") is None
    write_finished_run(tmp_path, DONE)
    assert read_finished_run(tmp_path) == DONE
    assert [path.name for path in tmp_path.iterdir()] == [FINISHED_FILE]
    for damage in ("", '{"steps": 20}', "[]"):
        (tmp_path / FINISHED_FILE).write_text(damage)
        with pytest.raises(CheckpointError, match="is damaged"):
            read_finished_run(tmp_path)


def test_a_complete_run_is_skipped_and_none_is_written_over(tmp_path: Path) -> None:
    write_finished_run(tmp_path, DONE)
    assert find_finished_run(tmp_path, IDENTITY, 20, "latest") == DONE
    assert find_finished_run(tmp_path, IDENTITY, 10, "latest") == DONE
    with pytest.raises(
        CheckpointError, match=r"another run, which is complete \(train.learning_rate: was 0.1, now 0.2"
    ):
        find_finished_run(tmp_path, {**IDENTITY, "train.learning_rate": 0.2}, 20, "latest")
    with pytest.raises(CheckpointError, match=r"no checkpoint to continue from to train\.max_steps=30"):
        find_finished_run(tmp_path, IDENTITY, 30, "latest")
    with pytest.raises(CheckpointError, match="already has this run"):
        find_finished_run(tmp_path, IDENTITY, 20, "never")
    (tmp_path / "checkpoints" / "step-00000020").mkdir(parents=True)
    assert find_finished_run(tmp_path, IDENTITY, 20, "latest") == DONE
    assert find_finished_run(tmp_path, IDENTITY, 30, "latest") is None  # there is more to do
    assert find_finished_run(tmp_path, IDENTITY, 20, "never") is None  # who looks for checkpoints will refuse
