from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from mining_inputs import moving_camera
from toy_data import photograph

from mimicbrush.data.pair import decode_jpeg
from mimicbrush.errors import InputError
from mimicbrush.mining.jpeg import shrink_to_side
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.pair_selection import Candidate, select_pairs
from mimicbrush.mining.video.strict_reader import VideoFrame
from mimicbrush.ops.counter_rng import mix
from mimicbrush.ops.keypoints import match_features, sift_features
from mimicbrush.ops.similarity import ssim_luma, ssim_thumbnail

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


@pytest.mark.parametrize(("num_pairs", "max_gap_s", "min_matches"), [(16, 4.0, 6), (2, 2.0, 40)])
def test_of_all_pairs_of_a_stretch_the_one_of_least_rank_is_taken(
    num_pairs: int, max_gap_s: float, min_matches: int
) -> None:
    """Against all pairs compared and matched, and the best of each stretch taken from them at the end."""
    frames = moving_camera(120)
    options = replace(OPTIONS, pairs_per_clip=num_pairs, max_gap_s=max_gap_s, min_matches=min_matches)
    features = {number: sift_features(frames[number]) for number in range(0, 120, 12)}  # every half second
    admissible = []
    for a, b in itertools.combinations(features, 2):
        ssim = ssim_luma(ssim_thumbnail(frames[a]), ssim_thumbnail(frames[b]))
        points = match_features(features[a], features[b])
        if b - a <= 24 * max_gap_s and 0.05 <= ssim <= 0.96 and len(points[0]) >= min_matches:
            admissible.append((mix(a, b), a, b, ssim, points))
    by_rank = sorted(admissible, key=lambda found: found[0], reverse=True)
    for stretch_frames in (12, 24, 48, 96):
        best = {found[1] // stretch_frames: found for found in by_rank}
        if len(best) <= 2 * num_pairs:
            break
    expected = [best[stretch] for stretch in sorted(best)]
    if len(expected) > num_pairs:
        expected = [expected[i * len(expected) // num_pairs] for i in range(num_pairs)]
    pairs = select_pairs(stream(frames), options).pairs
    assert len(pairs) >= 2
    assert [(pair.a_frame, pair.b_frame, pair.ssim) for pair in pairs] == [found[1:4] for found in expected]
    for pair, found in zip(pairs, expected, strict=True):
        np.testing.assert_array_equal((pair.a_points, pair.b_points), found[4])


def test_sift_runs_once_a_frame_and_only_for_pairs_that_can_win(monkeypatch: pytest.MonkeyPatch) -> None:
    frames, detected, matched = moving_camera(120), [], []
    monkeypatch.setattr(
        "mimicbrush.mining.pair_selection.sift_features", lambda image: detected.append(image) or sift_features(image)
    )
    monkeypatch.setattr(
        "mimicbrush.mining.pair_selection.match_features", lambda *both: matched.append(both) or match_features(*both)
    )
    all_admissible = replace(OPTIONS, min_ssim=-1.0, max_ssim=1.0, min_matches=0)
    selection = select_pairs(stream(frames), all_admissible)
    # Each of ten candidates but the last is the first frame of a pair.
    assert len(matched) == selection.num_compared == len(selection.pairs) == 9
    assert len(detected) == 10


@pytest.mark.parametrize("num_pairs", [1, 3, 5])
def test_few_pairs_are_spread_over_a_long_clip(num_pairs: int) -> None:
    there = moving_camera(120)
    frames = (there + there[::-1]) * 2  # 20 s
    pairs = select_pairs(stream(frames), replace(OPTIONS, pairs_per_clip=num_pairs)).pairs
    assert len(pairs) == num_pairs
    starts = [pair.a_time_s for pair in pairs]
    assert starts == sorted(starts)
    if num_pairs > 1:
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


def test_stored_images_are_reduced_and_points_count_in_them() -> None:
    frames = moving_camera(48, size_px=(240, 160))
    options = replace(OPTIONS, max_side_px=120)
    pair = select_pairs(stream(frames), options).pairs[0]
    assert (pair.width_px, pair.height_px) == (120, 80)
    assert decode_jpeg(pair.a_jpeg).shape == (80, 120, 3)
    moved = np.array([0.3, 0.125]) * (pair.b_frame - pair.a_frame)
    np.testing.assert_allclose(np.median(pair.a_points - pair.b_points, axis=0), moved, atol=0.2)
    assert shrink_to_side(frames[0], 240) is frames[0]


@pytest.mark.parametrize("side_px", [512, 448, 300, 256])
def test_matches_of_reduced_frames_lie_where_a_known_homography_puts_them(side_px: int) -> None:
    image = photograph("astronaut.png")
    matrix = np.array([[0.9, -0.15, 60], [0.12, 0.95, -20], [1e-4, -5e-5, 1]])
    options = replace(OPTIONS, match_side_px=side_px)
    frames = image, cv2.warpPerspective(image, matrix, (512, 512))
    a, b = match_features(*(Candidate(number, number, frame, options).features for number, frame in enumerate(frames)))
    homogeneous = np.c_[a, np.ones(len(a))] @ matrix.T
    difference = homogeneous[:, :2] / homogeneous[:, 2:] - b
    assert len(a) > 100
    # In pixels of the reduced image SIFT is as exact at every size, and half a pixel of bias would be a wrong centre.
    assert np.median(np.linalg.norm(difference, axis=1)) < 0.3 * 512 / side_px
    assert np.abs(difference.mean(axis=0)).max() < 0.1


@pytest.mark.parametrize(
    "values", [{"min_ssim": 0.9, "max_ssim": 0.5}, {"pairs_per_clip": 0}, {"jpeg_quality": 101}, {"min_gap_s": 0.0}]
)
def test_senseless_options_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        replace(OPTIONS, **values)


def test_a_cut_within_one_scene_is_respected_though_it_matches() -> None:
    """Wide shot, then a closer one of the same thing: SIFT matches across, only the cut tells."""
    wide = moving_camera(48, size_px=(192, 128))
    close = [cv2.resize(frame[20:105, 40:168], (192, 128), interpolation=cv2.INTER_CUBIC) for frame in wide]
    frames = wide + close
    blind = select_pairs(stream(frames), replace(OPTIONS, min_cut=255.0)).pairs
    assert any((pair.a_frame < 48) != (pair.b_frame < 48) for pair in blind)
    selection = select_pairs(stream(frames), replace(OPTIONS, refused_per_clip=9))
    assert selection.pairs and all((pair.a_frame < 48) == (pair.b_frame < 48) for pair in selection.pairs)
    assert "across_cut" in {refused.reason for refused in selection.refused}


def test_a_shake_is_no_cut() -> None:
    image = cv2.resize(photograph("coffee.png"), (300, 200), interpolation=cv2.INTER_AREA)
    jumps = np.random.default_rng(1).integers(0, 12, (72, 2))
    frames = [image[y : y + 180, x : x + 280] for x, y in jumps]
    assert "across_cut" not in select_pairs(stream(frames), OPTIONS).detail


@pytest.mark.parametrize("blur", ["focus", "swing"])
def test_blurred_frames_are_left_out(blur: str) -> None:
    frames = moving_camera(120, size_px=(288, 192))
    smear = np.zeros((17, 17), np.float32)
    smear[8] = 1 / 17
    for number in range(40, 76):
        frames[number] = (
            cv2.GaussianBlur(frames[number], (0, 0), 4) if blur == "focus" else cv2.filter2D(frames[number], -1, smear)
        )
    selection = select_pairs(stream(frames), OPTIONS)
    used = {frame for pair in selection.pairs for frame in (pair.a_frame, pair.b_frame)}
    assert selection.pairs and not used & set(range(40, 76))
    assert [refused.reason for refused in selection.refused if refused.b_frame == -1] == ["blurred"]
    assert select_pairs(stream(frames[40:76]), OPTIONS).reason == "blurred"


def test_real_clips_are_cut_where_they_were_joined(shared: Path) -> None:
    """Three seconds each of four real clips, one after the other; each pair must lie within one of them."""
    names = ("dog.mp4", "cups.mp4", "coffee.mp4", "car.mp4")
    frames = []
    for name in names:
        with av.open(str(shared / "data/videos" / name)) as container:
            part = itertools.islice(container.decode(video=0), 90)
            frames += [frame.reformat(width=320, height=180, format="rgb24").to_ndarray() for frame in part]
    selection = select_pairs(stream(frames, fps=30), OPTIONS)
    assert {pair.a_frame // 90 for pair in selection.pairs} >= {0, 1, 2}  # in the last, hardly anything moves
    assert all(pair.a_frame // 90 == pair.b_frame // 90 for pair in selection.pairs)
    for name in names:
        part = frames[90 * names.index(name) :][:90]
        assert "across_cut" not in select_pairs(stream(part, fps=30), OPTIONS).detail, name
