from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mimicbrush.errors import DataError
from mimicbrush.evaluation.ablations import compare_rows, format_ablations

SOURCES, PAIRS = 12, 3


def write_evaluation(folder: Path, lead: float, noise: float, seed: int, sources: int = SOURCES) -> Path:
    """per_pair.jsonl of a run whose PSNR is `lead` above 15 dB on average, in both sets."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines = []
    for name in ("natural", "warped"):
        for number in range(sources * PAIRS):
            psnr = 15 + lead + 0.1 * (number % 7) + noise * rng.standard_normal()
            lines.append(
                {
                    "set": name,
                    "pair_id": f"pair{number}",
                    "source_hash": f"source{number // PAIRS}",
                    "rows": {"model": {"psnr": psnr, "ssim": None if number == 0 else 0.5 + lead / 10}},
                    "gain_over_no_reference_db": lead / 2,
                    "reference_gain_db": lead,
                }
            )
    (folder / "per_pair.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def evaluations(tmp_path: Path) -> dict[str, list[Path]]:
    leads = {"full": 1.0, "grid_025": 0.0, "grid_075": 2.0, "grid_050": 1.0}
    return {
        row: [write_evaluation(tmp_path / f"{row}{seed}", lead, 0.3, 10 * number + seed) for seed in range(2)]
        for number, (row, lead) in enumerate(leads.items())
    }


def test_directions_are_told_by_the_interval_of_the_paired_difference(evaluations: dict[str, list[Path]]) -> None:
    effects = compare_rows(evaluations)
    directions = {row: effects[row]["natural"]["psnr"].direction for row in effects}
    assert directions == {"full": "", "grid_025": "seen", "grid_075": "opposite", "grid_050": "not seen"}
    worse = effects["grid_025"]["warped"]["psnr"]
    assert worse.change == pytest.approx(1.0, abs=0.2)
    assert worse.interval is not None
    assert worse.interval[0] < worse.change < worse.interval[1]
    assert len(worse.by_seed) == 2
    assert effects["grid_025"]["natural"]["reference_gain_db"].change == pytest.approx(1.0)
    assert effects["grid_025"]["natural"]["gain_over_no_reference_db"].change == pytest.approx(0.5)
    assert effects["grid_025"]["natural"]["ssim"].change == pytest.approx(0.1)  # the pair without one is left out


def test_a_direction_that_the_seeds_disagree_on_is_not_seen(tmp_path: Path) -> None:
    leads = {"full": (2.0, 0.0), "grid_025": (0.0, 0.3)}
    folders = {
        row: [write_evaluation(tmp_path / f"{row}{seed}", lead, 0.05, seed) for seed, lead in enumerate(of_row)]
        for row, of_row in leads.items()
    }
    effect = compare_rows(folders)["grid_025"]["natural"]["psnr"]
    assert effect.interval is not None and effect.interval[0] > 0 and effect.direction == "not seen"


def test_table_names_rows_that_could_not_be_run(evaluations: dict[str, list[Path]]) -> None:
    text = format_ablations(compare_rows(evaluations), {"reference_clip": "no weights"})
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "| n/a | n/a | n/a | n/a | n/a | +0.76 | no weights" in rows["reference encoder: CLIP"]
    assert rows["mask: grid 0.25"].endswith("| +0.44 | seen |")
    assert rows["mask: grid 0.75"].endswith("| +0.93 | opposite |")
    assert text.count("| row | PSNR, dB | SSIM | over none, dB | wrong against none, dB | reference gain, dB |") == 2


def test_the_table_of_our_options_has_its_own_base_and_keypoints(evaluations: dict[str, list[Path]]) -> None:
    folders = {"recipe": evaluations["full"], "all_heads": evaluations["grid_025"]}
    keypoints = {"recipe": {"PCK@0.1 in holes, %": [50.0, 51.25]}, "all_heads": {"PCK@0.1 in holes, %": [4.0, 3.5]}}
    text = format_ablations(compare_rows(folders, "recipe"), {}, keypoints)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "paper" not in text and text.count("| row | PCK@0.1 in holes, % | PSNR, dB |") == 2
    assert rows["recipe"].startswith("| recipe | 50.0 / 51.2 |") and "[" not in rows["recipe"]
    assert rows["all_heads"].startswith("| all_heads | 4.0 / 3.5 |") and rows["all_heads"].endswith("| seen |")


def test_rows_without_attention_have_no_keypoints_and_a_title_can_have_a_note(
    evaluations: dict[str, list[Path]],
) -> None:
    notes = {"grid_025": "in small"}
    text = format_ablations(
        compare_rows(evaluations), {"reference_clip": "no weights"}, {"full": {"PCK": [50.0]}}, notes
    )
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert rows["mask: grid 0.25 (in small)"].startswith("| mask: grid 0.25 (in small) | n/a |")
    assert rows["full (U-Net reference, SIFT grid)"].startswith("| full (U-Net reference, SIFT grid) | 50.0 |")
    assert {line.count("|") for line in rows.values()} == {rows["row"].count("|")}


def test_what_an_earlier_version_did_not_tell_reads_na(evaluations: dict[str, list[Path]]) -> None:
    rows = [
        line.split("|") for line in format_ablations(compare_rows(evaluations), {}).splitlines() if "grid 0.25 " in line
    ]
    assert [line[5].strip() for line in rows] == ["n/a", "n/a"]  # wrong against none, in both sets
    assert all("[" in line[4] and "[" in line[6] for line in rows)


def test_what_does_not_compare_is_refused(evaluations: dict[str, list[Path]], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row 'full'"):
        compare_rows({"grid_025": evaluations["grid_025"]})
    with pytest.raises(DataError, match="1 seeds and full has 2"):
        compare_rows({"full": evaluations["full"], "grid_025": evaluations["grid_025"][:1]})
    other = [write_evaluation(tmp_path / f"other{seed}", 0, 0.1, seed, sources=3) for seed in range(2)]
    with pytest.raises(DataError, match="other pairs"):
        compare_rows({"full": evaluations["full"], "single_box": other})
    with pytest.raises(DataError, match="was not evaluated"):
        compare_rows({"full": [tmp_path / "nothing"]})
