from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from toy_run import forget_accelerate, train

from mimicbrush.errors import CheckpointError, InputError
from mimicbrush.training import checkpoints
from mimicbrush.training.checkpoints import CheckpointSaver


def tensors(step: int, numbers: int = 64) -> checkpoints.Tensors:
    return {"weights": {"w": torch.full((numbers,), float(step))}, "ema": {"w": torch.full((numbers,), step / 2)}}


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return checkpoints.write_checkpoint(folder, step, tensors(step), {"identity": {"seed": 1}}, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_checkpoint_holds_what_was_given(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert checkpoints.verify_checkpoint(path) is None
    state = checkpoints.read_state(path)
    assert state["step"] == 3 and state["identity"] == {"seed": 1}
    assert torch.equal(load_file(path / "ema.safetensors")["w"], tensors(3)["ema"]["w"])


def test_old_ones_go_only_after_the_new_one_is_there(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_damaged_ones_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step-00000002" / "ema.safetensors").unlink()
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    save(tmp_path, 4, keep=1)  # two stay, whatever is asked for
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("file", ["weights.safetensors", "ema.safetensors", "state.json"])
def test_a_damaged_newest_one_lets_no_older_one_go(tmp_path: Path, file: str) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    for step in (3, 4, 5):
        path = save(tmp_path, step)
        flip_a_bit(path / file, (path / file).stat().st_size - 5)  # of the same size
    found = checkpoints.find_checkpoint(tmp_path, "latest", lambda message: None)
    assert found is not None and found.name == "step-00000002"
    for step in (6, 7, 8):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000007", "step-00000008"]


def test_half_written_ones_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000002.tmp").mkdir()  # killed while writing
    (tmp_path / "step-00000000.old.tmp").mkdir()  # killed while deleting
    found = checkpoints.find_checkpoint(tmp_path, "latest")
    assert found is not None and found.name == "step-00000001"
    assert save(tmp_path, 2).name == "step-00000002"
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_one_that_was_damaged_without_a_change_of_size_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    flip_a_bit(tmp_path / "step-00000002" / "ema.safetensors", 200)
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        save(folder, step)
    return folder


FILES = ("weights.safetensors", "ema.safetensors", "state.json")
#: Where a file is changed, as a part of its length, and how: another byte, one less, or one more.
CHANGES = st.tuples(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(-1, 256))


@given(CHANGES)
def test_any_changed_byte_is_found_or_harmless_and_the_one_before_is_taken(
    two_saved: Path, change: tuple[str, float, int]
) -> None:
    file, place, kind = change
    newest = checkpoints.checkpoint_path(two_saved, 2)
    path, said = newest / file, list[str]()
    honest = path.read_bytes()
    state = checkpoints.read_state(newest)
    at = int(place * len(honest))
    new = {-1: b"", 256: b"x" + honest[at : at + 1]}.get(kind, bytes([kind % 256]))
    path.write_bytes(honest[:at] + new + honest[at + 1 :])
    try:
        found = checkpoints.find_checkpoint(two_saved, "latest", said.append)
        assert found is not None
        if found == newest:  # the byte that was there, or a space in JSON in place of a line's end
            assert checkpoints.read_state(newest) == state
            assert file == "state.json" or path.read_bytes() == honest
        else:
            assert found.name == "step-00000001" and "step-00000002 is damaged" in said[-1]
    finally:
        path.write_bytes(honest)


def test_where_all_are_damaged_nothing_starts_anew_in_silence(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="all 1 checkpoints"):
        checkpoints.find_checkpoint(tmp_path, "latest")


def test_what_resume_may_name(tmp_path: Path) -> None:
    assert checkpoints.find_checkpoint(tmp_path, "latest") is None
    assert checkpoints.find_checkpoint(tmp_path, "never") is None
    path = save(tmp_path, 5)
    assert checkpoints.find_checkpoint(tmp_path, str(path)) == path
    with pytest.raises(CheckpointError, match="already has checkpoints"):
        checkpoints.find_checkpoint(tmp_path, "never")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoints.find_checkpoint(tmp_path, str(tmp_path / "nowhere"))
    save(tmp_path, 6)
    with pytest.raises(CheckpointError, match=r"has other checkpoints \(step-00000006\)"):
        checkpoints.find_checkpoint(tmp_path, str(path))
    with pytest.raises(CheckpointError, match="has other checkpoints"):
        checkpoints.find_checkpoint(save(tmp_path / "elsewhere", 9).parent, str(path))
    checkpoints.check_identity(path, {"seed": 1})
    with pytest.raises(CheckpointError, match="seed: was 1, now 2"):
        checkpoints.check_identity(path, {"seed": 2})
    (tmp_path / "step-00000006" / "ema.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors has 1 bytes"):
        checkpoints.find_checkpoint(tmp_path, str(tmp_path / "step-00000006"))


def test_checkpoints_of_the_first_format_are_refused_plainly(tmp_path: Path) -> None:
    old = tmp_path / "step-00000007"
    old.mkdir()
    (old / "state.json").write_text(json.dumps({"step": 7, "seed": 1}))
    with pytest.raises(CheckpointError, match="has format 1, and this version of mimicbrush reads format 2"):
        checkpoints.check_identity(old, {"seed": 1})


def test_a_full_disk_leaves_the_old_ones_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    saver = CheckpointSaver(tmp_path, 2, said.append)
    saver.save(1, tensors(1), {"identity": {}})
    saver.wait()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_flush", full)
        saver.save(2, tensors(2), {"identity": {}})
        saver.wait()
        assert saver.num_failed == 1 and "No space left" in said[0] and "are intact" in said[0]
        # As at the last step of a run that saves in the foreground: it was reported, and still there is none.
        with pytest.raises(CheckpointError, match="the last checkpoint could not be written"):
            saver.wait(must_succeed=True)
        assert saver.num_failed == 1
        saver.save(2, tensors(2), {"identity": {}})
        with pytest.raises(CheckpointError, match="the last checkpoint could not be written"):
            saver.wait(must_succeed=True)
    assert names(tmp_path) == ["step-00000001"]
    saver.save(3, tensors(3), {"identity": {}})
    saver.wait(must_succeed=True)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(OSError, match=r"and the disk has 0\.00 GB left"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs a small file system of its own")
def test_a_disk_that_fills_while_it_is_written(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        save(tmp_path, 1)
        # By their bytes alone they fit; headers and state.json do not.
        half = (shutil.disk_usage(tmp_path).free - 1024) // 8
        big = {"weights": {"w": torch.zeros(half)}, "ema": {"w": torch.zeros(half)}}
        with pytest.raises(OSError):
            checkpoints.write_checkpoint(tmp_path, 2, big, {"identity": {}}, 2)
        assert names(tmp_path) == ["step-00000001"]
        found = checkpoints.find_checkpoint(tmp_path, "latest")
        assert found is not None and found.name == "step-00000001"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def save_until_killed(folder: Path, first: int, told: int) -> None:
    """Save step after step, and tell each that is saved."""
    for step in range(first, first + 100_000):
        checkpoints.write_checkpoint(folder, step, tensors(step, numbers=50_000), {"identity": {}}, 2)
        os.write(told, step.to_bytes(8, "big"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("kills", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_at_random_moments_lose_at_most_one_interval(kills: int, tmp_path: Path) -> None:
    rng = random.Random(0)
    saved = 0
    interrupted = 0
    for kill in range(kills):
        reading, told = os.pipe()
        # No thread of PyTorch runs in the child: filling and writing tensors of this size needs none.
        child = os.fork()
        if child == 0:
            os.close(reading)
            save_until_killed(tmp_path, saved + 1, told)
            os._exit(0)
        os.close(told)
        if kill % 4 == 0:
            os.read(reading, 8)  # at least one more was saved
            saved += 1
        time.sleep(rng.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while os.read(reading, 8):
            saved += 1
        os.close(reading)
        interrupted += any(path.suffix == ".tmp" for path in tmp_path.iterdir())
        found = checkpoints.find_checkpoint(tmp_path, "latest", pytest.fail)
        assert found is not None
        step = checkpoints.read_state(found)["step"]
        assert step in (saved, saved + 1)  # the last may have got its name without having been told
        assert float(load_file(found / "weights.safetensors")["w"][0]) == step
        good = [path for path in checkpoints.list_checkpoints(tmp_path) if checkpoints.verify_checkpoint(path) is None]
        assert len(good) >= min(2, step)
        saved = step
    assert saved > kills / 10 and interrupted > kills / 10, (saved, interrupted)


def test_a_disk_without_room_for_the_checkpoints_is_said_before_training(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(run_dir: Path, free: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("mimicbrush.io.outputs.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
            train(mined, run_dir, "train.max_steps=1")

    run(tmp_path / "run", 10**12)
    forget_accelerate()
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").glob("*/*"))
    # Three are needed for a new run, and the estimate is that of the files within a tenth.
    run(tmp_path / "fits", round(3.1 * size))
    forget_accelerate()
    with pytest.raises(InputError, match=r"run_dir=\S+full needs about 0.0\d+ GB, and the disk has .* left; free some"):
        run(tmp_path / "full", round(2.7 * size))
    assert not (tmp_path / "full" / "metrics.jsonl").exists()
