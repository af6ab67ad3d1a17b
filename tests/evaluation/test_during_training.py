from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
from function_editor import FunctionEditor
from PIL import Image

from mimicbrush.assembly import build_components
from mimicbrush.data.pair import Pair
from mimicbrush.errors import DataError, InputError, WeightsError
from mimicbrush.evaluation.editors.mimicbrush import MimicBrushEditor
from mimicbrush.evaluation.heldout.during_training import LOG_FILE, TABLE_COLUMNS, HeldOutEvaluation, HeldOutResult
from mimicbrush.evaluation.heldout.options import DuringTrainingOptions, EvaluationOptions
from mimicbrush.evaluation.heldout.reference_gain import GAINS
from mimicbrush.evaluation.heldout.run import evaluate_heldout
from mimicbrush.models.options import ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.pipelines import MimicBrushPipeline

SIZE = 48
OPTIONS = EvaluationOptions(batch_size=2, sets=("natural",), sheet_pairs=3)


@FunctionEditor
def mixing(sources: np.ndarray, masks: np.ndarray, references: np.ndarray | None, seeds: Sequence[int]) -> np.ndarray:
    """Half the reference, half noise of the seed: imitates, and not perfectly."""
    noise = np.stack([np.random.default_rng(seed).integers(0, 256, sources.shape[1:], np.uint8) for seed in seeds])
    painted = noise if references is None else noise // 4 + references // 4 * 3
    return np.where(masks[..., None] > 0, painted, sources)


def shared(count: int, call: Callable[[int, Callable[[list[Any]], list[Any]]], Any]) -> list[Any]:
    """What `count` processes get, each a thread here, that gather as accelerate does: in the order of ranks."""
    given: list[list[Any]] = [[] for _ in range(count)]
    results: list[Any] = [None] * count
    barrier = Barrier(count, timeout=100)

    def run(rank: int) -> None:
        def gather(items: list[Any]) -> list[Any]:
            given[rank] = items
            barrier.wait()
            return [item for each in given for item in each]

        try:
            results[rank] = call(rank, gather)
        except Exception as error:  # noqa: BLE001 - what a process raises is what the test looks at
            results[rank] = error

    threads = [Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def without_time(result: HeldOutResult) -> dict[str, float]:
    return {name: value for name, value in result.figures.items() if name != "heldout/seconds"}


def test_the_figures_are_those_of_an_evaluation(rendered: list[Pair], tmp_path: Path) -> None:
    options = replace(OPTIONS, sets=("natural", "warped"), max_pairs=6)
    expected = evaluate_heldout(mixing, rendered, SIZE, options)
    figures = HeldOutEvaluation(rendered, SIZE, options, tmp_path)(mixing, 5).figures
    for prefix, name in (("heldout/", "natural"), ("heldout_warped/", "warped")):
        natural = expected[name]
        assert figures[f"{prefix}psnr"] == natural["rows"]["model"]["psnr"]
        assert figures[f"{prefix}ssim"] == natural["rows"]["model"]["ssim"]
        assert figures[f"{prefix}psnr_wrong_reference"] == natural["rows"]["wrong_reference"]["psnr"]
        assert figures[f"{prefix}psnr_no_reference"] == natural["rows"]["no_reference"]["psnr"]
        for gain in GAINS:
            bounds = [figures[f"{prefix}{gain}_ci95_{end}"] for end in ("low", "high")]
            assert (figures[f"{prefix}{gain}"], bounds) == (natural[gain], natural[f"{gain}_ci95"])
        assert (figures[f"{prefix}n"], figures[f"{prefix}n_sources"]) == (6, 4)
    assert figures["heldout/reference_gain_db"] > 1 and figures["heldout/unreadable"] == 0


@pytest.mark.parametrize("world_size", [2, 3, 12])  # 12: more processes than pairs
def test_processes_that_share_the_pairs_get_what_one_gets(
    rendered: list[Pair], tmp_path: Path, world_size: int
) -> None:
    one = HeldOutEvaluation(rendered, SIZE, OPTIONS, tmp_path / "one")(mixing, 5)
    calls: list[int] = []

    def call(rank: int, gather: Callable[[list[Any]], list[Any]]) -> HeldOutResult:
        def counting(*given: Any) -> np.ndarray:
            calls.append(len(given[0]))
            return mixing.edit(*given)

        evaluation = HeldOutEvaluation(rendered, SIZE, OPTIONS, tmp_path / "many", rank, world_size, gather)
        return evaluation(FunctionEditor(counting), 5)

    results = shared(world_size, call)
    assert all(without_time(result) == without_time(one) for result in results)
    assert sum(calls) == 3 * len(rendered)  # nothing is edited twice
    assert [len(result.table) for result in results] == [3] + [0] * (world_size - 1)
    for mine, its in zip(one.table, results[0].table, strict=True):
        assert mine.caption == its.caption
        assert all(np.array_equal(mine.images[name], its.images[name]) for name in mine.images)
    a, b = ((tmp_path / name / "step-00000005.png").read_bytes() for name in ("one", "many"))
    assert a == b


def test_an_error_in_one_process_is_one_in_all(rendered: list[Pair], tmp_path: Path) -> None:
    def call(rank: int, gather: Callable[[list[Any]], list[Any]]) -> HeldOutResult:
        def failing(*given: Any) -> np.ndarray:
            raise WeightsError("not finite")

        evaluation = HeldOutEvaluation(rendered, SIZE, OPTIONS, tmp_path, rank, 2, gather)
        return evaluation(FunctionEditor(failing) if rank else mixing, 5)

    assert [type(error) for error in shared(2, call)] == [WeightsError, WeightsError]


def test_files_are_written_and_cut_off_after_a_resume(rendered: list[Pair], tmp_path: Path) -> None:
    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in (tmp_path / LOG_FILE).read_text().splitlines()]

    def sheets() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("*.png"))

    evaluation = HeldOutEvaluation(rendered, SIZE, OPTIONS, tmp_path)
    results = [evaluation(mixing, step) for step in (500, 1000)]
    lines = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert lines == [{"step": result.step, **result.figures} for result in results]
    assert sheets() == ["step-00000500.png", "step-00001000.png"]
    with Image.open(tmp_path / "step-00000500.png") as sheet:
        assert sheet.height > 3 * 144
    assert set(results[0].table[0].images) == set(TABLE_COLUMNS) - {"reference_places", "correspondence"}

    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"step": 15')  # killed while writing
    HeldOutEvaluation(rendered, SIZE, OPTIONS, tmp_path, first_step=1000)
    assert steps() == [500, 1000] and len(sheets()) == 2
    HeldOutEvaluation(rendered, SIZE, OPTIONS, tmp_path, rank=1, world_size=2, first_step=0)  # not the one who writes
    assert steps() == [500, 1000]
    again = HeldOutEvaluation(rendered, SIZE, OPTIONS, tmp_path, first_step=999)
    assert steps() == [500] and sheets() == ["step-00000500.png"]
    again(mixing, 1000)
    assert steps() == [500, 1000]


def test_a_full_disk_is_told_of_and_ends_nothing(rendered: list[Pair], tmp_path: Path) -> None:
    evaluation = HeldOutEvaluation(rendered, SIZE, OPTIONS, tmp_path)
    (tmp_path / "step-00000005.png").mkdir()  # cannot be written to
    result = evaluation(mixing, 5)
    assert "could not be written" in result.notes[0] and result.figures["heldout/n"] == len(rendered)


def test_pairs_that_cannot_be_read_are_left_out_and_named(rendered: list[Pair], tmp_path: Path) -> None:
    damaged = [replace(pair, a_span=(0, 10)) if number == 3 else pair for number, pair in enumerate(rendered)]
    result = HeldOutEvaluation(damaged, SIZE, OPTIONS, tmp_path)(mixing, 5)
    assert (result.figures["heldout/n"], result.figures["heldout/unreadable"]) == (7, 1)
    assert damaged[3].pair_id in result.notes[0]
    with pytest.raises(DataError, match="none of 8 held-out pairs could be read"):
        nothing = [replace(pair, a_span=(0, 10)) for pair in rendered]
        HeldOutEvaluation(nothing, SIZE, OPTIONS, tmp_path)(mixing, 5)


@pytest.fixture(scope="module")
def editor(smallest: ToyModel) -> MimicBrushEditor:
    pipeline = MimicBrushPipeline(**vars(build_components(smallest, 0)), scheduler=noise_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return MimicBrushEditor(pipeline, num_inference_steps=2, guidance_scale=2.0)


def test_a_pipeline_tells_where_the_hole_came_from(
    editor: MimicBrushEditor, rendered: list[Pair], tmp_path: Path
) -> None:
    size = editor.pipeline.size_px
    options = replace(OPTIONS, batch_size=4)
    result = HeldOutEvaluation(rendered, size, options, tmp_path)(editor, 5)
    assert [set(row.images) for row in result.table] == [set(TABLE_COLUMNS)] * 3
    places = result.table[0].images["correspondence"]
    assert places.shape == (192, 256, 3) and places.dtype == np.uint8  # without the padding of the canvas
    expected = evaluate_heldout(editor, rendered, size, options)
    # Batches are others, so that single levels may differ by rounding.
    assert result.figures["heldout/psnr"] == pytest.approx(expected["psnr"], abs=0.02)
    assert result.figures["heldout/reference_gain_db"] == pytest.approx(expected["reference_gain_db"], abs=0.02)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every_steps": -1}, r"eval\.every_steps=-1: expected a whole number of at least 0 \(0: never\)"),
        ({"max_pairs": 1}, r"eval\.max_pairs=1: expected a whole number of at least 2"),
        ({"batch_size": 0}, r"eval\.batch_size=0: expected a whole number from 1 to "),
        ({"sets": ("warped",)}, "must contain natural"),
        ({"sets": ("sharp",)}, r"eval\.sets=.*natural, warped"),
    ],
)
def test_options_that_mean_nothing_are_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DuringTrainingOptions(**values)
