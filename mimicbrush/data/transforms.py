"""Transforms a pair into a sample: two decoded images, their geometry and colours, and the mask (paper Sec. 3.3).

Geometry, colours, mask and matches of a sample are sampled here. Rendering follows, in the loader's process or on the
model's device. Noise, timesteps and drops: `training/noise.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from mimicbrush.data.custom_masks import find_mask_function, sample_custom_mask
from mimicbrush.data.options import DataOptions
from mimicbrush.data.pair import Pair
from mimicbrush.ops import masks
from mimicbrush.ops.canvas import IMAGE_FILL, MASK_FILL
from mimicbrush.ops.color_jitter import Jitter, apply_jitter, random_jitter
from mimicbrush.ops.geometry import (
    is_inside,
    letterbox_matrix,
    random_matrix,
    reduce_to_fit,
    resize_matrix,
    shrink_factor,
    transform_points,
    warp_to_canvas,
)
from mimicbrush.ops.keypoints import find_orb_points

#: The two frames of a pair; a photograph has only the first.
Side = Literal["a", "b"]

_SEGMENT_TRIES = 8
#: Number of points of a photograph to try for each match: the reference does not show all of them.
_POINTS_PER_MATCH = 3
_NO_POINTS = np.zeros((0, 2), np.float32)


@dataclass(frozen=True)
class ImageView:
    """One decoded image, and the geometry and colours to render it with.

    Attributes:
        pixels: (H, W, 3) uint8 RGB, as decoded, no larger than the canvas needs.
        matrix: (3, 3) float64, from these pixels to the canvas.
        colour: (3, 4) float64, see `Jitter.matrix`.
        side: which frame of the pair this is.
    """

    pixels: np.ndarray
    matrix: np.ndarray
    colour: np.ndarray
    side: Side = "a"

    @property
    def is_mirrored(self) -> bool:
        """Whether the canvas shows the image mirrored."""
        return bool(np.linalg.det(self.matrix) < 0)

    def render(self, size_px: int) -> np.ndarray:
        """Render the image on its canvas: (S, S, 3) uint8, white around it."""
        return warp_to_canvas(apply_jitter(self.pixels, self.colour), self.matrix, size_px, IMAGE_FILL)


@dataclass(frozen=True)
class MatchedPoints:
    """Matches of one sample: points of the source, and the points of the reference that show the same place.

    Attributes:
        source_xy, reference_xy: (K, 2) float32, x and y in pixels of the canvas.
        capacity: largest number of matches of a sample; batches are padded to it.
    """

    source_xy: np.ndarray
    reference_xy: np.ndarray
    capacity: int

    def to_empty(self) -> MatchedPoints:
        """Return the same capacity without any match."""
        return MatchedPoints(_NO_POINTS, _NO_POINTS, self.capacity)


@dataclass(frozen=True)
class SampleViews:
    """A sample that is not rendered yet.

    Attributes:
        source, reference: the two images of the pair.
        mask: (S, S) uint8, 0 or 1.
        matches: between `source` and `reference`; None if they were not requested.
        other_references: the second and further references.
    """

    source: ImageView
    reference: ImageView
    mask: np.ndarray
    matches: MatchedPoints | None = None
    other_references: tuple[ImageView, ...] = ()


class SampleTransform:
    """Transform of a pair: samples geometry, colours and mask, and decodes both images.

    Args:
        size_px: side of the square canvas.
        options: augmentation and masks.
        num_matches: largest number of matches of a sample; 0: no matches are sampled. They are sampled last, so
            that nothing else in a sample depends on them.

    Raises:
        InputError: a mask strategy names a function that does not exist.
    """

    def __init__(self, size_px: int, options: DataOptions, num_matches: int = 0) -> None:
        self.size_px, self.options, self.num_matches = size_px, options, num_matches
        for strategy in (options.mask.strategy, options.mask.image_strategy):
            if ":" in strategy:
                find_mask_function(strategy)  # to report a wrong name before any image is read

    def __call__(self, pair: Pair, rng: np.random.Generator) -> SampleViews:
        """Transform a pair. The result depends only on the pair and the random numbers.

        Raises:
            DataError: the pair cannot be read.
        """
        pair.check()
        return self._transform_video(pair, rng) if pair.kind == "video" else self._transform_image(pair, rng)

    def read_reference(self, pair: Pair, rng: np.random.Generator) -> ImageView:
        """Read one image of a pair as the reference of another sample, with random geometry and colours.

        Raises:
            DataError: the image cannot be read.
        """
        pair.check()
        side: Side = "b" if pair.b_span is not None and rng.random() < 0.5 else "a"
        return self.read_frame(pair, side, self._sample_shared_flip(rng), rng)

    def read_frame(self, pair: Pair, side: Side, flip: bool | None, rng: np.random.Generator) -> ImageView:
        """Read one frame of a pair, with random geometry and colours; `flip` decides its flip, None samples it.

        Raises:
            DataError: the image cannot be read.
        """
        matrix = self._sample_matrix(pair, rng, flip)
        return self._read_view(pair, side, matrix, random_jitter(self.options.jitter, rng))

    def _transform_video(self, pair: Pair, rng: np.random.Generator) -> SampleViews:
        """Transform two frames of a video; either one is the source."""
        first: tuple[Side, np.ndarray] = ("a", pair.a_points)
        second: tuple[Side, np.ndarray] = ("b", pair.b_points)
        if rng.random() < 0.5:
            first, second = second, first
        flip = self._sample_shared_flip(rng)
        # Ours: both images are augmented independently; the paper does not say which one is.
        source_matrix, reference_matrix = (self._sample_matrix(pair, rng, flip) for _ in range(2))
        source_jitter, reference_jitter = (random_jitter(self.options.jitter, rng) for _ in range(2))
        source = self._read_view(pair, first[0], source_matrix, source_jitter)
        reference = self._read_view(pair, second[0], reference_matrix, reference_jitter)
        source_points = transform_points(first[1], source_matrix)
        reference_points = transform_points(second[1], reference_matrix)
        # Only matches that the augmented reference still shows are used.
        is_visible = is_inside(reference_points, self.size_px)
        mask = self._sample_mask(self.options.mask.strategy, source_points[is_visible], source, rng)
        return SampleViews(source, reference, mask, self._sample_matches(source_points, reference_points, rng))

    def _transform_image(self, pair: Pair, rng: np.random.Generator) -> SampleViews:
        """Transform a photograph: two augmentations of one image (paper Sec. 3.3)."""
        flip = self._sample_shared_flip(rng)
        reference_jitter, source_jitter = (random_jitter(self.options.jitter, rng) for _ in range(2))
        reference_matrix = self._sample_matrix(pair, rng, flip)
        reference = self._read_view(pair, "a", reference_matrix, reference_jitter)
        # A segment is masked and must be recovered from the other augmentation, which shows it unmasked.
        strategy = self.options.mask.image_strategy
        if strategy == "segment":
            matrix, mask = self._sample_segment_mask(pair, flip, rng)
            source = self._read_view(pair, "a", matrix, source_jitter)
        else:
            matrix = self._sample_matrix(pair, rng, flip)
            source = self._read_view(pair, "a", matrix, source_jitter)
            mask = self._sample_mask(strategy, _NO_POINTS, source, rng)
        return SampleViews(source, reference, mask, self._sample_image_matches(pair, matrix, reference_matrix, rng))

    def _sample_image_matches(
        self, pair: Pair, source_matrix: np.ndarray, reference_matrix: np.ndarray, rng: np.random.Generator
    ) -> MatchedPoints | None:
        """Sample matches of a photograph: both views show one image, so every visible point has a known match."""
        if not self.num_matches:
            return None
        height, width = pair.size_px
        canvas_points = rng.uniform(-0.5, self.size_px - 0.5, (_POINTS_PER_MATCH * self.num_matches, 2))
        stored_points = transform_points(canvas_points, np.linalg.inv(source_matrix))
        is_visible = (stored_points > -0.5).all(axis=1) & (stored_points < (width - 0.5, height - 0.5)).all(axis=1)
        source = canvas_points[is_visible].astype(np.float32)
        return self._sample_matches(source, transform_points(stored_points[is_visible], reference_matrix), rng)

    def _sample_matches(
        self, source: np.ndarray, reference: np.ndarray, rng: np.random.Generator
    ) -> MatchedPoints | None:
        """Sample at most `num_matches` of the (K, 2) matched points, among those inside both canvases."""
        if not self.num_matches:
            return None
        usable = np.flatnonzero(is_inside(source, self.size_px) & is_inside(reference, self.size_px))
        numbers = rng.permutation(usable)[: self.num_matches]
        return MatchedPoints(source[numbers], reference[numbers], self.num_matches)

    def _sample_shared_flip(self, rng: np.random.Generator) -> bool | None:
        """Sample one flip for all images; None, so that each image samples its own, without `share_flips`."""
        flip = rng.random() < self.options.geometry.flip_probability
        return bool(flip) if self.options.share_flips else None

    def _sample_matrix(self, pair: Pair, rng: np.random.Generator, flip: bool | None) -> np.ndarray:
        """Sample all geometry of one image: (3, 3), from *stored* pixels to the canvas."""
        height, width = pair.size_px
        # Read from right to left: the stored image is letterboxed, then augmented around the centre of the canvas.
        augmentation = random_matrix(self.options.geometry, self.size_px, rng, flip)
        return augmentation @ letterbox_matrix(width, height, self.size_px)

    def _read_view(self, pair: Pair, side: Side, matrix: np.ndarray, jitter: Jitter) -> ImageView:
        """Decode an image, reduced as far as its matrix (from stored pixels to the canvas) allows."""
        height, width = pair.size_px
        shrink = shrink_factor(matrix, width, height)
        reduction = next(r for r in (8, 4, 2, 1) if r <= shrink or r == 1)
        pixels = pair.read_a(reduction) if side == "a" else pair.read_b(reduction)
        pixels, matrix = reduce_to_fit(pixels, matrix @ resize_matrix(reduction, reduction))
        return ImageView(pixels, matrix, jitter.matrix(cv2.mean(pixels)[:3]), side)

    def _sample_mask(
        self, strategy: str, points: np.ndarray, source: ImageView, rng: np.random.Generator
    ) -> np.ndarray:
        """Sample a mask that needs no segments; `points` are matches on the canvas."""
        options = self.options.mask
        if strategy == "box":
            return masks.box_mask(self.size_px, rng, sides=options.box_sides, area=options.box_area)
        if strategy == "random_grid":
            return masks.random_grid_mask(self.size_px, rng, cells=options.cells, probability=options.probability)
        if strategy == "orb_grid":
            # ORB keypoints are not stored, so they are found here, in the image before augmentation (2 ms).
            return masks.fullest_grid_mask(
                transform_points(find_orb_points(source.pixels), source.matrix),
                self.size_px,
                rng,
                cells=options.cells,
                num_fullest=options.num_fullest,
                fullest=options.fullest,
                others=options.others,
            )
        if ":" in strategy:
            return sample_custom_mask(strategy, points[is_inside(points, self.size_px)], self.size_px, rng)
        return masks.sift_grid_mask(
            points, self.size_px, rng, cells=options.cells, matched=options.matched, unmatched=options.unmatched
        )

    def _sample_segment_mask(
        self, pair: Pair, flip: bool | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sample the matrix of the source and the mask of its segments on the canvas, (S, S) uint8.

        If the mask is too small or too large, both are sampled again. After `_SEGMENT_TRIES` tries, the mask is a
        random grid.
        """
        options = self.options.mask.segments
        low, high = options.segment_ratio
        usable = np.flatnonzero((pair.segment_ratios >= low) & (pair.segment_ratios <= high))
        segments: dict[int, np.ndarray] = {}
        for _ in range(_SEGMENT_TRIES):
            matrix = self._sample_matrix(pair, rng, flip)
            if not len(usable):
                break
            count = min(int(rng.integers(options.count[0], options.count[1] + 1)), len(usable))
            numbers = [int(number) for number in rng.choice(usable, count, replace=False)]
            segments |= {number: pair.read_segment(number) for number in numbers if number not in segments}
            union = masks.unite_masks([segments[number] for number in numbers])
            mask = (warp_to_canvas(union * 255, matrix, self.size_px, MASK_FILL) > 127).astype(np.uint8)
            mask = masks.dilate_mask(mask, round(rng.uniform(*options.dilation) * self.size_px))
            if options.mask_ratio[0] <= mask.mean() <= options.mask_ratio[1] and mask.any() and not mask.all():
                return matrix, mask
        unmatched = self.options.mask.unmatched
        return matrix, masks.random_grid_mask(self.size_px, rng, cells=self.options.mask.cells, probability=unmatched)
