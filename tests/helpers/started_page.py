"""The editing page in a process of its own: the real command, over a toy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mimicbrush.assembly import build_components
from mimicbrush.models.options import ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.pipelines import MimicBrushPipeline

ROOT = Path(__file__).parents[2]


@dataclass
class StartedPage:
    """A page that runs: its process, its address without a token, and the folder that it may write to."""

    process: subprocess.Popen[str]
    address: str
    token: str
    temporary: Path

    def end(self, number: signal.Signals = signal.SIGTERM) -> float:
        """End it with a signal, check that nothing of any visitor is left, and return how long it took, seconds."""
        begin = time.monotonic()
        self.process.send_signal(number)
        assert self.process.wait(60) == 128 + number
        assert not list(self.temporary.iterdir())
        return time.monotonic() - begin


@contextmanager
def started_page(model: ToyModel, folder: Path, *options: str) -> Iterator[StartedPage]:
    pipeline = MimicBrushPipeline(**vars(build_components(model, 0)), scheduler=noise_scheduler())
    pipeline.register_to_config(default_num_inference_steps=3, default_guidance_scale=2.0)
    pipeline.save_pretrained(folder / "pipeline")
    command = [sys.executable, "scripts/app.py", "--model", str(folder / "pipeline"), "--port", "0", *options]
    (temporary := folder / "temporary").mkdir()
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "TMPDIR": str(temporary)}, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said.startswith("edit at http://"), said
            address, _, token = said.split()[2].partition("?token=")
            yield StartedPage(process, address, token, temporary)
        finally:
            process.kill()
