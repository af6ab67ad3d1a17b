"""Values and networks that outlive a call: prepared references, shared components, copies, remembered constants."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import EMAModel
from toy_edit import an_edit, build, latents_of

from mimicbrush.models.options import ToyModel
from mimicbrush.models.projectors import ImageProjector
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.open_pipeline import seeded_generator


@pytest.mark.parametrize(
    ("timestep", "prepared_steps", "posterior"),
    [
        ("current", 3, "sample"),
        ("current", None, "mean"),
        ("current", 2, "sample"),
        ("zero", 3, "mean"),
        pytest.param("current", 3, "mean", marks=pytest.mark.slow),
        pytest.param("current", None, "sample", marks=pytest.mark.slow),
        pytest.param("current", 2, "mean", marks=pytest.mark.slow),
        pytest.param("zero", 3, "sample", marks=pytest.mark.slow),
    ],
)
def test_a_prepared_reference_gives_what_the_image_gives(
    smallest: ToyModel, timestep: str, prepared_steps: int | None, posterior: str
) -> None:
    pipe = build(smallest, reference_timestep=timestep, posterior=posterior)
    reference = an_edit()["reference"]

    def edit(turns: int, generator: torch.Generator, imitated: object, **options: object) -> torch.Tensor:
        edit = {**an_edit(turns), "reference": imitated}
        return latents_of(pipe, edit, generator=generator, num_inference_steps=3, **options)

    once = pipe.prepare_reference(reference, generator=seeded_generator(0), num_inference_steps=prepared_steps)
    for turns, seed, guidance in ((0, 0, 5.0), (1, 1, 2.0), (2, 2, 1.0)):
        prepared, generator = once, seeded_generator(seed)
        if posterior == "sample":  # exact where the same generator drew the reference's posterior just before
            prepared = pipe.prepare_reference(reference, generator=generator, num_inference_steps=prepared_steps)
        reused = edit(turns, generator, prepared, guidance_scale=guidance)
        assert torch.equal(reused, edit(turns, seeded_generator(seed), reference, guidance_scale=guidance))


def test_a_prepared_reference_is_left_as_it_was(smallest: ToyModel) -> None:
    pipe = build(smallest)
    prepared = pipe.prepare_reference(an_edit()["reference"], generator=seeded_generator(0), num_inference_steps=2)
    before = copy.deepcopy(prepared)
    first, again = (latents_of(pipe, {**an_edit(), "reference": prepared}) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(prepared.latents, before.latents) and torch.equal(prepared.context, before.context)
    assert list(prepared.features) == list(before.features)
    for timestep, projected in before.features.items():
        for path, tensors in projected.items():
            assert all(map(torch.equal, tensors, prepared.features[timestep][path]))


def test_components_make_a_pipeline_that_does_the_same(smallest: ToyModel) -> None:
    pipe = build(smallest)
    again = MimicBrushPipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert set(pipe.components) == {
        "vae", "unet", "reference_unet", "image_encoder", "image_projector",
        "depth_estimator", "depth_projector", "scheduler",
    }  # fmt: skip
    assert torch.equal(latents_of(again), latents_of(pipe))


def test_from_pipe_keeps_networks_and_conventions(smallest: ToyModel) -> None:
    pipe = build(smallest, reference_blend=0.5, reference_timestep="zero", posterior="mean")
    again = MimicBrushPipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    assert {**again.config} == {**pipe.config} and again.unet is pipe.unet
    assert torch.equal(latents_of(again), latents_of(pipe))


def test_pipelines_that_share_networks_blend_each_as_it_says(smallest: ToyModel) -> None:
    alone = {blend: latents_of(build(smallest, reference_blend=blend)) for blend in (1.0, 0.5)}
    assert not torch.allclose(alone[1.0], alone[0.5])
    first = build(smallest)
    second = MimicBrushPipeline(**first.components, reference_blend=0.5)
    second.set_progress_bar_config(disable=True)
    for pipe in (first, second, first):
        assert torch.equal(latents_of(pipe), alone[pipe.config.reference_blend])


def test_a_call_within_a_callback_disturbs_neither(smallest: ToyModel) -> None:
    outer, inner = build(smallest), build(smallest, reference_blend=0.5, reference_timestep="zero")
    expected = latents_of(outer), latents_of(inner)
    got: list[torch.Tensor] = []

    def call_the_other(
        _: MimicBrushPipeline, step: int, timestep: int, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        got.append(latents_of(inner))
        return tensors

    assert torch.equal(latents_of(outer, callback_on_step_end=call_the_other), expected[0])
    assert all(torch.equal(latents, expected[1]) for latents in got)


def test_a_deep_copy_does_the_same_and_shares_nothing(smallest: ToyModel) -> None:
    pipe = build(smallest)
    expected = latents_of(pipe)  # so that constants are remembered already
    copied = copy.deepcopy(pipe)
    assert torch.equal(latents_of(copied), expected)
    with torch.no_grad():
        for name in ("unet", "image_projector", "depth_projector"):
            for parameter in getattr(copied, name).parameters():
                parameter.mul_(1.5)
    assert not torch.allclose(latents_of(copied), expected)
    assert torch.equal(latents_of(pipe), expected)


def _write(pipe: MimicBrushPipeline) -> None:
    with torch.no_grad():
        pipe.image_projector.projector.bias.add_(0.5)
        pipe.depth_projector.conv_out.bias.add_(0.5)


def _train(pipe: MimicBrushPipeline) -> None:
    for network in (pipe.image_projector, pipe.depth_projector):
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(network.parameters(), lr=0.1).step()


def _load(pipe: MimicBrushPipeline) -> None:
    for network in (pipe.image_projector, pipe.depth_projector):
        network.load_state_dict({key: value * 1.5 for key, value in network.state_dict().items()})


def _replace(pipe: MimicBrushPipeline) -> None:
    torch.manual_seed(1)
    pipe.image_projector = ImageProjector(64, 16)


def _retype(pipe: MimicBrushPipeline) -> None:
    pipe.to(torch.bfloat16)


def _average(pipe: MimicBrushPipeline) -> None:
    for network in (pipe.image_projector, pipe.depth_projector):
        average = EMAModel([torch.zeros_like(parameter) for parameter in network.parameters()])
        average.copy_to(network.parameters())


@pytest.mark.parametrize("change", [_write, _train, _load, _replace, _retype, _average])
def test_remembered_constants_are_forgotten_when_weights_change(
    smallest: ToyModel, change: Callable[[MimicBrushPipeline], None]
) -> None:
    used, fresh = build(smallest), build(smallest)
    before = latents_of(used)
    change(used)
    change(fresh)
    after = latents_of(used)
    assert torch.equal(after, latents_of(fresh))
    assert not torch.allclose(after.float(), before)


def test_remembered_constants_are_computed_once(smallest: ToyModel) -> None:
    pipe = build(smallest, no_depth_convention="zero_input")
    calls = {"image_projector": 0, "depth_estimator": 0}

    def count(name: str) -> Callable[..., None]:
        def add(*_: object) -> None:
            calls[name] += 1

        return add

    for name in calls:
        getattr(pipe, name).register_forward_hook(count(name))
    latents_of(pipe)
    assert calls == {"image_projector": 2, "depth_estimator": 1}  # the reference's context, and the constants
    latents_of(pipe, an_edit(1), seed=1)
    assert calls == {"image_projector": 3, "depth_estimator": 1}


def test_one_reference_serves_a_batch_exactly_as_each_of_its_own(smallest: ToyModel) -> None:
    pipe = build(smallest, posterior="mean")
    images = {name: [an_edit(turns)[name] for turns in range(2)] for name in ("source", "mask")}
    prepared = pipe.prepare_reference(an_edit()["reference"])
    both = latents_of(pipe, {**images, "reference": prepared}, generator=[seeded_generator(0), seeded_generator(1)])
    for row in range(2):
        alone = {"source": images["source"][row], "mask": images["mask"][row], "reference": prepared}
        np.testing.assert_allclose(both[row], latents_of(pipe, alone, seed=row)[0], atol=2e-5)
