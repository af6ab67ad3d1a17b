"""Near duplicates differ from other images; the quick test misses none that the slow one finds."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from toy_data import PHOTOGRAPHS, photograph

from mimicbrush.ops.similarity import (
    LIKELY_AGREEMENT,
    NEAR_DUPLICATE_SSIM,
    highest_ssim,
    luma_statistics,
    phase_signature,
    signature_agreement,
    ssim_luma,
    ssim_statistics,
    ssim_thumbnail,
)

CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "the same": lambda image: image,
    "mirrored": lambda image: np.ascontiguousarray(image[:, ::-1]),
    "smaller": lambda image: cv2.resize(image, (290, 260), interpolation=cv2.INTER_AREA),
    "shifted": lambda image: cv2.warpAffine(image, np.array([[1.0, 0, 60], [0, 1, -30]]), image.shape[1::-1]),
    "darker": lambda image: (image * 0.8).astype(np.uint8),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_changed_copy_is_found_by_both(name: str, change: str) -> None:
    image = photograph(name)
    changed = CHANGES[change](image)
    views = np.stack([phase_signature(view) for view in (changed, changed[:, ::-1])])
    assert highest_ssim(image, changed) > NEAR_DUPLICATE_SSIM
    assert signature_agreement(phase_signature(image), views).max() > LIKELY_AGREEMENT


def test_other_photographs_are_not() -> None:
    images = [photograph(name) for name in PHOTOGRAPHS]
    signatures = np.stack([phase_signature(image) for image in images])
    for number, image in enumerate(images):
        agreements = signature_agreement(signatures[number], signatures)
        assert agreements[number] == pytest.approx(1, abs=0.02)
        for other in range(number):
            assert agreements[other] < LIKELY_AGREEMENT
            assert highest_ssim(image, images[other]) < NEAR_DUPLICATE_SSIM


def test_an_image_of_one_colour_agrees_with_nothing() -> None:
    flat = np.full((40, 50, 3), 90, np.uint8)
    assert signature_agreement(phase_signature(flat), phase_signature(photograph("coffee.png"))[None]) == 0


@pytest.mark.parametrize("size", [(11, 11), (64, 96), (300, 500)])
def test_ssim_of_statistics_is_that_of_the_images_to_the_bit(size: tuple[int, int]) -> None:
    images = [ssim_thumbnail(cv2.resize(photograph(name), size[::-1])) for name in PHOTOGRAPHS[:4]]
    images += [np.full_like(images[0], 90), 255 - images[0]]
    for a in images:
        for b in images:
            assert ssim_statistics(luma_statistics(a), luma_statistics(b)) == ssim_luma(a, b)
