"""The percentage of correct keypoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from mimicbrush.errors import DataError
from mimicbrush.evaluation.bootstrap import cluster_interval
from mimicbrush.evaluation.keypoint_transfer.methods import Method
from mimicbrush.evaluation.keypoint_transfer.tasks import TransferTask

#: A keypoint is correct within this part of the extent.
ALPHAS = (0.05, 0.1, 0.2)


def correct(found_xy: np.ndarray, task: TransferTask, alpha: float) -> np.ndarray:
    """Which keypoints arrived: (K, 2) float, px of the canvas -> (K,) bool.

    Raises:
        DataError: not one finite place for each keypoint.
    """
    if found_xy.shape != task.reference_xy.shape or not np.isfinite(found_xy).all():
        raise DataError(f"a method must give {task.reference_xy.shape} finite places, got {found_xy.shape}")
    return np.linalg.norm(found_xy - task.reference_xy, axis=1) <= alpha * task.extent_px


def measure(methods: Mapping[str, Method], tasks: Sequence[TransferTask], seed: int) -> dict[str, Any]:
    """Method -> alpha -> percentage of all points, mean of the percentages of pictures, and its 95 % interval.

    Args:
        methods: by the name of their rows.
        tasks: one or more.
        seed: of the bootstrap, which draws whole groups.
    """
    groups = [task.group for task in tasks]
    results: dict[str, Any] = {}
    for name, method in methods.items():
        found = [method(task) for task in tqdm(tasks, desc=name, unit="picture", disable=None)]
        results[name] = {}
        for alpha in ALPHAS:
            hits = [correct(xy, task, alpha) for xy, task in zip(found, tasks, strict=True)]
            by_picture = np.array([100 * each.mean() for each in hits])
            results[name][str(alpha)] = {
                "per_point": float(100 * np.concatenate(hits).mean()),
                "per_picture": float(by_picture.mean()),
                "ci95": list(cluster_interval(by_picture, groups, seed)),
            }
    return results


def markdown(results: Mapping[str, Any], absent: Mapping[str, str]) -> str:
    """The table: percentages per picture with intervals; rows that could not be measured say why."""
    lines = [
        "| method | " + " | ".join(f"PCK@{alpha:g}" for alpha in ALPHAS) + " |",
        "|" + "---|" * (len(ALPHAS) + 1),
    ]
    for name, by_alpha in results.items():
        cells = []
        for alpha in ALPHAS:
            value = by_alpha[str(alpha)]
            low, high = value["ci95"]
            cells.append(f"{value['per_picture']:.1f} [{low:.1f}, {high:.1f}]")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"| {name}: {why} | {' | '.join(['n/a'] * len(ALPHAS))} |" for name, why in absent.items()]
    return "\n".join(lines) + "\n"
