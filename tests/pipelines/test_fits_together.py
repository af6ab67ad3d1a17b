"""What is given together must fit together; what is shared must not leak from one edit into another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from toy_data import photograph

from mimicbrush.errors import InputError, MimicBrushError
from mimicbrush.models.components import toy_components
from mimicbrush.models.options import ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.open_pipeline import seeded_generator

SOURCES = [photograph("coffee.png")[:90, :120], photograph("astronaut.png")[:100, :80]]
REFERENCES = [photograph("chelsea.png")[:200, :160], photograph("rocket.jpg")[:120, :200]]


def masks() -> list[np.ndarray]:
    found = [np.zeros(source.shape[:2], np.uint8) for source in SOURCES]
    found[0][30:60, 40:80], found[1][20:70, 10:50] = 255, 255
    return found


@pytest.fixture
def pipe(smallest: ToyModel) -> MimicBrushPipeline:
    pipe = MimicBrushPipeline(**vars(toy_components(smallest)), scheduler=noise_scheduler(), reference_blend=0.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe: MimicBrushPipeline, **options: Any) -> torch.Tensor:
    given = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded_generator(0)}
    return pipe(SOURCES[0], masks()[0], REFERENCES[0], **{**given, **options}).images


@pytest.mark.parametrize("count", [0, 2, 3, 4])
@pytest.mark.parametrize("listed", [False, True])
def test_references_are_one_for_all_or_one_each(pipe: MimicBrushPipeline, count: int, listed: bool) -> None:
    sources, regions = SOURCES * 2, masks() * 2
    generator = [seeded_generator(i) for i in range(4)] if listed else seeded_generator(0)
    options = {"generator": generator, "num_inference_steps": 1, "output_type": "latent"}
    references = (REFERENCES * 2)[:count]
    if count == 4:
        assert pipe(sources, regions, references, **options).images.shape[0] == 4
        return
    with pytest.raises(InputError, match=rf"for each of 4 sources, got {count}$|got {count} references"):
        pipe(sources, regions, references, **options)


def test_correspondences_of_a_batch_are_those_of_single_edits(pipe: MimicBrushPipeline) -> None:
    options = {"num_inference_steps": 2, "return_correspondence": True, "crop": "auto"}
    crops = [(20, 10, 150, 190), (0, 0, 100, 90)]
    generators = [seeded_generator(i) for i in range(4)]
    both = pipe(
        SOURCES, masks(), REFERENCES, **options, num_images_per_prompt=2, generator=generators, reference_crop=crops
    )
    for row, found in enumerate(both.correspondences):
        edit = {"source": SOURCES[row // 2], "mask": masks()[row // 2], "reference": REFERENCES[row // 2]}
        alone = pipe(
            **edit, **options, generator=seeded_generator(row), reference_crop=crops[row // 2]
        ).correspondences[0]
        np.testing.assert_allclose(found.source_xy, alone.source_xy)
        np.testing.assert_allclose(found.reference_xy, alone.reference_xy, atol=1e-2)
        np.testing.assert_allclose(found.share, alone.share, atol=1e-4)
        x0, y0, x1, y1 = crops[row // 2]
        side = max(x1 - x0, y1 - y0)  # padding counts: a peak may lie on it
        centre = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
        assert (np.abs(found.reference_xy - centre) <= side / 2 + 1).all()


def test_pipelines_that_share_a_unet_keep_their_own_blend(pipe: MimicBrushPipeline) -> None:
    other = MimicBrushPipeline(**pipe.components, reference_blend=1.0)
    other.set_progress_bar_config(disable=True)
    expected, others = latents_of(pipe), latents_of(other)
    assert not torch.equal(expected, others)
    inner: list[torch.Tensor] = []

    def call_the_other(*_: Any) -> dict[str, torch.Tensor]:
        if not inner:
            steps = pipe.scheduler.timesteps
            inner.append(latents_of(other))
            pipe.scheduler.timesteps = steps
        return {}

    assert torch.equal(latents_of(pipe, callback_on_step_end=call_the_other), expected)
    assert torch.equal(inner[0], others)


def test_an_option_that_changes_is_heeded(pipe: MimicBrushPipeline) -> None:
    before = latents_of(pipe)
    pipe.register_to_config(no_depth_convention="zero_input")
    after = latents_of(pipe)
    assert not torch.equal(before, after)
    pipe.register_to_config(no_depth_convention="zero_map")
    assert torch.equal(latents_of(pipe), before)


def test_a_hole_that_no_latent_sees(pipe: MimicBrushPipeline) -> None:
    mask = np.zeros((16, 16), np.uint8)
    mask[1::2, 1::2] = 255  # a latent takes the first of its 2 x 2 pixels
    image = np.full((16, 16, 3), 90, np.uint8)
    with pytest.raises(InputError, match="the mask is too thin"):
        pipe(image, mask, image, num_inference_steps=1)


def test_a_boolean_mask(pipe: MimicBrushPipeline) -> None:
    expected = latents_of(pipe)
    options = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded_generator(0)}
    assert torch.equal(pipe(SOURCES[0], masks()[0] > 0, REFERENCES[0], **options).images, expected)


def test_what_is_no_image(pipe: MimicBrushPipeline) -> None:
    with pytest.raises(InputError, match="got str"):
        pipe("source.png", masks()[0], REFERENCES[0])
    with pytest.raises(InputError, match="no source was given"):
        pipe([], [], REFERENCES[0])


def test_a_prepared_reference_of_another_type(pipe: MimicBrushPipeline) -> None:
    prepared = pipe.prepare_reference(REFERENCES[0])
    pipe.to(torch.bfloat16)
    with pytest.raises(InputError, match="prepare it again"):
        pipe(SOURCES[0], masks()[0], prepared, num_inference_steps=1)


def test_a_result_that_overflowed_is_no_black_image(pipe: MimicBrushPipeline) -> None:
    start = torch.full((1, 4, 8, 8), torch.nan)
    with pytest.raises(MimicBrushError, match="use bfloat16 or float32"):
        latents_of(pipe, latents=start, output_type="pil")


def test_a_callback_that_returns_nothing(pipe: MimicBrushPipeline) -> None:
    assert torch.equal(latents_of(pipe, callback_on_step_end=lambda *_: None), latents_of(pipe))
