from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import cv2
import numpy as np
import pytest
from mining_inputs import moving_camera
from toy_data import photograph

from mimicbrush.data.pair import decode_jpeg
from mimicbrush.errors import InputError
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.reader import VideoFrame
from mimicbrush.mining.select import select_pairs, stored_size

OPTIONS = MiningOptions()


def stream(frames: list[np.ndarray], fps: float = 24) -> Iterator[VideoFrame]:
    for number, frame in enumerate(frames):
        yield VideoFrame(
            number, number / fps, lambda frame=frame: frame, lambda frame=frame: cv2.resize(frame, (64, 36))
        )


def test_pairs_obey_the_options_and_their_points_are_right() -> None:
    frames = moving_camera(120)
    selection = select_pairs(stream(frames), OPTIONS)
    assert 4 <= len(selection.pairs) <= OPTIONS.pairs_per_clip
    assert selection.reason == ""
    for pair in selection.pairs:
        assert OPTIONS.min_gap_s - 1e-2 <= pair.b_time_s - pair.a_time_s <= OPTIONS.max_gap_s + 1e-2
        assert OPTIONS.min_ssim <= pair.ssim <= OPTIONS.max_ssim
        assert len(pair.a_points) >= OPTIONS.min_matches
        moved = np.array([0.6, 0.25]) * (pair.b_frame - pair.a_frame)
        np.testing.assert_allclose(np.median(pair.a_points - pair.b_points, axis=0), moved, atol=0.2)
        assert np.abs(decode_jpeg(pair.a_jpeg).astype(int) - frames[pair.a_frame]).mean() < 6


def test_the_same_frames_give_the_same_pairs() -> None:
    first, second = (select_pairs(stream(moving_camera(60)), OPTIONS) for _ in range(2))
    assert [(p.a_frame, p.b_frame, p.a_jpeg, p.ssim) for p in first.pairs] == [
        (p.a_frame, p.b_frame, p.a_jpeg, p.ssim) for p in second.pairs
    ]


@pytest.mark.parametrize("wanted", [1, 3, 5])
def test_few_pairs_are_spread_over_a_long_clip(wanted: int) -> None:
    there = moving_camera(120)
    frames = (there + there[::-1]) * 2  # 20 s
    pairs = select_pairs(stream(frames), replace(OPTIONS, pairs_per_clip=wanted)).pairs
    assert len(pairs) == wanted
    starts = [pair.a_time_s for pair in pairs]
    assert starts == sorted(starts)
    if wanted > 1:
        assert starts[-1] - starts[0] > 20 * 0.4


def test_one_second_is_enough_but_a_fragment_is_not() -> None:
    assert select_pairs(stream(moving_camera(24)), OPTIONS).pairs
    assert select_pairs(stream(moving_camera(11), fps=5), OPTIONS).reason == "too_short"
    assert select_pairs(stream(moving_camera(12), fps=60), OPTIONS).reason == "too_short"


def test_why_a_clip_gives_nothing() -> None:
    still = [moving_camera(1)[0]] * 48
    black = [np.zeros((64, 96, 3), np.uint8)] * 48
    thin = [frame[:8] for frame in moving_camera(48)]
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (64, 96, 3), dtype=np.uint8) for _ in range(48)]
    assert select_pairs(stream(still), OPTIONS).reason == "too_similar"
    assert select_pairs(stream(black), OPTIONS).reason == "flat"
    assert select_pairs(stream(thin), OPTIONS).reason == "too_small"
    assert select_pairs(stream(noise), OPTIONS).reason == "too_different"
    assert select_pairs(stream(moving_camera(48)), replace(OPTIONS, min_matches=10**6)).reason == "few_matches"


def test_no_pair_spans_a_cut() -> None:
    other = cv2.resize(photograph("coffee.png"), (96, 64), interpolation=cv2.INTER_AREA)
    other = [np.roll(other, n // 4, axis=1) for n in range(48)]
    pairs = select_pairs(stream(moving_camera(48) + other), OPTIONS).pairs
    assert pairs
    assert all((pair.a_frame < 48) == (pair.b_frame < 48) for pair in pairs)


def test_stored_pictures_are_reduced_and_points_count_in_them() -> None:
    frames = moving_camera(48, size_px=(240, 160))
    options = replace(OPTIONS, max_side_px=120)
    pair = select_pairs(stream(frames), options).pairs[0]
    assert (pair.width_px, pair.height_px) == (120, 80)
    assert decode_jpeg(pair.a_jpeg).shape == (80, 120, 3)
    moved = np.array([0.3, 0.125]) * (pair.b_frame - pair.a_frame)
    np.testing.assert_allclose(np.median(pair.a_points - pair.b_points, axis=0), moved, atol=0.2)
    assert stored_size(frames[0], 240) is frames[0]


@pytest.mark.parametrize(
    "values", [{"min_ssim": 0.9, "max_ssim": 0.5}, {"pairs_per_clip": 0}, {"jpeg_quality": 101}, {"min_gap_s": 0.0}]
)
def test_senseless_options_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        replace(OPTIONS, **values)
