"""Ablations, row by row: does each measure change in the paper's direction?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mimicbrush.errors import DataError
from mimicbrush.evaluation.heldout.reference_gain import GAINS
from mimicbrush.evaluation.heldout.run import PER_PAIR_FILE
from mimicbrush.evaluation.paper_tables import ABLATIONS
from mimicbrush.evaluation.statistics import bootstrap_by_cluster

#: What all other rows of the paper's tables are compared with.
FULL = "full"
#: Measure -> how it is read from a line of per_pair.jsonl, and its digits.
MEASURES = {"psnr": 2, "ssim": 3, **dict.fromkeys(GAINS, 2)}
HEADINGS = {"psnr": "PSNR, dB", "ssim": "SSIM", **{key: f"{gain.name}, dB" for key, gain in GAINS.items()}}
SETS = ("natural", "warped")


@dataclass(frozen=True)
class AblationEffect:
    """The effect of one ablation on one measure, on one set of pairs.

    Attributes:
        value: mean over pairs and seeds.
        by_seed: mean over pairs, for each seed.
        change: mean of base - row over the same pairs, positive where the base is better; None for the base itself.
        interval: 95 % of it, by bootstrap over sources; seeds are averaged before.
        direction: "seen" or "opposite" where the interval is clear of zero and every seed alone has that sign;
            "not seen" otherwise, or "" where the paper states no effect.
    """

    value: float
    by_seed: list[float]
    change: float | None
    interval: tuple[float, float] | None
    direction: str


def read_evaluation(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Read one run's evaluation: set -> pair -> measures; the pair's source stands before its name.

    Raises:
        DataError: it was not evaluated.
    """
    path = folder / PER_PAIR_FILE
    if not path.is_file():
        raise DataError(f"{folder} holds no {PER_PAIR_FILE}: the run was not evaluated")
    measures: dict[str, dict[str, dict[str, float]]] = {name: {} for name in SETS}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        model = record["rows"]["model"]
        measures[record["set"]][f"{record['source_hash']} {record['pair_id']}"] = {
            "psnr": model["psnr"],
            "ssim": float("nan") if model["ssim"] is None else model["ssim"],
            # An evaluation of an earlier version has fewer; what one of them lacks is compared in none.
            **{key: record[key] for key in GAINS if key in record},
        }
    return measures


def compare_rows(
    evaluations: Mapping[str, Sequence[Path]], base: str = FULL, seed: int = 0
) -> dict[str, dict[str, dict[str, AblationEffect]]]:
    """Compare ablations with the row that leaves nothing out: row -> set -> measure -> effect.

    A measure that one of the runs lacks is left out.

    Args:
        evaluations: row -> the evaluation folders of its seeds, in order.
        base: the row that the others are compared with.
        seed: of the bootstrap.

    Raises:
        DataError: rows were evaluated on other pairs, or have other numbers of seeds.
    """
    if base not in evaluations:
        raise DataError(f"there is no row {base!r} to compare with; there are {', '.join(evaluations) or 'none'}")
    runs = {row: [read_evaluation(folder) for folder in folders] for row, folders in evaluations.items()}
    seeds = len(runs[base])
    for row, own in runs.items():
        if len(own) != seeds:
            raise DataError(f"{row} has {len(own)} seeds and {base} has {seeds}; the sweep is not complete")
        for name in SETS:
            if any(set(each[name]) != set(runs[base][0][name]) for each in own):
                raise DataError(f"{row} was evaluated on other pairs of the {name} set than {base}; evaluate again")
    return {
        row: {
            name: {
                measure: _compute_effect(runs, row, base, name, measure, seed)
                for measure in MEASURES
                if all(measure in values for own in runs.values() for each in own for values in each[name].values())
            }
            for name in SETS
            if runs[base][0][name]
        }
        for row in runs
    }


def _compute_effect(
    runs: Mapping[str, Sequence[dict[str, dict[str, dict[str, float]]]]],
    row: str,
    base: str,
    name: str,
    measure: str,
    seed: int,
) -> AblationEffect:
    pairs = sorted(runs[base][0][name])

    def values(of: str) -> np.ndarray:
        return np.array([[each[name][pair][measure] for pair in pairs] for each in runs[of]])  # (seeds, pairs)

    mine = values(row)
    by_seed = [float(value) for value in np.nanmean(mine, axis=1)]
    if row == base:
        return AblationEffect(float(np.mean(by_seed)), by_seed, None, None, "")
    differences = values(base) - mine  # (seeds, pairs)
    change = differences.mean(axis=0)
    is_finite = np.isfinite(change)
    low, high = bootstrap_by_cluster(
        change[is_finite], [pair.split()[0] for pair, use in zip(pairs, is_finite, strict=True) if use], seed
    )
    signs = set(np.sign(np.nanmean(differences, axis=1)))
    direction = "seen" if low > 0 and signs == {1} else "opposite" if high < 0 and signs == {-1} else "not seen"
    return AblationEffect(float(np.mean(by_seed)), by_seed, float(change[is_finite].mean()), (low, high), direction)


def format_ablations(
    effects: Mapping[str, Mapping[str, Mapping[str, AblationEffect]]],
    absent: Mapping[str, str],
    keypoints: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    notes: Mapping[str, str] | None = None,
) -> str:
    """Format the comparison as Markdown, a table for each set of pairs.

    Rows of the paper's tables stand in its order, beside its values; others in their own.

    Args:
        effects: of `compare_rows`; the row without a change is the one that the others are compared with.
        absent: row of the paper -> why it was not run.
        keypoints: row -> column -> a value for each seed, for further columns; "n/a" for rows that it lacks.
        notes: row -> what its title says besides its name.
    """
    base = next(row for row, sets in effects.items() if all(each["psnr"].change is None for each in sets.values()))
    is_paper = base == FULL
    names = {row: paper.name for row, paper in ABLATIONS.items()} if is_paper else {row: row for row in effects}
    further = list((keypoints or {}).get(base, ()))
    headings = [*further, *HEADINGS.values(), *(["paper: full - row, PSNR"] if is_paper else []), "direction in PSNR"]
    parts = []
    for name in SETS:
        if name not in effects[base]:
            continue
        seeds = len(effects[base][name]["psnr"].by_seed)
        paper_note = "In the paper's Table 3 the full model is better than every row in PSNR and SSIM. "
        lines = [
            f"**{name} pairs**, {seeds} seeds; in brackets {base} - row with its 95 % interval. "
            f"{paper_note if is_paper else ''}Intervals are over source videos; what another training would change is "
            "not in them, so a direction counts as seen only where every seed shows it.",
            "",
            "| row | " + " | ".join(headings) + " |",
            "|" + "---|" * (len(headings) + 1),
        ]
        for row, title in names.items():
            if note := (notes or {}).get(row):
                title = f"{title} ({note})"
            gap = ABLATIONS[FULL].part_composition.psnr - ABLATIONS[row].part_composition.psnr if is_paper else 0.0
            if row in effects:
                found = (keypoints or {}).get(row, {})
                cells = [" / ".join(f"{value:.1f}" for value in found.get(column, ())) or "n/a" for column in further]
                cells += [_format_cell(effects[row][name].get(measure), digits) for measure, digits in MEASURES.items()]
                cells += ["" if row == base else f"{gap:+.2f}"] if is_paper else []
                lines.append(f"| {title} | {' | '.join(cells)} | {effects[row][name]['psnr'].direction} |")
            elif row in absent:
                cells = ["n/a"] * (len(further) + len(HEADINGS))
                lines.append(f"| {title} | {' | '.join(cells)} | {gap:+.2f} | {absent[row]} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _format_cell(effect: AblationEffect | None, digits: int) -> str:
    if effect is None:
        return "n/a"
    if effect.change is None or effect.interval is None:
        return f"{effect.value:.{digits}f}"
    low, high = effect.interval
    return f"{effect.value:.{digits}f} ({effect.change:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}])"
