from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from toy_data import photograph

from mimicbrush.errors import InputError, speak_as
from mimicbrush.ops.crops import Placement
from mimicbrush.pipelines.editing.inputs import read_inputs
from mimicbrush.pipelines.editing.requests import Edit
from mimicbrush.pipelines.image_inputs import letterbox_masks


@pytest.fixture
def edit(tmp_path: Path) -> Edit:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "s.png")
    Image.new("RGB", (30, 30), "blue").save(tmp_path / "r.png")
    return Edit(tmp_path / "s.png", tmp_path / "m.png", tmp_path / "r.png", tmp_path / "o.png")


def save_mask(edit: Edit, width: int = 60, height: int = 40, painted: float = 0.5, white: int = 255) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[:, : round(width * painted)] = white
    Image.fromarray(mask).save(edit.mask)
    return mask


def test_images_that_fit(edit: Edit) -> None:
    mask = save_mask(edit)
    inputs = read_inputs(edit)
    assert (inputs.source.mode, inputs.mask.mode, inputs.reference.mode) == ("RGB", "L", "RGB")
    assert np.array_equal(np.asarray(inputs.mask), mask)


@pytest.mark.parametrize(
    ("width", "height", "offers", "hint"),
    [
        (30, 20, "resize_mask=True resizes it", ""),
        (50, 40, "with resize_mask=True its aspect ratio may differ by at most 1%", ""),
        (40, 60, "", "is the mask rotated?"),
    ],
)
def test_a_mask_of_another_size(edit: Edit, width: int, height: int, offers: str, hint: str) -> None:
    save_mask(edit, width, height)
    with pytest.raises(InputError, match=rf"m\.png is {width} x {height} px but .*s\.png is 60 x 40 px") as error:
        read_inputs(edit)
    assert offers in str(error.value) and hint in str(error.value)


@pytest.mark.parametrize("size", [(30, 20), (30, 30)])
def test_a_mask_of_the_references_size_may_tell_of_an_exchange(
    edit: Edit, size: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    save_mask(edit, *size)
    Image.new("RGB", size, "blue").save(edit.reference)
    note = r"m\.png has the size of .*r\.png: did you swap source and reference\?"
    with pytest.raises(InputError, match=rf"s\.png is 60 x 40 px; the mask must have .*\. .*{note}"):
        read_inputs(edit)
    if size == (30, 20):  # of the source's shape: it may be meant
        assert read_inputs(edit, resize_mask=True).mask.size == (60, 40)
        assert "did you swap" in caplog.messages[0]
    Image.new("RGB", (31, 31), "blue").save(edit.reference)
    with pytest.raises(InputError) as told:
        read_inputs(edit)
    assert "swap" not in str(told.value)


def test_a_box_is_a_mask(edit: Edit) -> None:
    box = replace(edit, mask=None, mask_box=(10, 5, 60, 6))
    mask = np.asarray(read_inputs(box).mask)
    assert mask.shape == (40, 60) and mask[5, 10:].all() and mask.sum() == 50 * 255
    with pytest.raises(
        InputError, match=r"the box 0,0,60,40 covers all of .*s\.png, so nothing .*allow_full_mask=True"
    ):
        read_inputs(replace(box, mask_box=(0, 0, 60, 40)))
    assert read_inputs(replace(box, mask_box=(0, 0, 60, 40)), allow_full_mask=True).mask.getextrema() == (255, 255)
    for wrong in ((0, 0, 61, 4), (4, 4, 4, 9), (-1, 0, 3, 3)):
        with pytest.raises(InputError, match=r"not a box inside the source .*s\.png, which is 60 x 40 px"):
            read_inputs(replace(box, mask_box=wrong))
    for changes in ({"mask_box": None}, {"mask": edit.source}):
        with pytest.raises(InputError, match="either a mask or a box"):
            replace(box, **changes)  # type: ignore[arg-type]


def test_resizing_a_mask_keeps_its_two_values_and_wants_its_shape(edit: Edit) -> None:
    save_mask(edit, 30, 20)
    mask = np.asarray(read_inputs(edit, resize_mask=True).mask)
    assert mask.shape == (40, 60) and set(np.unique(mask)) == {0, 255} and mask[:, :30].all() and not mask[:, 30:].any()
    save_mask(edit, 50, 40)
    with pytest.raises(InputError, match="its aspect ratio may differ by at most 1%"):
        read_inputs(edit, resize_mask=True)


def test_a_message_names_what_its_reader_has_before_him(edit: Edit) -> None:
    save_mask(edit, painted=1)
    for speaker, words in (("command", "--allow-full-mask"), ("page", "leave a part of the image unpainted")):
        with speak_as(speaker), pytest.raises(InputError, match=words) as caught:  # type: ignore[arg-type]
            read_inputs(edit)
        assert speaker == "command" or "--" not in str(caught.value)
    thin = np.zeros((64, 64), np.uint8)
    thin[3, 3] = 255
    placement = Placement((0, 0, 64, 64), 64)
    for speaker, words in (("python", r'\(crop="auto"\)'), ("command", "--crop auto"), ("page", "around the mask")):
        with speak_as(speaker), pytest.raises(InputError, match=f"the mask is too thin: .*{words}"):  # type: ignore[arg-type]
            letterbox_masks([thin], [placement], 64, "resize_then_pad", 8)


def test_empty_and_full_masks(edit: Edit, caplog: pytest.LogCaptureFixture) -> None:
    save_mask(edit, painted=0)
    with pytest.raises(InputError, match=r"m\.png: the mask is empty"):
        read_inputs(edit)
    save_mask(edit, white=1)  # of 0 and 1 instead of 0 and 255
    with pytest.raises(InputError, match="the brightest value is 1"):
        read_inputs(edit)
    save_mask(edit, white=128)
    with pytest.raises(InputError, match="empty"):
        read_inputs(edit)
    save_mask(edit, painted=1)
    with pytest.raises(InputError, match=r"full.*allow_full_mask=True"):
        read_inputs(edit)
    assert read_inputs(edit, allow_full_mask=True).mask.getextrema() == (255, 255)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (np.full((40, 60), 4095, np.uint16), "is 15, stored as 4095"),
        (np.full((40, 60), 1, np.uint16), "is 1, stored as 1"),
        (np.full((40, 60), 0.25, np.float32), "is 64, stored as 0.25"),
    ],
)
def test_an_empty_masks_brightest_value_is_told_as_it_is_stored(edit: Edit, stored: np.ndarray, told: str) -> None:
    mask = edit.mask.with_suffix(".tiff")
    Image.fromarray(stored).save(mask)
    with pytest.raises(InputError, match=told):
        read_inputs(replace(edit, mask=mask))


@pytest.mark.parametrize(("painted", "noted"), [(0.7, False), (0.9, True)])
def test_a_mask_that_looks_inverted(edit: Edit, painted: float, noted: bool, caplog: pytest.LogCaptureFixture) -> None:
    save_mask(edit, painted=painted)
    with caplog.at_level(logging.WARNING):
        read_inputs(edit)
    assert any("is the mask inverted?" in message for message in caplog.messages) == noted


@pytest.mark.parametrize("is_photograph", [True, False])
def test_a_photograph_in_the_place_of_the_mask_is_noted(
    edit: Edit, is_photograph: bool, caplog: pytest.LogCaptureFixture
) -> None:
    soft = np.zeros((40, 60), np.float32)
    soft[10:30, 20:40] = 255  # with a soft edge, as a brush leaves it
    grey = photograph("coffee.png")[:40, 200:260].mean(axis=2)
    image = grey if is_photograph else cv2.GaussianBlur(soft, (0, 0), 2)
    Image.fromarray(image.astype(np.uint8)).save(edit.mask)
    with caplog.at_level(logging.WARNING):
        read_inputs(edit)
    assert any("is this the mask?" in message for message in caplog.messages) == is_photograph


def test_a_crop_that_leaves_the_reference(edit: Edit) -> None:
    save_mask(edit)
    paths = (edit.source, edit.mask, edit.reference, edit.output)
    read_inputs(Edit(*paths, reference_crop=(0, 0, 30, 30)))
    for box in ((0, 0, 31, 30), (5, 5, 5, 9), (-1, 0, 3, 3)):
        with pytest.raises(InputError, match=r"not a box inside the reference .*r\.png, which is 30 x 30 px"):
            read_inputs(Edit(*paths, reference_crop=box))
