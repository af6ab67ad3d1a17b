"""Editors that have weights, all of toy size: real classes and formats, random numbers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_material import view
from PIL import Image
from safetensors.torch import load_file, save_file
from toy_editors import write_paint_by_example, write_stable_diffusion

from mimicbrush.assembly import build_components
from mimicbrush.errors import InputError, WeightsError
from mimicbrush.evaluation.benchmark.layout import TRACKS, Case
from mimicbrush.evaluation.editors.mimicbrush import MimicBrushEditor
from mimicbrush.evaluation.editors.protocol import CaseInputs, Editor
from mimicbrush.evaluation.editors.registry import open_editor
from mimicbrush.io.images import read_image
from mimicbrush.models.options import ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.models.unets import ReferenceUNet
from mimicbrush.ops.canvas import crop_back
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.checksums import CHECKSUMS_FILE
from mimicbrush.pipelines.editing import auto_zoom
from mimicbrush.pipelines.editing.reference_part import ReferencePart
from mimicbrush.pipelines.open_pipeline import load_pipeline, seeded_generator

FAST = {"device": "cpu", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipeline_folder(smallest: ToyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "pipeline"
    MimicBrushPipeline(**vars(build_components(smallest, 0)), scheduler=noise_scheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every public checkpoint under its own name."""
    root = write_stable_diffusion(tmp_path_factory.mktemp("weights"))
    write_paint_by_example(root / "Paint-by-Example")
    return root


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A source of 60 x 40 px and a reference of 100 x 80 px, with a mask."""
    mask, reference_mask = Image.new("L", (60, 40)), Image.new("L", (100, 80))
    mask.paste(255, (10, 8, 44, 34))
    reference_mask.paste(255, (50, 10, 90, 60))
    images = {
        "source": Image.fromarray(view("coffee.png", 0)[:40, :60]),
        "mask": mask,
        "reference": Image.fromarray(view("chelsea.png", 0)[:80, :100]),
        "reference_mask": reference_mask,
    }
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
    return Case(TRACKS["texture_inner"], "001", *(tmp_path / f"{name}.png" for name in images))


@pytest.fixture
def given(case: Case) -> CaseInputs:
    source, reference = (read_image(path, "RGB") for path in (case.source, case.reference))
    mask = read_image(case.mask, "L")
    return CaseInputs(source, mask, reference, keep_shape=True, seed=3)


def check_manners(editor: Editor, case: Case, given: CaseInputs) -> np.ndarray:
    """Size, seeds and the reference matter, the hole's content does not (unless its shape is asked for)."""
    given = replace(given, keep_shape=False)
    result = editor.edit_case(case, given).image
    assert (result.size, result.mode) == (given.source.size, "RGB")
    pixels = np.asarray(result)
    assert np.array_equal(pixels, np.asarray(editor.edit_case(case, given).image))
    assert not np.array_equal(pixels, np.asarray(editor.edit_case(case, replace(given, seed=4)).image))
    other = given.reference.transpose(Image.Transpose.FLIP_TOP_BOTTOM).convert("L").convert("RGB")
    assert not np.array_equal(pixels, np.asarray(editor.edit_case(case, replace(given, reference=other)).image))
    hidden = given.source.copy()
    hidden.paste((255, 0, 0), (16, 14, 38, 28))  # not at its edge, which is mixed with what is around it when reduced
    assert np.array_equal(pixels, np.asarray(editor.edit_case(case, replace(given, source=hidden)).image))
    assert {"editor", "weights", "steps", "guidance", "versions"} <= editor.about.keys()
    assert all(isinstance(value, str) for value in editor.about.values())
    return pixels


def test_a_pipeline_folder_edits_as_the_pipeline_itself(pipeline_folder: Path, case: Case, given: CaseInputs) -> None:
    editor = open_editor(str(pipeline_folder), guidance_scale=2.0, **FAST)
    pipeline = load_pipeline(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "keep_shape": True}
    images = (given.source, given.mask, given.reference)
    square = pipeline(*images, generator=seeded_generator(3), paste_back=False, return_correspondence=True, **options)
    result = editor.edit_case(case, given)
    assert np.array_equal(np.asarray(result.image), crop_back(np.asarray(square.images[0]), 40, 60))
    assert result.correspondence is not None
    assert np.array_equal(result.correspondence.reference_xy, square.correspondences[0].reference_xy)
    pasted = np.asarray(pipeline(*images, generator=seeded_generator(3), **options).images[0])
    inner = slice(19, 23), slice(21, 33)  # more than ten pixels from the edge of the hole
    assert np.array_equal(pasted[inner], np.asarray(result.image)[inner])
    assert not np.array_equal(pasted, np.asarray(result.image))  # nothing is pasted back
    check_manners(editor, case, given)


def test_paint_by_example(weights: Path, case: Case, given: CaseInputs) -> None:
    whole = check_manners(open_editor(f"paint_by_example:{weights / 'Paint-by-Example'}", **FAST), case, given)
    boxed = open_editor(f"paint_by_example_box:{weights}", **FAST)
    result = np.asarray(boxed.edit_case(case, given).image)
    assert not np.array_equal(result, whole)
    cut = replace(given, reference=given.reference.crop((50, 10, 90, 60)), keep_shape=False)
    same = open_editor(f"paint_by_example:{weights}", **FAST).edit_case(case, cut).image
    assert np.array_equal(result, np.asarray(same))
    with pytest.raises(InputError, match=r"has no mask \(.*needs one for its box"):
        boxed.edit_case(replace(case, reference_mask=None), given)


def test_ip_adapter(weights: Path, case: Case, given: CaseInputs) -> None:
    editor = open_editor(f"ip_adapter:{weights}", **FAST)
    check_manners(editor, case, given)
    assert editor.about["adapter_scale"] == "1.0"


def test_reference_only_of_stable_diffusion(weights: Path, case: Case, given: CaseInputs) -> None:
    editor = open_editor(f"reference_only:{weights}", **FAST)
    check_manners(editor, case, given)
    found = editor.edit_case(case, given).correspondence
    assert found is not None
    assert len(found.source_xy) > 0
    assert ((found.share > 0) & (found.share < 1)).all()


def test_reference_only_of_a_pipeline(pipeline_folder: Path, case: Case, given: CaseInputs) -> None:
    editor = open_editor(f"reference_only:{pipeline_folder}", guidance_scale=2.0, **FAST)
    pixels = check_manners(editor, case, given)
    assert not np.array_equal(pixels, np.asarray(editor.edit_case(case, given).image))  # depth gives the shape


def test_a_pipeline_may_see_the_box_alone_or_look_twice(
    pipeline_folder: Path, case: Case, given: CaseInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = ReferencePart((10, 5, 60, 45), 1.0, 1)  # random weights look everywhere
    monkeypatch.setattr(auto_zoom, "find_attended_part", lambda found, area: part)
    whole, boxed, zoomed = (open_editor(f"{look}{pipeline_folder}", **FAST) for look in ("", "boxed:", "auto_zoom:"))
    assert isinstance(whole, MimicBrushEditor)
    assert [editor.about["reference"] for editor in (whole, boxed)] == ["whole", "boxed"]
    assert "auto_zoom" in zoomed.about["reference"] and "least_share" in zoomed.about["reference"]
    cut = replace(given, reference=given.reference.crop((50, 10, 90, 60)), keep_shape=False)
    assert np.array_equal(check_manners(boxed, case, given), np.asarray(whole.edit_case(case, cut).image))
    closer = replace(given, reference=given.reference.crop(part.box), keep_shape=False)
    assert np.array_equal(check_manners(zoomed, case, given), np.asarray(whole.edit_case(case, closer).image))
    with pytest.raises(InputError, match=r"has no mask \(.*needs one for its box"):
        boxed.edit_case(replace(case, reference_mask=None), given)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_reference_only_that_does_not_look_is_the_pipeline_without_a_reference(
    guidance_scale: float, smallest: ToyModel, case: Case, given: CaseInputs, tmp_path: Path
) -> None:
    pipeline = MimicBrushPipeline(
        **vars(build_components(smallest, 0)), scheduler=noise_scheduler(), reference_blend=0.0
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    editor = open_editor(f"reference_only:{tmp_path / 'pipeline'}", guidance_scale=guidance_scale, **FAST)
    pipeline.set_progress_bar_config(disable=True)
    side = pipeline.unet.config.sample_size
    square = pipeline(
        given.source,
        given.mask,
        num_inference_steps=2,
        keep_shape=True,
        latents=torch.randn((1, 4, side, side), generator=seeded_generator(given.seed)),
        paste_back=False,
    ).images[0]
    difference = crop_back(np.asarray(square), 40, 60).astype(int) - np.asarray(editor.edit_case(case, given).image)
    assert np.abs(difference).max() <= 1  # rounding


def test_other_weights_in_the_same_folder_are_another_editor(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline_folder, tmp_path / "pipeline")
    before, same = (open_editor(str(folder), **FAST).about for _ in range(2))
    assert before == same
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(path).items()}, path)
    (folder / CHECKSUMS_FILE).unlink()
    assert open_editor(str(folder), **FAST).about["weights"] != before["weights"]


def test_steps_must_be_some(pipeline_folder: Path) -> None:
    with pytest.raises(InputError, match="1 or more"):
        open_editor(str(pipeline_folder), num_inference_steps=0)


def test_the_reading_unet_has_the_painting_ones_weights(pipeline_folder: Path) -> None:
    unet = load_pipeline(pipeline_folder).unet
    reading = ReferenceUNet.from_unet(unet)
    assert reading.config.in_channels == 4
    painting = unet.state_dict()
    for key, weight in reading.state_dict().items():
        assert torch.equal(weight, painting[key][:, :4] if key == "conv_in.weight" else painting[key])


@pytest.mark.parametrize("name", ["paint_by_example", "ip_adapter", "reference_only"])
def test_weights_that_cannot_be_read(name: str, weights: Path, tmp_path: Path) -> None:
    for repository in weights.iterdir():
        if (repository / "unet").is_dir():
            copy = tmp_path / repository.name
            copy.mkdir()
            for each in repository.iterdir():
                if each.name != "unet":
                    (copy / each.name).symlink_to(each)
            (copy / "unet").mkdir()
            (copy / "unet" / "config.json").symlink_to(repository / "unet" / "config.json")
        else:
            (tmp_path / repository.name).symlink_to(repository)
    with pytest.raises(WeightsError, match=r"cannot be loaded \(only .safetensors are read\)"):
        open_editor(f"{name}:{tmp_path}", **FAST)
