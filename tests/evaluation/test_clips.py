from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from mimicbrush.errors import InputError
from mimicbrush.ops.keypoints import match_keypoints
from mimicbrush.synthetic.clips import (
    HELDOUT_PHOTOGRAPHS,
    TRAIN_PHOTOGRAPHS,
    ClipSpec,
    demo_clips,
    read_photograph,
    render_frames,
    write_clip,
    write_clips,
)
from mimicbrush.synthetic.small_model_data import training_clips

SHORT = ClipSpec("coffee.png", ("chelsea.png",), seed=1, seconds=0.75, width_px=160, height_px=120)


def test_clips_decode_with_the_stated_frames(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", SHORT)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", Fraction(24))
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == SHORT.num_frames == 18
    assert frames[0].shape == (120, 160, 3)
    for decoded, rendered in zip(frames, render_frames(SHORT), strict=True):
        assert np.abs(decoded.astype(int) - rendered).mean() < 8  # compressed, but the same image


def test_a_clip_is_a_function_of_its_spec(tmp_path: Path) -> None:
    first, second = (write_clips(tmp_path / name, {"a.mp4": SHORT}) for name in ("one", "two"))
    assert next(iter(first)).read_bytes() == next(iter(second)).read_bytes()
    other = ClipSpec(**vars(SHORT) | {"seed": 2})
    assert not np.array_equal(next(render_frames(SHORT)), next(render_frames(other)))


def test_camera_and_things_move() -> None:
    frames = list(render_frames(SHORT))
    alone = list(render_frames(ClipSpec(**vars(SHORT) | {"cutouts": ()})))
    assert np.abs(frames[-1].astype(int) - frames[0]).mean() > 5
    assert np.abs(frames[0].astype(int) - alone[0]).mean() > 1


def test_train_and_heldout_share_no_photograph_and_each_can_be_read() -> None:
    assert not set(TRAIN_PHOTOGRAPHS) & set(HELDOUT_PHOTOGRAPHS)
    for name in TRAIN_PHOTOGRAPHS + HELDOUT_PHOTOGRAPHS:
        photograph = read_photograph(name, np.random.default_rng(0))
        assert photograph.dtype == np.uint8
        assert photograph.shape[2] == 3
    with pytest.raises(InputError, match="no photograph"):
        read_photograph("nothing.png", np.random.default_rng(0))


def test_demo_clips_take_turns() -> None:
    specs = demo_clips(TRAIN_PHOTOGRAPHS, 14, seed=0)
    assert len(specs) == 14
    assert {spec.background for spec in specs.values()} == set(TRAIN_PHOTOGRAPHS)
    assert len({spec.seed for spec in specs.values()}) == 14
    for spec in specs.values():
        assert len({spec.background, *spec.cutouts}) == 3


def test_things_of_training_clips_have_motions_of_their_own() -> None:
    """OpenCV finds a second homography among the matches that the first one, the camera's, does not explain."""
    specs = training_clips([], 3, seed=0)
    spec = next(spec for spec in specs.values() if not spec.background.startswith("leaves:"))
    assert len(spec.cutouts) >= 3 and spec.tilt > 0
    frames = list(render_frames(spec))
    one, other = match_keypoints(frames[0], frames[16])
    found = 0
    while len(one) >= 12 and found < 2:
        _, inliers = cv2.findHomography(one, other, cv2.RANSAC, 3.0)
        if inliers.sum() < 10:
            break
        found += 1
        one, other = (points[inliers.ravel() == 0] for points in (one, other))
    assert found == 2
