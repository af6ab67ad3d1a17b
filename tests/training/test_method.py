"""The trainer knows a family of models by `TrainingMethod` alone: here one that has nothing to do with MimicBrush."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from toy_run import forget_accelerate, metrics

from mimicbrush.data.batch import DecodedBatch
from mimicbrush.training.checkpoints import find_checkpoint
from mimicbrush.training.export import ExportWeights
from mimicbrush.training.guards import BadSamples
from mimicbrush.training.method import TrainingMethod
from mimicbrush.training.metrics import TrainingHooks, TrainingMetrics
from mimicbrush.training.objective import NUM_BINS, TrainingLoss
from mimicbrush.training.options import TrainOptions
from mimicbrush.training.trainer import Trainer
from mimicbrush.types import TrainBatch


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


class Colours(NamedTuple):
    source: torch.Tensor
    reference: torch.Tensor


class ColourModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, colour: torch.Tensor) -> torch.Tensor:
        return self.frozen(colour) + self.linear(colour)


class ColourMethod:
    """Predicts the mean colour of a reference from that of its source, by a linear map."""

    reads_ema = False

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = ColourModel()

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def encode(self, batch: TrainBatch | DecodedBatch, device: torch.device) -> Colours:
        on_device = batch.to(device)
        return Colours(on_device.source.mean(dim=(2, 3)), on_device.reference.mean(dim=(2, 3)))

    def loss(self, model: nn.Module, inputs: Colours, step: int, average: Mapping[str, torch.Tensor]) -> TrainingLoss:
        error = (model(inputs.source) - inputs.reference).square().mean(dim=1)
        parts = torch.stack([error.detach().sum(), torch.tensor(float(len(error))), torch.zeros(()), torch.zeros(())])
        return TrainingLoss(error.mean(), parts, torch.zeros(2, NUM_BINS), torch.zeros(4))

    def export(self, weights: ExportWeights, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in weights}, folder / "colours.safetensors")


def load(first_step: int, last_step: int) -> Iterator[TrainBatch]:
    for step in range(first_step, last_step):
        source = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)) * 2 - 1
        keys = torch.arange(4) + 4 * step
        yield TrainBatch(source, -source, torch.ones(4, 1, 8, 8), keys, keys)


def train_colours(run_dir: Path, max_steps: int) -> dict[str, torch.Tensor]:
    """Train, or go on from the newest checkpoint; return what was exported."""
    run_dir.mkdir(exist_ok=True)
    method: TrainingMethod[Colours] = ColourMethod()
    options = TrainOptions(
        max_steps=max_steps, batch_size=4, total_batch_size=4, learning_rate=0.1, lr_warmup_steps=0, log_every=1,
        checkpoint_every=10, ema_decay=0.5,
    )  # fmt: skip
    trainer = Trainer(
        method,
        load,
        options,
        Accelerator(cpu=True),
        TrainingMetrics(torch.device("cpu"), 1, 1000),
        BadSamples(0.0, run_dir / "bad_samples.txt"),
        TrainingHooks(),
        run_dir,
        identity={},
        resume_from=find_checkpoint(run_dir / "checkpoints", "latest"),
    )
    assert trainer.train().step == max_steps
    return load_file(run_dir / "pipeline" / "colours.safetensors")


def test_another_family_of_models_learns_by_the_same_trainer(tmp_path: Path) -> None:
    start = dict(ColourMethod().model.named_parameters())
    weights = train_colours(tmp_path / "run", 60)
    losses = [values["loss"] for values in metrics(tmp_path / "run")]
    assert len(losses) == 60 and losses[-1] < 0.01 * losses[0]
    assert torch.equal(weights["frozen.weight"], start["frozen.weight"])
    # The reference is the negative of the source; the sum of both maps becomes just this.
    assert torch.allclose(weights["frozen.weight"] + weights["linear.weight"], -torch.eye(3), atol=0.2)
    assert not torch.equal(weights["linear.weight"], start["linear.weight"])


def test_another_family_of_models_resumes_to_the_same_bits(tmp_path: Path) -> None:
    straight = train_colours(tmp_path / "straight", 6)
    train_colours(tmp_path / "twice", 3)
    twice = train_colours(tmp_path / "twice", 6)
    assert straight.keys() == twice.keys() and all(torch.equal(straight[name], twice[name]) for name in straight)
