"""Padding, collage and paste-back agree with numbers made by the released code, for any golden file of its kind."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from released_golden import golden_path, mask_of
from safetensors.numpy import load_file

from mimicbrush.ops.canvas import IMAGE_FILL, crop_back, letterbox, letterbox_mask, paste_back

Case = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    values = load_file(golden_path("MIMICBRUSH_GOLDEN_PREPOST", "released_prepost.safetensors"))
    for name, value in values.items():
        case, _, what = name.partition("/")
        found.setdefault(case, {})[what] = value
    assert found
    return found


def mismatches(case: Case) -> list[str]:
    """Which of a case's numbers ours do not reproduce."""
    source, mask = case["source"], mask_of(case["mask"])
    size = int(case["padded_shape"][0])
    square, hole = letterbox(source, size, IMAGE_FILL), letterbox_mask(mask, size)
    stored = case["padded_source_512"]
    small = cv2.resize(square, stored.shape[1::-1], interpolation=cv2.INTER_AREA)
    result = cv2.resize(case["pred_small"], (size, size), interpolation=cv2.INTER_NEAREST)
    cropped = crop_back(result, *mask.shape)
    checks = {
        "padded_shape": list(square.shape) == case["padded_shape"].tolist(),
        "padded_source_512": _within_one_level(small, stored),
        "padded_mask_512_area": hole.sum() == case["padded_mask_512_area"],
        "collage_512_sum": (square * (1 - hole[..., None])).sum(dtype=np.int64) == case["collage_512_sum"],
        "cropped": _within_one_level(cropped, case["cropped"]),
        "composite": _within_one_level(paste_back(cropped, source, mask), case["composite"]),
    }
    return [name for name, holds in checks.items() if not holds]


def _within_one_level(found: np.ndarray, golden: np.ndarray) -> bool:
    return found.shape == golden.shape and float(np.abs(found.astype(float) - golden).max()) <= 1


def test_all_cases(cases: dict[str, Case]) -> None:
    assert {name: mismatches(case) for name, case in cases.items()} == {name: [] for name in cases}


def test_another_input_does_not_match(cases: dict[str, Case]) -> None:
    for case in cases.values():
        assert "padded_source_512" in mismatches({**case, "source": 255 - case["source"]})
        assert "padded_mask_512_area" in mismatches({**case, "mask": np.zeros_like(case["mask"])})
        changed = mismatches({**case, "pred_small": 255 - case["pred_small"]})
        assert changed == ["cropped", "composite"]
