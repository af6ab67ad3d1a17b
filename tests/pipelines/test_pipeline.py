from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from toy_data import photograph

from mimicbrush.errors import InputError, WeightsError
from mimicbrush.models.components import toy_components
from mimicbrush.models.options import ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.ops.canvas import crop_back, paste_back
from mimicbrush.pipelines import MimicBrushPipeline, MimicBrushPipelineOutput
from mimicbrush.pipelines.checksums import CHECKSUMS_FILE
from mimicbrush.pipelines.open_pipeline import load_pipeline, move_to_device, seeded_generator


@pytest.fixture(scope="module")
def pipe(smallest: ToyModel) -> MimicBrushPipeline:
    pipe = MimicBrushPipeline(**vars(toy_components(smallest)), scheduler=noise_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def edit() -> dict[str, Image.Image]:
    source = Image.fromarray(photograph("coffee.png")[:90, :120])
    mask = np.zeros((90, 120), np.uint8)
    mask[30:60, 40:80] = 255
    return {"source": source, "mask": Image.fromarray(mask), "reference": Image.fromarray(photograph("chelsea.png"))}


def run(pipe: MimicBrushPipeline, edit: dict[str, Image.Image], **options: object) -> MimicBrushPipelineOutput:
    return pipe(**edit, num_inference_steps=2, generator=seeded_generator(0), **options)


def test_only_the_hole_and_its_soft_edge_change(pipe: MimicBrushPipeline, edit: dict[str, Image.Image]) -> None:
    result = run(pipe, edit).images[0]
    assert result.size == edit["source"].size and result.mode == "RGB"
    before, after = np.asarray(edit["source"]), np.asarray(result)
    near = np.zeros((90, 120), bool)
    near[20:70, 30:90] = True
    assert np.array_equal(before[~near], after[~near])
    assert np.abs(before[40:50, 50:70].astype(int) - after[40:50, 50:70]).mean() > 5


@pytest.mark.parametrize("crop", ["full", "auto"])
@pytest.mark.parametrize("soft", [False, True])
def test_pasting_back_where_it_counts_equals_pasting_all_of_it(
    pipe: MimicBrushPipeline, edit: dict[str, Image.Image], crop: str, soft: bool
) -> None:
    source, mask = np.asarray(edit["source"]), np.asarray(edit["mask"]).copy()
    if soft:
        mask[22:30, 36:90] = 60  # too little to be repainted, enough to be blended
    options = {"crop": crop, "num_inference_steps": 1, "paste_back": False}
    (square,) = pipe(source, mask, edit["reference"], **options, generator=seeded_generator(0)).images
    (result,) = pipe(
        source, mask, edit["reference"], **{**options, "paste_back": True}, generator=seeded_generator(0)
    ).images
    ((x0, y0, x1, y1),) = (placement.box for placement in pipe.place([source], [mask], crop))
    assert (x1 - x0 == 120) == (crop == "full")
    assert not mask[:y0].any() and not mask[:, :x0].any() and not mask[y1:].any() and not mask[:, x1:].any()
    back, part = crop_back(np.asarray(square), y1 - y0, x1 - x0), (slice(y0, y1), slice(x0, x1))
    expected = source.copy()
    expected[part] = paste_back(back, source[part], mask[part]).round()
    assert np.array_equal(np.asarray(result), expected)


def test_equal_seeds_give_equal_images_and_the_reference_matters(
    pipe: MimicBrushPipeline, edit: dict[str, Image.Image]
) -> None:
    first, again = (np.asarray(run(pipe, edit).images[0]) for _ in range(2))
    assert np.array_equal(first, again)
    other = np.asarray(run(pipe, {**edit, "reference": edit["source"]}).images[0])
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, np.asarray(run(pipe, edit, keep_shape=True).images[0]))


def test_a_batch_equals_single_edits(pipe: MimicBrushPipeline, edit: dict[str, Image.Image]) -> None:
    turned = {name: image.transpose(Image.Transpose.ROTATE_90) for name, image in edit.items()}
    options = {"num_inference_steps": 2, "paste_back": False, "output_type": "np"}
    both = pipe(
        **{name: [edit[name], turned[name]] for name in edit},
        generator=[seeded_generator(3), seeded_generator(4)],
        **options,
    ).images
    alone = [
        pipe(**one, generator=seeded_generator(seed), **options).images[0] for one, seed in ((edit, 3), (turned, 4))
    ]
    np.testing.assert_allclose(both, np.stack(alone), atol=2e-5)


def test_without_guidance_or_reference(pipe: MimicBrushPipeline, edit: dict[str, Image.Image]) -> None:
    latents = [
        run(pipe, edit, guidance_scale=1.0, output_type="latent").images,
        run(pipe, {**edit, "reference": None}, guidance_scale=5.0, output_type="latent").images,
        run(pipe, edit, guidance_scale=5.0, output_type="latent").images,
    ]
    assert all(latent.shape == (1, 4, 8, 8) for latent in latents)
    assert not torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], latents[2])


def test_guidance_extrapolates_from_the_unconditional_prediction(
    pipe: MimicBrushPipeline, edit: dict[str, Image.Image]
) -> None:
    # After one step the result is linear in the predicted noise: x(g) = x(no reference) + g (x(1) - x(none)).
    start = torch.randn(1, 4, 8, 8, generator=seeded_generator(7))
    options = {"num_inference_steps": 1, "output_type": "latent", "latents": start}
    none = pipe(**{**edit, "reference": None}, **options).images
    one, three = (pipe(**edit, guidance_scale=g, **options).images for g in (1.0, 3.0))
    torch.testing.assert_close(three, none + 3 * (one - none), atol=1e-4, rtol=1e-4)


def test_output_types_and_callback(pipe: MimicBrushPipeline, edit: dict[str, Image.Image]) -> None:
    seen: list[int] = []

    def note(
        _: MimicBrushPipeline, step: int, timestep: int, values: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        seen.append(step)
        return {"latents": torch.zeros_like(values["latents"])}

    assert run(pipe, edit, output_type="pt", callback_on_step_end=note).images.abs().max() <= 1
    assert seen == [0, 1]
    assert run(pipe, edit, paste_back=False).images[0].size == (16, 16)
    assert run(pipe, edit, paste_back=False, output_type="np").images.shape == (1, 16, 16, 3)
    assert run(pipe, edit, output_type="np").images[0].shape == (90, 120, 3)
    assert isinstance(run(pipe, edit, return_dict=False), tuple)


@pytest.mark.parametrize(("timestep", "batch", "passes"), [("current", 1, 3), ("current", 2, 2), ("zero", 2, 1)])
def test_how_often_the_reference_is_read(
    smallest: ToyModel, edit: dict[str, Image.Image], timestep: str, batch: int, passes: int
) -> None:
    pipe = MimicBrushPipeline(
        **vars(toy_components(smallest)), scheduler=noise_scheduler(), reference_timestep=timestep
    )
    pipe.set_progress_bar_config(disable=True)
    seen: list[list[float]] = []
    pipe.reference_unet.register_forward_pre_hook(lambda _, args: seen.append(args[1].tolist()))
    pipe(**edit, num_inference_steps=3, generator=seeded_generator(0), reference_batch_size=batch)
    assert len(seen) == passes
    expected = [0.0] if timestep == "zero" else pipe.scheduler.timesteps.tolist()
    assert [t for one in seen for t in one] == expected


def test_it_saves_and_loads_with_its_conventions(
    tmp_path: Path, smallest: ToyModel, edit: dict[str, Image.Image]
) -> None:
    options = {"reference_blend": 0.5, "reference_timestep": "zero", "default_guidance_scale": 2.5}
    pipe = MimicBrushPipeline(**vars(toy_components(smallest)), scheduler=noise_scheduler("v_prediction"), **options)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "pipe")
    assert not list((tmp_path / "pipe").rglob("*.bin"))
    loaded = load_pipeline(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    assert {name: loaded.config[name] for name in options} == options
    assert isinstance(loaded.scheduler, DDIMScheduler) and loaded.scheduler.config.prediction_type == "v_prediction"
    assert np.array_equal(np.asarray(run(pipe, edit).images[0]), np.asarray(run(loaded, edit).images[0]))


def test_what_does_not_fit_is_said(pipe: MimicBrushPipeline, edit: dict[str, Image.Image]) -> None:
    small = edit["mask"].resize((60, 45))
    with pytest.raises(InputError, match="the mask is 60 x 45 px, but its source is 120 x 90 px"):
        run(pipe, {**edit, "mask": small})
    with pytest.raises(InputError, match="nothing to repaint"):
        run(pipe, {**edit, "mask": Image.new("L", (120, 90))})
    with pytest.raises(InputError, match="2 sources and 1 masks"):
        run(pipe, {**edit, "source": [edit["source"]] * 2})
    with pytest.raises(InputError, match="for 1 sources x 1 images, got 2"):
        pipe(**edit, num_inference_steps=1, generator=[seeded_generator(0), seeded_generator(1)])
    for name, value in (
        ("num_inference_steps", 0), ("num_inference_steps", 1001), ("num_inference_steps", 2.0), ("guidance_scale", -3),
        ("guidance_scale", float("nan")), ("num_images_per_prompt", True), ("eta", 2), ("reference_batch_size", 0),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"{name}={'true' if value is True else value}: expected a"):
            pipe(**edit, **{name: value})
    with pytest.raises(InputError, match=r"\(H, W, 3\) uint8"):
        pipe(np.zeros((9, 9), np.float32), edit["mask"], edit["reference"])
    with pytest.raises(InputError, match=r"expected \(1, 4, 8, 8\)"):
        pipe(**edit, latents=torch.zeros(1, 4, 9, 9))


def test_folders_that_are_no_pipeline(tmp_path: Path, pipe: MimicBrushPipeline) -> None:
    with pytest.raises(InputError, match="is not a pipeline folder"):
        load_pipeline(tmp_path)
    pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe" / CHECKSUMS_FILE).unlink()  # older folders have none
    weights = tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="has 1,000 bytes and no header; the download was interrupted"):
        load_pipeline(tmp_path / "pipe")
    weights.unlink()
    (tmp_path / "pipe" / "unet" / "config.json").unlink()
    (tmp_path / "pipe" / "unet").rmdir()
    with pytest.raises(InputError, match="lacks unet"):
        load_pipeline(tmp_path / "pipe")
    with pytest.raises(InputError, match="must be auto, cpu or cuda, got 'tpu'"):
        move_to_device(pipe, "tpu")
