"""Padding, collage and paste-back agree with numbers made by the released code."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from safetensors.numpy import load_file

from mimicbrush.ops.images import IMAGE_FILL, crop_back, letterbox, letterbox_mask, paste_back


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    path = Path(__file__).parents[3] / "shared" / "golden" / "released_prepost.safetensors"
    if not path.exists():
        pytest.skip("../shared is not here")
    return load_file(path)


@pytest.mark.parametrize("case", ["landscape", "portrait", "square"])
def test_prepost(golden: dict[str, np.ndarray], case: str) -> None:
    source, mask = golden[f"{case}/source"], golden[f"{case}/mask"]
    square, hole = letterbox(source, 512, IMAGE_FILL), letterbox_mask(mask, 512)
    assert list(square.shape) == golden[f"{case}/padded_shape"].tolist()
    assert hole.sum() == golden[f"{case}/padded_mask_512_area"]
    small = cv2.resize(square, (128, 128), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(small - golden[f"{case}/padded_source_512"]).max() <= 1
    assert (square * (1 - hole[..., None])).sum(dtype=np.int64) == golden[f"{case}/collage_512_sum"]

    result = cv2.resize(golden[f"{case}/pred_small"], (512, 512), interpolation=cv2.INTER_NEAREST)
    cropped = crop_back(result, *mask.shape)
    assert np.abs(cropped.astype(int) - golden[f"{case}/cropped"]).max() <= 1
    assert np.abs(paste_back(cropped, source, mask) - golden[f"{case}/composite"]).max() <= 1
