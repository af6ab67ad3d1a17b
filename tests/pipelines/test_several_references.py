"""Several references of one source: one among them changes nothing, and their order does not matter."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recorded_ops import record_ops
from toy_data import photograph
from toy_edit import an_edit, build, edits, latents_of

from mimicbrush.errors import InputError
from mimicbrush.models.options import ToyModel
from mimicbrush.ops.correspondence import TITLE_PX, Correspondence, plot_correspondence
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.cuda_graphs import GraphedPasses
from mimicbrush.pipelines.open_pipeline import seeded_generator

ONE = an_edit()["reference"]
TWO = Image.fromarray(photograph("rocket.jpg")[100:180, 300:400])


def edited(pipe: MimicBrushPipeline, reference: Any, **options: Any) -> torch.Tensor:
    return latents_of(pipe, {**an_edit(), "reference": reference}, **options)


@pytest.fixture(scope="module")
def pipe(smallest: ToyModel) -> MimicBrushPipeline:
    """Without a random posterior, so that equal references are equal."""
    return build(smallest, posterior="mean", reference_timestep="zero")


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"reference_sharing": "keys_values", "reference_timestep": "current"}, marks=pytest.mark.slow),
        pytest.param({"reference_encoder": "clip", "posterior": "mean"}, marks=pytest.mark.slow),
    ],
)
def test_one_reference_in_a_list_of_a_list_gives_the_same_bits(smallest: ToyModel, options: dict[str, str]) -> None:
    of_model = {name: value for name, value in options.items() if name.startswith("reference_") and "time" not in name}
    pipe = build(
        replace(smallest, **of_model),  # type: ignore[arg-type]
        **{name: value for name, value in options.items() if name not in of_model},
    )
    expected = edited(pipe, ONE)
    assert torch.equal(edited(pipe, [ONE]), expected) and torch.equal(edited(pipe, [[ONE]]), expected)
    generator = seeded_generator(0)
    prepared = pipe.prepare_reference([[ONE]], generator=generator, num_inference_steps=2)
    assert torch.equal(edited(pipe, prepared, generator=generator), expected)
    # A second one is seen, whatever sees the first.
    assert not torch.allclose(edited(pipe, [ONE, TWO]), expected, atol=1e-4)


def test_the_order_of_references_does_not_matter(pipe: MimicBrushPipeline) -> None:
    both = edited(pipe, [ONE, TWO])
    torch.testing.assert_close(both, edited(pipe, [TWO, ONE]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both, edited(pipe, [[ONE, TWO]]))
    for other in (TWO, [ONE, ONE]):
        assert not torch.allclose(both, edited(pipe, other), atol=1e-4)


def test_without_attention_copies_say_what_one_says(smallest: ToyModel) -> None:
    """What is left is the context: r copies of its tokens, and of those of "no reference", are one."""
    pipe = build(smallest, posterior="mean", reference_blend=0.0)
    torch.testing.assert_close(edited(pipe, [ONE] * 3), edited(pipe, ONE), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prepared", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sources_with_references_of_their_own_are_edited_as_alone(smallest: ToyModel, prepared: bool) -> None:
    """Two sources, two results each, and a generator each, which also sample the posteriors of the references."""
    pipe = build(smallest)
    batch = edits(2)
    groups = [[batch["reference"][0], TWO], [TWO, batch["reference"][1]]]
    seeds = [3, 4, 5, 6]
    options: dict[str, Any] = {"num_images_per_prompt": 2, "num_inference_steps": 2}

    def generators(chosen: list[int]) -> list[torch.Generator]:
        return [seeded_generator(seed) for seed in chosen]

    def edit(edit: Any, references: Any, chosen: list[int]) -> torch.Tensor:
        drawing = generators(chosen)
        if prepared:
            references = pipe.prepare_reference(references, generator=drawing)
        return latents_of(pipe, {**edit, "reference": references}, generator=drawing, **options)

    together = edit(batch, groups, seeds)
    alone = [
        edit({name: batch[name][n] for name in ("source", "mask")}, [groups[n]], seeds[2 * n : 2 * n + 2])
        for n in range(2)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    # One group serves all sources.
    shared = latents_of(pipe, {**batch, "reference": [groups[0]]}, num_inference_steps=1, generator=generators([1, 2]))
    assert len(shared) == 2


@pytest.mark.slow
def test_graphs_repeat_edits_with_several_references(smallest: ToyModel) -> None:
    pipe = build(smallest)
    with_graphs = copy.copy(pipe)
    with_graphs._graphs = GraphedPasses(8, record_ops, "cpu")
    for reference in ([ONE, TWO], ONE, [TWO, ONE]):
        plain, replayed = (edited(each, reference, reference_batch_size=2) for each in (pipe, with_graphs))
        assert torch.equal(plain, replayed)
    assert len(with_graphs._graphs) == 4  # reading and painting, of one and of two


def test_a_correspondence_says_in_which_reference_a_place_lies(pipe: MimicBrushPipeline) -> None:
    edit = {**an_edit(), "num_inference_steps": 1, "output_type": "np", "return_correspondence": True}
    latents = torch.randn(1, 4, 8, 8, generator=seeded_generator(0))
    (found,) = pipe(**{**edit, "reference": [ONE, TWO]}, latents=latents).correspondences
    (swapped,) = pipe(**{**edit, "reference": [TWO, ONE]}, latents=latents).correspondences
    assert set(found.reference_index) <= {0, 1}
    assert np.array_equal(found.reference_index, 1 - swapped.reference_index)
    np.testing.assert_allclose(found.reference_xy, swapped.reference_xy, atol=1e-2)
    (single,) = pipe(**edit, latents=latents).correspondences
    assert not single.reference_index.any() and single.reference_index.shape == (len(single.source_xy),)
    # With a crop for the second alone, its places lie within the crop.
    crops = [None, (20, 10, 60, 50)]
    (cropped,) = pipe(**{**edit, "reference": [ONE, TWO]}, latents=latents, reference_crop=crops).correspondences
    places = cropped.reference_xy[cropped.reference_index == 1]
    assert len(places) and ((places >= (20, 10)) & (places <= (60, 50))).all()


def test_it_is_saved_and_plotted_with_all_references(tmp_path: Path) -> None:
    source, mask = Image.new("RGB", (100, 100), "grey"), Image.new("L", (100, 100), 0)
    mask.paste(255, (30, 30, 70, 70))
    ones = np.ones(2, np.float32)
    places = np.array([[20.0, 50.0], [20.0, 150.0]], np.float32)
    found = Correspondence(places[:, :1] + [[20, 45], [45, 20]], places, ones, ones, 5.0, 5.0, np.array([0, 1]))
    found.save(tmp_path / "map.npz")
    assert np.array_equal(Correspondence.load(tmp_path / "map.npz").reference_index, [0, 1])
    images = [Image.new("RGB", (200, 100), "navy"), Image.new("RGB", (100, 200), "maroon")]
    sheet = np.asarray(plot_correspondence(source, mask, images, found, height_px=200))
    panels = [sheet[TITLE_PX : TITLE_PX + 200, start : start + width] for start, width in ((228, 400), (656, 100))]
    assert sheet.shape[1] == 756
    navy, maroon = ((panel == panel[0, 0]).all(axis=2) for panel in panels)
    assert panels[0][0, 0].tolist() == [0, 0, 128] and panels[1][0, 0].tolist() == [128, 0, 0]
    assert not navy[95:105, 35:45].any() and not maroon[145:155, 15:25].any()  # a mark in each
    # A place beside its own reference is none in the next.
    beside = replace(found, reference_xy=np.array([[420.0, 50.0], [420.0, 50.0]], np.float32))
    unmarked = np.asarray(plot_correspondence(source, mask, images, beside, height_px=200))
    assert (unmarked[TITLE_PX : TITLE_PX + 200, 656:] == [128, 0, 0]).all()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ([[ONE, TWO], [ONE]], "all sources must have the same number of references, got 2, 1"),
        ([[ONE] * 5], "references of a source"),
        ([[]], "references of a source"),
        ([], "got 0 references for"),
        ([[ONE], [TWO]], r"expected one reference, or one \(or a list\) for each of 1 sources, got 2"),
        (["one.png", "two.png"], "an image must be a PIL image or a NumPy array, got str"),
        ([None, None], "an image must be a PIL image or a NumPy array, got NoneType"),
        ({1: ONE}, "an image must be a PIL image or a NumPy array, got int"),
        (5, "an image must be a PIL image or a NumPy array, got int"),
    ],
)
def test_lists_that_do_not_fit_are_refused(pipe: MimicBrushPipeline, reference: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        edited(pipe, reference)


def test_a_crop_for_each_image_is_expected(pipe: MimicBrushPipeline) -> None:
    with pytest.raises(InputError, match="for each of 2 references, got 3"):
        edited(pipe, [ONE, TWO], reference_crop=[None, None, (0, 0, 9, 9)])
