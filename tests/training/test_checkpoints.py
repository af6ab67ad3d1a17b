from __future__ import annotations

from pathlib import Path

import pytest

from mimicbrush.errors import CheckpointError
from mimicbrush.training import checkpoints
from mimicbrush.training.metrics_log import MetricsLog


def save(folder: Path, step: int, keep: int = 2) -> Path:
    aside = checkpoints.begin(folder, step)
    (aside / "weights").write_text(str(step))
    return checkpoints.finish(aside, {"step": step, "seed": 1}, keep)


def test_old_ones_go_only_after_the_new_one_is_there(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]


def test_half_written_ones_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoints.begin(tmp_path, 2)  # and killed here
    assert checkpoints.find_checkpoint(tmp_path, "latest").name == "step-00000001"
    assert save(tmp_path, 2).name == "step-00000002"


def test_what_resume_may_name(tmp_path: Path) -> None:
    assert checkpoints.find_checkpoint(tmp_path, "latest") is None
    assert checkpoints.find_checkpoint(tmp_path, "never") is None
    path = save(tmp_path, 5)
    assert checkpoints.find_checkpoint(tmp_path, str(path)) == path
    with pytest.raises(CheckpointError, match="already holds checkpoints"):
        checkpoints.find_checkpoint(tmp_path, "never")
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        checkpoints.find_checkpoint(tmp_path, str(tmp_path / "nowhere"))
    save(tmp_path, 6)
    with pytest.raises(CheckpointError, match=r"holds other checkpoints \(step-00000006\)"):
        checkpoints.find_checkpoint(tmp_path, str(path))
    with pytest.raises(CheckpointError, match="holds other checkpoints"):
        checkpoints.find_checkpoint(save(tmp_path / "elsewhere", 9).parent, str(path))
    assert checkpoints.read_state(path, {"seed": 1}) == 5
    with pytest.raises(CheckpointError, match="seed: 1 there, 2 now"):
        checkpoints.read_state(path, {"seed": 2})
    (path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.read_state(path, {"seed": 1})


def test_metrics_beyond_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n{"step": 10}\n{"step": 15}\n{"ste')
    MetricsLog(path, 10).append({"step": 15, "loss": 1.0})
    assert path.read_text() == '{"step": 5}\n{"step": 10}\n{"step": 15, "loss": 1.0}\n'
