"""A blind study from end to end: the page in a real browser, the answers it gives, and what they score."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from browser import page_of
from PIL import Image

from mimicbrush.cli import study as study_command
from mimicbrush.errors import DataError, InputError
from mimicbrush.evaluation.benchmark.layout import BenchmarkWriter, TrackName, read_benchmark
from mimicbrush.evaluation.user_study.pages import ANSWERS_FORMAT, QUESTIONS, make_study
from mimicbrush.evaluation.user_study.score import bootstrap_by_rater_and_case, format_scores, score_study

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# Each editor paints in a colour of its own, by which a rater in these tests knows it.
COLOURS = {"Zebra Editor": (200, 20, 20), "yak": (20, 200, 20), "xenops": (20, 20, 200)}
SIZE = (64, 48)


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    mask = Image.new("L", SIZE)
    mask.paste(255, (20, 10, 44, 38))
    writer = BenchmarkWriter(tmp_path / "benchmark")
    tracks: list[TrackName] = ["part_inter", "part_inter", "part_inner", "texture_inner"]
    for track in tracks:
        source, reference = (Image.fromarray(rng.integers(60, 90, (*SIZE[::-1], 3), np.uint8)) for _ in range(2))
        writer.add(track, source, mask, reference)
    writer.finish({})
    return tmp_path / "benchmark"


@pytest.fixture
def evaluation(benchmark: Path, tmp_path: Path) -> Path:
    for case in read_benchmark(benchmark).cases:
        for editor, colour in COLOURS.items():
            path = tmp_path / "evaluation/results" / editor / case.result_path
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", SIZE, colour).save(path)
    return tmp_path / "evaluation"


@pytest.fixture
def study(evaluation: Path, benchmark: Path, tmp_path: Path) -> Path:
    make_study(evaluation, benchmark, tmp_path / "study")
    return tmp_path / "study"


def key_of(study: Path) -> dict[str, Any]:
    return json.loads((study / "key.json").read_text())


def answers_of(study: Path, rater: str, order: list[str], missing: int = 0) -> dict[str, Any]:
    """A rater who always ranks the editors in this order, and leaves out the last few cases."""
    key = key_of(study)
    answers = {}
    for case, facts in list(key["cases"].items())[: len(key["cases"]) - missing]:
        ranks = {letter: order.index(editor) + 1 for letter, editor in facts["letters"].items()}
        answers[case] = dict.fromkeys(QUESTIONS, ranks)
    return {"format": ANSWERS_FORMAT, "study": key["study"], "rater": rater, "answers": answers}


def write(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path


# ---- the page


def rank_by_colour(page: Page, best: int) -> None:
    """Rank what is shown: first the one with the most of this channel, the others by their letters."""
    colours = page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll("#case figure")].slice(2).map((figure) => {
             const image = figure.querySelector("img");
             const canvas = document.createElement("canvas");
             const context = canvas.getContext("2d");
             context.drawImage(image, 0, 0);
             return [figure.innerText.trim(), [...context.getImageData(32, 24, 1, 1).data].slice(0, 3)];
           }))"""
    )
    first = max(colours, key=lambda letter: colours[letter][best])
    for question in QUESTIONS:
        for rank, letter in enumerate([first, *(letter for letter in sorted(colours) if letter != first)], 1):
            page.check(f"input[name='{question}-{letter}'][value='{rank}']")


def test_raters_rank_in_a_browser_go_on_later_and_their_answers_score(
    browser: Browser, study: Path, tmp_path: Path
) -> None:
    with page_of(browser) as page:
        page.goto((study / "for_raters/study.html").as_uri())
        rank_by_colour(page, best=1)
        page.click("#next")
        rank_by_colour(page, best=1)
        order = page.evaluate("state.order")
        page.reload()
        assert page.evaluate("state.order") == order
        assert page.locator("#place").inner_text() == "Image 2 of 4; 2 ranked completely"
        page.click("#next")
        rank_by_colour(page, best=2)
        # A rank has one owner: whoever had it loses it, and the case is open again.
        page.check("input[name='harmony-A'][value='3']")
        page.check("input[name='harmony-B'][value='3']")
        assert not page.is_checked("input[name='harmony-A'][value='3']")
        assert "2 ranked completely" in page.locator("#place").inner_text()
        rank_by_colour(page, best=2)
        with page.expect_download() as downloaded:
            page.click("#download")
        path = tmp_path / downloaded.value.suggested_filename
        downloaded.value.save_as(path)
    found = score_study(study / "key.json", [path])
    assert found.incomplete == {str(path): len(QUESTIONS)}
    for question in QUESTIONS:
        row = {editor: found.scores[editor][question] for editor in COLOURS}
        assert row["yak"].best == pytest.approx(200 / 3) and row["xenops"].best == pytest.approx(100 / 3)
        assert row["Zebra Editor"].best == 0 and {score.rankings for score in row.values()} == {3}


def test_the_page_says_nothing_of_whose_results_they_are(study: Path, benchmark: Path, tmp_path: Path) -> None:
    page = (study / "for_raters/study.html").read_text(encoding="utf-8")
    assert [path.name for path in (study / "for_raters").iterdir()] == ["study.html"]
    text = re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", "", page)
    for secret in (*COLOURS, "part_inter", "PartComp", str(tmp_path)):
        assert secret not in text
    assert not re.search(r"(src|href)=[\"']?(https?:|//)", text)
    letters = [tuple(facts["letters"].values()) for facts in key_of(study)["cases"].values()]
    assert len(set(letters)) > 1, "the order must differ between cases"


def test_the_hole_is_not_shown_and_results_are_pasted_back(evaluation: Path, benchmark: Path, tmp_path: Path) -> None:
    import base64
    import io

    pixels = {}
    for pasted_back in (True, False):
        make_study(evaluation, benchmark, tmp_path / "study", pasted_back=pasted_back)
        page = (tmp_path / "study/for_raters/study.html").read_text(encoding="utf-8")
        data = json.loads(re.findall(r'id="data">(.*?)</script>', page)[0])
        shown = data["cases"][0]
        letters = key_of(tmp_path / "study")["cases"]["q001"]["letters"]
        letter = next(letter for letter, editor in letters.items() if editor == "yak")
        for name, address in (("source", shown["source"]), (f"yak {pasted_back}", shown["results"][letter])):
            pixels[name] = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))), int)
    assert np.abs(pixels["source"][24, 32] - (232, 46, 106)).max() < 12
    for name in ("yak True", "yak False"):
        assert np.abs(pixels[name][24, 32] - COLOURS["yak"]).max() < 12
    assert np.abs(pixels["yak True"][2, 2] - 75).max() < 30
    assert np.abs(pixels["yak False"][2, 2] - COLOURS["yak"]).max() < 12


# ---- which cases


def test_a_case_without_all_results_is_left_out_and_named(evaluation: Path, benchmark: Path, tmp_path: Path) -> None:
    cases = read_benchmark(benchmark).cases
    missing, small = (evaluation / "results/yak" / case.result_path for case in cases[:2])
    missing.unlink()
    Image.new("RGB", (9, 9)).save(small)
    made = make_study(evaluation, benchmark, tmp_path / "study")
    assert made.cases == 2
    assert {fault.path: fault.reason for fault in made.faults} == {
        missing: "no such file",
        small: "the result is 9 x 9 px, but its source is 64 x 48 px",
    }
    two = make_study(evaluation, benchmark, tmp_path / "study", editors=["xenops", "Zebra Editor"], max_cases=3)
    assert (two.cases, two.faults, two.editors) == (3, [], ("xenops", "Zebra Editor"))


def test_the_tracks_take_turns(evaluation: Path, benchmark: Path, tmp_path: Path) -> None:
    make_study(evaluation, benchmark, tmp_path / "study", max_cases=3)
    tracks = {facts["track"] for facts in key_of(tmp_path / "study")["cases"].values()}
    assert tracks == {"part_inter", "part_inner", "texture_inner"}


def test_the_same_input_gives_the_same_study(study: Path, evaluation: Path, benchmark: Path, tmp_path: Path) -> None:
    make_study(evaluation, benchmark, tmp_path / "again")
    for name in ("key.json", "for_raters/study.html"):
        assert (study / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert make_study(evaluation, benchmark, tmp_path / "other", seed=1).study != key_of(study)["study"]


def test_what_cannot_be_studied_is_refused(evaluation: Path, benchmark: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown: \['gnu'\]"):
        make_study(evaluation, benchmark, tmp_path / "study", editors=["yak", "gnu"])
    with pytest.raises(InputError, match="expected 2 to 8 different"):
        make_study(evaluation, benchmark, tmp_path / "study", editors=["yak", "yak"])
    with pytest.raises(InputError, match="at least two editors"):
        make_study(benchmark, benchmark, tmp_path / "study")
    with pytest.raises(InputError, match="is not empty and not a user study"):
        make_study(evaluation, benchmark, evaluation)
    for path in (evaluation / "results/yak").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="no case has results of all"):
        make_study(evaluation, benchmark, tmp_path / "study")
    assert not (tmp_path / "study").exists()


# ---- the scores


def test_scores_are_shares_of_first_ranks(study: Path, tmp_path: Path) -> None:
    names = list(COLOURS)
    paths = [
        write(tmp_path / f"{rater}.json", answers_of(study, rater, order))
        for rater, order in (("a", names), ("b", names), ("c", [names[1], names[0], names[2]]))
    ]
    found = score_study(study / "key.json", paths)
    for question in QUESTIONS:
        scores = [found.scores[name][question] for name in names]
        assert [score.best for score in scores] == pytest.approx([200 / 3, 100 / 3, 0])
        assert [score.mean_rank for score in scores] == pytest.approx([4 / 3, 5 / 3, 3])
        assert scores[0].interval == (0, 100), "of three raters, any may be missing from another draw"
        assert scores[2].interval == (0, 0)
    assert found.raters == 3 and found.incomplete == {}
    table = format_scores(found)
    assert "| Zebra Editor | 66.7 [0.0, 100.0] |" in table and "*55.8*" in table and "33.3 %" in table


def test_rankings_that_are_not_whole_are_counted_and_do_not_count(study: Path, tmp_path: Path) -> None:
    names = list(COLOURS)
    partly = answers_of(study, "b", names[::-1], missing=1)
    first = next(iter(partly["answers"].values()))
    first["harmony"] = dict(itertools.islice(first["harmony"].items(), 2))
    paths = [
        write(tmp_path / "a.json", answers_of(study, "a", names)),
        write(tmp_path / "b.json", partly),
    ]
    found = score_study(study / "key.json", paths)
    assert found.incomplete == {str(paths[1]): 4}
    assert found.scores[names[0]]["fidelity"].rankings == 7
    assert found.scores[names[0]]["harmony"].rankings == 6
    assert found.scores[names[0]]["harmony"].best == pytest.approx(400 / 6)
    empty = {**partly, "answers": {}}
    with pytest.raises(DataError, match="no rater ranked all results"):
        score_study(study / "key.json", [write(tmp_path / "c.json", empty)])


def test_answers_that_do_not_belong_are_refused(study: Path, tmp_path: Path) -> None:
    good = answers_of(study, "a", list(COLOURS))
    case = next(iter(good["answers"]))
    refused = {
        "belongs to study 0123": {**good, "study": "0123"},
        "expected the format 'mimicbrush user study answers 1'": {**good, "format": "other"},
        "do not belong to the cases": {**good, "answers": {"q999": {}}},
        "not a ranking of A, B, C from 1 to 3": {**good, "answers": {case: {"harmony": {"A": 1, "B": 1}}}},
        "not a ranking of": {**good, "answers": {case: {"quality": {"A": 4}}}},
        "not a ranking": {**good, "answers": {case: {"quality": {"D": 1}}}},
        "is not a ranking": {**good, "answers": {case: 5}},
    }
    for message, answers in refused.items():
        with pytest.raises(InputError, match=re.escape(message)):
            score_study(study / "key.json", [write(tmp_path / "answers.json", answers)])
    one, two = (write(tmp_path / f"{n}.json", good) for n in (1, 2))
    with pytest.raises(InputError, match="are from the same rater"):
        score_study(study / "key.json", [one, two])
    with pytest.raises(InputError, match="are from the same rater"):
        score_study(study / "key.json", [one, one])
    damaged = {key: value for key, value in json.loads((study / "key.json").read_text()).items() if key != "editors"}
    with pytest.raises(InputError, match="it lacks editors"):
        score_study(write(tmp_path / "key.json", damaged), [one])
    with pytest.raises(InputError, match="expected the format 'mimicbrush user study key 1'"):
        score_study(one, [two])
    (tmp_path / "3.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        score_study(study / "key.json", [tmp_path / "3.json"])


def test_the_interval_is_that_of_the_binomial_where_only_one_of_the_two_varies() -> None:
    """With one rater it is the bootstrap over cases, whose spread is known; with equal columns, over raters."""
    rng = np.random.default_rng(0)
    values = (rng.random(200) < 0.3).astype(float)
    spread = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 200)
    for table in (values[None], values[:, None], np.repeat(values[:, None], 5, axis=1)):
        low, high = bootstrap_by_rater_and_case(table, seed=1)
        assert low == pytest.approx(values.mean() - spread, abs=0.012)
        assert high == pytest.approx(values.mean() + spread, abs=0.012)
    holes = np.repeat(values[:, None], 2, axis=1)
    holes[::2, 1] = np.nan
    low, high = bootstrap_by_rater_and_case(holes, seed=1)
    assert low < np.nanmean(holes) < high


def test_the_script_makes_and_scores(
    evaluation: Path,
    benchmark: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["user_study.py", *map(str, arguments)])
        study_command.main()
        return capsys.readouterr().out

    study = tmp_path / "study"
    said = run("make", evaluation, "--benchmark", benchmark, "--output", study, "--cases", 3)
    assert f"study {key_of(study)['study']}: 3 cases of Zebra Editor, xenops, yak; 0 were skipped" in said
    answers = write(tmp_path / "answers.json", answers_of(study, "a", list(COLOURS), missing=1))
    said = run("score", study, answers, "--output", tmp_path / "scores.json")
    assert "| Zebra Editor | 100.0 [100.0, 100.0] |" in said
    assert f"incomplete: {answers}: 3 rankings are missing" in said
    assert json.loads((tmp_path / "scores.json").read_text())["scores"]["yak"]["harmony"]["best"] == 0
    with pytest.raises(SystemExit):
        run("make", evaluation, "--benchmark", benchmark, "--output", study, "--cases", 0)
    assert "argument --cases: expected a whole number of at least 1, got '0'" in capsys.readouterr().err
