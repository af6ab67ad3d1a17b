"""scripts/speed.py on mining: equal pairs, and a simulated cluster that ends each shard once, within known bounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from measurements import harness, mining_choice, mining_cluster
from measurements.mining_cluster import Cluster, Cost, simulate

from mimicbrush.synthetic.clips import ClipSpec, write_clip

COST = Cost(
    clip_s=(1.0, 2.0, 4.0), read_mb=2.0, written_mb=3.0, shard_s=0.1, start_s=5.0, finish_clip_s=0, finish_shard_s=0
)
CALM = Cluster(workers=24, slow_share=0.0, driver_s=0.0, store_mb_per_s=1e9)
CLIP_S = COST.draw_clips(1000, np.random.default_rng(0))


@pytest.mark.parametrize("per_shard", [1, 4, 7])
@pytest.mark.parametrize("losses", [0.0, 60.0])
def test_each_shard_ends_once(per_shard: int, losses: float) -> None:
    cluster = replace(CALM, node_losses_per_hour=losses, restart_s=20.0, slow_share=0.3, hangs_per_clip=0.01,
                      timeout_s=30.0, driver_s=0.01, store_mb_per_s=100.0)  # fmt: skip
    outcome = simulate(CLIP_S, per_shard, COST, cluster, 3)
    assert outcome.finished == dict.fromkeys(range(-(-1000 // per_shard)), 1)
    assert (outcome.lost_tries > 0) == (outcome.lost_s > 0) == (losses > 0)
    again = simulate(CLIP_S, per_shard, COST, cluster, 3)
    assert (again.wall_s, again.lost_s) == (outcome.wall_s, outcome.lost_s)


def test_no_work_is_lost_and_the_time_is_that_of_a_list_schedule() -> None:
    """Without failures: all work is done once, and greedy scheduling has Graham's bound."""
    outcome = simulate(CLIP_S, 4, COST, CALM, 0)
    shard_s = CLIP_S.reshape(-1, 4).sum(1) + COST.shard_s
    assert outcome.useful_s == pytest.approx(shard_s.sum())
    assert shard_s.sum() / 24 <= outcome.wall_s - COST.start_s <= shard_s.sum() / 24 + shard_s.max()


def test_what_slows_a_cluster_down() -> None:
    calm = simulate(CLIP_S, 4, COST, CALM, 0).wall_s
    for change, least in (
        ({"slow_share": 1.0, "slow_factor": 3.0}, 2.5 * calm),
        ({"store_mb_per_s": 10.0}, 1000 * 5 / 10 * 0.9),  # all bytes must pass
        ({"driver_s": 1.0}, 250),  # a shard a second
        ({"node_losses_per_hour": 60.0}, 1.3 * calm),
        ({"hangs_per_clip": 0.001, "timeout_s": 1800.0}, 1800),
    ):
        assert simulate(CLIP_S, 4, COST, replace(CALM, **change), 0).wall_s >= least, change


def test_clips_are_drawn_as_long_as_those_that_were_measured() -> None:
    drawn = np.log(COST.draw_clips(20_000, np.random.default_rng(0)))
    assert drawn.mean() == pytest.approx(np.log(2), abs=0.02)
    assert drawn.std() == pytest.approx(np.log(COST.clip_s).std(), abs=0.02)


def test_pairs_tried_by_rank_are_those_tried_as_they_come(tmp_path: Path) -> None:
    """At a small size, on a clip that is rendered: the measurement's own assertions, and what it finds."""
    write_clip(tmp_path / "a.mp4", ClipSpec("coffee.png", seconds=2, width_px=400, height_px=224))
    rank, smaller = (harness.compare(case, 1) for case in mining_choice.choice_cases([tmp_path / "a.mp4"], [280]))
    assert rank["max_abs_diff"] == 0
    assert smaller["max_abs_diff"] <= 0.05
    assert smaller["pairs"] >= 0.95 * smaller["pairs_default"] > 0
    assert 0.3 < smaller["matches_kept"] < 1
    assert 0.8 < smaller["mask_iou"] <= 1 and 0.8 < smaller["mask_equal_area"] <= 1


@pytest.mark.slow
def test_the_cost_of_a_clip_is_measured_and_a_cluster_follows_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clips").mkdir()
    for number, name in enumerate(("coffee.png", "chelsea.png")):
        write_clip(tmp_path / f"clips/{number}.mp4", ClipSpec(name, seconds=2, width_px=256, height_px=144))
    monkeypatch.setattr(mining_cluster, "FINISH_COPIES", 3)
    monkeypatch.setattr(mining_cluster, "CLIPS", 5000)
    cost = mining_cluster.measure_cost(tmp_path / "clips", tmp_path)
    assert len(cost.clip_s) == 2 and min(cost.clip_s) > 0
    assert 0.001 < cost.read_mb < 1 and 0.01 < cost.written_mb < 1
    assert 0 <= cost.shard_s < 5 and 0 < cost.start_s < 60
    figures = mining_cluster.describe_run(cost, 4, Cluster(workers=50), seeds=2)
    ideal_s = 5000 * np.mean(cost.clip_s) / 50
    assert ideal_s < figures["wall_s"] <= figures["longest_wall_s"] < 3 * ideal_s + 5000 / 50 * cost.shard_s + 60
