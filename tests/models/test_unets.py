from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from mimicbrush.errors import WeightsError
from mimicbrush.models.components import toy_components
from mimicbrush.models.options import ToyModel
from mimicbrush.models.projectors import DepthProjector, ImageProjector
from mimicbrush.models.reference_attention import set_reference_write_processors
from mimicbrush.models.unets import ReferenceUNet, widen_conv_in
from mimicbrush.types import ReferenceStates

SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}


def small_unet(in_channels: int = 4) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def test_full_size_has_the_released_keys() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=13, **SD15)
        reference = ReferenceUNet(in_channels=4, **SD15)
    assert len(unet.state_dict()) == 686
    assert unet.conv_in.weight.shape == (320, 13, 3, 3)
    tail = set(unet.state_dict()) - set(reference.state_dict())
    assert len(reference.state_dict()) == 662 and len(tail) == 24
    assert all(key.startswith(("conv_norm_out.", "conv_out.", "up_blocks.3.attentions.2.")) for key in tail)
    assert not any(".norm1." in key or "proj_in" in key for key in tail)


def test_projectors_have_the_released_keys() -> None:
    depth = DepthProjector()
    assert sum(p.numel() for p in depth.parameters()) == 150_260
    assert depth(torch.zeros(1, 1, 37, 37), 64).shape == (1, 4, 8, 8)
    image = ImageProjector()
    assert set(image.state_dict()) == {"projector.weight", "projector.bias"}
    assert image(torch.zeros(1, 257, 1280)).shape == (1, 257, 768)


def test_pruned_and_whole_unets_write_the_same() -> None:
    whole = small_unet()
    pruned = ReferenceUNet.from_unet(whole)
    set_reference_write_processors(whole)
    sample, context = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
    written = []
    for unet in (whole, pruned):
        states = ReferenceStates()
        unet(sample, 10, context, cross_attention_kwargs={"reference_states": states})
        written.append(states.features)
    assert list(written[0]) == list(written[1])
    for path, feature in written[0].items():
        assert torch.equal(feature, written[1][path]), path


def test_a_pruned_unet_saves_and_loads(tmp_path: Path) -> None:
    pruned = ReferenceUNet.from_unet(small_unet())
    pruned.save_pretrained(tmp_path)
    loaded = ReferenceUNet.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in pruned.state_dict().items())
    assert set(loaded.state_dict()) == set(pruned.state_dict())


def test_widening_leaves_the_output_whatever_the_new_channels_hold() -> None:
    unet = small_unet(9).eval()
    stem, context = torch.randn(1, 13, 8, 8), torch.randn(1, 3, 8)
    expected = unet(stem[:, :9], 10, context).sample
    widen_conv_in(unet, 13)
    assert unet.config.in_channels == 13
    torch.testing.assert_close(unet(stem, 10, context).sample, expected)
    with pytest.raises(WeightsError, match="cannot widen conv_in from 13 to 9"):
        widen_conv_in(unet, 9)


def test_toy_parts_are_made_alike_from_one_seed(smallest: ToyModel) -> None:
    one, same, other = (toy_components(smallest, seed=seed).unet.conv_in.weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_small_unets_can_begin_alike() -> None:
    apart, alike = (toy_components(ToyModel(size_px=16, shared_start=shared), seed=2) for shared in (False, True))
    for parts, expected in ((apart, False), (alike, True)):
        assert parts.reference_unet is not None
        theirs = parts.unet.state_dict()
        theirs["conv_in.weight"] = theirs["conv_in.weight"][:, :4]
        mine = parts.reference_unet.state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items()) == expected
    assert all(torch.equal(value, alike.unet.state_dict()[key]) for key, value in apart.unet.state_dict().items())
