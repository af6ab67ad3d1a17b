"""The lean edit computes what the released algorithm computes, and the oracle for it is right itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peers.released_algorithm import ReleasedAlgorithm
from released_golden import GoldenPipeline, golden_path
from toy_data import photograph

from mimicbrush.models.components import toy_components
from mimicbrush.models.options import RELEASED_CONVENTIONS, ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.ops.canvas import IMAGE_FILL, letterbox, letterbox_mask, to_tensor
from mimicbrush.pipelines import MimicBrushPipeline


def test_the_oracle_reproduces_the_golden_file() -> None:
    golden = GoldenPipeline(golden_path("MIMICBRUSH_GOLDEN_PIPELINE", "released_pipeline.safetensors"))
    edit = golden.edit()
    pipe = golden.pipeline()
    released = ReleasedAlgorithm(pipe)
    size = pipe.size_px
    source, reference = (to_tensor(letterbox(edit[name], size, IMAGE_FILL)[None]) for name in ("source", "reference"))
    mask = torch.from_numpy(letterbox_mask(edit["mask"], size))[None, None].float()
    with torch.no_grad():
        conditions = released.encode(source, mask, reference, keep_shape=False)
        conditions["depth"] = pipe.depth_projector(edit["depth_map"], pipe.size_px).repeat(2, 1, 1, 1)
        latents = edit["latents"]
        pipe.scheduler.set_timesteps(golden.steps)
        for step, timestep in enumerate(pipe.scheduler.timesteps):
            noise = released.step(latents, timestep, conditions, golden.guidance_scale)
            latents = pipe.scheduler.step(noise, timestep, latents, return_dict=False)[0]
            expected = golden.tensors[f"out/latents_after_step_{step}"]
            torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("keep_shape", [False, True])
@pytest.mark.parametrize("reference_timestep", ["current", "zero"])
def test_ours_equals_the_released_algorithm(smallest: ToyModel, reference_timestep: str, keep_shape: bool) -> None:
    options = {**RELEASED_CONVENTIONS, "reference_timestep": reference_timestep}
    pipe = MimicBrushPipeline(**vars(toy_components(smallest)), scheduler=noise_scheduler(), **options)
    pipe.set_progress_bar_config(disable=True)
    size = pipe.size_px
    source, reference = (letterbox(photograph(name), size, IMAGE_FILL) for name in ("coffee.png", "chelsea.png"))
    mask = np.zeros((size, size), np.uint8)
    mask[3:9, 5:14] = 255
    latents = torch.randn(1, 4, size // 2, size // 2, generator=torch.Generator().manual_seed(0))
    expected = ReleasedAlgorithm(pipe, reference_timestep)(
        to_tensor(source[None]),
        torch.from_numpy(mask > 128)[None, None].float(),
        to_tensor(reference[None]),
        latents,
        steps=5,
        guidance_scale=5.0,
        keep_shape=keep_shape,
    )
    found = pipe(
        source,
        mask,
        reference,
        latents=latents,
        num_inference_steps=5,
        guidance_scale=5.0,
        keep_shape=keep_shape,
        output_type="latent",
    ).images
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
