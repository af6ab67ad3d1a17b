from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from function_editor import FunctionEditor
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from toy_data import photograph

from mimicbrush.data.pair import Pair
from mimicbrush.errors import InputError, OutputError
from mimicbrush.evaluation.editors import baselines
from mimicbrush.evaluation.heldout.options import EvaluationOptions
from mimicbrush.evaluation.heldout.reference_gain import (
    GAIN_DEFINITIONS,
    GAINS,
    PSNR_CAP_DB,
    ROWS,
    MaskScore,
    PairScores,
    describe_few_sources,
    score_inside_mask,
    summarise_pairs,
)
from mimicbrush.evaluation.heldout.report import describe_gains, format_summary
from mimicbrush.evaluation.heldout.run import evaluate_heldout
from mimicbrush.evaluation.statistics import MIN_SOURCES
from mimicbrush.io.atomic import ASIDE_PATTERN
from mimicbrush.ops.canvas import letterbox, letterbox_mask
from mimicbrush.ops.similarity import psnr_inside
from mimicbrush.pipelines.editing.inputs import read_inputs
from mimicbrush.pipelines.editing.requests import collect_edits

SIZE = 48
OPTIONS = EvaluationOptions(batch_size=3)


@FunctionEditor
def perfect(sources: np.ndarray, masks: np.ndarray, references: np.ndarray | None, seeds: Sequence[int]) -> np.ndarray:
    return sources


@FunctionEditor
def deaf(sources: np.ndarray, masks: np.ndarray, references: np.ndarray | None, seeds: Sequence[int]) -> np.ndarray:
    """Paints noise from the seed, whatever the reference shows."""
    holes = [np.random.default_rng(seed).integers(0, 256, sources.shape[1:], np.uint8) for seed in seeds]
    return np.where(masks[..., None] > 0, np.stack(holes), sources)


@FunctionEditor
def copying(sources: np.ndarray, masks: np.ndarray, references: np.ndarray | None, seeds: Sequence[int]) -> np.ndarray:
    """Copies the reference in place: a true imitation as long as the frames lie close together."""
    return np.where(masks[..., None] > 0, np.uint8(127) if references is None else references, sources)


def test_psnr_is_that_of_scikit_image_on_the_masked_pixels() -> None:
    rng = np.random.default_rng(0)
    result, target = rng.integers(0, 256, (2, 20, 20, 3), np.uint8)
    mask = (rng.random((20, 20)) < 0.4).astype(np.uint8)
    theirs = peak_signal_noise_ratio(target[mask > 0], result[mask > 0], data_range=255)
    assert psnr_inside(result, target, mask) == pytest.approx(theirs)


def test_equal_images_get_the_cap_and_tiny_canvases_no_ssim() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert score_inside_mask(image, image, np.ones((8, 8))) == (PSNR_CAP_DB, None)


def test_an_editor_that_returns_the_target_gets_the_cap(rendered: list[Pair]) -> None:
    metrics = evaluate_heldout(perfect, rendered, SIZE, OPTIONS)
    assert metrics["psnr"] == PSNR_CAP_DB
    assert metrics["ssim"] == pytest.approx(1.0)
    assert metrics["n"] == 8


def test_an_editor_that_ignores_the_reference_gains_exactly_nothing(rendered: list[Pair]) -> None:
    metrics = evaluate_heldout(deaf, rendered, SIZE, OPTIONS)
    for values in (metrics, metrics["natural"], metrics["warped"]):
        assert values["reference_gain_db"] == 0.0
        assert values["reference_gain_db_ci95"] == [0.0, 0.0]
        assert values["gain_over_no_reference_db"] == values["wrong_against_none_db"] == 0.0


def test_an_editor_that_imitates_gains_and_the_interval_is_clear_of_zero(rendered: list[Pair]) -> None:
    natural = evaluate_heldout(copying, rendered, SIZE, OPTIONS)["natural"]
    low, high = natural["reference_gain_db_ci95"]
    assert 3.0 < low < natural["reference_gain_db"] < high
    rows = natural["rows"]
    assert rows["model"] == rows["copy_in_place"]
    assert natural["reference_gain_db"] == pytest.approx(rows["model"]["psnr"] - rows["wrong_reference"]["psnr"])
    assert natural["gain_over_no_reference_db"] == pytest.approx(rows["model"]["psnr"] - rows["no_reference"]["psnr"])
    harm = rows["wrong_reference"]["psnr"] - rows["no_reference"]["psnr"]
    assert natural["wrong_against_none_db"] == pytest.approx(harm) and harm < -1  # pasted pixels of another video
    low, high = natural["wrong_against_none_db_ci95"]
    assert low < harm < high < 0


def test_a_model_that_a_wrong_reference_only_hurts_has_a_gain_and_is_told_not_to_be_helped() -> None:
    rng = np.random.default_rng(0)
    scores = []
    for number in range(2 * MIN_SOURCES):
        true, wrong, none = (level + 0.1 * rng.standard_normal() for level in (12.0, 9.0, 12.5))
        rows = {
            "model": MaskScore(true, 0.5),
            "wrong_reference": MaskScore(wrong, 0.5),
            "no_reference": MaskScore(none, 0.5),
        }
        scores.append(PairScores(f"video {number}", rows))
    first, second, third = describe_gains(summarise_pairs(scores, seed=0)).split("\n")
    assert first.startswith("Over none (true minus no reference) -0.5") and first.endswith("does harm.")
    assert second.startswith("Wrong against none (wrong minus no reference) -3.5") and second.endswith("does harm.")
    assert third.startswith("Reference gain (true minus wrong reference) +3.0") and "helps more" in third


def test_copying_in_place_does_not_pay_in_the_warped_set(rendered: list[Pair]) -> None:
    metrics = evaluate_heldout(copying, rendered, SIZE, OPTIONS)
    natural, warped = (metrics[name]["rows"] for name in ("natural", "warped"))
    assert warped["copy_in_place"]["psnr"] < natural["copy_in_place"]["psnr"] - 3
    assert warped["copy_in_place"]["psnr"] < warped["opencv_inpaint"]["psnr"]
    assert warped["opencv_inpaint"] == natural["opencv_inpaint"]


def test_batch_size_and_repetition_change_nothing(rendered: list[Pair]) -> None:
    first = evaluate_heldout(deaf, rendered, SIZE, OPTIONS)
    assert evaluate_heldout(deaf, rendered, SIZE, OPTIONS) == first
    assert evaluate_heldout(deaf, rendered, SIZE, replace(OPTIONS, batch_size=8)) == first
    assert evaluate_heldout(deaf, rendered, SIZE, replace(OPTIONS, seed=1)) != first


def test_what_is_written(rendered: list[Pair], tmp_path: Path) -> None:
    options = replace(OPTIONS, sheet_pairs=2)
    metrics = evaluate_heldout(copying, rendered, SIZE, options, tmp_path / "out", {"editor": "copying"})
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written == metrics
    assert written["about"] == {"editor": "copying"}
    assert set(ROWS) == set(written["natural"]["rows"]) <= set(GAIN_DEFINITIONS)
    lines = [json.loads(line) for line in (tmp_path / "out" / "per_pair.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * len(rendered)
    natural = [line for line in lines if line["set"] == "natural"]
    for gain in GAINS:
        assert np.mean([line[gain] for line in natural]) == pytest.approx(metrics[gain])
    order = ["gain_over_no_reference_db", "wrong_against_none_db", "reference_gain_db"]
    assert [key for key in written if key in order] == [key for key in natural[0] if key in order] == order
    assert {line["pair_id"] for line in natural} == {pair.pair_id for pair in rendered}
    for name in ("contact_sheet.png", "contact_sheet_warped.png"):
        with Image.open(tmp_path / "out" / name) as sheet:
            assert sheet.width > 10 * 144
    images = tmp_path / "out" / "pictures" / "natural"
    assert len(list(images.glob("*_model.png"))) == 2
    edits = collect_edits(images / "edits.jsonl", tmp_path / "edits")
    assert [edit.source for edit in edits] == sorted(images.glob("*_target.png"))
    assert all(read_inputs(edit).mask.size == read_inputs(edit).source.size for edit in edits)
    assert not list((tmp_path / "out").rglob(ASIDE_PATTERN))


def test_no_number_is_lost_where_the_output_is_gone_in_the_end(
    rendered: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "mounted").touch()  # as a file: nothing can be made in it any more
    options = replace(OPTIONS, max_pairs=2)
    with pytest.raises(OutputError, match="The result was saved as") as told:
        evaluate_heldout(copying, rendered, SIZE, options, tmp_path / "mounted" / "out")
    (kept,) = (tmp_path / "temporary").glob("*/out")
    metrics = json.loads((kept / "metrics.json").read_text())
    assert format_summary(metrics, options.sets) in str(told.value) and (kept / "per_pair.jsonl").is_file()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "mounted"))  # not even there
    with pytest.raises(OutputError) as told:
        evaluate_heldout(copying, rendered, SIZE, options, tmp_path / "mounted" / "out")
    assert format_summary(metrics, options.sets) in str(told.value)


def test_what_was_not_measured_is_null(rendered: list[Pair]) -> None:
    metrics = evaluate_heldout(deaf, rendered, SIZE, replace(OPTIONS, sets=("warped",), max_pairs=2))
    for key in ("n", "psnr", "ssim", "reference_gain_db", "reference_gain_db_ci95", "natural"):
        assert metrics[key] is None
    assert metrics["warped"]["n"] == 2
    assert "Only 2 source videos" in metrics["note"]


def test_few_sources_are_cautioned_about_and_the_values_stay(rendered: list[Pair]) -> None:
    metrics = evaluate_heldout(copying, rendered, SIZE, OPTIONS)
    few = metrics["natural"]
    assert few["n_sources"] == metrics["n_sources"] == 4 < MIN_SOURCES == 10
    low, high = few["gain_over_no_reference_db_ci95"]
    bounds = f"95 % interval {low:+.2f} to {high:+.2f}"
    for line in describe_gains(few).split("\n"):
        assert "too narrow with only 4 source videos)" in line
    assert f"({bounds}, which is too narrow" in describe_gains(few)
    assert "too narrow" in metrics["note"]
    assert metrics["note"] in format_summary(metrics, OPTIONS.sets)
    assert f"({bounds}): " in describe_gains(few | {"n_sources": MIN_SOURCES})
    assert "too narrow" in describe_gains(few | {"n_sources": MIN_SOURCES - 1})
    assert describe_few_sources(MIN_SOURCES) is None


def test_an_editor_with_results_of_another_size_is_an_error(rendered: list[Pair]) -> None:
    with pytest.raises(InputError, match="the editor returned"):
        evaluate_heldout(
            FunctionEditor(lambda sources, masks, references, seeds: sources[:, ::2]), rendered, SIZE, OPTIONS
        )


def test_inpainting_keeps_what_is_known_and_sees_no_padding() -> None:
    source = np.full((40, 40, 3), 255, np.uint8)
    source[10:30] = (200, 30, 90)
    area = np.zeros((40, 40), np.uint8)
    area[10:30] = 1
    mask = cv2.rectangle(np.zeros((40, 40), np.uint8), (15, 10), (25, 20), 1, -1)
    damaged = np.where(mask[..., None] > 0, np.uint8(0), source)
    assert np.abs(baselines.opencv_inpaint(damaged, mask, area).astype(int) - source).max() <= 3  # its own rounding


def on_a_plane(size_px: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source, mask and reference, a photograph and the same through a known homography; the hole is all shown."""
    photo = photograph("astronaut.png")
    tilt = np.array([[0.86, -0.2, 80], [0.16, 0.9, 10], [1.5e-4, -1e-4, 1]])
    source = cv2.resize(photo, (size_px, size_px), interpolation=cv2.INTER_AREA)
    reference = cv2.warpPerspective(photo, tilt, (512, 512), borderValue=(255,) * 3)
    mask = np.zeros((size_px, size_px), np.uint8)
    mask[size_px // 10 : size_px // 2, size_px // 3 : 3 * size_px // 5] = 1
    return source, mask, cv2.resize(reference, (size_px, size_px), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("size_px", [64, 256])
def test_on_a_plane_sift_and_a_homography_win_clearly(size_px: int) -> None:
    source, mask, reference = on_a_plane(size_px)
    everywhere = np.ones_like(mask)
    found = baselines.sift_homography(source, mask, reference, everywhere)
    fills = {
        "homography": found,
        "copy": baselines.copy_in_place(source, mask, reference),
        "inpaint": baselines.opencv_inpaint(source, mask, everywhere),
    }
    psnr = {name: psnr_inside(fill, source, mask) for name, fill in fills.items()}
    assert psnr["homography"] > 6 + max(psnr["copy"], psnr["inpaint"]), psnr
    assert np.array_equal(found[mask == 0], source[mask == 0])


def test_sift_and_a_homography_see_nothing_of_the_hole() -> None:
    source, mask, reference = on_a_plane(256)
    area = np.ones_like(mask)
    area[:16] = area[-16:] = 0
    rng = np.random.default_rng(0)
    for given in (reference, reference[:, :128], photograph("coffee.png")):  # all, a part, and nothing of it is shown
        found = baselines.sift_homography(source, mask * area, given, area)
        for hole in (rng.integers(0, 256, source.shape, np.uint8), np.uint8(0), photograph("chelsea.png")[:256, :256]):
            other = np.where((mask * area)[..., None] > 0, hole, source)
            assert np.array_equal(baselines.sift_homography(other, mask * area, given, area), found)


def test_sift_and_a_homography_inpaint_what_the_reference_does_not_show() -> None:
    source, mask, reference = on_a_plane(256)
    everywhere = np.ones_like(mask)
    whole = baselines.sift_homography(source, mask, reference, everywhere)
    part = baselines.sift_homography(source, mask, np.ascontiguousarray(reference[:, :152]), everywhere)
    inpainted = baselines.opencv_inpaint(source, mask, everywhere)
    filled = psnr_inside(part, source, mask)
    assert psnr_inside(inpainted, source, mask) + 1 < filled < psnr_inside(whole, source, mask) - 1
    unrelated = baselines.sift_homography(source, mask, photograph("coffee.png"), everywhere)
    assert np.array_equal(unrelated, inpainted)


def test_sift_and_a_homography_take_nothing_from_the_padding_of_the_reference() -> None:
    """A camera that pans over a wide photograph: what comes in from below is white on the reference's canvas."""
    photo = cv2.resize(photograph("astronaut.png"), (400, 400))
    first, second = photo[60:360], photo[:300]  # (300, 400)
    area = letterbox_mask(np.full(first.shape[:2], 255, np.uint8), 256)
    source, reference = (letterbox(image, 256, 255) for image in (first, second))
    mask = np.zeros((256, 256), np.uint8)
    mask[180:222, 60:200] = 1
    inpainted = psnr_inside(baselines.opencv_inpaint(source, mask, area), source, mask)
    padded = psnr_inside(baselines.sift_homography(source, mask, reference, area), source, mask)
    known = psnr_inside(baselines.sift_homography(source, mask, reference, area, area), source, mask)
    assert known > inpainted > padded


def test_sift_and_a_homography_miss_a_thing_that_moved() -> None:
    background, thing = photograph("coffee.png")[:300, :400].copy(), photograph("astronaut.png")[60:160, 160:260]
    source, reference = background.copy(), background.copy()
    source[100:200, 150:250] = thing
    reference[180:280, 20:120] = thing
    mask = np.zeros(source.shape[:2], np.uint8)
    mask[100:200, 150:250] = 1
    found = baselines.sift_homography(source, mask, reference, np.ones_like(mask))
    assert psnr_inside(found, background, mask) > 30  # as if nothing had moved: the reference at the same place
    assert psnr_inside(found, source, mask) < 15


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"split": "test"}, "heldout, all"),
        ({"sets": ("sharp",)}, "natural, warped"),
        ({"sets": ()}, "natural, warped"),
        ({"sets": None}, "expected a list"),
        ({"sets": "natural"}, "expected a list"),
        ({"batch_size": 0}, r"batch_size=0: expected a whole number from 1 to "),
        ({"seed": "x"}, "whole number"),
        ({"guidance_scale": "x"}, "a number"),
        ({"guidance_scale": True}, "a number"),
    ],
)
def test_options_that_mean_nothing_are_errors(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EvaluationOptions(**values)
