"""A thousand random compositions of pad, flip, rotation, scale and projection, with kornia as the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import pytest
import torch
from kornia.geometry import get_perspective_transform, get_rotation_matrix2d, transform_points, warp_perspective

from mimicbrush.ops import geometry
from mimicbrush.ops.canvas import warp_images
from mimicbrush.ops.color_jitter import JitterRanges, apply_jitter, random_jitter

RANGES = geometry.GeometryRanges(rotation_deg=45, scale=(0.8, 1.6), projective_intensity=0.5)
CANVAS_PX = 64
COMPOSITIONS = 1000


@dataclass(frozen=True)
class Composition:
    width: int
    height: int
    matrix: np.ndarray  # ours, all steps in one
    steps: list[torch.Tensor]  # kornia's, (1, 3, 3) each, in the order in which they are applied


@pytest.fixture(scope="module")
def compositions() -> list[Composition]:
    return [composition(seed) for seed in range(COMPOSITIONS)]


def composition(seed: int) -> Composition:
    width, height = map(int, np.random.default_rng((seed, 1)).integers(24, 65, 2))
    ours = geometry.random_matrix(RANGES, CANVAS_PX, np.random.default_rng(seed))
    # The same random numbers, in the order in which `random_matrix` makes them.
    rng = np.random.default_rng(seed)
    flip = rng.random() < RANGES.flip_probability
    angle_deg = rng.uniform(-RANGES.rotation_deg, RANGES.rotation_deg)
    scale = np.exp(rng.uniform(*np.log(RANGES.scale)))
    offsets = rng.uniform(-1, 1, (4, 2)) * 0.4 * RANGES.projective_intensity * CANVAS_PX
    last, centre = CANVAS_PX - 1, (CANVAS_PX - 1) / 2
    corners = np.array([[0, 0], [last, 0], [last, last], [0, last]], float)
    mirrored = np.array([[last, 0], [0, 0], [0, last], [last, last]], float)
    turn = torch.eye(3, dtype=torch.float64)[None]
    # Their angles count against the clock.
    turn[:, :2] = get_rotation_matrix2d(*(torch.tensor(v, dtype=torch.float64) for v in (
        [[centre, centre]], [-angle_deg], [[scale, scale]])))  # fmt: skip
    steps = [padding(width, height), through(corners, mirrored if flip else corners), turn,
             through(corners, corners + offsets)]  # fmt: skip
    return Composition(width, height, ours @ geometry.letterbox_matrix(width, height, CANVAS_PX), steps)


def through(before: np.ndarray, after: np.ndarray) -> torch.Tensor:
    return get_perspective_transform(torch.from_numpy(before)[None], torch.from_numpy(after)[None])


def padding(width: int, height: int) -> torch.Tensor:
    """The image's outline, half a pixel outside of the outer centres, to where a centred square has it."""
    side = CANVAS_PX / max(width, height)
    left, top = (CANVAS_PX - width * side) / 2, (CANVAS_PX - height * side) / 2
    outline = np.array([[0, 0], [width, 0], [width, height], [0, height]], float)
    return through(outline - 0.5, outline * side + [left, top] - 0.5)


def smooth_image(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    return cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), np.uint8), (0, 0), 1.5)


def warped_by_kornia(image: np.ndarray, steps: list[torch.Tensor], fill: int) -> np.ndarray:
    matrix = torch.eye(3, dtype=torch.float64)[None]
    for step in steps:
        matrix = step @ matrix
    pixels = torch.from_numpy(image.reshape(*image.shape[:2], -1)).permute(2, 0, 1)[None].double()
    warped = warp_perspective(pixels - fill, matrix, (CANVAS_PX, CANVAS_PX), align_corners=True) + fill
    return warped[0].permute(1, 2, 0).numpy().reshape(CANVAS_PX, CANVAS_PX, *image.shape[2:])


def test_points(compositions: list[Composition]) -> None:
    for seed, each in enumerate(compositions):
        points = np.random.default_rng(seed).uniform(0, (each.width - 1, each.height - 1), (50, 2))
        expected = torch.from_numpy(points)[None]
        for step in each.steps:
            expected = transform_points(step, expected)
        found = geometry.transform_points(points, each.matrix)
        assert np.abs(found - expected[0].numpy()).max() < 1e-3, seed


def test_images_and_masks(compositions: list[Composition]) -> None:
    for seed, each in enumerate(compositions):
        rng = np.random.default_rng(seed)
        image = smooth_image(each.width, each.height, rng)
        # None is reduced first, which kornia would not do.
        assert geometry.shrink_factor(each.matrix, each.width, each.height) < 2
        warped = geometry.warp_to_canvas(image, each.matrix, CANVAS_PX, 255)
        assert np.abs(warped - warped_by_kornia(image, each.steps, 255)).max() < 0.75, seed  # rounding, and play
        blocks = rng.integers(0, 2, (each.height // 9 + 1, each.width // 9 + 1), np.uint8).repeat(9, 0).repeat(9, 1)
        mask = blocks[: each.height, : each.width] * np.uint8(255)
        ours = geometry.warp_to_canvas(mask, each.matrix, CANVAS_PX, 0) > 127
        theirs = warped_by_kornia(mask, each.steps, 0)
        undecided = np.abs(theirs - 127.5) < 1
        assert np.array_equal(ours[~undecided], (theirs > 127.5)[~undecided]) and undecided.mean() < 0.05, seed


def test_batches_warped_by_torch_equal_single_images_warped_by_opencv(compositions: list[Composition]) -> None:
    for start in range(0, COMPOSITIONS, 100):
        chunk = compositions[start : start + 100]
        rng = np.random.default_rng(start)
        images = [smooth_image(each.width, each.height, rng) for each in chunk]
        colours = [random_jitter(JitterRanges(), rng).matrix(cv2.mean(image)[:3]) for image in images]
        expected = [
            geometry.warp_to_canvas(apply_jitter(image, colour), each.matrix, CANVAS_PX, 255)
            for each, image, colour in zip(chunk, images, colours, strict=True)
        ]
        sizes = np.array([image.shape[:2] for image in images])
        batch = np.zeros((len(chunk), *sizes.max(axis=0), 3), np.uint8)
        for place, image in zip(batch, images, strict=True):
            place[: image.shape[0], : image.shape[1]] = image
        matrices = np.stack([np.linalg.inv(each.matrix) for each in chunk]).astype(np.float32)
        arrays = (batch, sizes, matrices, np.stack(colours).astype(np.float32))
        warped = warp_images(*map(torch.from_numpy, arrays), size_px=CANVAS_PX, fill=255)
        difference = np.abs(warped.permute(0, 2, 3, 1).numpy() - np.stack(expected))
        assert difference.max() <= 2 and difference.mean() < 0.05


def test_masks_warped_by_torch_are_black_outside() -> None:
    mask = np.full((1, 20, 30, 1), 255, np.uint8)
    matrix = geometry.letterbox_matrix(30, 20, 30)
    to_image, unchanged = np.linalg.inv(matrix)[None].astype(np.float32), np.eye(1, 2, dtype=np.float32)[None]
    arrays = map(torch.from_numpy, (mask, np.array([[20, 30]]), to_image, unchanged))
    warped = warp_images(*arrays, size_px=30, fill=0)[0, 0].numpy()
    np.testing.assert_array_equal(warped, geometry.warp_to_canvas(mask[0, :, :, 0], matrix, 30, 0))
    assert set(warped[:5].ravel()) == {0.0} and set(warped[5:25].ravel()) == {255.0}
