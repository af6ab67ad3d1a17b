from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mimicbrush.errors import InputError
from mimicbrush.models.components import toy_components
from mimicbrush.models.encoders import encode_image_tokens, estimate_depth
from mimicbrush.models.options import ToyModel
from mimicbrush.models.patch_autoencoder import PatchAutoencoder
from mimicbrush.training.methods import small_encoders
from mimicbrush.training.methods.small_encoders import Schedule


def scenes(seed: int, batch: int = 8) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Two noisy views of smooth coloured scenes, 64 px."""
    torch.manual_seed(seed)
    while True:
        smooth = F.interpolate(torch.rand(batch, 3, 6, 6) * 2 - 1, (64, 64), mode="bicubic").clamp(-1, 1)
        yield smooth, (smooth + 0.1 * torch.randn_like(smooth)).clamp(-1, 1)


def depths() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Bright squares before a dark ground."""
    torch.manual_seed(0)
    while True:
        depth = torch.full((8, 1, 64, 64), 0.2)
        for number in range(8):
            x, y = torch.randint(0, 40, (2,)).tolist()
            depth[number, :, y : y + 24, x : x + 24] = 1.0
        yield (2 * depth - 1).expand(-1, 3, -1, -1) + 0.05 * torch.randn(8, 3, 64, 64), depth


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    with torch.random.fork_rng(devices=[]):
        small_encoders.train_autoencoder(scenes(0), Schedule(30), seed=0).save_pretrained(folder / "vae")
        encoder = small_encoders.train_image_encoder(scenes(1, 16), Schedule(30), seed=0)
        encoder.save_pretrained(folder / "image_encoder")
        small_encoders.train_depth_estimator(depths(), Schedule(60), seed=0).save_pretrained(folder / "depth_estimator")
    return folder


def test_autoencoder_begins_as_linear_and_becomes_better(folder: Path) -> None:
    trained = PatchAutoencoder.from_pretrained(folder / "vae")
    linear = PatchAutoencoder(channel_std=trained.config.channel_std, block_out_channels=(1, 1, 1))
    started = PatchAutoencoder(**{**trained.config, "hidden_channels": 64})
    pixels, _ = next(scenes(9))

    def error(vae: PatchAutoencoder) -> float:
        return float((vae.decode(vae.encode(pixels).latent_dist.mean).sample - pixels).square().mean())

    with torch.no_grad():
        assert error(started) == pytest.approx(error(linear), rel=1e-5)
        assert error(trained) < 0.8 * error(linear)
        latents = trained.encode(pixels).latent_dist.mean * trained.config.scaling_factor
    assert latents.shape == (8, 4, 16, 16)
    assert 0.7 < latents.std() < 1.4


def test_image_encoder_knows_a_scene_again(folder: Path) -> None:
    encoder = toy_components(ToyModel(size_px=64, encoders=str(folder))).image_encoder
    first, second = next(scenes(8, 16))
    with torch.no_grad():
        one, other = (F.normalize(encode_image_tokens(encoder, pixels).flatten(1), dim=1) for pixels in (first, second))
    assert (one @ other.T).argmax(dim=1).tolist() == list(range(16))


def test_depth_estimator_sees_what_is_near(folder: Path) -> None:
    estimator = toy_components(ToyModel(size_px=64, encoders=str(folder))).depth_estimator
    pixels, depth = next(depths())
    with torch.no_grad():
        found = F.interpolate(estimate_depth(estimator, pixels, "standard"), (64, 64))
    for map_, truth in zip(found, depth, strict=True):
        assert torch.corrcoef(torch.stack([map_.flatten(), truth.flatten()]))[0, 1] > 0.5


def test_parts_with_trained_encoders_fit_together(folder: Path) -> None:
    parts = toy_components(ToyModel(size_px=64, encoders=str(folder)), seed=3)
    assert parts.unet.config.sample_size == 16
    assert parts.depth_projector(torch.zeros(1, 1, 56, 56), 64).shape == (1, 4, 16, 16)
    other = toy_components(ToyModel(size_px=64, encoders=str(folder)), seed=4)
    assert torch.equal(parts.vae.encoder, other.vae.encoder)
    assert not torch.equal(parts.unet.conv_in.weight, other.unet.conv_in.weight)


def test_encoders_that_are_absent_or_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lacks vae, image_encoder, depth_estimator"):
        toy_components(ToyModel(size_px=64, encoders=str(tmp_path)))
    with pytest.raises(InputError, match="multiple of 8"):
        toy_components(ToyModel(size_px=36, encoders=str(folder)))
    with pytest.raises(InputError, match="contain only CLIP"):
        toy_components(ToyModel(size_px=64, encoders=str(folder), reference_encoder="dinov2"))
