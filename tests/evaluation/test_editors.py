from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from function_editor import make_pair_batch

from mimicbrush.assembly import build_components
from mimicbrush.errors import InputError
from mimicbrush.evaluation.editors.mimicbrush import MimicBrushEditor
from mimicbrush.evaluation.editors.protocol import Editor, NotApplicableError
from mimicbrush.evaluation.editors.registry import check_editor, find_editor_pipeline, open_editor
from mimicbrush.models.options import ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.pipelines import MimicBrushPipeline


@pytest.fixture(scope="module")
def editor(smallest: ToyModel) -> MimicBrushEditor:
    parts = vars(build_components(smallest, 0))
    pipeline = MimicBrushPipeline(**parts, scheduler=noise_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return MimicBrushEditor(pipeline, num_inference_steps=2, guidance_scale=2.0)


@pytest.fixture(scope="module")
def images(editor: MimicBrushEditor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size = editor.pipeline.size_px
    sources, references = np.random.default_rng(0).integers(0, 256, (2, 3, size, size, 3), np.uint8)
    masks = np.zeros((3, size, size), np.uint8)
    masks[:, : size // 2] = 1
    return sources, masks, references


def edit(
    editor: Editor, sources: np.ndarray, masks: np.ndarray, references: np.ndarray | None, seeds: list[int]
) -> np.ndarray:
    return editor.edit_pairs(make_pair_batch(sources, masks, references, seeds)).images


def test_results_do_not_depend_on_the_batch(
    editor: MimicBrushEditor, images: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    sources, masks, references = images
    together = edit(editor, sources, masks, references, [5, 6, 7])
    assert together.shape == sources.shape
    assert together.dtype == np.uint8
    alone = edit(editor, sources[1:2], masks[1:2], references[1:2], [6])
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1  # rounding
    assert not np.array_equal(alone, edit(editor, sources[1:2], masks[1:2], references[1:2], [8]))


def test_without_a_reference_the_noise_is_the_same(editor: MimicBrushEditor) -> None:
    assert editor._sample_latents([3, 4])[1].equal(editor._sample_latents([4])[0])


def test_editing_without_a_reference(
    editor: MimicBrushEditor, images: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    sources, masks, _ = images
    assert edit(editor, sources, masks, None, [1, 2, 3]).shape == sources.shape


@pytest.mark.parametrize("name", ["blur", "copy_in_place", "opencv_inpaint", "sift_homography", "oracle"])
def test_editors_without_a_model_edit_pairs(
    name: str, editor: MimicBrushEditor, images: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    check_editor(name, for_pairs=True)
    assert find_editor_pipeline(name) is None
    baseline = open_editor(name)
    assert baseline.size_px is None
    sources, masks, references = images
    for given in (references, None):
        result = edit(baseline, sources, masks, given, [1, 2, 3])
        assert result.shape == sources.shape and result.dtype == np.uint8
        assert np.array_equal(result[masks == 0], sources[masks == 0])
        assert np.array_equal(result, sources) == (name == "oracle")


def test_fills_leave_the_padding_of_a_canvas_out() -> None:
    source, area = np.full((40, 40, 3), 255, np.uint8), np.zeros((40, 40), np.uint8)
    source[10:30], area[10:30] = (200, 30, 90), 1
    mask = np.zeros((40, 40), np.uint8)
    mask[10:20, 15:25] = 1  # at the edge of the padding
    batch = make_pair_batch(source[None], mask[None], None, [1])
    batch = replace(batch, source_areas=area[None], reference_areas=area[None])
    for name in ("blur", "opencv_inpaint"):
        result = open_editor(name).edit_pairs(batch).images[0]
        assert np.abs(result.astype(int) - source).max() <= 3, name  # OpenCV's own rounding


@pytest.mark.parametrize("name", ["source", "ip_adapter", "results:.", "boxed:proof", "auto_zoom:proof"])
def test_editors_of_cases_alone_refuse_pairs(name: str) -> None:
    with pytest.raises(InputError, match="can edit only benchmark cases"):
        check_editor(name, for_pairs=True)


def test_an_editor_of_cases_says_so_when_it_gets_pairs(images: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    with pytest.raises(NotApplicableError, match="source can edit benchmark cases, but not"):
        edit(open_editor("source"), *images, [1, 2, 3])


def test_folders_that_are_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a folder nor the name of an editor"):
        check_editor(str(tmp_path / "absent"), for_pairs=True)
    with pytest.raises(InputError, match=r"not a pipeline folder \(it has no model_index.json\); expected"):
        check_editor(str(tmp_path), for_pairs=True)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match=r"pipeline is not a complete MimicBrush pipeline"):  # of a run, its pipeline
        check_editor(str(tmp_path), for_pairs=True)
    assert find_editor_pipeline(str(tmp_path)) == tmp_path / "pipeline"
