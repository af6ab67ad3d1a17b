"""Where paper and released code differ: every choice is an option, does something, and is saved with the pipeline."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_data import photograph

from mimicbrush.errors import InputError
from mimicbrush.models.components import toy_components
from mimicbrush.models.options import RELEASED_CONVENTIONS, ModelOptions, ToyModel
from mimicbrush.models.reference_attention import reference_paths, set_reference_processors
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.models.unets import KeyValueReferenceUNet, ReferenceUNet
from mimicbrush.ops.canvas import letterbox, letterbox_mask
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.open_pipeline import load_pipeline, seeded_generator
from mimicbrush.types import ReferenceStates

#: option -> (default, the other choice).
CHOICES = {
    "letterbox_order": ("resize_then_pad", "pad_then_resize"),
    "reference_sharing": ("hidden_states", "keys_values"),
    "reference_blend": (1.0, 0.5),
    "reference_timestep": ("current", "zero"),
    "depth_channels": (1, 3),
    "depth_convention": ("standard", "released"),
    "no_depth_convention": ("zero_map", "zero_input"),
}


def pipeline(options: ToyModel) -> MimicBrushPipeline:
    named = {name: getattr(options, name) for name in (*RELEASED_CONVENTIONS, "letterbox_order")}
    pipe = MimicBrushPipeline(**vars(toy_components(options)), scheduler=noise_scheduler(), **named)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edited(pipe: MimicBrushPipeline, keep_shape: bool) -> torch.Tensor:
    source, reference = photograph("coffee.png")[:90, :121], photograph("chelsea.png")
    mask = np.zeros(source.shape[:2], np.uint8)
    mask[30:60, 40:80] = 255
    options = {
        "num_inference_steps": 3,
        "output_type": "latent",
        "keep_shape": keep_shape,
        "generator": seeded_generator(0),
    }
    return pipe(source, mask, reference, **options).images


def test_the_defaults_are_those_that_are_documented() -> None:
    assert set(CHOICES) == {field.name for field in fields(ModelOptions)} - {"size_px", "reference_encoder"}
    assert {name: getattr(ModelOptions(), name) for name in CHOICES} == {name: c[0] for name, c in CHOICES.items()}
    document = (Path(__file__).parents[2] / "docs" / "paper_vs_code.md").read_text()
    assert all(f"`{name}" in document for name in CHOICES)


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_changes_the_edit_and_is_remembered(smallest: ToyModel, tmp_path: Path, name: str) -> None:
    other = replace(smallest, **{name: CHOICES[name][1]})
    # With the shape kept, an estimated depth is used, without it the one that stands for none.
    keep_shape = name == "depth_convention"
    default, changed = pipeline(smallest), pipeline(other)
    found = edited(changed, keep_shape)
    assert not torch.equal(edited(default, keep_shape), found)
    changed.save_pretrained(tmp_path / "pipe")
    loaded = load_pipeline(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    assert getattr(loaded.options(), name) == CHOICES[name][1]
    assert asdict(loaded.options()) == asdict(changed.options())
    # Not to the bit: weights from a file lie elsewhere in memory, and kernels differ by that.
    torch.testing.assert_close(edited(loaded, keep_shape), found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "reference_blend"])
def test_a_choice_that_there_is_not(name: str) -> None:
    with pytest.raises(InputError, match=f"model.{name}=both: expected one of"):
        ModelOptions(**{name: "both"})


def test_shared_keys_and_values_are_the_references_own(smallest: ToyModel) -> None:
    parts = toy_components(replace(smallest, reference_sharing="keys_values"))
    assert type(parts.reference_unet) is KeyValueReferenceUNet
    path = reference_paths(parts.unet)[-1]
    # The pruned tail holds the two projections that are shared, and nothing else of the last attention.
    lacking = set(toy_components(smallest).unet.state_dict()) - set(parts.reference_unet.state_dict())
    without = set(toy_components(smallest).unet.state_dict()) - set(
        toy_components(smallest).reference_unet.state_dict()
    )
    assert without - lacking == {f"{path}.to_k.weight", f"{path}.to_v.weight"}
    assert isinstance(parts.reference_unet, ReferenceUNet)

    # Written out: keys of the own tokens by the imitative U-Net, keys of the reference by the reference U-Net.
    states = ReferenceStates()
    seen: dict[str, torch.Tensor] = {}
    writer = parts.reference_unet.get_submodule(path)
    writer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(feature=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    latents, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    with torch.no_grad():
        parts.reference_unet(latents, 3, context, cross_attention_kwargs={"reference_states": states})
        set_reference_processors(parts.unet, 1.0)
        layer = parts.unet.get_submodule(path)
        own = torch.randn(1, 64, layer.query_dim)

        def heads(tokens: torch.Tensor) -> torch.Tensor:
            return tokens.unflatten(-1, (layer.heads, -1)).transpose(1, 2)

        key = torch.cat([layer.to_k(own), writer.to_k(seen["feature"])], dim=1)
        value = torch.cat([layer.to_v(own), writer.to_v(seen["feature"])], dim=1)
        scores = heads(layer.to_q(own)) @ heads(key).mT / (layer.query_dim // layer.heads) ** 0.5
        expected = layer.to_out[0]((scores.softmax(-1) @ heads(value)).transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(own, reference_states=states), expected, atol=1e-5, rtol=1e-5)


def test_the_two_letterboxes_agree_but_for_the_border() -> None:
    image = photograph("coffee.png")[:90, :121]
    one, other = (letterbox(image, 32, 255, order).astype(int) for order in CHOICES["letterbox_order"])
    assert one.shape == other.shape and not np.array_equal(one, other)
    # Away from the border only the grid is moved, by less than a pixel.
    assert np.abs(one[8:24] - other[8:24]).mean() < 12
    mask = np.full((90, 121), 255, np.uint8)
    areas = [letterbox_mask(mask, 32, order).sum() for order in CHOICES["letterbox_order"]]
    assert abs(int(areas[0]) - int(areas[1])) <= 64
