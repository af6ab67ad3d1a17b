"""Training with several references: one is as before, equal ones follow the formula, and any split gives the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_run import everything, forget_accelerate, train

from mimicbrush.models.components import toy_components
from mimicbrush.models.options import ToyModel
from mimicbrush.models.reference_attention import join_references
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.training.checkpoints import checkpoint_path
from mimicbrush.training.correspondence_loss import correspondence_loss
from mimicbrush.training.noise import NoiseSample
from mimicbrush.training.objective import FrozenEncoders, MimicBrushModel, denoising_loss, list_reference_rows
from mimicbrush.training.options import TrainOptions
from mimicbrush.training.performance import apply_speedups, count_training_flop
from mimicbrush.types import Matches, ReferenceStates, TrainBatch

ROWS = 3


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


def a_batch(size_px: int, num_references: int) -> TrainBatch:
    generator = torch.Generator().manual_seed(0)
    source, *references = torch.rand(5, ROWS, 3, size_px, size_px, generator=generator) * 2 - 1
    mask = (torch.rand(ROWS, 1, size_px, size_px, generator=generator) > 0.5).float()
    xy = torch.rand(2, ROWS, 4, 2, generator=generator) * (size_px - 1)
    others = torch.stack(references[1:num_references], dim=1) if num_references > 1 else None
    matches = Matches(xy[0], xy[1], torch.ones(ROWS, 4, dtype=torch.bool))
    return TrainBatch(source, references[0], mask, torch.arange(ROWS), torch.arange(ROWS), (), matches, others)


def sample_noise(num_references: int, drop: float = 0.0) -> NoiseSample:
    return NoiseSample.for_keys(
        torch.arange(ROWS), (4, 8, 8), num_timesteps=1000, reference_drop_ratio=drop, depth_drop_ratio=0.0,
        num_references=num_references,
    )  # fmt: skip


def build(options: ToyModel) -> tuple[MimicBrushModel, FrozenEncoders]:
    parts = toy_components(options)
    torch.nn.init.normal_(parts.unet.conv_in.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    networks = (parts.unet, parts.reference_unet, parts.image_projector, parts.depth_projector)
    return MimicBrushModel(*networks, size_px=options.size_px), FrozenEncoders(parts, options)


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_more_references_change_no_other_random_number(device: torch.device | None) -> None:
    keys = torch.arange(100, 105)
    rates = {"num_timesteps": 1000, "reference_drop_ratio": 0.3, "depth_drop_ratio": 0.5, "noise_device": device}
    one, three = (NoiseSample.for_keys(keys, (4, 8, 8), num_references=count, **rates) for count in (1, 3))
    none = NoiseSample.for_keys(keys, (4, 8, 8), has_posteriors=False, **rates)
    assert none.posteriors.shape == (0, 5, 4, 8, 8)
    assert all(torch.equal(tensor, getattr(one, name)) for name, tensor in vars(none).items() if name != "posteriors")
    assert one.posteriors.shape == (3, 5, 4, 8, 8) and three.posteriors.shape == (5, 5, 4, 8, 8)
    for name, tensor in vars(one).items():
        other = getattr(three, name)
        assert torch.equal(tensor, other[:3] if name == "posteriors" else other)
    streams = three.posteriors.flatten(2).flatten(0, 1)
    assert len(torch.unique(streams, dim=0)) == 25 and abs(float(streams.mean())) < 0.05
    assert list_reference_rows(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_each_reference_is_encoded_with_its_own_noise_and_tokens(smallest: ToyModel) -> None:
    _, encoders = build(smallest)
    batch, noise = a_batch(16, 3), sample_noise(3)
    together = encoders.encode(batch, noise)
    assert together.reference_latents.shape == (ROWS * 3, 4, 8, 8) and len(together.image_tokens) == ROWS * 3
    for n in range(3):
        alone = replace(batch, reference=batch.references[:, n], other_references=None)
        own = replace(noise, posteriors=noise.posteriors[[0, 1, 2 + n]])
        expected = encoders.encode(alone, own)
        for name, tensor in vars(expected).items():
            found = getattr(together, name)
            rows = slice(n, None, 3) if name in ("reference_latents", "image_tokens") else slice(None)
            torch.testing.assert_close(found[rows], tensor, atol=1e-5, rtol=1e-4)
    dropped = encoders.encode(batch, sample_noise(3, drop=1.0))
    assert torch.equal(dropped.image_tokens, encoders.unconditional_inputs(torch.device("cpu"))[0].repeat(9, 1, 1))


@pytest.mark.parametrize("sharing", ["hidden_states", "tokens", pytest.param("keys_values", marks=pytest.mark.slow)])
def test_dropped_references_are_not_seen_and_others_are_whatever_their_order(smallest: ToyModel, sharing: str) -> None:
    chosen = {"reference_encoder": "clip"} if sharing == "tokens" else {"reference_sharing": sharing}
    model, encoders = build(replace(smallest, **chosen))
    batch = a_batch(16, 3)
    first, *others = batch.references.unbind(1)
    turned = replace(batch, reference=others[1], other_references=torch.stack([first, others[0]], dim=1))

    def predict(batch: TrainBatch, drop: float, grad: bool = True) -> torch.Tensor:
        noise = sample_noise(batch.num_references, drop)
        with torch.set_grad_enabled(grad):
            # Without the noise of the posteriors, whose order is that of the references.
            conditions = encoders.encode(batch, replace(noise, posteriors=torch.zeros_like(noise.posteriors)))
            return model(noise.noise, noise.timestep, conditions, noise.keep_reference).sample.detach()

    seen = predict(batch, 0.0)
    torch.testing.assert_close(predict(turned, 0.0), seen, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(predict(batch, 0.0, grad=False), seen, atol=1e-5, rtol=1e-4)  # as a pipeline computes
    one = replace(batch, other_references=None)
    assert not torch.allclose(predict(one, 0.0), seen, atol=1e-4)
    torch.testing.assert_close(predict(batch, 1.0), predict(one, 1.0), atol=1e-5, rtol=1e-4)


WAYS = [("activation_checkpointing",), ("selective_checkpointing", "low_precision_norms")]


@pytest.mark.parametrize("ways", [WAYS[0], pytest.param(WAYS[1], marks=pytest.mark.slow)])
def test_recomputation_gives_the_same_gradients(smallest: ToyModel, ways: tuple[str, ...]) -> None:
    gradients = []
    batch, noise = a_batch(16, 2), sample_noise(2, drop=0.5)
    for options in (TrainOptions(), TrainOptions(**dict.fromkeys(ways, True))):
        model, encoders = build(smallest)
        model.train()
        apply_speedups(model, options, channels_last=False)
        conditions = encoders.encode(batch, noise)
        loss = denoising_loss(model, noise_scheduler(), conditions, noise, None, batch.matches, 0.5)
        loss.total.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_the_correspondence_loss_is_that_of_the_first_reference() -> None:
    torch.manual_seed(0)
    query, first, second = torch.randn(3, ROWS, 64, 2, 8).unbind(0)
    matches, keep = a_batch(16, 1).matches, torch.tensor([True, True, False])
    assert matches is not None
    expected = correspondence_loss({"layer": (query, first)}, matches, keep, 16, 0.5)
    both = correspondence_loss({"layer": (query, torch.cat([first, second], dim=1))}, matches, keep, 16, 0.5)
    assert all(map(torch.equal, expected, both)) and bool(expected.per_sample[:2].all())


def test_states_pass_on_what_is_asked_of_the_reading(smallest: ToyModel) -> None:
    states = ReferenceStates(
        {"a": torch.rand(4, 5, 6)}, keep=torch.tensor([True, False]), blend=0.3, queries_and_keys={}
    )
    joined = join_references(states, 2)
    assert joined.keep is states.keep and joined.blend == 0.3 and joined.queries_and_keys is states.queries_and_keys
    assert joined.features["a"].shape == (2, 10, 6) and states.features["a"].shape == (4, 5, 6)


@pytest.mark.slow
def test_flop_of_a_second_reference_are_counted(smallest: ToyModel) -> None:
    model, encoders = build(smallest)
    one, two = (count_training_flop(model, encoders, num_references=count) for count in (1, 2))
    assert 1.2 * one < two < 2 * one


@pytest.mark.slow
def test_a_run_resumes_to_the_same_bits(mined: Path, tmp_path: Path) -> None:
    more = ["train.correspondence_weight=0.3", "train.unrelated_reference_ratio=0.3", "train.noise_on=device"]
    options = ["data.num_references=3", "data.augment_on=device", "train.checkpoint_every=3", *more]
    train(mined, tmp_path / "straight", *options, "train.max_steps=4")
    for stop in (2, 4):
        train(mined, tmp_path / "resumed", *options, f"train.max_steps={stop}", "train.resume=latest")
    a, b = (everything(checkpoint_path(tmp_path / run / "checkpoints", 4)) for run in ("straight", "resumed"))
    assert a.keys() == b.keys() and [key for key in a if not torch.equal(a[key], b[key])] == []
