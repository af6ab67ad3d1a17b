from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from toy_data import PHOTOGRAPHS, photograph
from transformers import CLIPImageProcessorPil

from mimicbrush.errors import WeightsError
from mimicbrush.models.components import toy_components
from mimicbrush.models.encoders import (
    decode_latents,
    encode_image_tokens,
    encode_latents,
    estimate_depth,
    make_no_depth_map,
)
from mimicbrush.models.options import PretrainedModel, ToyModel
from mimicbrush.models.patch_autoencoder import PatchAutoencoder
from mimicbrush.models.pretrained.weights import find_weights
from mimicbrush.ops.canvas import letterbox, to_tensor


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_patch_autoencoder_shows_photographs(name: str) -> None:
    vae = PatchAutoencoder()
    pixels = to_tensor(cv2.resize(photograph(name), (64, 64), interpolation=cv2.INTER_AREA)[None])
    latents = encode_latents(vae, pixels, noise=None)
    assert latents.shape == (1, 4, 32, 32)
    decoded = decode_latents(vae, latents)
    psnr = 10 * torch.log10(4 / (decoded - pixels).square().mean())
    assert psnr > 21.5
    # What it keeps, it keeps exactly.
    torch.testing.assert_close(encode_latents(vae, decoded, noise=None), latents, atol=1e-5, rtol=1e-5)


def test_patch_latents_have_about_unit_variance() -> None:
    pixels = to_tensor(np.stack([letterbox(photograph(name), 64, 255) for name in PHOTOGRAPHS]))
    std = encode_latents(PatchAutoencoder(), pixels, noise=None).std(dim=(0, 2, 3))
    assert torch.all((std > 0.4) & (std < 2.0)), std


def test_image_tokens_are_those_of_the_clip_processor(smallest: ToyModel) -> None:
    parts = toy_components(smallest)
    square = letterbox(photograph("chelsea.png"), 64, 255)
    size = parts.image_encoder.config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    with torch.no_grad():
        expected = parts.image_encoder(
            processor(square, return_tensors="pt").pixel_values, output_hidden_states=True
        ).hidden_states[-2]
        tokens = encode_image_tokens(parts.image_encoder, to_tensor(square[None]))
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def test_depth_conventions_differ_and_have_the_right_shapes(smallest: ToyModel) -> None:
    estimator = toy_components(smallest).depth_estimator
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        standard, released = (estimate_depth(estimator, pixels, c) for c in ("standard", "released"))
        zero_map, zero_input = (make_no_depth_map(estimator, 2, c, pixels.device) for c in ("zero_map", "zero_input"))
    assert standard.shape == released.shape == zero_map.shape == zero_input.shape
    assert not torch.equal(standard, released)
    assert not zero_map.any()


def test_missing_weights_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        find_weights(PretrainedModel(vae=str(tmp_path), unet="nobody/nothing"))
    message = str(caught.value)
    assert "model.unet=nobody/nothing" in message and "model.image_encoder=" in message
    assert "model.vae" not in message and "mimicbrush fetch" in message
