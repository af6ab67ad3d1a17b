"""scripts/train.py with eyes on it, for tests.

WATCH=FILE notes what every process feeds its loss, SHARD=1 shards, SIGNAL=N signals one of the processes, STUCK=N stops
the workers of process N, FULL=1 fills the disk of the pipeline. accelerate starts FSDP on GPUs only; with
the changes here, the same code runs on CPUs.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from faulty_data import FaultyDataset

from mimicbrush.assembly import training_run
from mimicbrush.data import dataset
from mimicbrush.training import method
from mimicbrush.training.export import PipelineExporter
from mimicbrush.training.noise import NoiseSample


def note_inputs(file: Path) -> None:
    """Per sample: its key, its timestep, hashes of its noise and posteriors, whether reference and depth are kept."""
    honest = NoiseSample.for_keys.__func__

    def noting(cls: type[NoiseSample], keys: Any, *arguments: Any, **options: Any) -> NoiseSample:
        noise_sample = honest(cls, keys, *arguments, **options)
        lines = [
            json.dumps(
                [
                    key,
                    int(noise_sample.timestep[row]),
                    hashlib.sha256(noise_sample.noise[row].numpy().tobytes()).hexdigest()[:16],
                    hashlib.sha256(noise_sample.posteriors[:, row].numpy().tobytes()).hexdigest()[:16],
                    bool(noise_sample.keep_reference[row]),
                    bool(noise_sample.keep_depth[row]),
                ]
            )
            for row, key in enumerate(keys.tolist())
        ]
        with file.with_suffix(f".{os.environ.get('RANK', 0)}").open("a") as opened:
            opened.writelines(f"{line}\n" for line in lines)
        return noise_sample

    NoiseSample.for_keys = classmethod(noting)  # type: ignore[method-assign]


def shard() -> None:
    """Let accelerate take the CPUs for GPUs where it decides about FSDP."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    honest = training_run.make_accelerator

    def sharding(*arguments: Any) -> Any:
        accelerator = honest(*arguments)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["BasicTransformerBlock", "ResnetBlock2D"],
            cpu_ram_efficient_loading=False,
        )
        if accelerator.mixed_precision != "no":
            accelerator.state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.distributed_type = DistributedType.FSDP
        return accelerator

    training_run.make_accelerator = sharding


def signal_one_process() -> None:
    """Let the last process hear a signal in its third step."""
    honest, passes = method.denoising_loss, [0]

    def interrupting(*arguments: Any) -> Any:
        passes[0] += 1
        if passes[0] == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        return honest(*arguments)

    method.denoising_loss = interrupting


def stop_workers(rank: str) -> None:
    """Let the workers of one process stop answering after a few samples."""
    if os.environ["RANK"] == rank:
        FaultyDataset.fault = ("stuck", 6, Path(os.devnull))
        dataset.PairDataset = FaultyDataset  # type: ignore[misc]


def fill_disk() -> None:
    """Let the first process find the disk full when it has begun to make a pipeline."""
    honest = PipelineExporter._build_pipeline

    def filling(exporter: PipelineExporter, weights: Any, *arguments: Any) -> Any:
        if os.environ["RANK"] != "0":
            return honest(exporter, weights, *arguments)
        next(weights)
        raise OSError(errno.ENOSPC, "No space left on device")

    PipelineExporter._build_pipeline = filling  # type: ignore[method-assign]


if __name__ == "__main__":
    if "SIGNAL" in os.environ:
        signal_one_process()
    if "WATCH" in os.environ:
        note_inputs(Path(os.environ["WATCH"]))
    if "SHARD" in os.environ:
        shard()
    if "STUCK" in os.environ:
        stop_workers(os.environ["STUCK"])
    if "FULL" in os.environ:
        fill_disk()
    script = Path(__file__).parents[2] / "scripts" / "train.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
