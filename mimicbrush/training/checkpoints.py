"""Writes, verifies and deletes checkpoints on disk. They are written under another name, and renamed when complete.

A checkpoint is a folder ``step-00001000`` with safetensors files and a ``state.json``, which has the size and the
SHA-256 of each file and is written last. `training.state` decides what a checkpoint contains.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimicbrush.errors import CheckpointError, UnsavedError
from mimicbrush.io.atomic import apply_umask, write_json
from mimicbrush.io.stored_files import find_changed_file, list_stored_files, parse_stored_files

if TYPE_CHECKING:
    import torch

STATE_FILE = "state.json"
#: At least this many good checkpoints are kept, even if `keep` is smaller.
LEAST_KEPT = 2
#: Increased by 1 if older checkpoints can no longer be read.
FORMAT = 2
_NAME = re.compile(r"step-\d{8,}")

#: File name (without suffix) -> name -> tensor on the CPU.
Tensors = Mapping[str, Mapping[str, "torch.Tensor"]]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after this many steps."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """List all complete checkpoints, oldest first, including damaged ones."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())


def write_checkpoint(folder: Path, step: int, tensors: Tensors, state: Mapping[str, Any], keep: int) -> Path:
    """Write a complete checkpoint, then delete all but the newest `keep` good ones.

    Args:
        folder: folder of all checkpoints; it is created if it does not exist.
        step: number of steps done.
        tensors: tensors to save, by file.
        state: further values to save as JSON.
        keep: number of checkpoints to keep; at least `LEAST_KEPT` are kept.

    Returns:
        The new folder.

    Raises:
        OSError: the disk is full or cannot be written; no incomplete files stay, and all older checkpoints are kept.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = checkpoint_path(folder, step)
    aside = final.with_suffix(".tmp")
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    try:
        _check_space(folder, sum(value.nbytes for group in tensors.values() for value in group.values()))
        aside.mkdir()
        for name, group in tensors.items():
            path = aside / f"{name}.safetensors"
            save_file({key: value.contiguous() for key, value in group.items()}, path)
            _flush(path)
        files = list_stored_files(aside, aside.iterdir())
        _write_json(aside / STATE_FILE, {"format": FORMAT, "step": step, **state, "files": files})
        apply_umask(aside)
        _flush(aside)
        if final.exists():  # of a run that continued from an older checkpoint, because the newer one was damaged
            _remove(final)
        aside.rename(final)
        _flush(folder)
    except SafetensorError as error:  # safetensors raises this for errors of the disk
        raise OSError(errno.EIO, str(error), str(aside)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _rotate(folder, keep)
    return final


def find_checkpoint(folder: Path, resume: str, say: Callable[[str], None] = print) -> Path | None:
    """Find the checkpoint to resume from; None to start a new run.

    Args:
        folder: folder of all checkpoints.
        resume: "never": None; "latest": the newest intact checkpoint, or None if there are none; or the folder of a
            checkpoint.
        say: called with a message for each damaged checkpoint that is skipped.

    Raises:
        CheckpointError: `resume` is "never", but there are checkpoints; or all are damaged; or the folder is not a good
            checkpoint.
    """
    existing = list_checkpoints(folder)
    if resume == "never":
        if existing:
            raise CheckpointError(
                f"{folder} already has checkpoints (up to {existing[-1].name}); continue with "
                "train.resume=latest, or start in another folder (run_dir=..., or hydra.sweep.dir=... for a sweep)"
            )
        return None
    if resume == "latest":
        for path in reversed(existing):
            damage = verify_checkpoint(path)
            if damage is None:
                return path
            say(f"{path} is damaged ({damage}); trying the one before it")
        if existing:
            raise CheckpointError(
                f"all {len(existing)} checkpoints in {folder} are damaged; restore one from a copy, or move them away "
                "to start again"
            )
        return None
    return _find_named_checkpoint(folder, resume, existing)


def check_named_checkpoint(checkpoint: Path) -> Path:
    """Verify the folder of a checkpoint that a user named, and return it.

    Raises:
        CheckpointError: it is not a checkpoint, or it is damaged.
    """
    if not (checkpoint / STATE_FILE).is_file():
        raise CheckpointError(f"{checkpoint} is not a checkpoint (it has no {STATE_FILE})")
    damage = verify_checkpoint(checkpoint)
    if damage is not None:
        raise CheckpointError(f"{checkpoint} is damaged ({damage})")
    return checkpoint


def _find_named_checkpoint(folder: Path, resume: str, existing: list[Path]) -> Path:
    path = Path(resume)
    if not (path / STATE_FILE).is_file():
        raise CheckpointError(
            f"train.resume={resume}: there is no checkpoint (no {STATE_FILE}); expected never, latest, or the folder "
            "of a checkpoint"
        )
    later = [other.name for other in existing if path.resolve().parent == folder.resolve() and other.name > path.name]
    if later or (existing and path.resolve().parent != folder.resolve()):
        raise CheckpointError(
            f"train.resume={resume}: {folder} has other checkpoints ({', '.join(later or [existing[-1].name])}), "
            "and the new ones would be mixed with them; use another run_dir, or move them away"
        )
    return check_named_checkpoint(path)


def verify_checkpoint(checkpoint: Path, deep: bool = True) -> str | None:
    """Find what is wrong with a checkpoint; None if it is intact.

    The size of every file is compared and, if `deep`, its hash, which takes about a second per gigabyte.
    """
    try:
        files = parse_stored_files(_read_json(checkpoint / STATE_FILE)["files"])
        found = find_changed_file(checkpoint, files, deep=deep)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE_FILE} or a file that it names cannot be read: {error!r}"
    return None if found is None else " ".join(found)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the JSON of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or is of another version.
    """
    try:
        state = _read_json(checkpoint / STATE_FILE)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint} is damaged ({error}); move it away to use the one before it") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{checkpoint} has format {state.get('format', 1)}, and this version of mimicbrush reads format {FORMAT}"
        )
    return state


def check_identity(checkpoint: Path, expected: Mapping[str, Any]) -> None:
    """Check that a checkpoint belongs to the same run.

    Args:
        checkpoint: its folder.
        expected: options and other values that must be the same, so that the run continues as if it was not
            interrupted.

    Raises:
        CheckpointError: the run differs; the message names all differences. Or see `read_state`.
    """
    differing = find_identity_differences(read_state(checkpoint)["identity"], expected)
    if differing:
        raise CheckpointError(
            f"{checkpoint} belongs to another run ({'; '.join(differing)}); "
            "use the same options, or start in another run_dir"
        )


#: Options that old checkpoints lack -> the values that describe what earlier versions did.
ADDED_LATER: dict[str, Any] = {
    "data.num_matches": 64,
    "data.fixed_views": 0,
    "data.num_references": 1,
    "data.geometry.identity_probability": 0.0,
    "train.correspondence_weight": 0.0,
    "train.correspondence_final": "None",
    "train.correspondence_heads": 0.5,
    "train.unrelated_reference_ratio": 0.0,
    "train.noise_on": "cpu",
    "train.distill": "none",
    "train.distill_guidance": "[5.0, 5.0]",
    "train.distill_ddim_steps": 50,
    "train.distill_huber_c": 0.001,
    "train.correspondence_layers": "[]",
    "train.hole_weight": 1.0,
    "train.timestep_sampling": "uniform",
    "train.timestep_logit_mean": 0.0,
    "train.timestep_logit_std": 1.0,
    "train.transformer": "lora",
    "train.rescale_betas_zero_snr": False,
    "train.latent_channel_weights": "[1.0, 1.0, 1.0, 1.0]",
}


def find_identity_differences(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """List the differences between two runs, for a message."""
    before = {**ADDED_LATER, **stored}
    return [
        f"{name}: was {before.get(name)!r}, now {value!r}"
        for name, value in expected.items()
        if before.get(name) != value
    ]


def estimate_missing_bytes(folder: Path, num_trained: int, *, has_average: bool) -> int:
    """Estimate the least space that the checkpoints of a run need in addition to those that exist.

    `LEAST_KEPT` are kept, and a new one is written before the oldest is deleted. `keep_checkpoints` may be larger, but
    a run may end before it is reached. Weights, both moments of Adam and the average are float32.

    Args:
        folder: folder of the checkpoints.
        num_trained: number of trained parameters.
        has_average: whether averaged weights are also stored.
    """
    num_missing = max(1, LEAST_KEPT + 1 - len(list_checkpoints(folder)))
    return num_missing * num_trained * 4 * (4 if has_average else 3)


def _rotate(folder: Path, keep: int) -> None:
    """Delete all checkpoints that are older than the newest `keep` good ones; damaged ones do not count.

    The hashes of those that are kept are verified, so that no good checkpoint is deleted in favour of a damaged one.
    This takes about a second per gigabyte, and is done only if there are checkpoints to delete.
    """
    good, least, paths = 0, max(keep, LEAST_KEPT), list_checkpoints(folder)
    if len(paths) <= least:
        return
    for path in reversed(paths):
        if good >= least:
            _remove(path)
        else:
            good += verify_checkpoint(path) is None


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a half-deleted folder does not look like a checkpoint."""
    renamed = checkpoint.with_suffix(".old.tmp")
    with contextlib.suppress(OSError):  # a folder that cannot be deleted now is tried again with the next checkpoint
        checkpoint.rename(renamed)
        shutil.rmtree(renamed, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    for leftover in folder.glob("step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint needs {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left",
            str(folder),
        )


def _write_json(path: Path, state: Mapping[str, Any]) -> None:
    """Write JSON with its own hash, so that damage to this file is also noticed."""
    write_json(path, {"sha256": _json_hash(state), "state": state})


def _read_json(path: Path) -> dict[str, Any]:
    outer = json.loads(path.read_text())
    if "state" not in outer:
        return {"format": 1}  # written by the first version, without hashes
    state: dict[str, Any] = outer["state"]
    if _json_hash(state) != outer["sha256"]:
        raise ValueError(f"{path.name} has changed since it was written (different hash)")
    return state


def _json_hash(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk; Windows cannot do this for folders."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class CheckpointSaver:
    """Writes one checkpoint at a time in a thread, while training continues.

    Safetensors and hashing release the GIL, so training is hardly slower meanwhile.

    Args:
        folder: folder of all checkpoints.
        keep: see `write_checkpoint`.
        say: called with a message for each checkpoint that could not be written.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None]) -> None:
        self.folder, self.keep, self.say = folder, keep, say
        self.num_failed = 0
        self._latest_error: Exception | None = None  # error of the latest checkpoint; None if it was written
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def save(self, step: int, tensors: Tensors, state: Mapping[str, Any]) -> None:
        """Start to write a checkpoint, when the one before is done. The caller must not change the tensors any more."""
        self.wait()
        self._writing = self._pool.submit(write_checkpoint, self.folder, step, tensors, state, self.keep)

    def wait(self, must_succeed: bool = False) -> None:
        """Wait until nothing is being written, and report a checkpoint that could not be written.

        Args:
            must_succeed: raise an error if the latest checkpoint was not written, also if this was reported before;
                for the end of a run.

        Raises:
            UnsavedError: the latest checkpoint could not be written, and `must_succeed` is set.
        """
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
                self._latest_error = None
        except (OSError, MemoryError) as error:
            self.note_failure(error, must_succeed)
        if must_succeed and self._latest_error is not None:
            raise self._unsaved_error(self._latest_error) from self._latest_error

    def note_failure(self, error: Exception, must_succeed: bool = False) -> None:
        """Count and report a checkpoint that could not be made; `must_succeed` and errors as in `wait`."""
        self.num_failed += 1
        self._latest_error = error
        if must_succeed:
            raise self._unsaved_error(error) from error
        self.say(
            f"a checkpoint could not be written ({error}). Older ones in {self.folder} are intact; the run "
            "continues and tries again later"
        )

    def _unsaved_error(self, error: Exception) -> UnsavedError:
        return UnsavedError(
            f"the last checkpoint could not be written ({error}). Older ones in {self.folder} are intact: free some "
            "space, then continue with train.resume=latest"
        )
