"""The released pipeline's own numbers come out of ours, for any golden file made the same way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorded_ops import record_ops
from released_golden import GoldenPipeline, golden_path

from mimicbrush.models.encoders import encode_image_tokens, encode_no_image_tokens
from mimicbrush.ops.canvas import IMAGE_FILL, MASK_THRESHOLD, blank_mask, letterbox, to_tensor, to_uint8
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.cuda_graphs import GraphedPasses

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden() -> GoldenPipeline:
    return GoldenPipeline(golden_path("MIMICBRUSH_GOLDEN_PIPELINE", "released_pipeline.safetensors"))


@pytest.fixture
def pipe(golden: GoldenPipeline) -> MimicBrushPipeline:
    return golden.pipeline()


def difference(found: torch.Tensor, golden: torch.Tensor) -> float:
    assert found.shape == golden.shape
    return float((found - golden).abs().max())


def latents_after_each_step(pipe: MimicBrushPipeline, golden: GoldenPipeline) -> tuple[list[float], list[int]]:
    """How far the latents are off after each step, and the timesteps."""
    off: list[float] = []
    seen: list[int] = []

    def compare(_: Any, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        off.append(difference(tensors["latents"], golden.tensors[f"out/latents_after_step_{step}"]))
        seen.append(timestep)
        return {}

    pipe(**golden.edit(), output_type="latent", callback_on_step_end=compare)
    return off, seen


@torch.no_grad()
def test_what_the_encoders_see(pipe: MimicBrushPipeline, golden: GoldenPipeline) -> None:
    values = golden.tensors
    pixels = to_tensor(letterbox(values["in/reference"].numpy(), pipe.size_px, IMAGE_FILL)[None])
    tokens = encode_image_tokens(pipe.image_encoder, pixels)
    assert difference(tokens, values["mid/clip_hidden"]) < TOLERANCE
    assert difference(pipe.image_projector(tokens), values["mid/image_embeds"]) < TOLERANCE
    nothing = pipe.image_projector(encode_no_image_tokens(pipe.image_encoder, 1, torch.device("cpu")))
    assert difference(nothing, values["mid/negative_image_embeds"]) < TOLERANCE
    depth = pipe.depth_projector(values["in/depth_map"], pipe.size_px)
    assert difference(depth, values["mid/depth_feature"]) < TOLERANCE


def test_latents_after_every_step(pipe: MimicBrushPipeline, golden: GoldenPipeline) -> None:
    off, seen = latents_after_each_step(pipe, golden)
    assert seen == [int(golden.tensors[f"out/t_{step}"]) for step in range(golden.steps)]
    assert max(off) < TOLERANCE, off


def test_latents_after_every_step_by_graphs(pipe: MimicBrushPipeline, golden: GoldenPipeline) -> None:
    pipe._graphs = GraphedPasses(8, record_ops, "cpu")  # operations are recorded and repeated, as by a CUDA graph
    off, _ = latents_after_each_step(pipe, golden)
    assert len(pipe._graphs) == 2 and max(off) < TOLERANCE, off


def test_image(pipe: MimicBrushPipeline, golden: GoldenPipeline) -> None:
    (image,) = pipe(**golden.edit(), output_type="pt").images
    assert difference(image.permute(1, 2, 0), golden.tensors["out/image"]) < TOLERANCE


@torch.no_grad()
def test_the_hole_is_blanked_alike(golden: GoldenPipeline) -> None:
    edit, collage = golden.edit(), golden.tensors["in/collage"]
    source = to_tensor(edit["source"][None])
    hole = torch.from_numpy(edit["mask"] > MASK_THRESHOLD)[None, None].float()
    assert (torch.from_numpy(to_uint8(blank_mask(source, hole)))[0].int() - collage.int()).abs().max() <= 1


@pytest.mark.parametrize("part", ["unet", "reference_unet", "vae", "image_encoder", "image_projector"])
def test_one_changed_weight_does_not_match(pipe: MimicBrushPipeline, golden: GoldenPipeline, part: str) -> None:
    # The negative control: the numbers above can be missed.
    network = getattr(pipe, part)
    named = {"image_encoder": "vision_model.embeddings.class_embedding", "image_projector": "projector.bias"}
    name = named.get(part) or next(n for n, p in network.named_parameters() if p.ndim == 4)
    with torch.no_grad():
        network.get_parameter(name).mul_(-1)
    off, _ = latents_after_each_step(pipe, golden)
    assert max(off) > 10 * TOLERANCE


def test_a_changed_depth_projector_does_not_match(pipe: MimicBrushPipeline, golden: GoldenPipeline) -> None:
    with torch.no_grad():
        pipe.depth_projector.conv_out.weight.mul_(-1)
        depth = pipe.depth_projector(golden.tensors["in/depth_map"], pipe.size_px)
    assert difference(depth, golden.tensors["mid/depth_feature"]) > 10 * TOLERANCE


def test_another_blend_does_not_match(golden: GoldenPipeline) -> None:
    for blend in (0.0, 1.0):
        off, _ = latents_after_each_step(golden.pipeline(reference_blend=blend), golden)
        assert max(off) > 10 * TOLERANCE
