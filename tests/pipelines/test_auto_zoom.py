"""Auto-zoom: two edits of the pipeline, the second with the part that the first looked at."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from toy_edit import Edit, an_edit, build

from mimicbrush.errors import InputError
from mimicbrush.models.options import ToyModel
from mimicbrush.ops.correspondence import Correspondence
from mimicbrush.ops.crops import Box
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.editing import auto_zoom
from mimicbrush.pipelines.editing.auto_zoom import edit_zoomed
from mimicbrush.pipelines.editing.reference_part import ReferencePart
from mimicbrush.pipelines.open_pipeline import seeded_generator

STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe(smallest: ToyModel) -> MimicBrushPipeline:
    return build(smallest)


@pytest.fixture
def edit() -> Edit:
    return an_edit()


def plain(pipe: MimicBrushPipeline, edit: Edit, seed: int, **options: object) -> Image.Image:
    return pipe(**edit, **STEPS, generator=seeded_generator(seed), **options).images[0]


def where_the_first_token_looked(found: Correspondence, area: Box) -> ReferencePart:
    """Random weights look everywhere; so that there is a part, one token decides."""
    x, y = found.reference_xy[0].round().astype(int).clip((area[0], area[1]), (area[2] - 20, area[3] - 20))
    return ReferencePart((int(x), int(y), int(x) + 20, int(y) + 20), 1.0, 1)


def test_each_seed_has_a_closer_look_of_its_own(
    pipe: MimicBrushPipeline, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_zoom, "find_attended_part", where_the_first_token_looked)
    area = (10, 20, 90, 80)
    output, parts = edit_zoomed(pipe, **edit, seeds=[3, 4], reference_crop=area, return_correspondence=True, **STEPS)
    assert output.correspondences is not None and len(output.correspondences) == 2
    for seed, image, part in zip([3, 4], output.images, parts, strict=True):
        first = pipe(**edit, **STEPS, generator=seeded_generator(seed), reference_crop=area, return_correspondence=True)
        assert part == where_the_first_token_looked(first.correspondences[0], area)
        assert part is not None and isinstance(image, Image.Image)
        assert np.array_equal(image, plain(pipe, edit, seed, reference_crop=part.box))
        assert not np.array_equal(image, plain(pipe, edit, seed, reference_crop=area))


def test_without_a_part_the_first_pass_is_the_result(
    pipe: MimicBrushPipeline, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_zoom, "find_attended_part", lambda found, area: None)
    output, parts = edit_zoomed(pipe, **edit, seeds=[1], **STEPS)
    assert parts == [None] and output.correspondences is None
    assert np.array_equal(output.images[0], plain(pipe, edit, 1))


def test_a_pipeline_that_cannot_tell_is_refused(smallest: ToyModel, edit: Edit) -> None:
    pipe = build(smallest)
    pipe.reference_unet = None
    with pytest.raises(InputError, match="auto-zoom needs a pipeline with a reference U-Net"):
        edit_zoomed(pipe, **edit, seeds=[1], **STEPS)
