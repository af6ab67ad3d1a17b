"""The small model that comes with the project, on scenes that it has never seen."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

from mimicbrush.evaluation.clips import HELDOUT_PHOTOGRAPHS, demo_clips, render_frames
from mimicbrush.evaluation.editors import PipelineEditor
from mimicbrush.evaluation.heldout import read_training_data
from mimicbrush.evaluation.shipped import SHIPPED_MODEL, model_folder, shipped_size_px
from mimicbrush.ops.images import IMAGE_FILL, letterbox
from mimicbrush.pipelines.load import load_pipeline

SCENES = 8


@pytest.fixture(scope="module")
def editor() -> PipelineEditor:
    pipeline = load_pipeline(SHIPPED_MODEL, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return PipelineEditor(pipeline, num_inference_steps=12)


def test_it_is_small_whole_and_tells_what_it_was_trained_on() -> None:
    assert sum(path.stat().st_size for path in SHIPPED_MODEL.rglob("*")) < 10.5e6
    training = read_training_data(SHIPPED_MODEL)
    assert training is not None and training.source_hashes
    assert "reference gain" in (SHIPPED_MODEL / "README.md").read_text()
    for config in SHIPPED_MODEL.rglob("*.json"):  # nothing of the machine that it was trained on
        assert "/work" not in config.read_text() and "/home" not in config.read_text()
        json.loads(config.read_text())
    assert model_folder("proof") == SHIPPED_MODEL
    assert str(model_folder("runs/a/pipeline")) == "runs/a/pipeline"


def test_it_imitates_on_photographs_that_it_has_not_seen(editor: PipelineEditor) -> None:
    """Enough to notice a model that does not look at its reference; docs/RESULTS.md has more."""
    size = shipped_size_px()
    assert editor.pipeline.size_px == size
    frames = []
    for spec in demo_clips(HELDOUT_PHOTOGRAPHS, SCENES, seed=77).values():
        shown = list(render_frames(spec))
        frames.append([letterbox(shown[number], size, IMAGE_FILL) for number in (0, 24)])
    sources, references = (np.stack(pictures) for pictures in zip(*frames, strict=True))
    masks = np.zeros((SCENES, size, size), np.uint8)
    cv2.circle(masks[0], (size // 2, size // 2), size // 5, 1, -1)
    masks[:] = masks[0]

    def error(given: np.ndarray | None) -> np.ndarray:
        edited = editor(sources, masks, given, seeds=list(range(SCENES)))
        difference = (edited.astype(float) - sources)[masks > 0].reshape(SCENES, -1)
        return np.square(difference).mean(axis=1)

    true, wrong, none = error(references), error(np.roll(references, 1, axis=0)), error(None)
    gain_db = 10 * np.log10(np.stack([wrong, none]) / true)
    assert gain_db[0].mean() > 1.0  # over the reference of another scene
    assert gain_db[1].mean() > 0.25  # over none
