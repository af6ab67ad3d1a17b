"""A toy pipeline of real classes, and an edit to run through it, for the tests of this folder."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from toy_data import photograph

from mimicbrush.models.components import toy_components
from mimicbrush.models.options import ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.open_pipeline import seeded_generator

Edit = dict[str, Image.Image]


def build(options: ToyModel, **conventions: object) -> MimicBrushPipeline:
    """A quiet pipeline whose autoencoder is diffusers' own: unlike the toy one it has a posterior to draw from."""
    parts = vars(toy_components(options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts["vae"] = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=options.size_px,
            scaling_factor=1.0,
        )
    pipe = MimicBrushPipeline(**parts, scheduler=noise_scheduler(), **conventions)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def an_edit(turns: int = 0) -> Edit:
    """Source, mask and reference, turned by so many quarters."""
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 20:40] = 255
    images = {
        "source": Image.fromarray(photograph("coffee.png")[:40, :60]),
        "mask": Image.fromarray(mask),
        "reference": Image.fromarray(photograph("chelsea.png")[:100, :100]),
    }
    return {name: image.rotate(90 * turns, expand=True) for name, image in images.items()}


def edits(number: int) -> dict[str, list[Image.Image]]:
    """So many different edits, as lists."""
    each = [an_edit(turns) for turns in range(number)]
    return {name: [one[name] for one in each] for name in each[0]}


def latents_of(pipe: MimicBrushPipeline, edit: Edit | None = None, *, seed: int = 0, **options: object) -> torch.Tensor:
    """The latents of an edit in two steps."""
    settings: dict[str, object] = {
        "num_inference_steps": 2,
        "generator": seeded_generator(seed),
        "output_type": "latent",
    }
    return pipe(**(an_edit() if edit is None else edit), **{**settings, **options}).images
