"""PCK, the percentage of correct keypoints: numbers and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from mimicbrush.errors import DataError
from mimicbrush.evaluation.keypoint_transfer.attention import AttentionPlaces
from mimicbrush.evaluation.keypoint_transfer.attention_maps import THIRDS
from mimicbrush.evaluation.keypoint_transfer.methods import Method
from mimicbrush.evaluation.keypoint_transfer.tasks import TransferTask
from mimicbrush.evaluation.statistics import bootstrap_by_cluster

#: A keypoint is correct within this part of the extent.
ALPHAS = (0.05, 0.1, 0.2)
#: Of the tables that have one number a cell.
ALPHA = 0.1

#: Name of a row -> (K, 2) places for each task.
Places = Mapping[str, Sequence[np.ndarray]]


def find_correct(found_xy: np.ndarray, task: TransferTask, alpha: float) -> np.ndarray:
    """Find which keypoints are correct: (K, 2) float, px of the canvas -> (K,) bool.

    Raises:
        DataError: not one finite place for each keypoint.
    """
    if found_xy.shape != task.reference_xy.shape or not np.isfinite(found_xy).all():
        raise DataError(f"a method must return finite places of shape {task.reference_xy.shape}, got {found_xy.shape}")
    return np.linalg.norm(found_xy - task.reference_xy, axis=1) <= alpha * task.extent_px


def carry_keypoints(methods: Mapping[str, Method], tasks: Sequence[TransferTask]) -> dict[str, list[np.ndarray]]:
    """Carry the keypoints of each task by each method: row -> places."""
    return {
        name: [method(task) for task in tqdm(tasks, desc=name, unit="picture", disable=None)]
        for name, method in methods.items()
    }


def measure_pck(
    places: Places, tasks: Sequence[TransferTask], seed: int, alphas: Sequence[float] = ALPHAS
) -> dict[str, Any]:
    """Measure PCK: row -> alpha -> percentage of all points, mean over images, and its 95 % interval.

    Args:
        places: of every row, one array for each task.
        tasks: one or more.
        seed: of the bootstrap, which resamples whole groups.
        alphas: see `ALPHAS`.
    """
    groups = [task.group for task in tasks]
    results: dict[str, Any] = {}
    for name, of_row in places.items():
        results[name] = {}
        for alpha in alphas:
            hits = [find_correct(xy, task, alpha) for xy, task in zip(of_row, tasks, strict=True)]
            by_image = np.array([100 * each.mean() for each in hits])
            results[name][str(alpha)] = {
                "per_point": float(100 * np.concatenate(hits).mean()),
                "per_picture": float(by_image.mean()),
                "ci95": list(bootstrap_by_cluster(by_image, groups, seed)),
            }
    return results


def measure_sets(places: Places, tasks: Sequence[TransferTask], seed: int) -> dict[str, Any]:
    """Measure PCK by set: name -> `points`, `pictures`, and the `results` of `measure_pck`."""
    sets: dict[str, Any] = {}
    for name in dict.fromkeys(task.set_name for task in tasks if task.set_name):
        chosen = [number for number, task in enumerate(tasks) if task.set_name == name]
        of_set = [tasks[number] for number in chosen]
        some = {row: [of_row[number] for number in chosen] for row, of_row in places.items()}
        sets[name] = {
            "pictures": len(of_set),
            "points": sum(len(task.source_xy) for task in of_set),
            "results": measure_pck(some, of_set, seed),
        }
    return sets


def measure_layers(found: Sequence[AttentionPlaces], tasks: Sequence[TransferTask], seed: int) -> list[dict[str, Any]]:
    """Measure PCK at `ALPHA` of attention inside the mask, by layer and by third of the steps.

    Returns:
        A dictionary each: `path` and `tokens` along a side of the layer (None: all layers), and for each of `THIRDS`
        and for `all` the values of `measure_pck`.
    """
    layers = []
    for path in (*found[0].sides, None):
        places = {
            name: [each.by_layer[path, third] for each in found]
            for name, third in (*zip(THIRDS, range(len(THIRDS)), strict=True), ("all", None))
        }
        measured = measure_pck(places, tasks, seed, [ALPHA])
        side = None if path is None else found[0].sides[path]
        layers.append({"path": path, "tokens": side, **{name: by[str(ALPHA)] for name, by in measured.items()}})
    return layers


def format_pck(results: Mapping[str, Any], absent: Mapping[str, str]) -> str:
    """Format the table: percentages per image with intervals; rows that could not be measured say why."""
    rows = [[name, *(_format_cell(by_alpha[str(alpha)]) for alpha in ALPHAS)] for name, by_alpha in results.items()]
    rows += [[f"{name}: {why}", *["n/a"] * len(ALPHAS)] for name, why in absent.items()]
    return _format_table(["method", *(f"PCK@{alpha:g}" for alpha in ALPHAS)], rows)


def format_sets(sets: Mapping[str, Any]) -> str:
    """Format PCK at `ALPHA`: a column for each set, with the number of its images."""
    first = next(iter(sets.values()))["results"]
    head = [f"PCK@{ALPHA:g}", *(f"{name} ({values['pictures']})" for name, values in sets.items())]
    return _format_table(
        head, [[row, *(_format_cell(values["results"][row][str(ALPHA)]) for values in sets.values())] for row in first]
    )


def format_layers(layers: Sequence[Mapping[str, Any]]) -> str:
    """Format PCK at `ALPHA` of attention inside the mask: a row for each layer, a column for each third."""
    rows = []
    for layer in layers:
        name, side = layer["path"] or "all layers", layer["tokens"]
        numbers = [f"{layer[third]['per_picture']:.1f}" for third in THIRDS]
        rows.append([name, f"{side} x {side}" if side else "", *numbers, _format_cell(layer["all"])])
    return _format_table(
        [f"PCK@{ALPHA:g} in holes", "tokens", *(f"{third} steps" for third in THIRDS), "all steps"], rows
    )


def _format_cell(value: Mapping[str, Any]) -> str:
    low, high = value["ci95"]
    return f"{value['per_picture']:.1f} [{low:.1f}, {high:.1f}]"


def _format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"
