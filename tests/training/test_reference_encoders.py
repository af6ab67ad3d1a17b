"""CLIP's or DINOv2's patch tokens in the place of the reference U-Net (the ablation of the paper's Table 3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_data import photograph
from toy_run import forget_accelerate, metrics, train
from transformers import Dinov2Model

from mimicbrush.errors import InputError, WeightsError
from mimicbrush.models.components import random_components, toy_components
from mimicbrush.models.encoders import encode_image_tokens, encode_no_image_tokens
from mimicbrush.models.options import PretrainedModel, ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.conversion.export_released import export_released
from mimicbrush.pipelines.open_pipeline import load_pipeline
from mimicbrush.training.noise import NoiseSample
from mimicbrush.training.objective import FrozenEncoders, MimicBrushModel, denoising_loss
from mimicbrush.types import TrainBatch

ENCODERS = ("unet", "clip", "dinov2")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


def a_batch(size_px: int, rows: int = 4) -> TrainBatch:
    generator = torch.Generator().manual_seed(0)
    source, reference = torch.rand(2, rows, 3, size_px, size_px, generator=generator) * 2 - 1
    mask = (torch.rand(rows, 1, size_px, size_px, generator=generator) > 0.5).float()
    return TrainBatch(source, reference, mask, torch.arange(rows), torch.arange(rows))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_trained_parameter_learns_and_a_dropped_reference_is_not_seen(smallest: ToyModel, encoder: str) -> None:
    options = replace(smallest, reference_encoder=encoder)
    parts = toy_components(options)
    assert (parts.reference_unet is None) == (encoder != "unet")
    torch.nn.init.normal_(parts.unet.conv_in.weight, std=0.1)
    model = MimicBrushModel(
        parts.unet, parts.reference_unet, parts.image_projector, parts.depth_projector, size_px=options.size_px
    )
    encoders = FrozenEncoders(parts, options)
    batch = a_batch(options.size_px)
    drop = {"num_timesteps": 1000, "depth_drop_ratio": 0.0}
    noise_sample = NoiseSample.for_keys(batch.key, (4, 8, 8), reference_drop_ratio=0.0, **drop)
    denoising_loss(model, noise_scheduler(), encoders.encode(batch, noise_sample), noise_sample).total.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert bool(parts.image_projector.projector.weight.grad.abs().sum() > 0)

    def predict(reference: torch.Tensor, noise_sample: NoiseSample) -> torch.Tensor:
        conditions = encoders.encode(replace(batch, reference=reference), noise_sample)
        with torch.no_grad():
            return model(noise_sample.noise, noise_sample.timestep, conditions, noise_sample.keep_reference).sample

    other = batch.reference.flip(0)
    assert not torch.allclose(predict(batch.reference, noise_sample), predict(other, noise_sample), atol=1e-4)
    dropped = NoiseSample.for_keys(batch.key, (4, 8, 8), reference_drop_ratio=1.0, **drop)
    torch.testing.assert_close(predict(batch.reference, dropped), predict(other, dropped))


def test_patch_tokens_are_those_of_transformers(smallest: ToyModel) -> None:
    pixels = (torch.arange(3 * 32 * 32).view(1, 3, 32, 32) * 7 % 256) / 127.5 - 1
    dino = toy_components(replace(smallest, reference_encoder="dinov2")).image_encoder
    assert isinstance(dino, Dinov2Model)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = dino(((pixels + 1) / 2 - mean) / std).last_hidden_state[:, 1:]
        torch.testing.assert_close(encode_image_tokens(dino, pixels, patches_only=True), expected, atol=1e-5, rtol=1e-5)
        nothing = dino(torch.zeros(1, 3, 32, 32)).last_hidden_state[:, 1:].expand(2, -1, -1)
        found = encode_no_image_tokens(dino, 2, pixels.device, patches_only=True)
        torch.testing.assert_close(found, nothing)
        clip = toy_components(replace(smallest, reference_encoder="clip")).image_encoder
        whole = encode_image_tokens(clip, pixels)
        assert torch.equal(encode_image_tokens(clip, pixels, patches_only=True), whole[:, 1:])


@pytest.mark.parametrize(("encoder", "width"), [("clip", 1280), ("dinov2", 1024)])
def test_at_full_size_there_are_256_tokens(encoder: str, width: int) -> None:
    with torch.device("meta"):
        parts = random_components(reference_encoder=encoder)
        pixels = torch.empty(1, 3, 224, 224)
        tokens = encode_no_image_tokens(parts.image_encoder, 1, pixels.device, patches_only=True)
    assert tokens.shape == (1, 256, width) and parts.image_projector.projector.weight.shape == (768, width)


def test_only_the_weights_that_are_needed_are_asked_for() -> None:
    assert PretrainedModel().weight_options() == ("unet", "reference_unet", "image_encoder", "vae", "depth_estimator")
    clip, dinov2 = (PretrainedModel(reference_encoder=name).weight_options() for name in ("clip", "dinov2"))
    assert clip == ("unet", "image_encoder", "vae", "depth_estimator")
    assert dinov2 == ("unet", "dinov2", "vae", "depth_estimator")


@pytest.mark.parametrize("encoder", ["clip", "dinov2"])
def test_such_a_row_trains_edits_and_is_not_exported_to_the_released_format(
    mined: Path, tmp_path: Path, encoder: str
) -> None:
    train(mined, tmp_path / "run", "train.max_steps=2", f"+ablation=reference_{encoder}")
    logged = metrics(tmp_path / "run")[-1]
    assert logged["gradient_norm_image_projector"] > 0 and "gradient_norm_reference_unet" not in logged
    pipe = MimicBrushPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.reference_unet is None and pipe.options().reference_encoder == encoder
    mask = Image.new("L", (60, 40))
    mask.paste(255, (20, 10, 40, 30))
    edit = {"source": Image.fromarray(photograph("coffee.png")[:40, :60]), "mask": mask}
    references = [Image.fromarray(photograph(name)[:100, :100]) for name in ("chelsea.png", "astronaut.png")]

    def latents(reference: object, **options: object) -> torch.Tensor:
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        given = {"num_inference_steps": 2, "output_type": "latent", "latents": noise, "guidance_scale": 3.0}
        return pipe(**edit, reference=reference, generator=torch.Generator().manual_seed(0), **{**given, **options})[0]

    one, other = map(latents, references)
    assert not torch.allclose(one, other, atol=1e-3) and not torch.allclose(one, latents(None), atol=1e-3)
    prepared = pipe.prepare_reference(references[0], num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert prepared.features == {}
    torch.testing.assert_close(latents(prepared), one)
    with pytest.raises(InputError, match="needs a reference U-Net, but this pipeline has none"):
        latents(references[0], return_correspondence=True)
    pipe.save_pretrained(tmp_path / "again")
    assert f"| `reference_encoder` | `{encoder}` |" in (tmp_path / "again" / "README.md").read_text()
    pipe = load_pipeline(tmp_path / "again")
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(latents(references[0]), one)
    with pytest.raises(WeightsError, match="no reference U-Net"):
        export_released(tmp_path / "again", tmp_path / "x.bin")
