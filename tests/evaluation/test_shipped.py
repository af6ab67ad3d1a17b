"""The small model that comes with the project, on scenes that it has never seen."""

from __future__ import annotations

import json
from itertools import islice

import cv2
import numpy as np
import pytest
import torch
from function_editor import make_pair_batch

from mimicbrush.data.training_data import read_training_data
from mimicbrush.evaluation.editors.mimicbrush import MimicBrushEditor
from mimicbrush.evaluation.heldout.samples import WARP
from mimicbrush.evaluation.keypoint_transfer.attention import AttentionTransfer
from mimicbrush.evaluation.keypoint_transfer.methods import keep_place
from mimicbrush.evaluation.keypoint_transfer.pck import find_correct
from mimicbrush.evaluation.keypoint_transfer.tasks import TransferTask, make_keypoint_grid
from mimicbrush.ops.canvas import IMAGE_FILL, letterbox
from mimicbrush.ops.counter_rng import generator
from mimicbrush.ops.geometry import is_inside, random_matrix, transform_points, warp_to_canvas
from mimicbrush.pipelines.open_pipeline import load_pipeline
from mimicbrush.pipelines.small_model import SHIPPED_MODEL, model_folder, shipped_size_px
from mimicbrush.synthetic.clips import HELDOUT_PHOTOGRAPHS, demo_clips, render_frames

SCENES = 8


@pytest.fixture(scope="module")
def editor() -> MimicBrushEditor:
    pipeline = load_pipeline(SHIPPED_MODEL, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return MimicBrushEditor(pipeline)


def test_it_is_small_whole_and_tells_what_it_was_trained_on() -> None:
    assert sum(path.stat().st_size for path in SHIPPED_MODEL.rglob("*")) < 20e6
    training = read_training_data(SHIPPED_MODEL)
    assert training is not None and training.source_hashes
    assert "over none" in (SHIPPED_MODEL / "README.md").read_text()
    for config in SHIPPED_MODEL.rglob("*.json"):  # nothing of the machine that it was trained on
        assert "/work" not in config.read_text() and "/home" not in config.read_text()
        json.loads(config.read_text())
    assert model_folder("small") == model_folder("proof") == SHIPPED_MODEL
    assert str(model_folder("runs/a/pipeline")) == "runs/a/pipeline"


def test_it_imitates_on_photographs_that_it_has_not_seen(editor: MimicBrushEditor) -> None:
    """Enough to notice a model that does not look at its reference; docs/results.md has more."""
    size = shipped_size_px()
    assert editor.pipeline.size_px == size
    frames = [
        [letterbox(shown, size, IMAGE_FILL) for shown in islice(render_frames(spec), 0, 25, 24)]
        for spec in demo_clips(HELDOUT_PHOTOGRAPHS, SCENES, seed=77).values()
    ]
    sources, references = (np.stack(images) for images in zip(*frames, strict=True))
    masks = np.zeros((SCENES, size, size), np.uint8)
    cv2.circle(masks[0], (size // 2, size // 2), size // 5, 1, -1)
    masks[:] = masks[0]

    def error(given: np.ndarray | None) -> np.ndarray:
        edited = editor.edit_pairs(make_pair_batch(sources, masks, given, list(range(SCENES)))).images
        difference = (edited.astype(float) - sources)[masks > 0].reshape(SCENES, -1)
        return np.square(difference).mean(axis=1)

    true, wrong, none = error(references), error(np.roll(references, 1, axis=0)), error(None)
    gain_db = 10 * np.log10(np.stack([wrong, none]) / true)
    assert gain_db[0].mean() > 1.0  # over the reference of another scene
    assert gain_db[1].mean() > 1.0  # over none


def test_its_attention_finds_the_place_in_a_hole(editor: MimicBrushEditor) -> None:
    """Far more often than looking at the same place does: colours alone cannot do that."""
    size = shipped_size_px()
    tasks = []
    for number, spec in enumerate(demo_clips(HELDOUT_PHOTOGRAPHS, 4, seed=78).values()):
        frame = letterbox(next(iter(render_frames(spec))), size, IMAGE_FILL)
        matrix = random_matrix(WARP, size, generator(number), flip=False)
        there = transform_points(make_keypoint_grid(size), matrix)
        shown = is_inside(there, size)
        reference = warp_to_canvas(frame, matrix, size, IMAGE_FILL)
        tasks.append(TransferTask(frame, reference, make_keypoint_grid(size)[shown], there[shown], size, str(number)))
    attention = AttentionTransfer(editor.pipeline)
    found, same = (
        np.mean(np.concatenate([find_correct(method(task), task, 0.1) for task in tasks]))
        for method in (lambda task: attention(task).inside_mask, keep_place)
    )
    assert found > 0.7 and found > same + 0.2
