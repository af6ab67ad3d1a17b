"""Scores of a study: how often each editor was ranked best, as in the paper's table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mimicbrush.errors import DataError, InputError
from mimicbrush.evaluation.statistics import LEVEL, RESAMPLES
from mimicbrush.evaluation.user_study.pages import ANSWERS_FORMAT, KEY_FORMAT, QUESTIONS
from mimicbrush.io.text import parse_json
from mimicbrush.ops import counter_rng

#: What a file must hold, by its format.
_FIELDS = {KEY_FORMAT: ("study", "editors", "cases"), ANSWERS_FORMAT: ("study",)}

#: Best %, by question (paper Sec. 4).
PAPER_USER_STUDY = {
    "Paint-by-Example": {"fidelity": 10.8, "harmony": 29.2, "quality": 15.8},
    "AnyDoor, with mask": {"fidelity": 30.6, "harmony": 22.6, "quality": 29.4},
    "MimicBrush": {"fidelity": 55.8, "harmony": 45.2, "quality": 50.6},
}
_CHUNK = 1000


@dataclass(frozen=True)
class RaterScore:
    """The score of one editor in one question.

    Attributes:
        best: how often it was ranked first, in per cent of the complete rankings.
        interval: 95 % bootstrap interval of `best`, over raters and cases.
        mean_rank: 1 is best.
        rankings: how many it is of.
    """

    best: float
    interval: tuple[float, float]
    mean_rank: float
    rankings: int


@dataclass(frozen=True)
class StudyScores:
    """The scores of all editors.

    Attributes:
        scores: editor -> question -> score.
        raters: how many answered.
        cases: how many were asked about.
        incomplete: file -> how many of its rankings are missing or not whole, and do not count.
    """

    scores: dict[str, dict[str, RaterScore]]
    raters: int
    cases: int
    incomplete: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        scores = {
            editor: {question: vars(score) for question, score in row.items()} for editor, row in self.scores.items()
        }
        return {"raters": self.raters, "cases": self.cases, "incomplete": self.incomplete, "scores": scores}


def score_study(key_path: Path, answer_paths: Sequence[Path], seed: int = 0) -> StudyScores:
    """Score the answers of some raters.

    A ranking that is not whole is left out and counted. The interval is of other raters *and* other cases: both are
    drawn again, with replacement.

    Args:
        key_path: key.json of the study.
        answer_paths: what raters downloaded from its page, a file each.
        seed: of the bootstrap.

    Raises:
        InputError: a file that is no key or no answers, of another study, damaged, or of a rater who is there already.
        DataError: a question without a single whole ranking.
    """
    key = _read_file(key_path, KEY_FORMAT)
    editors, cases = list(key["editors"]), list(key["cases"])
    if not answer_paths:
        raise InputError("no answers were given; name the files that the raters downloaded")
    ranks = np.full((len(answer_paths), len(cases), len(QUESTIONS), len(editors)), np.nan)
    raters: dict[str, Path] = {}
    incomplete: dict[str, int] = {}
    for row, path in enumerate(answer_paths):
        answers = _read_file(path, ANSWERS_FORMAT)
        if answers.get("study") != key["study"]:
            raise InputError(
                f"{path} belongs to study {answers.get('study')}, but {key_path} is the key of {key['study']}; score "
                "each study with its own key"
            )
        rater = str(answers.get("rater"))
        if rater in raters:
            raise InputError(f"{raters[rater]} and {path} are from the same rater ({rater}); give only the later one")
        raters[rater] = path
        ranks[row] = _read_ranks(path, answers, key, editors)
        missing = int(np.isnan(ranks[row, :, :, 0]).sum())
        if missing:
            incomplete[str(path)] = missing
    scores: dict[str, dict[str, RaterScore]] = {editor: {} for editor in editors}
    for number, question in enumerate(QUESTIONS):
        of_question = ranks[:, :, number]  # (raters, cases, editors)
        if np.isnan(of_question).all():
            raise DataError(f"no rater ranked all results of any case for {question}, so there is nothing to score")
        for column, editor in enumerate(editors):
            values = of_question[:, :, column]
            counted = values[~np.isnan(values)]
            first = np.where(np.isnan(values), np.nan, values == 1)
            low, high = bootstrap_by_rater_and_case(first, seed)
            scores[editor][question] = RaterScore(
                best=100 * float(np.mean(counted == 1)),
                interval=(100 * low, 100 * high),
                mean_rank=float(counted.mean()),
                rankings=len(counted),
            )
    return StudyScores(scores, len(raters), len(cases), incomplete)


def bootstrap_by_rater_and_case(values: np.ndarray, seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Compute a percentile bootstrap interval of a table's mean, resampling its rows and its columns.

    Args:
        values: (raters, cases), NaN where there is none; at least one number.
        seed: of the resampling.
        resamples: how many.

    Returns:
        Lower and upper bound, at `LEVEL`.
    """
    rng = counter_rng.generator(seed, *values.shape)
    is_there = ~np.isnan(values)
    filled = np.where(is_there, values, 0.0)
    num_rows, num_columns = values.shape
    means = []
    for start in range(0, resamples, _CHUNK):
        count = min(_CHUNK, resamples - start)
        rows = rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows), count)
        columns = rng.multinomial(num_columns, np.full(num_columns, 1 / num_columns), count)
        total = np.einsum("br,rc,bc->b", rows, filled, columns, optimize=True)
        weight = np.einsum("br,rc,bc->b", rows, is_there.astype(float), columns, optimize=True)
        means.append(total[weight > 0] / weight[weight > 0])
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def format_scores(found: StudyScores) -> str:
    """Format the scores as a Markdown table, with the scores of the paper below."""
    heads = "".join(f" {question}, best % |" for question in QUESTIONS)
    lines = [f"| editor |{heads} mean rank |", "|---|" + "---|" * (len(QUESTIONS) + 1)]
    for editor, row in found.scores.items():
        cells = [f"{s.best:.1f} [{s.interval[0]:.1f}, {s.interval[1]:.1f}]" for s in row.values()]
        ranks = " / ".join(f"{score.mean_rank:.2f}" for score in row.values())
        lines.append(f"| {editor} | {' | '.join(cells)} | {ranks} |")
    for editor, values in PAPER_USER_STUDY.items():
        lines.append(f"| *paper: {editor}* | " + " | ".join(f"*{values[q]:.1f}*" for q in QUESTIONS) + " | |")
    chance = 100 / len(found.scores)
    lines += [
        "",
        f"{found.raters} raters, {found.cases} cases. By chance, each editor would be best in {chance:.1f} %. "
        "Brackets show 95 % intervals over raters and cases. The paper's rows come from other images, raters and "
        "editors.",
    ]
    if found.raters == 1:
        lines.append("There is only one rater, so the intervals say nothing about other raters.")
    return "\n".join(lines)


def _read_ranks(path: Path, answers: dict[str, Any], key: dict[str, Any], editors: list[str]) -> np.ndarray:
    """Read the ranks, (cases, questions, editors); NaN for all editors if a ranking is incomplete."""
    given = answers.get("answers")
    if not isinstance(given, dict) or set(given) - set(key["cases"]):
        raise InputError(f"{path}: its answers do not belong to the cases of this study; download the answers again")
    ranks = np.full((len(key["cases"]), len(QUESTIONS), len(editors)), np.nan)
    for row, (case, facts) in enumerate(key["cases"].items()):
        letters = facts["letters"]
        for column, question in enumerate(QUESTIONS):
            of_case = given.get(case, {})
            ranking = of_case.get(question, {}) if isinstance(of_case, dict) else of_case
            if not _is_ranking(ranking, letters):
                raise InputError(
                    f"{path}: {ranking!r} is not a ranking of {', '.join(letters)} from 1 to {len(editors)} "
                    f"({case}, {question}); download the answers again"
                )
            if len(ranking) == len(editors):
                for letter, rank in ranking.items():
                    ranks[row, column, editors.index(letters[letter])] = rank
    return ranks


def _is_ranking(ranking: object, letters: Collection[str]) -> bool:
    """Tell whether it gives some of the letters a rank of their own, from 1 to their number."""
    if not isinstance(ranking, dict) or set(ranking) - set(letters):
        return False
    ranks = list(ranking.values())
    return all(type(rank) is int and 1 <= rank <= len(letters) for rank in ranks) and len(set(ranks)) == len(ranks)


def _read_file(path: Path, expected: str) -> dict[str, Any]:
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != expected:
        raise InputError(f"{path}: expected the format {expected!r}, got {found!r}")
    if absent := [name for name in _FIELDS[expected] if name not in values]:
        raise InputError(f"{path} is damaged: it lacks {', '.join(absent)}")
    return dict(values)
