"""A training run at the smallest size, through the real configuration, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from composed import compose_train
from safetensors.torch import load_file

from mimicbrush import assembly

SHORTEST = [
    "+experiment=smoke",
    "train.batch_size=2",
    "train.total_batch_size=2",
    "train.log_every=2",
    "train.checkpoint_every=3",
    "data.num_workers=0",
]
SMALLEST = [
    *SHORTEST,
    "model.size_px=16",
    "model.block_out_channels=[16,32]",
    "model.attention_heads=2",
    "model.context_width=16",
]


def forget_accelerate() -> None:
    """Let the next run in this process choose its precision anew."""
    AcceleratorState._reset_state()
    PartialState._reset_state()


def train(mined: Path, run_dir: Path, *overrides: str) -> int:
    return train_with(mined, run_dir, *SMALLEST, *overrides)


def train_with(mined: Path, run_dir: Path, *overrides: str) -> int:
    """With all overrides given, as `SMALLEST` or `SHORTEST` begin them."""
    config = compose_train(f"data.root={mined}", f"run_dir={run_dir}", *overrides)
    return assembly.train(config, run_dir)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{key}": value
        for part in ("unet", "reference_unet", "image_projector", "depth_projector")
        for key, value in load_file(run_dir / "pipeline" / part / "diffusion_pytorch_model.safetensors").items()
    }


def differing(one: Path, other: Path) -> list[str]:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def everything(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights, average and optimizer of a checkpoint."""
    return {
        f"{group}/{name}": value
        for group in ("weights", "ema", "optimizer")
        for name, value in load_file(checkpoint / f"{group}.safetensors").items()
    }
