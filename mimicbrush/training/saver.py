"""Saving while the training goes on: the tensors are copied, and a thread writes the copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mimicbrush.errors import CheckpointError
from mimicbrush.training.checkpoints import Tensors, write_checkpoint


class CheckpointSaver:
    """Writes one checkpoint at a time in the background. safetensors and hashing let other threads run.

    Args:
        folder: of all checkpoints.
        keep: see `write_checkpoint`.
        say: is told of checkpoints that could not be written.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None]) -> None:
        self.folder, self.keep, self.say = folder, keep, say
        self.num_failed = 0
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def save(self, step: int, tensors: Tensors, state: Mapping[str, Any]) -> None:
        """Begin to write; waits for the one before. The tensors must not be changed any more."""
        self.wait()
        self._writing = self._pool.submit(write_checkpoint, self.folder, step, tensors, state, self.keep)

    def wait(self, must_succeed: bool = False) -> None:
        """Until nothing is being written. A checkpoint that could not be written is told of here.

        Args:
            must_succeed: the run ends here, so that such a checkpoint is an error.

        Raises:
            CheckpointError: the last one could not be written.
        """
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except OSError as error:
            self.num_failed += 1
            kept = f"Older ones in {self.folder} are as they were"
            if must_succeed:
                raise CheckpointError(
                    f"the last checkpoint could not be written ({error}). {kept}: make room, and go on from there "
                    "with train.resume=latest"
                ) from error
            self.say(f"a checkpoint could not be written ({error}). {kept}; the run goes on and tries again later")

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being written, so that `wait` does not wait."""
        return self._writing is None or self._writing.done()
