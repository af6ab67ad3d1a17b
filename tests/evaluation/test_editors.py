from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mimicbrush.assembly import build_components
from mimicbrush.errors import InputError
from mimicbrush.evaluation.editors.pair_editors import PipelineEditor, check_pipeline_folder
from mimicbrush.models.options import ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.pipelines import MimicBrushPipeline


@pytest.fixture(scope="module")
def editor(smallest: ToyModel) -> PipelineEditor:
    parts = vars(build_components(smallest, 0))
    pipeline = MimicBrushPipeline(**parts, scheduler=noise_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return PipelineEditor(pipeline, num_inference_steps=2, guidance_scale=2.0)


@pytest.fixture(scope="module")
def images(editor: PipelineEditor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size = editor.pipeline.size_px
    sources, references = np.random.default_rng(0).integers(0, 256, (2, 3, size, size, 3), np.uint8)
    masks = np.zeros((3, size, size), np.uint8)
    masks[:, : size // 2] = 1
    return sources, masks, references


def test_results_do_not_depend_on_the_batch(
    editor: PipelineEditor, images: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    sources, masks, references = images
    together = editor(sources, masks, references, [5, 6, 7])
    assert together.shape == sources.shape
    assert together.dtype == np.uint8
    alone = editor(sources[1:2], masks[1:2], references[1:2], [6])
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1  # rounding
    assert not np.array_equal(alone, editor(sources[1:2], masks[1:2], references[1:2], [8]))


def test_without_a_reference_the_noise_is_the_same(editor: PipelineEditor) -> None:
    assert editor._noise([3, 4])[1].equal(editor._noise([4])[0])


def test_editing_without_a_reference(editor: PipelineEditor, images: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    sources, masks, _ = images
    assert editor(sources, masks, None, [1, 2, 3]).shape == sources.shape


def test_folders_that_are_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        check_pipeline_folder(tmp_path / "absent")
    with pytest.raises(InputError, match=r"no pipeline folder \(it has no model_index.json\)$"):
        check_pipeline_folder(tmp_path)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match="did you mean"):
        check_pipeline_folder(tmp_path)
