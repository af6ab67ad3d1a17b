"""scripts/speed.py: what is written, and the counts, which hang on no machine. Times are never asserted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_scripts
from measurements import breakdown, editing, harness, samples

from mimicbrush.errors import MimicBrushError

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_measurement_is_written(tmp_path: Path, script_environment: Callable[[], dict[str, str]]) -> None:
    command = [sys.executable, "scripts/speed.py", "dropped_references", "--rounds", "1", "--json", str(tmp_path / "f")]
    warm_scripts.run(command, cwd=ROOT, env=script_environment(), check=True, stdout=subprocess.DEVNULL)
    figures = json.loads((tmp_path / "f").read_text())
    assert figures["name"] == "dropped_references"
    (case,) = figures["cases"]
    assert case["time_ratio"] > 0
    # Of four attentions' worth of work, one over the own tokens alone and its projections are saved.
    assert 1.4 < case["flop_ratio"] < 1.6
    assert case["flop_ratio_full_size"] == case["flop_ratio"]
    assert case["max_abs_diff"] < 1e-5


@pytest.mark.slow
def test_a_full_size_edit_by_count() -> None:
    counted = editing.full_size_edit()
    # REFERENCE.md section 7 counts the leanest edit at these; remembered constants and projections save a little more.
    for reference_timestep, ours_tera, least in (("current", 130.7, 1.55), ("zero", 92.6, 2.2)):
        own, peer = counted[reference_timestep]
        assert 0.97 * ours_tera < own <= ours_tera
        assert peer / own >= least


@pytest.mark.slow
def test_the_launches_of_a_full_size_edit_by_count() -> None:
    counted = {case.case: case.figures() for case in editing.edit_launches()}
    assert counted["current"]["eager_ops_per_step"] > counted["zero"]["eager_ops_per_step"] > 800
    assert counted["zero"]["graphed_ops_per_step"] == 10
    assert counted["current"]["graphed_ops_per_step"] == 15.5
    assert all(counts["host_copies_per_step"] == 0 for counts in counted.values())


@pytest.mark.parametrize(("side", "width"), [(64, 320), (32, 640)])
def test_a_reading_layer_by_count(side: int, width: int) -> None:
    own, peer = (harness.count_flops(side) for side in editing.read_block_sides(side, width, "meta"))
    assert peer / own >= 3


def test_results_that_differ_have_no_speed() -> None:
    case = harness.Case("wrong", lambda: torch.zeros(1), lambda: torch.ones(1), 1e-4, rounds=1)
    with pytest.raises(MimicBrushError, match="wrong: our result and that of the peer differ by 1"):
        harness.compare(case, 1)


def test_equality_is_asserted_in_full_float32_and_times_are_taken_as_usual() -> None:
    def side() -> torch.Tensor:
        return torch.tensor([float(torch.backends.cudnn.allow_tf32), float(torch.backends.cudnn.enabled)])

    assert side().tolist() == [1, 1]
    compared: list[torch.Tensor] = []
    equality = [lambda: compared.append(side()) or torch.zeros(1)] * 2
    timed: list[torch.Tensor] = []
    ours = [lambda: timed.append(side()) or torch.zeros(1)] * 2
    harness.compare(harness.Case("float32", *ours, 0, 1, equality=tuple(equality), counts={}), 1)
    # The kernels that are compared are cuDNN's, like those that are timed.
    assert [each.tolist() for each in compared] == [[0, 1]] * 2
    assert timed and all(each.tolist() == [1, 1] for each in timed)


@pytest.mark.parametrize(
    ("ours", "peer", "difference"),
    [
        (torch.zeros(2), torch.tensor([0.0, 3.0]), 3),
        ([np.uint8([1]), b"x"], [np.uint8([255]), b"x"], 254),  # no wrapping around
        ([np.uint8([1])], [np.uint8([1]), np.uint8([1])], np.inf),
        (np.zeros(2), np.zeros((2, 1)), np.inf),
        (np.zeros(0), np.zeros(0), 0),
        ("one", "other", np.inf),
    ],
)
def test_how_far_results_are_apart(ours: object, peer: object, difference: float) -> None:
    assert harness.largest_difference(ours, peer) == difference


def test_counts_are_per_item_and_any_can_be_named() -> None:
    sides = [lambda: [np.zeros(10)]] * 2
    case = harness.Case("counted", *sides, 0, 1, items=5, counts={"mb": lambda side: len(side()[0]) * 2.0},
                        figures=lambda: {"workers": 2})  # fmt: skip
    figures = harness.compare(case, 1)
    assert (figures["ours_mb"], figures["peer_mb"], figures["mb_ratio"], figures["items"]) == (4, 4, 1, 5)
    assert figures["workers"] == 2 and not [name for name in figures if "flop" in name]


def test_the_gpu_measurement_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for measurement in (editing.edit_gpu, breakdown.breakdown_gpu):
        with pytest.raises(MimicBrushError, match="needs a CUDA GPU"):
            next(measurement())


@pytest.mark.slow
def test_samples_with_stored_matches_equal_those_with_sift_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a small size, on clips that are rendered: the measurement's own assertions, and what it counts."""
    monkeypatch.setattr(samples, "REAL_CLIPS", [tmp_path / "absent.mp4"])
    clips = samples.clips_in(tmp_path / "clips", width_px=320)
    mined = samples.mined_folder(clips, tmp_path / "mined")
    jpeg, video = (harness.compare(case, 1) for case in samples.sample_cases(mined, clips, 64, 4))
    assert jpeg["max_abs_diff"] == video["max_abs_diff"] == 0
    assert jpeg["ours_sift_mpx"] == video["ours_sift_mpx"] == 0
    # Each of the two images is searched at its stored size, which is below the 640 px of the miner.
    assert jpeg["peer_sift_mpx"] == video["peer_sift_mpx"] == pytest.approx(2 * 320 * 180 / 1e6)
    assert 0 < jpeg["ours_decoded_mpx"] < jpeg["peer_decoded_mpx"] < video["peer_decoded_mpx"]


def test_the_peer_of_the_samples_has_masks_of_its_own_matches(tmp_path: Path, mined: Path) -> None:
    """With other stored matches than SIFT finds, the peer must differ: it does not read them."""
    videos = tmp_path / "mined"
    shutil.copytree(mined, videos)
    ours, peer = samples.side(videos, 64, 8), samples.side(videos, 64, 8, samples.frames_of_jpegs)
    images, masks = zip(*((made[:2], made[2]) for made in ours()), strict=True)
    others, other_masks = zip(*((made[:2], made[2]) for made in peer()), strict=True)
    assert harness.largest_difference(images, others) == 0
    assert harness.largest_difference(masks, other_masks) == 1
