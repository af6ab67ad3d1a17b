"""What diffusers users expect of any pipeline: the checks of its `PipelineTesterMixin`, for a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from toy_edit import an_edit, build, edits, latents_of

from mimicbrush.errors import InputError
from mimicbrush.models.options import ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.open_pipeline import seeded_generator

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pipe(smallest: ToyModel) -> MimicBrushPipeline:
    """For tests that leave it as it is."""
    return build(smallest)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_each_row_of_a_batch_is_what_a_call_of_its_own_gives(
    pipe: MimicBrushPipeline, size: int, guidance: float
) -> None:
    generators = [seeded_generator(row) for row in range(size)]
    batch = latents_of(pipe, edits(size), generator=generators, guidance_scale=guidance)
    assert batch.shape == (size, 4, 8, 8)
    for row in range(size):
        alone = latents_of(pipe, an_edit(row), seed=row, guidance_scale=guidance)
        torch.testing.assert_close(batch[row : row + 1], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("each", [1, 3])
def test_images_per_prompt_lie_side_by_side_and_equal_single_calls(
    pipe: MimicBrushPipeline, size: int, each: int
) -> None:
    generators = [seeded_generator(row) for row in range(size * each)]
    latents = latents_of(pipe, edits(size), generator=generators, num_images_per_prompt=each)
    assert latents.shape == (size * each, 4, 8, 8)
    for row in range(size * each):
        alone = latents_of(pipe, an_edit(row // each), seed=row)
        torch.testing.assert_close(latents[row : row + 1], alone, atol=2e-5, rtol=1e-4)
    images = pipe(
        **edits(size), num_inference_steps=1, num_images_per_prompt=each, generator=seeded_generator(0)
    ).images
    assert [image.size for image in images] == [(60, 40)] * each + [(40, 60)] * each * (size - 1)


def test_a_tuple_holds_what_the_output_holds(pipe: MimicBrushPipeline) -> None:
    options = {"num_inference_steps": 2, "output_type": "pt"}
    output = pipe(**an_edit(), **options, generator=seeded_generator(0))
    plain = pipe(**an_edit(), **options, generator=seeded_generator(0), return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 1
    assert torch.equal(plain[0], output.images) and torch.equal(output[0], output["images"])


def test_every_output_type_shows_the_same_image(pipe: MimicBrushPipeline) -> None:
    options = {"num_inference_steps": 2, "paste_back": False}
    as_pt, as_np, as_pil = (
        pipe(**an_edit(), **options, output_type=kind, generator=seeded_generator(0)).images
        for kind in ("pt", "np", "pil")
    )
    assert as_pt.shape == (1, 3, 16, 16) and as_np.shape == (1, 16, 16, 3) and as_np.dtype == np.float32
    np.testing.assert_array_equal(as_pt.permute(0, 2, 3, 1).numpy(), as_np)
    assert np.abs(as_np[0] * 255 - np.asarray(as_pil[0])).max() <= 0.51  # rounding to 8 bit


def test_a_seed_repeats_and_another_one_differs(pipe: MimicBrushPipeline) -> None:
    first = latents_of(pipe, seed=1)
    assert torch.equal(first, latents_of(pipe, seed=1))
    assert not torch.allclose(first, latents_of(pipe, seed=2))
    going_on = seeded_generator(1)
    assert torch.equal(first, latents_of(pipe, generator=going_on))
    assert not torch.allclose(first, latents_of(pipe, generator=going_on))  # a generator goes on, as everywhere


def test_given_latents_take_the_place_of_drawn_ones(smallest: ToyModel) -> None:
    pipe = build(smallest, posterior="mean")  # nothing else is drawn
    start = torch.randn(1, 4, 8, 8, generator=seeded_generator(3))
    assert torch.equal(latents_of(pipe, latents=start.clone()), latents_of(pipe, seed=3))
    assert torch.equal(latents_of(pipe, latents=start), latents_of(pipe, latents=start, seed=4))


def test_guidance_of_one_or_less_is_no_guidance(pipe: MimicBrushPipeline) -> None:
    off = latents_of(pipe, guidance_scale=1.0)
    assert torch.equal(off, latents_of(pipe, guidance_scale=0.0))
    assert not torch.allclose(off, latents_of(pipe, guidance_scale=3.0))
    assert torch.equal(latents_of(pipe, guidance_scale=5.0), latents_of(pipe))  # the pipeline's default


def test_a_callback_gets_the_tensors_that_it_names_and_no_others(pipe: MimicBrushPipeline) -> None:
    assert "callback_on_step_end_tensor_inputs" in inspect.signature(pipe.__call__).parameters
    seen: list[list[str]] = []

    def note(_: MimicBrushPipeline, step: int, timestep: int, tensors: Tensors) -> Tensors:
        seen.append(sorted(tensors))
        return tensors

    plain = latents_of(pipe)
    for names in (pipe._callback_tensor_inputs, []):
        result = latents_of(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=names)
        assert torch.equal(result, plain)
    assert seen == [list(pipe._callback_tensor_inputs)] * 2 + [[]] * 2
    with pytest.raises(InputError, match=r"callback tensors may be .* got .*'prompt_embeds'"):
        latents_of(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


def test_what_a_callback_returns_is_what_goes_on(pipe: MimicBrushPipeline) -> None:
    def zero_at_last(pipe: MimicBrushPipeline, step: int, timestep: int, tensors: Tensors) -> Tensors:
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    assert not latents_of(pipe, callback_on_step_end=zero_at_last).any()


def test_a_callback_changes_the_guidance_of_the_next_steps(pipe: MimicBrushPipeline) -> None:
    def raise_guidance(pipe: MimicBrushPipeline, step: int, timestep: int, tensors: Tensors) -> Tensors:
        pipe._guidance_scale += 1.0
        return tensors

    changed = latents_of(pipe, guidance_scale=2.0, callback_on_step_end=raise_guidance)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    assert not torch.allclose(changed, latents_of(pipe, guidance_scale=2.0))
    assert pipe.guidance_scale == 2.0  # of the present call: the change is not remembered


def test_a_callback_that_sets_guidance_to_zero_turns_it_off(pipe: MimicBrushPipeline) -> None:
    # As diffusers' documentation does it; the unconditional prediction, which a plain 0 would give, is not meant.
    def lower_to(scale: float) -> Callable[[MimicBrushPipeline, int, int, Tensors], Tensors]:
        def lower(pipe: MimicBrushPipeline, step: int, timestep: int, tensors: Tensors) -> Tensors:
            pipe._guidance_scale = scale
            return tensors

        return lower

    off, one = (latents_of(pipe, guidance_scale=2.0, callback_on_step_end=lower_to(scale)) for scale in (0.0, 1.0))
    assert torch.equal(off, one)


def test_an_interrupted_call_returns_what_it_had(pipe: MimicBrushPipeline) -> None:
    on_the_way: list[torch.Tensor] = []

    def note(_: MimicBrushPipeline, step: int, timestep: int, tensors: Tensors) -> Tensors:
        on_the_way.append(tensors["latents"].clone())
        return tensors

    def interrupt(pipe: MimicBrushPipeline, step: int, timestep: int, tensors: Tensors) -> Tensors:
        pipe._interrupt = step == 1
        return tensors

    whole = latents_of(pipe, num_inference_steps=4, callback_on_step_end=note)
    assert torch.equal(latents_of(pipe, num_inference_steps=4, callback_on_step_end=interrupt), on_the_way[1])
    assert torch.equal(latents_of(pipe, num_inference_steps=4), whole)  # the next call is not interrupted


def test_the_progress_bar_is_shown_and_silenced(smallest: ToyModel, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = build(smallest)
    latents_of(pipe)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(desc="painting")
    latents_of(pipe)
    shown = capsys.readouterr()
    assert "painting" in shown.err and "2/2" in shown.err and shown.out == ""


SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]


#: `make test` tries these, `make slow` all: solvers of several orders, added noise, two evaluations in a step.
COMMON_SCHEDULERS = (
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)


@pytest.fixture(scope="module")
def by_timestep(smallest: ToyModel) -> dict[str, MimicBrushPipeline]:
    """For tests that put a scheduler of their own in."""
    return {each: build(smallest, reference_timestep=each) for each in ("current", "zero")}


# DEIS and KDPM2 hand tensors to NumPy in a way that NumPy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "reference_timestep"),
    [
        pytest.param(name, each, marks=[] if each == "current" and name in COMMON_SCHEDULERS else pytest.mark.slow)
        for name in SCHEDULERS
        for each in ("current", "zero")
    ],
)
def test_schedulers_can_be_swapped(
    by_timestep: dict[str, MimicBrushPipeline], name: str, reference_timestep: str
) -> None:
    pipe = by_timestep[reference_timestep]
    pipe.scheduler = getattr(diffusers, name).from_config(noise_scheduler().config)
    steps = 4 if name == "PNDMScheduler" else 3  # it begins with three Runge-Kutta steps
    first = latents_of(pipe, num_inference_steps=steps)
    assert first.shape == (1, 4, 8, 8) and first.isfinite().all()
    assert first.abs().max() < 100  # scaled to unit variance, not left at the scheduler's own noise level
    assert torch.equal(first, latents_of(pipe, num_inference_steps=steps))  # also those that draw noise
    # Those that evaluate a step twice read the reference at each evaluation's own timestep.
    prepared = pipe.prepare_reference(
        an_edit()["reference"], generator=(generator := seeded_generator(0)), num_inference_steps=steps
    )
    again = latents_of(pipe, {**an_edit(), "reference": prepared}, num_inference_steps=steps, generator=generator)
    torch.testing.assert_close(again, first, atol=1e-5, rtol=1e-4)


def test_solvers_agree_with_ddim_where_steps_are_many(smallest: ToyModel) -> None:
    # They solve one differential equation: what differs is the error of its discretisation. So this shows that
    # noise levels, timesteps and the scaling of the model's input are handed over rightly.
    pipe = build(smallest)
    start = torch.randn(1, 4, 8, 8, generator=seeded_generator(0))

    def solve(name: str, steps: int) -> torch.Tensor:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, timestep_spacing="trailing")
        return latents_of(pipe, latents=start, num_inference_steps=steps, guidance_scale=1.0)

    ddim = solve("DDIMScheduler", 50)
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        assert (solve(name, 50) - ddim).norm() / ddim.norm() < 0.05, name


def test_eta_makes_ddim_random(pipe: MimicBrushPipeline) -> None:
    none, full = (latents_of(pipe, eta=eta) for eta in (0.0, 1.0))
    assert not torch.allclose(none, full)
    assert torch.equal(full, latents_of(pipe, eta=1.0))


def test_to_moves_every_network_to_a_type(smallest: ToyModel) -> None:
    pipe = build(smallest)
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert len(networks) == 7
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        pipe.to(dtype)
        assert {name: part.dtype for name, part in networks.items()} == dict.fromkeys(networks, dtype)
    pipe.to("cpu", torch.float64)
    assert pipe.dtype == torch.float64 and pipe.device.type == "cpu"


# One rounding is off by 2 ** -11 (fp16) or 2 ** -8 (bf16) of a value; some hundred layers in two steps, amplified by
# a guidance of 3, add up to some ten such errors.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 10 * 2**-11), (torch.bfloat16, 10 * 2**-8)])
@pytest.mark.parametrize("reference_timestep", ["current", "zero"])
def test_half_precision_is_close_to_float32(
    smallest: ToyModel, dtype: torch.dtype, tolerance: float, reference_timestep: str
) -> None:
    pipe = build(smallest, reference_timestep=reference_timestep)
    options = {
        "guidance_scale": 3.0,
        "keep_shape": True,
        "latents": torch.randn(1, 4, 8, 8, generator=seeded_generator(1)),
    }
    exact = latents_of(pipe, **options)
    half = latents_of(pipe.to(dtype), **options)
    assert half.dtype == dtype
    assert (half.float() - exact).norm() / exact.norm() < tolerance
    assert np.isfinite(pipe(**an_edit(), num_inference_steps=1, paste_back=False, output_type="np").images).all()


def test_networks_may_be_of_different_types(smallest: ToyModel) -> None:
    pipe = build(smallest)
    expected = latents_of(pipe)
    pipe.unet.to(torch.bfloat16)
    pipe.reference_unet.to(torch.bfloat16)  # the VAE, CLIP and the depth estimator stay in float32
    mixed = latents_of(pipe)
    assert mixed.dtype == torch.bfloat16 and (mixed.float() - expected).norm() / expected.norm() < 0.1


def test_arrays_are_taken_like_images(pipe: MimicBrushPipeline) -> None:
    arrays = {name: np.asarray(image) for name, image in an_edit().items()}
    assert torch.equal(latents_of(pipe, arrays), latents_of(pipe))
    assert isinstance(pipe(**arrays, num_inference_steps=1).images[0], Image.Image)


def test_older_names_give_what_the_new_ones_give(smallest: ToyModel) -> None:
    class Other(MimicBrushPipeline):
        def compute_reference_kv(self, *arguments: object) -> str:  # type: ignore[override]
            return "mine"

    pipe = build(smallest)
    assert pipe.reader is pipe.reference_network and pipe.denoise == pipe.predict_noise
    assert MimicBrushPipeline.prepare_stem is MimicBrushPipeline.prepare_cond_latents
    assert Other(**pipe.components).read_references(None) == "mine"
    with pytest.raises(TypeError, match="Older overrides denoise, which is named predict_noise now"):
        type("Older", (Other,), {"denoise": lambda self: None})
