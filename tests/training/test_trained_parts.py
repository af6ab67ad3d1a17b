from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from toy_run import forget_accelerate, metrics, train

from mimicbrush.errors import InputError
from mimicbrush.models.components import toy_components
from mimicbrush.models.options import ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.models.unets import ReferenceUNet
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.training.checkpoints import checkpoint_path
from mimicbrush.training.lora import freeze_and_adapt, merge_adapters
from mimicbrush.training.noise import NoiseSample
from mimicbrush.training.objective import Conditions, MimicBrushModel, denoising_loss
from mimicbrush.training.options import TRAINED_PARTS, TrainOptions


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


def toy_model(smallest: ToyModel) -> MimicBrushModel:
    parts = toy_components(smallest)
    torch.nn.init.normal_(parts.unet.conv_in.weight[:, 4:], std=0.1)
    return MimicBrushModel(
        parts.unet, parts.reference_unet, parts.image_projector, parts.depth_projector, size_px=smallest.size_px
    )


def batch(smallest: ToyModel, rows: int = 4) -> tuple[Conditions, NoiseSample]:
    side = smallest.size_px // 2
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(rows, 4, side, side, generator=generator) for _ in range(3)]
    mask = (torch.rand(rows, 1, side, side, generator=generator) > 0.5).float()
    tokens = torch.randn(rows, 17, 64, generator=generator)
    depth = torch.rand(rows, 1, 28, 28, generator=generator)
    noise_sample = NoiseSample.for_keys(
        torch.arange(rows), (4, side, side), num_timesteps=1000, reference_drop_ratio=0.3, depth_drop_ratio=0.5
    )
    return Conditions(*latents, mask, tokens, depth), noise_sample


def loss_of(model: MimicBrushModel, smallest: ToyModel) -> torch.Tensor:
    return denoising_loss(model, noise_scheduler(), *batch(smallest)).total


@pytest.mark.parametrize("frozen", [*[(name,) for name in TRAINED_PARTS], ("unet", "reference_unet")], ids=str)
def test_only_what_is_trained_gets_gradients(smallest: ToyModel, frozen: tuple[str, ...]) -> None:
    model = toy_model(smallest)
    freeze_and_adapt(dict(model.named_children()), TrainOptions(**dict.fromkeys(frozen, "frozen")))
    loss_of(model, smallest).backward()
    trained = model.trained_parameters()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name.split(".")[0] in frozen), name
        assert (name in trained) == (parameter.grad is not None)


def test_adapters_learn_where_to_look(mined: Path, tmp_path: Path) -> None:
    options = ["train.unet=lora", "train.reference_unet=lora", "train.lora_rank=2", "train.correspondence_weight=1",
               "train.max_steps=2", "train.log_every=1"]  # fmt: skip
    train(mined, tmp_path, *options)
    assert all(values["gradient_norm_reference_unet"] > 0 for values in metrics(tmp_path)[1:])
    assert metrics(tmp_path)[-1]["loss_correspondence"] > 0


def test_frozen_alone_is_an_error(smallest: ToyModel) -> None:
    with pytest.raises(InputError, match=r"nothing would be trained: train\.unet=frozen train\.reference_unet=frozen"):
        freeze_and_adapt(
            dict(toy_model(smallest).named_children()), TrainOptions(**dict.fromkeys(TRAINED_PARTS, "frozen"))
        )


LORA = TrainOptions(unet="lora", reference_unet="lora", lora_rank=2, image_projector="frozen")


def test_adapters_start_as_nothing_and_learn(smallest: ToyModel) -> None:
    plain = toy_model(smallest)
    adapted = copy.deepcopy(plain)
    freeze_and_adapt(dict(adapted.named_children()), LORA)
    before = loss_of(adapted, smallest)
    assert torch.equal(loss_of(plain, smallest), before)
    before.backward()
    # The projections of every attention layer are adapted, through our own processors, also those of the reference.
    trained = adapted.trained_parameters()
    assert all("lora_" in name or name.startswith("depth_projector.") for name in trained)
    reached = [name for name, p in trained.items() if p.grad is not None and bool(p.grad.abs().sum() > 0)]
    layers = {name.split(".lora_")[0] for name in trained if "lora_" in name}
    assert layers == {name.split(".lora_B")[0] for name in reached if "lora_B" in name}
    assert {name.split(".")[0] for name in layers} == {"unet", "reference_unet"}


def test_merged_adapters_give_what_adapters_gave(smallest: ToyModel, tmp_path: Path) -> None:
    model = toy_model(smallest)
    freeze_and_adapt(dict(model.named_children()), LORA)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted, base = loss_of(model, smallest), copy.deepcopy(model)
    merge_adapters(dict(model.named_children()), tmp_path)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert abs(loss_of(model, smallest) - adapted) < 1e-5
    # The adapters alone, read by diffusers, on the weights that they were trained beside.
    for name, kind in (("unet", UNet2DConditionModel), ("reference_unet", ReferenceUNet)):
        part = getattr(base, name)
        part.unload_lora()
        assert type(part) is kind
        part.load_lora_adapter(tmp_path / name, prefix=None, use_safetensors=True)
    assert abs(loss_of(base, smallest) - adapted) < 1e-5
    base.unet.unload_lora()
    assert abs(loss_of(base, smallest) - adapted) > 1e-4


def test_a_run_with_adapters_resumes_and_exports_a_plain_pipeline(mined: Path, tmp_path: Path) -> None:
    options = ["train.unet=lora", "train.reference_unet=lora", "train.lora_rank=2", "train.lora_dropout=0.1"]
    train(mined, tmp_path / "straight", "train.max_steps=3", *options)
    train(mined, tmp_path / "resumed", "train.max_steps=1", *options)
    train(mined, tmp_path / "resumed", "train.max_steps=3", "train.resume=latest", *options)
    files = [checkpoint_path(tmp_path / run / "checkpoints", 3) / "ema.safetensors" for run in ("straight", "resumed")]
    one, other = map(load_file, files)
    assert all(torch.equal(one[name], other[name]) for name in one)  # dropout, too
    assert all("lora_" in name or "projector" in name for name in one)
    pipeline = MimicBrushPipeline.from_pretrained(tmp_path / "straight" / "pipeline")
    assert not any("lora" in name for name in pipeline.unet.state_dict())
    saved = tmp_path / "straight" / "pipeline" / "adapters"
    assert sorted(path.name for path in saved.iterdir()) == ["reference_unet", "unet"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weighs_as_its_paper_says(smallest: ToyModel, prediction_type: str) -> None:
    model, scheduler = toy_model(smallest), noise_scheduler(prediction_type)
    conditions, noise_sample = batch(smallest)
    plain = denoising_loss(model, scheduler, conditions, noise_sample)
    weighted = denoising_loss(model, scheduler, conditions, noise_sample, min_snr_gamma=5.0)
    with torch.no_grad():
        noisy = scheduler.add_noise(conditions.source_latents, noise_sample.noise, noise_sample.timestep)
        target = noise_sample.noise
        if prediction_type == "v_prediction":
            target = scheduler.get_velocity(conditions.source_latents, noise_sample.noise, noise_sample.timestep)
        error = (
            (model(noisy, noise_sample.timestep, conditions, noise_sample.keep_reference).sample - target)
            .square()
            .mean(dim=(1, 2, 3))
        )
    alpha = scheduler.alphas_cumprod[noise_sample.timestep]
    snr = alpha / (1 - alpha)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    expected = (error * torch.minimum(snr, torch.tensor(5.0)) / divisor).mean()
    assert torch.allclose(weighted.total, expected, rtol=1e-5) and torch.equal(weighted.parts, plain.parts)


@pytest.mark.parametrize(("mean", "logged"), [(-10, "loss_t750_999"), (10, "loss_t000_249")])
def test_timesteps_follow_the_chosen_distribution(mined: Path, tmp_path: Path, mean: int, logged: str) -> None:
    sampling = ["train.timestep_sampling=logit_normal", f"train.timestep_logit_mean={mean}"]
    train(mined, tmp_path, "train.max_steps=2", "train.log_every=2", *sampling)
    (values,) = metrics(tmp_path)
    assert [name for name, value in values.items() if name.startswith("loss_t") and value is not None] == [logged]


def test_latent_channels_have_the_weights_that_were_chosen(smallest: ToyModel) -> None:
    model, scheduler = toy_model(smallest), noise_scheduler("v_prediction")
    conditions, noise_sample = batch(smallest)
    plain = denoising_loss(model, scheduler, conditions, noise_sample)
    weighted = denoising_loss(model, scheduler, conditions, noise_sample, channel_weights=(4.0, 2.0, 1.0, 1.0))
    with torch.no_grad():
        noisy = scheduler.add_noise(conditions.source_latents, noise_sample.noise, noise_sample.timestep)
        target = scheduler.get_velocity(conditions.source_latents, noise_sample.noise, noise_sample.timestep)
        sample = model(noisy, noise_sample.timestep, conditions, noise_sample.keep_reference).sample
        of_channels = (sample - target).square().mean(dim=(0, 2, 3))  # (4,)
    assert torch.allclose(weighted.total, of_channels @ torch.tensor([0.5, 0.25, 0.125, 0.125]), rtol=1e-5)
    # What is logged stays comparable, and a common factor changes nothing.
    assert torch.equal(weighted.parts, plain.parts) and torch.equal(weighted.bins, plain.bins)
    doubled = denoising_loss(model, scheduler, conditions, noise_sample, channel_weights=(8.0, 4.0, 2.0, 2.0))
    assert torch.equal(doubled.total, weighted.total)
    same = denoising_loss(model, scheduler, conditions, noise_sample, channel_weights=(3.0, 3.0, 3.0, 3.0))
    assert torch.equal(same.total, plain.total)


def test_parts_and_bins_add_up_to_the_loss(smallest: ToyModel) -> None:
    loss = denoising_loss(toy_model(smallest), noise_scheduler(), *batch(smallest))
    inside, number_inside, outside, number_outside = loss.parts
    assert torch.allclose((inside + outside) / (number_inside + number_outside), loss.total, rtol=1e-5)
    assert torch.allclose(loss.bins[0].sum() / loss.bins[1].sum(), loss.total, rtol=1e-5)
    noise_sample = batch(smallest)[1]
    assert loss.bins[1].tolist() == [int((noise_sample.timestep // 250 == number).sum()) for number in range(4)]
